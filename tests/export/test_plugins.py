"""TensorRT's plugins, up to the library: what it would launch is launched here, in Triton's interpreter or natively."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from pfstorer_rt.export import export_plan, plugins
from pfstorer_rt.export.graph import build_graph, fused_module
from pfstorer_rt.export.tensorrt import BuildOptions
from pfstorer_rt.kernels import reference

from pfstorer_rt.engine.tensorrt import Library, load_library
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.models.components import example_inputs
from pfstorer_rt.models.denoiser import Denoiser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Side(int):
    """A symbolic size that happens to be known."""

    is_constant = True

    def constant_value(self):
        return int(self)


def described(tensor):
    return SimpleNamespace(shape_expr=tuple(Side(n) for n in tensor.shape))


TRTP = SimpleNamespace(cdiv=lambda a, b: math.ceil(a / b))


def run(launch, inputs, output):
    """Call the kernel as TensorRT does: inputs, extra arguments, outputs; nothing else is passed."""
    kernel, constants = launch.variant.kernel, launch.variant.constants
    names = [name for name in kernel.arg_names if name not in constants]
    values = [*inputs, *map(int, launch.extra), output]
    assert len(names) == len(values)
    kernel[tuple(map(int, launch.grid))](**dict(zip(names, values, strict=True)), **constants)
    return output


def normal(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("delta", [0, 1])
@pytest.mark.parametrize("sides", [(2, 17, 40, 24), (1, 65, 64, 80)])
def test_gated_projection_is_launched_as_it_is_defined(sides, delta):
    b, length, k, n = sides
    h, weight, bias, x = normal(b, length, k), normal(n, k, seed=1), normal(n, seed=2), normal(b, length, n, seed=3)
    gamma, stream = normal(n, seed=4), normal(b, length, n, seed=5)
    strength = torch.full((1,), 0.7, device=DEVICE)
    launch = plugins.launch_gated_projection(TRTP, described(h), described(weight), described(x), delta)
    found = run(launch, (h, weight, bias, x, gamma, strength, stream), torch.empty_like(x))
    wide = (t.float() for t in (h, weight, bias, x, gamma))
    expected = reference.gated_projection(*wide, 0.7, stream.float(), bool(delta))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("modulated,silu", [(1, 0), (0, 1)])
def test_spade_norm_is_launched_as_it_is_defined(modulated, silu):
    x, scale, shift = (normal(3, 12, 5, 14, seed=i) for i in range(3))
    weight, bias = normal(12, seed=3, dtype=torch.float32), normal(12, seed=4, dtype=torch.float32)
    grouped = x.float().unflatten(1, (4, -1)).flatten(2)
    mean, rstd = grouped.mean(-1), (grouped.var(-1, correction=0) + 1e-5).rsqrt()
    launch = plugins.launch_spade_norm(TRTP, described(x), described(mean), modulated, silu)
    found = run(launch, (x, scale, shift, weight, bias, mean, rstd), torch.empty_like(x))
    more = (scale.float(), shift.float()) if modulated else (None, None)
    expected = reference.spade_norm(x.float(), weight, bias, 4, 1e-5, *more, bool(silu))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


COMPILE = """
import json, math, re, subprocess, sys, tempfile
from types import SimpleNamespace
import triton
from pfstorer_rt.export import plugins
class Side(int):
    is_constant = True
    def constant_value(self): return int(self)
trtp = SimpleNamespace(cdiv=lambda a, b: math.ceil(a / b), KernelLaunchParams=SimpleNamespace,
                       SymIntExprs=lambda n: [None] * n, SymInt32=int)
def shape(*s): return SimpleNamespace(shape_expr=tuple(map(Side, s)))
launches = [plugins.launch_gated_projection(trtp, shape(1, 64, 320), shape(80, 320), shape(1, 64, 80), 1),
            plugins.launch_spade_norm(trtp, shape(1, 32, 8, 8), shape(1, 8), 1, 0)]
for launch in launches:
    name, ptx, parameters, extra = plugins.compiled(trtp, launch, 89)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx); file.flush()
        done = subprocess.run([triton.knobs.nvidia.ptxas.path, "-arch=sm_89", file.name, "-o", "/dev/null"])
    print(json.dumps({"name": name, "assembled": done.returncode == 0, "extra": len(extra),
                      "parameters": len(re.findall(r"_param_\\d+[,\\s]", ptx.split(")", 1)[0] + " ")),
                      "entry": f".entry {name}(" in ptx, "block": parameters.block_x, "shared": parameters.shared_mem}))
