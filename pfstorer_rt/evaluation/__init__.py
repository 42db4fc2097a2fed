"""Evaluation: metrics with their requirements, and the report over folders of pictures."""
