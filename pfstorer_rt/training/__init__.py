"""Training: degradation, data, losses, and the two jobs `train-base` and `personalize`."""
