"""fp16 graphs: which numbers are halves and which stay fp32 is decided here, and nowhere in an engine.

Engines from TensorRT 11 on have no precision flags: they compute in the types that the graph states. Halves are the
weights and activations of convolutions and projections. In fp32 stay

- the statistics of GroupNorm and LayerNorm: sums of squares over a whole map pass 65504 long before a value does;
- the sinusoid and the time embedding: neighbouring timesteps differ by less than a half resolves;
- softmax, inside the engines' fused attention; its sums are kept small enough for halves by `centred_attention`;
- the inputs and outputs, so that the sampler outside never rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn
from torch.func import functional_call

from pfstorer_rt.ops import AttentionProcessor, math


def centred_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention whose keys have their mean over the tokens taken off; q (B, H, L, D), k and v (B, H, S, D).

    Softmax ignores what is added to all scores of one query, and `q . mean(k)` is just that, so the result is the
    same. On flat pictures all keys are nearly alike and large, and `q . k` passes 65504, the largest half; without
    their mean they are small. (The same identity smooths keys in SageAttention, Zhang et al. 2024, section 4.2.)
    """
    mean = k.float().mean(-2, keepdim=True)
    return F.scaled_dot_product_attention(q, (k.float() - mean).to(k.dtype), v, attn_mask=mask)


def spell_out_attention(module: nn.Module) -> None:
    """Let every attention layer that goes through the door be matrix products and a softmax."""
    for child in module.modules():
        if isinstance(child, Attention) and isinstance(child.processor, AttentionProcessor):
            child.processor.attention = math


def compute_in_float32(norm: nn.Module) -> None:
    """Let a normalization take halves, compute in fp32 and give halves; its parameters keep their names."""
    norm.float()
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    norm.register_forward_hook(lambda _, __, output: output.half())


class TypedComponent(nn.Module):
    """One component with fp32 inputs and outputs, computing in fp32 or fp16; for fp16 it is changed in place.

    bound: parameters and buffers of the module, by path, that follow the other inputs in this order instead of
    being constants of the graph.
    """

    def __init__(self, module: nn.Module, precision: str, bound: Sequence[str] = ()) -> None:
        super().__init__()
        self.module, self.half_inside, self.bound = module, precision == "fp16", tuple(bound)
        if self.half_inside:
            make_half(module)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Take and give fp32; inside, pictures and latents (4-d) become halves, `t` and `strength` do not."""
        ports, tensors = inputs[: len(inputs) - len(self.bound)], inputs[len(inputs) - len(self.bound) :]
        arguments = tuple(i.half() if self.half_inside and i.ndim == 4 else i for i in ports)
        if self.bound:
            result = functional_call(self.module, dict(zip(self.bound, tensors, strict=True)), arguments)
        else:
            result = self.module(*arguments)
        return tuple(r.float() for r in result) if isinstance(result, tuple) else result.float()


def make_half(module: nn.Module) -> None:
    """Cast a component's weights to fp16, but for the parts that stay fp32."""
    module.half()
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            compute_in_float32(child)
        elif isinstance(child, TimestepEmbedding):
            child.float()
        elif isinstance(child, Attention) and type(child.processor) is AttentionProcessor:
            child.set_processor(AttentionProcessor(centred_attention))
