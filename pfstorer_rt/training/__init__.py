"""Training of bases and identities: data, objectives, losses and the training loop."""
