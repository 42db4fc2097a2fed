"""Import of StableSR and Stable Diffusion checkpoints."""
