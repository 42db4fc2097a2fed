"""Evaluation: metrics with their requirements, and reports on folders of images."""
