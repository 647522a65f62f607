"""Measurements; each script prints a table and one JSON line, and may import peers."""
