"""The `denoiser` component: base and identity as the function (x, t) -> prediction of a sampler."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import nn

from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.personalization import PersonalizationBlocks, build_blocks
from pfstorer_rt.models.unet import RestorationUNet


class Denoiser(nn.Module):
    """Structure encoder, UNet and, with an identity, its personalization blocks.

    This is the plain, unfused model; `models.fuse` folds its constants. Buffer `context` (1, L, D): the base's prompt.
    """

    context: torch.Tensor

    def __init__(self, base: Base, identity: Identity | None = None) -> None:
        """Raise `MismatchError` for an identity of another base."""
        super().__init__()
        self.unet, self.structure_encoder = base.unet, base.structure_encoder
        self.blocks = PersonalizationBlocks()
        with torch.no_grad():
            self.register_buffer("context", base.encode_prompt(), persistent=False)
        if identity is None:
            return
        identity.check_base(base.fingerprint)
        if identity.method == "dreambooth":
            self.unet = tuned_unet(base.unet, identity)
        else:
            self.blocks = load_blocks(base, identity)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, z_lq: torch.Tensor, strength: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """x, z_lq (B, C, h, w), t (B,) in 0..999, strength scalar -> eps or v (B, C, h, w)."""
        taps = {block.layer: partial(block, strength=strength) for block in self.blocks}
        context = self.context.expand(x.shape[0], -1, -1)
        return self.unet(x, t, context, self.structure_encoder(z_lq, t), taps)


def load_blocks(base: Base, identity: Identity) -> PersonalizationBlocks:
    """Build the identity's blocks for a base's UNet, with their weights and cached references.

    Tokens of a reference that its mask excludes are dropped, so no mask is needed.
    """
    settings, tensors = identity.settings, identity.tensors
    blocks = build_blocks(base.unet, identity.layers, base.config.head_size, settings["rank"])
    blocks.load_state_dict(
        {k.removeprefix("blocks."): v.float() for k, v in tensors.items() if k.startswith("blocks.")}
    )
    for i, block in enumerate(blocks if settings["ref_source"] == "cached" else ()):
        block.reference = tensors[f"reference.{i}"].float()[tensors[f"mask.{i}"].bool()][None]
    return blocks.to(base.device).eval().requires_grad_(False)


def tuned_unet(unet: RestorationUNet, identity: Identity) -> RestorationUNet:
    """Return a copy of the UNet with the weights from DreamBooth."""
    tuned = deepcopy(unet)
    weights = {k.removeprefix("unet."): v.float() for k, v in identity.tensors.items() if k.startswith("unet.")}
    tuned.load_state_dict(weights)
    return tuned
