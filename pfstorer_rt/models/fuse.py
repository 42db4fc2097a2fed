"""Fusion: values that depend neither on the image nor on the timestep become constants.

- The prompt is constant, so every text cross-attention keeps its keys and values only.
- The cached reference is constant, so every reference attention keeps its keys and values only.
- A block whose gamma is all zero changes nothing and is removed.

gamma stays a multiplication at the end of its block. It cannot be folded into a projection, because the three branches
of the block use each other's unscaled results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pfstorer_rt.models.components import Component
from pfstorer_rt.models.constant_context import fold_context
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.personalization import PersonalizationBlocks
from pfstorer_rt.models.sharing import share_weights


class FusedDenoiser(nn.Module):
    """The denoiser with folded constants; it owns its networks and changes them in place."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        for block in _transformer_blocks(denoiser.unet):
            fold_context(block.attn2, denoiser.context)
        denoiser.blocks = PersonalizationBlocks(block for block in denoiser.blocks if block.gamma.any())
        for block in denoiser.blocks:
            block.fold_reference()

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, z_lq: torch.Tensor, strength: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x, z_lq (B, C, h, w), t (B,) float in 0..999, strength (1,) -> eps or v (B, C, h, w)."""
        return self.denoiser(x, t, z_lq, 1.0 if strength is None else strength)

    def identity_paths(self) -> dict[str, str]:
        """Return the paths of the parameters and buffers that belong to the person: {name: path}, in order.

        Names are `{layer}.gamma`, `{layer}.k` and `{layer}.v` of the reference, and `{layer}.` with the projections of
        the block. A graph has these tensors as constants, or as inputs in this order.
        """
        short = {"block.attn2.k": "k", "block.attn2.v": "v"}
        return {
            f"{block.layer}.{short.get(key, key.removeprefix('block.'))}": f"denoiser.blocks.{i}.{key}"
            for i, block in enumerate(self.denoiser.blocks)
            for key in block.state_dict()
        }

    def identity_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `identity_paths` by name, in the same order."""
        state = self.state_dict()
        return {name: state[path] for name, path in self.identity_paths().items()}


def fuse_denoiser(component: Component) -> Component:
    """Return the denoiser with folded constants; the original component and its base are not changed."""
    module = share_weights(component.module)
    assert isinstance(module, Denoiser)
    fused = component.with_module(FusedDenoiser(module))
    return fused if len(module.blocks) else fused.without_strength()


def _transformer_blocks(unet: nn.Module) -> list[Any]:
    found: list[Any] = [m for m in unet.modules() if hasattr(m, "transformer_blocks")]
    return [block for transformer in found for block in transformer.transformer_blocks]
