"""Synthetic degradation of images, deterministic for a seed."""