"""


def test_ptx_takes_what_tensorrt_passes_and_assembles():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["name"] for report in reports] == ["_gated_projection_kernel", "_spade_norm_kernel"]
    for report in reports:
        assert report["assembled"] and report["entry"] and report["block"] == 128
        assert report["parameters"] == 7 + report["extra"] + 1  # both have seven inputs and an output


def test_scratch_memory_is_not_dropped_silently():
    ptx = ".entry k(\n.param .u64 k_param_0,\n.param .u64 k_param_1,\n.param .u64 k_param_2\n)\n{ ld k_param_1; }"
    with pytest.raises(plugins.PFStorerError, match=r"scratch memory \(k_param_1\)"):
        plugins.plain_ptx(ptx)


def test_tensorrt_rtx_has_no_plugins():
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(MissingBackendError, match=r"tensorrt-rtx \S+ has no plugins in Python .*--target tensorrt"):
        plugins.load_api(load_library("tensorrt-rtx"))


def test_they_are_refused_before_any_work(nano_base, tmp_path):
    output = tmp_path / "a.plan"
    for target, error, words in (
        ("tensorrt-rtx", MissingBackendError, "no plugins in Python"),
        ("onnx", ValueError, "fp16 engines of TensorRT"),
    ):
        with pytest.raises(error, match=words):
            export_plan(output, None, nano_base, target, options=BuildOptions(plugins=True))
    assert not list(tmp_path.iterdir())


def test_the_graph_with_operators_computes_the_denoiser(nano_base, nano_identity, tmp_path):
    inputs = example_inputs("denoiser", nano_base, True)
    with torch.no_grad():
        expected = Denoiser(nano_base, nano_identity)(*inputs.values()).numpy()
    graph = build_graph("denoiser", fused_module("denoiser", nano_base, nano_identity), nano_base, "fp16", plugins=True)
    operators = Counter(node.op_type for node in graph.model.graph if node.domain == plugins.DOMAIN)
    resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in nano_base.unet.modules())
    assert operators == {"gated_projection": 3, "spade_norm": 3 * resnets}  # one of four gammas is zero
    model = graph.save(tmp_path / "model")
    session = onnxruntime.InferenceSession(str(model))
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    assert abs(found - expected).max() < 2e-2 * expected.std()  # halves against fp32; parity allows 5e-2
    stripped = onnx.load(plugins.without_functions(model), load_external_data=False)
    nodes = [node for node in stripped.graph.node if node.domain == plugins.DOMAIN]
    assert not stripped.functions and len(nodes) == sum(operators.values())
    assert all({"plugin_namespace"} < {a.name for a in node.attribute} for node in nodes)


def test_an_old_tensorrt_is_refused(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    module, api = ModuleType("fake_trt"), ModuleType("fake_trt.plugin")
    module.__version__ = "10.8"
    monkeypatch.setitem(sys.modules, "fake_trt", module)
    monkeypatch.setitem(sys.modules, "fake_trt.plugin", api)
    library = replace(load_library("tensorrt-rtx"), module=module, target="tensorrt")
    assert isinstance(library, Library)
    with pytest.raises(MissingBackendError, match="no plugins compiled ahead of time; leave --plugins out, or a later"):
        plugins.load_api(library)


def test_both_plugins_are_registered_with_types_that_are_objects():
    registered = {}

    def into(kind):
        return lambda name: lambda function: registered.setdefault((kind, name), function)

    class TensorDesc: ...

    trtp = SimpleNamespace(
        TensorDesc=TensorDesc, KernelLaunchParams=object, SymExprs=object, register=into("plugin"), aot_impl=into("aot")
    )
    plugins.register(trtp, 89)
    names = ("gated_projection", "spade_norm")
    assert set(registered) == {(kind, f"pfstorer::{name}") for kind in ("plugin", "aot") for name in names}
    types = registered["plugin", "pfstorer::spade_norm"].__annotations__
    assert types["x"] is TensorDesc and types["silu"] is int and types["return"] is TensorDesc
