"""Kernels: each has a plain PyTorch definition here, and faster twins where a device has them."""
