"""The `denoiser` component: base and identity as the function (x, t) -> prediction of a sampler."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import nn

from pfstorer_rt.errors import MismatchError
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
    Raises `MismatchError` for weights and references of other networks than the base's.
    """
    settings, tensors = identity.settings, identity.tensors
    blocks = build_blocks(base.unet, identity.layers, base.config.head_size, settings.get("rank", 0))
    load_weights(blocks, identity, "blocks.")
    for i, block in enumerate(blocks if settings.get("ref_source", "cached") == "cached" else ()):
        block.reference = tensors[f"reference.{i}"].float()[tensors[f"mask.{i}"].bool()][None]
        if block.reference.shape[-1] != len(block.gamma):
            found = f"a reference with {block.reference.shape[-1]} channels at {block.layer}"
            raise unfit(identity, f"{found}, expected {len(block.gamma)}")
    return blocks.to(base.device).eval().requires_grad_(False)


def load_weights(module: nn.Module, identity: Identity, prefix: str) -> None:
    """Copy the tensors of an identity with a prefix to a module; raises `MismatchError` unless they fit."""
    state = {k.removeprefix(prefix): v.float() for k, v in identity.tensors.items() if k.startswith(prefix)}
    shapes, own = ({k: tuple(v.shape) for k, v in values.items()} for values in (state, module.state_dict()))
    if wrong := sorted(key for key in shapes.keys() | own.keys() if shapes.get(key) != own.get(key)):
        key = wrong[0]
        found, expected = shapes.get(key, "missing"), own.get(key, "no such tensor")
        raise unfit(identity, f"{(prefix + key)[:80]!r} is {found}, expected {expected}")
    module.load_state_dict(state)


def unfit(identity: Identity, reason: str) -> MismatchError:
    """Return the error for an identity whose tensors are not those of its base's networks."""
    return MismatchError(f"identity {identity.name!r} does not fit its base: {reason}; personalize again")


def tuned_unet(unet: RestorationUNet, identity: Identity) -> RestorationUNet:
    """Return a copy of the UNet with the weights from DreamBooth."""
    tuned = deepcopy(unet)
    load_weights(tuned, identity, "unet.")
    return tuned
