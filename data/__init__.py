"""Trajectories to tokens with one loss weight per target token."""
