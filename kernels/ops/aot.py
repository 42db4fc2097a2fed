"""Compile all kernels ahead of time, without a GPU.

    python -m pfstorer_rt.kernels.aot --capability 90

The command prints one JSON object per kernel and variant: registers, spilled and shared memory, use of tensor cores.
It does not work with TRITON_INTERPRET=1, because the interpreter compiles nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, gated_projection, geglu, spade_norm

CAPABILITIES = (80, 89, 90, 120)
"""Compute capabilities times ten: A100, L4 and RTX 40, H100 and H200, RTX 50."""


@dataclass(frozen=True)
class Variant:
    """A kernel with its specialization."""

    kernel: Any
    types: Mapping[str, str]
    """Argument name -> type, for arguments that are not integers."""
    constants: Mapping[str, Any]
    """Constant argument -> value; strides of one are constant too."""
    warps: int = 4
    stages: int = 3
    unaligned: Sequence[str] = ("L", "S", "P", "M", "H", "size", "chunks", "tokens")
    """Integer arguments that need not be multiples of 16. Wide loads require multiples of 16 for the others."""

    def specialized(self, *ones: str) -> Variant:
        """Return the variant for arguments that are 1, which Triton makes constants; the others are multiples of 16."""
        constants = {**self.constants, **{name: 1 for name in ones if name in self.kernel.arg_names}}
        return replace(self, constants=constants, unaligned=())

    @property
    def name(self) -> str:
        """The name of the kernel without leading underscore and suffix."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")

    def compile(self, capability: int) -> Any:
        """Return Triton's compiled kernel, with `asm["ptx"]`, `asm["cubin"]` and `metadata`, without a GPU."""
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in self.constants else self.types.get(n, "i32") for n in names}
        sizes = {n for n in names if signature[n] == "i32"} - set(self.unaligned)
        aligned = sizes | {n for n in names if signature[n].startswith("*")}
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _pointers(names: str, element: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), element)


def attention_variants(head: int, half: str, indexed: bool) -> list[Variant]:
    """Return the three attention kernels with their default tiles."""
    types = _pointers("q k v out grad grad_q grad_k grad_v", half) | _pointers("lse delta", "*fp32")
    types |= _pointers("index length", "*i32") | {"scale": "fp32"}
    padded = int(triton.next_power_of_2(head))
    sizes = {"D": head, "BLOCK_D": padded, "INDEXED": indexed}
    ahead, back = attention.FORWARD_TILES[padded][0], attention.BACKWARD_TILES[padded]
    made = []
    for kernel, tile, length, keys in (
        (attention._attention_forward_kernel, ahead, ahead.rows, ahead.columns),
        (attention._attention_backward_keys_kernel, back, back.rows, back.columns),
        (attention._attention_backward_queries_kernel, back, back.columns, back.rows),
    ):
        constants = {**sizes, "BLOCK_L": length, "BLOCK_S": keys}
        made.append(Variant(kernel, _used(kernel, types), constants, tile.warps, tile.stages))
    return made


def gated_projection_variant(half: str = "*fp16", gamma: str = "*fp32", strength: str = "*fp32") -> Variant:
    """Return the gated projection with the arguments of a personalization block."""
    types = _pointers("h weight bias stream x out", half) | {"gamma": gamma, "strength": strength}
    tile = gated_projection.TILES[0]
    constants = {
        "BIAS": True,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "GROUP_M": gated_projection.GROUP,
    }
    return Variant(gated_projection._gated_projection_kernel, types, constants, tile.warps, tile.stages)


def geglu_variants(half: str = "*fp16") -> list[Variant]:
    """Return the forward and backward kernels of GEGLU."""
    types, constants = _pointers("x out grad grad_x", half), {"BLOCK_N": geglu.BLOCK}
    kernels = (geglu._geglu_forward_kernel, geglu._geglu_backward_kernel)
    return [Variant(kernel, _used(kernel, types), constants) for kernel in kernels]


def spade_norm_variants(half: str = "*fp16", dense: str = "c", size: int = 10, eps: float = 1e-5) -> list[Variant]:
    """Return the statistics, combination, forward and two backward kernels; dense axis: channels `c` or pixels `p`."""
    types = _pointers("x scale shift out grad grad_x grad_scale grad_shift", half)
    types |= _pointers("means squares mean rstd sums products weight bias", "*fp32")
    tile = {"BLOCK_P": spade_norm.PIXELS, "BLOCK_C": spade_norm.CHANNELS}
    modulation = {**tile, "MODULATED": True, "SILU": True}
    combined = {
        "BLOCK_P": spade_norm.PIXELS,
        "BLOCK_I": spade_norm.CHUNKS,
        "BLOCK_G": int(triton.next_power_of_2(size)),
        "eps": eps,
    }
    made = []
    for kernel, constants in (
        (spade_norm._statistics_kernel, tile),
        (spade_norm._combine_kernel, combined),
        (spade_norm._spade_norm_kernel, modulation),
        (spade_norm._spade_norm_backward_kernel, {**modulation, "FIRST": True}),
        (spade_norm._spade_norm_backward_kernel, {**modulation, "FIRST": False}),
    ):
        ones = {name: 1 for name in kernel.arg_names if re.fullmatch(f"[a-z]_{dense}", name)}
        made.append(Variant(kernel, _used(kernel, types), {**constants, **ones}))
    return made


def _used(kernel: Any, types: Mapping[str, str]) -> dict[str, str]:
    return {name: element for name, element in types.items() if name in kernel.arg_names}


ONES = ("H", "L", "S", "M", "tokens", "inner", "C", "P", "size", "chunks")
"""Sizes that may be 1 in a call, such as one channel in a group, or one token."""


def variants() -> list[Variant]:
    """Return all kernels in all variants that compile differently."""
    usual = [
        *attention_variants(64, "*fp16", False),
        *attention_variants(40, "*bf16", True),
        attention_variants(128, "*fp16", False)[0],
        gated_projection_variant(),
        gated_projection_variant("*bf16"),
        *geglu_variants(),
        *spade_norm_variants(),
        spade_norm_variants(dense="p")[2],
    ]
    first = [*attention_variants(64, "*fp16", False), gated_projection_variant(), *geglu_variants()]
    small = [variant.specialized(*ONES) for variant in (*first, *spade_norm_variants(size=1))]
    return [*usual, *small, *(variant.specialized() for variant in spade_norm_variants())]


def resources(compiled: Any) -> dict[str, int]:
    """Return registers per thread, spilled bytes per thread and shared memory per program."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]), "shared": compiled.metadata.shared}


def report(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile one variant for one compute capability and return its resources."""
    compiled = variant.compile(capability)
    ptx = compiled.asm["ptx"]
    product = "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else None
    target = re.search(r"\.target (sm_\d+)", ptx)
    return {
        "kernel": variant.name,
        "capability": capability,
        "target": target and target.group(1),
        **variant.constants,
        **resources(compiled),
        "product": product,
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def main() -> None:
    """Compile all variants for the given capabilities; the default is all capabilities."""
    parser = argparse.ArgumentParser(description="Compile all kernels ahead of time; needs no GPU.")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    for capability in parser.parse_args().capability or CAPABILITIES:
        for variant in variants():
            sys.stdout.write(json.dumps(report(variant, capability)) + "\n")


if __name__ == "__main__":
    main()
