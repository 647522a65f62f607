"""How the bundled model and data were made."""
