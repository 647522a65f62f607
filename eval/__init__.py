"""Evaluation: predictions, metrics, reports. Import as `from eval.x import y` only."""
