"""Neighbouring convolutions of an AutoencoderTiny with nothing between them become one, with the same result.

An autoencoder without blocks at full resolution goes from three channels to many and back at the full size of the
picture. One convolution in place of such a pair never makes that map:

- the encoder's first two, the second of stride 2, are one of 5x5 and stride 2;
- the decoder's last two after an enlargement by repetition are one of 3x3 at half the size, whose channels are the
  pixels of 2x2 squares. (What repetition enlarged has each value four times; a sum of weights takes it once.)

The two are the same but for a border one pixel wide, where the first convolution's result is padded with zeros; the
border is computed as before, on narrow strips.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn

STRIP = 4
"""Pixels of the strips that a border is computed on; the pair sees three, and sides are to stay even."""


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
    """An enlargement by repetition and two 3x3 convolutions, as one before the enlargement."""

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
    # The weight of a composition is the convolution of the weights, over the channels between.
    weight = F.conv2d(a.transpose(0, 1), b.flip(-1, -2), padding=2).transpose(0, 1)
    bias = torch.zeros(len(b), dtype=torch.float64) if second.bias is None else second.bias.detach().double()
    return weight, bias if first.bias is None else bias + b.sum((2, 3)) @ first.bias.detach().double()


def halve_grid(weight: torch.Tensor) -> torch.Tensor:
    """Turn a 5x5 weight on repeated pixels, (D, C, 5, 5), into one on the pixels themselves, (4 D, C, 3, 3).

    The pixel (y, x) of a 2x2 square is channel `4 d + 2 y + x`, as `pixel_shuffle` wants it.
    """
    taps = torch.zeros(2, 5, 3, dtype=weight.dtype)
    for phase in range(2):
        for tap in range(5):
            taps[phase, tap, (phase + tap - 2) // 2 + 1] = 1
    return torch.einsum("dcuv,yui,xvj->dyxcij", weight, taps, taps).flatten(0, 2)


@torch.no_grad()
def set_convolution(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Fill a convolution in, rounded to its type."""
    assert conv.bias is not None and conv.weight.shape == weight.shape
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    conv.requires_grad_(False)


def compose_autoencoder(vae: AutoencoderTiny) -> None:
    """Compose what an autoencoder has to compose, in place: nothing where it has blocks at full resolution."""
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
