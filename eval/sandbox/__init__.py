"""Code that a model wrote runs here, and only here."""
