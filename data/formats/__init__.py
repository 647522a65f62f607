"""Prompt and output formats of the models that the project reads, trains and evaluates."""
