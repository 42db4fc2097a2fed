"""Degradation: low-quality images from good ones, the same for the same seed."""
