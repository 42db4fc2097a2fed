"""Support for Triton's interpreter, which runs the kernels on a CPU if TRITON_INTERPRET=1 is set at import."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels run in the interpreter."""


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Return acc + a b, summed in fp32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter stores bf16 as integer bit patterns and would multiply the integers. The conversion to fp32
        # is exact, so the products equal the products of a tensor core.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)
