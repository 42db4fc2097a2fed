"""Features of a reference photograph in the frozen base, with the subject's mask, at each personalized layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from pfstorer_rt.diffusion import noisy_latent
from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.personalization import reference_mask
from pfstorer_rt.models.prompt import PLACEHOLDER, SUBJECT, token_position, tokenize
from pfstorer_rt.models.unet import RestorationUNet, Tap
from pfstorer_rt.ops import AttentionProcessor, split_heads


class RecordingProcessor(AttentionProcessor):
    """Computes attention and keeps the probabilities, averaged over the heads."""

    def __init__(self, processor: AttentionProcessor) -> None:
        super().__init__(processor.attention)
        self.probabilities = torch.empty(0)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Like `AttentionProcessor`; `probabilities` becomes (B, L, S), fp32."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = split_heads(attn.to_q(hidden_states), attn.heads).float()
        k = split_heads(attn.to_k(context), attn.heads).float()
        self.probabilities = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **more)


@contextmanager
def record_text_attention(unet: RestorationUNet, layers: Sequence[str]) -> Iterator[dict[str, RecordingProcessor]]:
    """Record the text attention at `layers` while the context is open."""
    attns = {layer: unet.get_submodule(layer).transformer_blocks[-1].attn2 for layer in layers}
    before = {layer: attn.processor for layer, attn in attns.items()}
    recording = {layer: RecordingProcessor(before[layer]) for layer in layers}
    try:
        for layer, attn in attns.items():
            attn.set_processor(recording[layer])
        yield recording
    finally:
        for layer, attn in attns.items():
            attn.set_processor(before[layer])


class Positions(NamedTuple):
    """Positions of the learned token and of the end of the text in the subject prompt."""

    subject: int
    end: int


def subject_ids(base: Base, prompt: str) -> tuple[torch.Tensor, Positions]:
    """Tokenize the subject prompt ('{}' stands for S*); returns ids (1, L) and the positions in it.

    The prompt can come from an untrusted file, so it is not used as a format string. Raises `ValueError` for a prompt
    without '{}'.
    """
    if "{}" not in prompt:
        raise SettingError(f"subject prompt {prompt[:80]!r}, expected {{}} in it, such as 'a photo of a {{}}'")
    ids = tokenize(prompt.replace("{}", SUBJECT), base.config)
    end = token_position(ids, base.config.text["eos_token_id"])
    return ids.to(base.device), Positions(token_position(ids, PLACEHOLDER), end)


class LayerReference(NamedTuple):
    """The features of a reference at one personalized layer."""

    features: torch.Tensor
    """(B, S, C) output tokens of the spatial transformer."""
    probabilities: torch.Tensor
    """(B, S, L) head-mean text attention of the tokens, fp32."""

    @torch.no_grad()
    def mask(self, subject: int) -> torch.Tensor:
        """Return which tokens show the subject, bool (B, S); subject: position of the learned token in the prompt."""
        return reference_mask(self.probabilities[:, :, subject])


@lru_cache(maxsize=8)
def fixed_noise(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return the same fp32 noise at every call; it is kept on the device, where a CUDA graph can read it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def reference_pass(
    unet: RestorationUNet,
    structure_encoder: nn.Module,
    latent: torch.Tensor,
    context: torch.Tensor,
    layers: Sequence[str],
    timestep: int = 0,
    alphas_cumprod: torch.Tensor | None = None,
) -> dict[str, LayerReference]:
    """Run clean reference latents (B, C, h, w) through the base; returns the features by layer.

    context: the subject prompt, (B, L, D). timestep: 0 leaves the latents clean, as ViCo does. Another timestep adds
    fixed noise by `alphas_cumprod` (1000,): features of one timestep resemble each other more. Gradients flow to the
    context.
    """
    features: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> Tap:
        return lambda tokens: features.setdefault(layer, tokens)

    t = torch.full((len(latent),), timestep, dtype=torch.long, device=latent.device)
    x = latent
    if timestep:
        assert alphas_cumprod is not None
        noise = fixed_noise(latent.shape[1:], latent.device).to(latent.dtype)
        x = noisy_latent(latent, latent, noise.expand_as(latent), t, alphas_cumprod)
    with record_text_attention(unet, layers) as recording:
        unet(x, t, context, structure_encoder(latent, t), {layer: keep(layer) for layer in layers})
    return {layer: LayerReference(features[layer], recording[layer].probabilities) for layer in layers}


@torch.no_grad()
def reference_features(
    base: Base, latent: torch.Tensor, token: torch.Tensor, prompt: str, layers: Sequence[str], timestep: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Run the base once on a clean reference latent (B, C, h, w), in the same way as in training.

    prompt: the subject prompt ('{}' stands for S*). Returns {layer: (features (B, S, C), mask bool (B, S))}.
    """
    ids, positions = subject_ids(base, prompt)
    context = base.text_encoder(ids, token).expand(len(latent), -1, -1)
    alphas = base.schedule.alphas_cumprod_tensor().to(latent.device)
    found = reference_pass(base.unet, base.structure_encoder, latent, context, layers, timestep, alphas)
    return {layer: (seen.features, seen.mask(positions.subject)) for layer, seen in found.items()}
