"""Replace two consecutive convolutions of an AutoencoderTiny by one with the same result.

An autoencoder without blocks at full resolution converts three channels to many and back at the full size of the image.
A single convolution avoids that large map:

- The first two convolutions of the encoder, the second with stride 2, become one 5x5 convolution with stride 2.
- The last two convolutions of the decoder, after nearest-neighbour upsampling, become one 3x3 convolution at half the
  size. Its channels are the pixels of 2x2 squares: upsampling repeats each value four times, so the weights are summed.

The results differ only in a border one pixel wide, because the first convolution's result is padded with zeros. The
border is computed with the original pair, on narrow strips.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn

STRIP = 4
"""Pixels of the border strips: the pair needs three, and stride 2 needs an even number."""


class ComposedEntry(nn.Module):
    """Two 3x3 convolutions, the second of stride 2, as one of 5x5."""

    stride = (2, 2)

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.pair = nn.Sequential(first, second)
        self.conv = nn.Conv2d(first.in_channels, second.out_channels, 5, 2, 2, dtype=first.weight.dtype)
        set_convolution(self.conv, *compose(first, second))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, H/2, W/2)."""
        top, left = self.pair(x[..., :STRIP, :])[..., :1, :], self.pair(x[..., :STRIP])[..., 1:, :1]
        return torch.cat([top, torch.cat([left, self.conv(x)[..., 1:, 1:]], -1)], -2)


class ComposedEnd(nn.Module):
    """Nearest-neighbour upsampling and two 3x3 convolutions, as one convolution before the upsampling."""

    scale_factor = 2

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), first, second)
        self.conv = nn.Conv2d(first.in_channels, 4 * second.out_channels, 3, padding=1, dtype=first.weight.dtype)
        weight, bias = compose(first, second)
        set_convolution(self.conv, halve_grid(weight), bias.repeat_interleave(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, 2H, 2W)."""
        body = F.pixel_shuffle(self.conv(x), 2)[..., 1:-1, 1:-1]
        n = STRIP // 2
        top, bottom = self.pair(x[..., :n, :])[..., :1, :], self.pair(x[..., -n:, :])[..., -1:, :]
        left, right = self.pair(x[..., :n])[..., 1:-1, :1], self.pair(x[..., -n:])[..., 1:-1, -1:]
        return torch.cat([top, torch.cat([left, body, right], -1), bottom], -2)


def compose(first: nn.Conv2d, second: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 5x5 weight and the bias, in fp64, of two 3x3 convolutions one after the other."""
    a, b = first.weight.detach().double(), second.weight.detach().double()
    # The composed weight is the convolution of both weights, summed over the channels between them.
    weight = F.conv2d(a.transpose(0, 1), b.flip(-1, -2), padding=2).transpose(0, 1)
    bias = torch.zeros(len(b), dtype=torch.float64) if second.bias is None else second.bias.detach().double()
    return weight, bias if first.bias is None else bias + b.sum((2, 3)) @ first.bias.detach().double()


def halve_grid(weight: torch.Tensor) -> torch.Tensor:
    """Convert a 5x5 weight for upsampled pixels, (D, C, 5, 5), to a 3x3 weight for original pixels, (4 D, C, 3, 3).

    The pixel (y, x) of a 2x2 square is channel `4 d + 2 y + x`, the order of `pixel_shuffle`.
    """
    taps = torch.zeros(2, 5, 3, dtype=weight.dtype)
    for phase in range(2):
        for tap in range(5):
            taps[phase, tap, (phase + tap - 2) // 2 + 1] = 1
    return torch.einsum("dcuv,yui,xvj->dyxcij", weight, taps, taps).flatten(0, 2)


@torch.no_grad()
def set_convolution(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Set the weight and bias of a convolution, rounded to its type."""
    assert conv.bias is not None and conv.weight.shape == weight.shape
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    conv.requires_grad_(False)


def compose_autoencoder(vae: AutoencoderTiny) -> None:
    """Compose the convolutions of an autoencoder in place, unless it has blocks at full resolution."""
    entry, end = vae.encoder.layers, vae.decoder.layers
    if _is_3x3(entry[0], 1) and _is_3x3(entry[1], 2):
        vae.encoder.layers = nn.Sequential(ComposedEntry(entry[0], entry[1]), *entry[2:])
    enlarges = isinstance(end[-3], nn.Upsample) and end[-3].scale_factor == 2 and end[-3].mode == "nearest"
    if enlarges and _is_3x3(end[-2], 1) and _is_3x3(end[-1], 1):
        vae.decoder.layers = nn.Sequential(*end[:-3], ComposedEnd(end[-2], end[-1]))


def _is_3x3(module: nn.Module, stride: int) -> bool:
    return isinstance(module, nn.Conv2d) and (module.kernel_size, module.stride, module.padding) == (
        (3, 3),
        (stride, stride),
        (1, 1),
    )
