"""Every kernel compiles down to machine code for GPUs that are not there."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pfstorer_rt.kernels import attention

# Bytes of shared memory that one program can have (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.fixture(scope="module")
def reports():
    """What `python -m pfstorer_rt.kernels.aot` prints: apart, since here kernels may be made for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "pfstorer_rt.kernels.aot"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def kernels():
    """Names of all kernels in the package's files: jitted functions called `_NAME_kernel`."""
    for path in Path(attention.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                yield node.name.strip("_").removesuffix("_kernel")


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability, reports):
    found = [report for report in reports if report["capability"] == capability]
    names = set(kernels())
    assert {report["kernel"] for report in found} == names and len(names) >= 10
    for report in found:
        assert report["target"] == f"sm_{capability}" and report["cubin_bytes"] > 1000
        assert report["shared"] <= SHARED[capability], report


def test_products_run_on_tensor_cores(reports):
    for report in reports:
        if report["kernel"].startswith(("attention", "gated_projection")):
            assert report["product"] == ("wgmma" if report["capability"] == 90 else "mma"), report
        else:
            assert report["product"] is None


def test_forward_kernels_keep_everything_in_registers(reports):
    forward = [report for report in reports if "backward" not in report["kernel"]]
    assert forward and all(report["spilled"] == 0 for report in forward)


def test_both_memory_orders_are_compiled(reports):
    orders = {(report.get("x_c"), report.get("x_p")) for report in reports if report["kernel"] == "spade_norm"}
    assert orders == {(1, None), (None, 1)}
