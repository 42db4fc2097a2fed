"""An adversary that sees pictures through a frozen network: small heads on its features (Projected GANs).

Source: Sauer et al. 2021, "Projected GANs Converge Faster", section 3. A network that already knows what pictures are
made of needs far fewer samples than a discriminator of pixels; here it is that of LPIPS, whose features are there
already. The losses are the hinge losses of Lim and Ye 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (2, 2, 1, 1, 1)
"""Stride of a head's first convolution by stage: the finest maps are large."""


class FeatureDiscriminator(nn.Module):
    """One head for each stage of features: how real every place looks at every scale.

    channels: of the stages' maps. width: of the heads. Untrained, every answer is 0.
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
        """Judge a picture by its features (B, C_i, H_i, W_i) of length 1: a map (B, 1, h_i, w_i) of each stage.

        Values above 0 stand for real.
        """
        return [head(m * m.shape[1] ** 0.5) for head, m in zip(self.heads, maps, strict=True)]


def discriminator_loss(real: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hinge loss of the discriminator, the mean over its heads."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(losses).mean()


def generator_loss(made: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the maker of the pictures wants small: the mean over the heads of how unreal they look."""
    return torch.stack([-m.mean() for m in made]).mean()
