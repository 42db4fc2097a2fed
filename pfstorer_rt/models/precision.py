"""fp16 networks: this module sets the types of all values, and the graphs and engines of plans keep them.

TensorRT 11 and later have no precision flags. The weights and activations of convolutions and projections are fp16.
These stay in fp32:

- the statistics of GroupNorm and LayerNorm, because sums of squares over a whole map overflow before single values do;
- the sinusoid and the time embedding, because fp16 cannot resolve the difference of neighbouring timesteps;
- softmax, inside the engines' fused attention; `centred` keeps its scores small enough for fp16;
- the inputs and outputs, so that the sampler outside the graph does not round.

PyTorch's kernels accumulate the sums of a norm and the scores of fused attention in fp32 themselves (`native`). Casts
around norms, and centred keys, would be hundreds of kernel launches in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn
from torch.func import functional_call

from pfstorer_rt.ops import FUSED, AttentionFn, AttentionProcessor, math


def centred(attention: AttentionFn) -> AttentionFn:
    """Return an attention on keys without their mean over the tokens; q (B, H, L, D), k and v (B, H, S, D).

    The result is the same, because the mean adds the same value `q . mean(k)` to all scores of one query, and softmax
    ignores it. On flat images all keys are large and nearly equal, and `q . k` exceeds 65504, the largest fp16 value;
    without their mean they are small. (SageAttention smooths keys in the same way: Zhang et al. 2024, section 4.2.)
    """

    return partial(_on_centred_keys, attention)


def _on_centred_keys(
    attention: AttentionFn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    mean = k.float().mean(-2, keepdim=True)
    return attention(q, (k.float() - mean).to(k.dtype), v, mask)


def spell_out_attention(module: nn.Module) -> None:
    """Compute every attention layer of `pfstorer_rt.ops` as matrix products and a softmax."""
    for child in module.modules():
        if isinstance(child, Attention) and isinstance(child.processor, AttentionProcessor):
            child.processor.attention = math


def compute_in_float32(norm: nn.Module) -> None:
    """Change a normalization to take and return fp16 but compute in fp32; its parameters keep their names."""
    norm.float()
    norm.register_forward_pre_hook(_to_float32)
    norm.register_forward_hook(_to_half)


def _to_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return inputs[0].float(), *inputs[1:]


def _to_half(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.half()


class TypedComponent(nn.Module):
    """One component with fp32 inputs and outputs that computes in fp32 or fp16; for fp16 it is changed in place.

    bound: paths of the parameters and buffers that are inputs of the graph, after the other inputs and in this order.
    native: whether PyTorch computes the component; otherwise it is exported as a graph.
    """

    def __init__(self, module: nn.Module, precision: str, bound: Sequence[str] = (), native: bool = False) -> None:
        super().__init__()
        self.module, self.half_inside, self.bound = module, precision == "fp16", tuple(bound)
        if self.half_inside:
            make_half(module, native)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """fp32 -> fp32; inside, images and latents (4-d) become fp16, `t` and `strength` stay fp32."""
        ports, tensors = inputs[: len(inputs) - len(self.bound)], inputs[len(inputs) - len(self.bound) :]
        arguments = tuple(i.half() if self.half_inside and i.ndim == 4 else i for i in ports)
        if self.bound:
            result = functional_call(self.module, dict(zip(self.bound, tensors, strict=True)), arguments)
        else:
            result = self.module(*arguments)
        return tuple(r.float() for r in result) if isinstance(result, tuple) else result.float()


def make_half(module: nn.Module, native: bool = False) -> None:
    """Cast the weights of a component to fp16, except for the parts that stay in fp32; native: see `TypedComponent`."""
    module.half()
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm) and not native:
            compute_in_float32(child)
        elif isinstance(child, TimestepEmbedding):
            child.float()
        elif isinstance(child, Attention) and type(child.processor) is AttentionProcessor:
            attention = child.processor.attention
            if not (native and attention in FUSED):
                child.set_processor(AttentionProcessor(centred(attention)))
