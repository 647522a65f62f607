"""Supervised fine-tuning: loss, distributed loop, checkpoints, logs."""
