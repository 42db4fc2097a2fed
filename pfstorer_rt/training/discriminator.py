"""A discriminator of small heads on the features of a frozen network (Projected GANs).

Source: Sauer et al. 2021, "Projected GANs Converge Faster", section 3. Pretrained features need far fewer samples than
a discriminator of pixels. The network is LPIPS's, whose features are computed anyway. The losses are hinge losses (Lim
and Ye 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (2, 2, 1, 1, 1)
"""Stride of a head's first convolution by stage; the finest maps are large, so their stride is 2."""


class FeatureDiscriminator(nn.Module):
    """One head for each stage of features; a head scores every position as real or generated.

    channels: channels of each stage's map. width: channels of the heads. Untrained heads return 0.
    """

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(entry, width, 3, stride, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, 1, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 1),
            )
            for entry, stride in zip(channels, STRIDES, strict=True)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)  # type: ignore[index]
            nn.init.zeros_(head[-1].bias)  # type: ignore[index]

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Score normalized features (B, C_i, H_i, W_i); returns a map (B, 1, h_i, w_i) for each stage.

        Values above 0 mean real.
        """
        return [head(m * m.shape[1] ** 0.5) for head, m in zip(self.heads, maps, strict=True)]


def discriminator_loss(real: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hinge loss of the discriminator, the mean over its heads."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(losses).mean()


def generator_loss(made: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hinge loss of the generator, the mean over the heads of the negative score."""
    return torch.stack([-m.mean() for m in made]).mean()
