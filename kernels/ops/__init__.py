"""Kernels: each operation has a plain PyTorch reference and faster Triton kernels."""
