"""What the frozen base makes of a reference photograph: features at each layer and the subject's mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from pfstorer_rt.models.base import Base
from pfstorer_rt.models.personalization import reference_mask
from pfstorer_rt.models.prompt import PLACEHOLDER, SUBJECT, token_position, tokenize
from pfstorer_rt.models.unet import RestorationUNet
from pfstorer_rt.ops import AttentionProcessor, split_heads


class RecordingProcessor(AttentionProcessor):
    """Attends as usual and keeps the head-mean probabilities of the last `rows` rows."""

    def __init__(self, processor: AttentionProcessor, rows: int) -> None:
        super().__init__(processor.attention)
        self.rows = rows
        self.probabilities = torch.empty(0)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Like `AttentionProcessor`; `probabilities` becomes (rows, L, S), fp32."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = split_heads(attn.to_q(hidden_states[-self.rows :]), attn.heads).float()
        k = split_heads(attn.to_k(context[-self.rows :]), attn.heads).float()
        self.probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **more)


@contextmanager
def record_text_attention(
    unet: RestorationUNet, layers: Sequence[str], rows: int
) -> Iterator[dict[str, RecordingProcessor]]:
    """Record the text attention of the last `rows` rows at `layers` while the context is open."""
    attns = {layer: unet.get_submodule(layer).transformer_blocks[-1].attn2 for layer in layers}
    before = {layer: attn.processor for layer, attn in attns.items()}
    recording = {layer: RecordingProcessor(before[layer], rows) for layer in layers}
    try:
        for layer, attn in attns.items():
            attn.set_processor(recording[layer])
        yield recording
    finally:
        for layer, attn in attns.items():
            attn.set_processor(before[layer])


class Positions(NamedTuple):
    """Where the subject prompt holds the learned token and the end of the text."""

    subject: int
    end: int


def subject_ids(base: Base, prompt: str) -> tuple[torch.Tensor, Positions]:
    """Tokenize the subject prompt ('{}' stands for S*); returns ids (1, L) and the positions in it.

    The prompt can be another person's, so it is no format string. Raises `ValueError` for a prompt without '{}'.
    """
    if "{}" not in prompt:
        raise ValueError(f"subject prompt {prompt[:80]!r}, expected {{}} in it, such as 'a photo of a {{}}'")
    ids = tokenize(prompt.replace("{}", SUBJECT), base.config)
    end = token_position(ids, base.config.text["eos_token_id"])
    return ids.to(base.device), Positions(token_position(ids, PLACEHOLDER), end)


class References(NamedTuple):
    """Reference features and masks by layer."""

    features: Mapping[str, torch.Tensor]
    """{layer: (B, S, C)}"""
    masks: Mapping[str, torch.Tensor]
    """{layer: bool (B, S)}"""


class ReferencePass(NamedTuple):
    """What one pass of the base over reference rows leaves at each layer."""

    features: Mapping[str, torch.Tensor]
    """{layer: (B, S, C)}"""
    probabilities: Mapping[str, torch.Tensor]
    """{layer: (B, S, L)} head-mean text attention, fp32."""


def reference_pass(
    unet: RestorationUNet,
    structure_encoder: nn.Module,
    latent: torch.Tensor,
    t: torch.Tensor,
    context: torch.Tensor,
    layers: Sequence[str],
    tap: str = "post",
    bypass_sft: bool = False,
) -> ReferencePass:
    """Run clean reference latents (B, C, h, w) through the base and keep what the personalized layers see.

    t: (B,). context: the subject prompt, (B, L, D). tap, bypass_sft: `tap` and `ref_sft == "bypass"` of a
    `PersonalizeConfig`. Gradients flow to the context.
    """
    features: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> Any:
        return lambda tokens: features.setdefault(layer, tokens)

    taps = {layer: keep(layer) for layer in layers}
    where = {"taps" if tap == "post" else "inner_taps": taps}
    bypass = torch.ones(len(latent), dtype=torch.bool, device=latent.device) if bypass_sft else None
    with record_text_attention(unet, layers, len(latent)) as recording:
        unet(latent, t, context, structure_encoder(latent, t), bypass=bypass, **where)
    return ReferencePass(features, {layer: r.probabilities for layer, r in recording.items()})


@torch.no_grad()
def reference_features(
    base: Base, latent: torch.Tensor, token: torch.Tensor, settings: Mapping[str, Any], layers: Sequence[str]
) -> References:
    """Run the base once on a clean reference latent (B, C, h, w), exactly as training does.

    settings: a `PersonalizeConfig` as a mapping. The timestep is 0 whatever `ref_timestep` says, as
    there is no restored row to share one with.
    """
    ids, positions = subject_ids(base, settings["subject_prompt"])
    context = base.text_encoder(ids, token).expand(len(latent), -1, -1)
    t = torch.zeros(len(latent), dtype=torch.long, device=latent.device)
    found = reference_pass(
        base.unet, base.structure_encoder, latent, t, context, layers, settings["tap"], settings["ref_sft"] == "bypass"
    )
    masks = {layer: reference_mask(p[:, :, positions.subject]) for layer, p in found.probabilities.items()}
    return References(found.features, masks)
