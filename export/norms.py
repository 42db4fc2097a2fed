"""Write GroupNormalization with InstanceNormalization.

ONNX Runtime has no kernel for GroupNormalization: whenever it loads a graph, it replaces each one by 20 operators. That
was a third of the time to load a denoiser.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnxscript import rewriter


class _GroupNorm(rewriter.RewriteRuleClassBase):
    def pattern(self, op: Any, maps: Any, scale: Any, bias: Any) -> Any:
        return op.GroupNormalization(maps, scale, bias, _outputs=["normed"])

    def check(self, context: Any, normed: Any, **_: Any) -> bool:
        return normed.dtype == onnx_ir.DataType.FLOAT and normed.shape is not None

    def rewrite(self, op: Any, maps: Any, scale: Any, bias: Any, normed: Any) -> Any:
        attributes, sizes = normed.producer().attributes, list(normed.shape)[1:]
        groups, epsilon = attributes["num_groups"].as_int(), attributes.get_float("epsilon", 1e-5)

        def constant(values: Any) -> Any:
            return op.Constant(value=onnx_ir.tensor(np.array(values)))

        fixed = all(isinstance(size, int) for size in sizes)
        shape = constant([0, *sizes]) if fixed else op.Shape(maps)  # 0 keeps the size of the batch
        ones, zeros = (constant(np.full(groups, value, np.float32)) for value in (1, 0))
        split = op.Reshape(maps, constant([0, groups, -1]))
        whole = op.Reshape(op.InstanceNormalization(split, ones, zeros, epsilon=epsilon), shape)
        per_channel = constant([-1] + [1] * (len(sizes) - 1))
        return op.Add(op.Mul(whole, op.Reshape(scale, per_channel)), op.Reshape(bias, per_channel))


def spell_out_group_norms(model: onnx_ir.Model) -> None:
    """Replace each GroupNormalization of fp32 by InstanceNormalization of its groups, a product and a sum."""
    rewriter.rewrite(model, [_GroupNorm().rule()])
