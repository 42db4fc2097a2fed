"""The `denoiser` component: base and identity behind the one call that samplers know, (x, t) -> prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.personalization import PersonalizationBlocks
from pfstorer_rt.models.reference import References
from pfstorer_rt.models.unet import RestorationUNet


class Denoiser(nn.Module):
    """Structure encoder, UNet and, with an identity, the personalization blocks on cached references.

    This is the plain, unfused model; `export.fuse` folds its constants. Buffers: `context` (1, L, D),
    `reference_{i}` (1, S_i, C_i) with the masked-out tokens dropped.
    """

    context: torch.Tensor

    def __init__(self, base: Base, identity: Identity | None = None, references: References | None = None) -> None:
        """Raise `MismatchError` for an identity of another base.

        references: features to use in place of the cached ones (`ref_source="live"`).
        """
        super().__init__()
        self.unet, self.structure_encoder = base.unet, base.structure_encoder
        self.blocks: PersonalizationBlocks | None = None
        self.settings: Mapping[str, Any] = identity.settings if identity else {}
        with torch.no_grad():
            context = base.encode_prompt()
        self.register_buffer("context", context, persistent=False)
        if identity is None:
            return
        identity.check_base(base.fingerprint)
        if identity.method == "dreambooth":
            self.unet = tuned_unet(base.unet, identity)
            return
        if self.settings["main_prompt"] == "subject":
            self.context = subject_context(base, identity)
        self.blocks = load_blocks(base, identity)
        if references is None and self.settings["ref_source"] != "self":
            references = cached_references(identity, base.device)
        self.masks = dict(references.masks) if references else {}
        for i, layer in enumerate(self.blocks.layers if references else ()):
            self.register_buffer(f"reference_{i}", references.features[layer], persistent=False)  # type: ignore[union-attr]

    @property
    def has_strength(self) -> bool:
        """Whether the identity can be turned up and down."""
        return self.blocks is not None

    def taps(self, strength: torch.Tensor | float) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return the taps of the UNet, none without blocks."""
        if self.blocks is None:
            return {}
        features = None
        if hasattr(self, "reference_0"):
            features = {layer: getattr(self, f"reference_{i}") for i, layer in enumerate(self.blocks.layers)}
        return self.blocks.taps(features, self.masks, strength)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, z_lq: torch.Tensor, strength: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """x, z_lq (B, C, h, w), t (B,) in 0..999, strength scalar -> eps or v (B, C, h, w)."""
        where = "inner_taps" if self.settings.get("tap") == "inner" else "taps"
        context = self.context.expand(x.shape[0], -1, -1)
        return self.unet(x, t, context, self.structure_encoder(z_lq, t), **{where: self.taps(strength)})


def load_blocks(base: Base, identity: Identity) -> PersonalizationBlocks:
    """Build the identity's blocks for a base's UNet and fill in their weights."""
    settings = identity.settings
    blocks = PersonalizationBlocks.for_unet(
        base.unet, identity.layers, base.config.head_size, settings["rank"], settings["residual"]
    )
    weights = {k.removeprefix("blocks."): v.float() for k, v in identity.tensors.items() if k.startswith("blocks.")}
    blocks.load_state_dict(weights)
    return blocks.to(base.device).eval().requires_grad_(False)


def cached_references(identity: Identity, device: torch.device) -> References:
    """Return the stored features with the masked-out tokens dropped, so that no mask is left."""
    features = {}
    for i, layer in enumerate(identity.layers):
        kept = identity.tensors[f"reference.{i}"].float()[identity.tensors[f"mask.{i}"].bool()]
        features[layer] = kept[None].to(device)
    return References(features, {})


def subject_context(base: Base, identity: Identity) -> torch.Tensor:
    """Encode the subject prompt with the learned token, (1, L, D)."""
    with torch.no_grad():
        token = identity.tensors["token"].float().to(base.device)
        return base.encode_prompt(identity.settings["subject_prompt"].replace("{}", "S*"), token)


def tuned_unet(unet: RestorationUNet, identity: Identity) -> RestorationUNet:
    """Return a copy of the UNet with the weights that DreamBooth tuned."""
    tuned = deepcopy(unet)
    weights = {k.removeprefix("unet."): v.float() for k, v in identity.tensors.items() if k.startswith("unet.")}
    tuned.load_state_dict(weights)
    return tuned
