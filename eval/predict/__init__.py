"""How predictions are made and kept."""
