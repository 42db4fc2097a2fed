"""Terms of the training losses: plain functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Losses = dict[str, torch.Tensor]
CELLS = 4
"""Cells along each side over which `repeated_error` averages."""
SQUARE = 16
"""Side in pixels of the squares over which `color_loss` averages."""


def gradient_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical first differences of (B, C, H, W)."""
    dx = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    dy = (output.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    return dx + dy


def color_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of (B, C, H, W) averaged over squares of `SQUARE` pixels, with an overlap of one half.

    It compares colours and brightness without detail: an image smaller than a square is averaged as a whole. Source:
    the colour loss of DPED (Ignatov et al. 2017, section 3.1), with means of squares instead of a Gaussian blur.
    """
    side = min(SQUARE, *output.shape[-2:])
    return F.avg_pool2d(output - target, side, max(1, side // 2)).abs().mean()


def repeated_error(output: torch.Tensor, target: torch.Tensor, cell: int) -> torch.Tensor:
    """Mean absolute error that repeats from cell to cell, such as a grid of dots that a decoder adds.

    output, target: (B, C, H, W). cell: side in pixels of what one latent pixel decodes to. The error is averaged over
    `CELLS` x `CELLS` neighbouring cells, or as many as there are, so that only a pattern of their period is left,
    without its mean.
    """
    height, width = output.shape[-2:]
    rows, columns = min(CELLS, height // cell), min(CELLS, width // cell)
    error = (output - target)[..., : height - height % (rows * cell), : width - width % (columns * cell)]
    cells = error.unflatten(-1, (-1, columns, cell)).unflatten(-4, (-1, rows, cell)).mean((-5, -2))
    return (cells - cells.mean((-3, -1), keepdim=True)).abs().mean()


def moment_loss(latent: torch.Tensor) -> torch.Tensor:
    """Squared distance of each latent channel's batch mean and deviation from 0 and 1; (B, C, h, w)."""
    flat = latent.transpose(0, 1).flatten(1)
    return flat.mean(1).square().mean() + (flat.std(1) - 1).square().mean()


def attention_loss(probabilities: torch.Tensor, subject: int, end: int) -> torch.Tensor:
    """L_pers of one layer: the learned token's map follows the map of the end of the text (ViCo 3.3).

    probabilities: (B, S, L) head-mean text attention of the reference rows.
    """
    p, e = probabilities[:, :, subject], probabilities[:, :, end].detach()
    return F.mse_loss(p / p.amax(1, keepdim=True), e / e.amax(1, keepdim=True))
