"""Running on a CPU: with TRITON_INTERPRET=1 at the time of import, kernels run in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels were made for the interpreter."""


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Return acc + a b, summed in fp32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter keeps bf16 as the integers of its bits, and would multiply those; in fp32 the factors of
        # a tensor core's products are the same.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)
