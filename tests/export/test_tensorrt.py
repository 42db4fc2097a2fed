"""TensorRT-RTX builds real engines, which needs no GPU; tests/engine runs engines."""

import json
import re
import subprocess
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from pfstorer_rt.export import export_plan
from pfstorer_rt.export.build import Progress
from pfstorer_rt.export.graph import build_graph, fuse
from pfstorer_rt.export.tensorrt import BuildOptions, EngineBuilder, plan_profiles

from pfstorer_rt.config import PRESETS
from pfstorer_rt.errors import BadFileError, MissingBackendError, PFStorerError
from pfstorer_rt.models.components import components, denoiser, encoder
from pfstorer_rt.plan import COMPONENTS, Plan
from pfstorer_rt.signing import is_signed, key_path, sign

pytest.importorskip("tensorrt_rtx")
SMALL = BuildOptions(batches=(1, 2))


@pytest.fixture(scope="module")
def rtx_plan(nano_base, nano_identity, tmp_path_factory):
    phases = []
    plan = export_plan(
        tmp_path_factory.mktemp("rtx") / "alice.plan",
        nano_identity,
        nano_base,
        "tensorrt-rtx",
        options=SMALL,
        progress=Progress(phase=lambda *step: phases.append(step)),
    )
    assert phases and all(0 <= done <= total for _, done, total in phases)
    assert {name.split(":")[0] for name, _, _ in phases} == set(COMPONENTS)
    return plan


def test_a_plan_contains_real_engines(rtx_plan, nano_identity):
    manifest = rtx_plan.manifest
    assert (manifest.target, manifest.precision) == ("tensorrt-rtx", "fp16")
    assert manifest.compute_capabilities == ["8.0", "8.6", "8.9", "12.0+"]
    assert manifest.identity_fingerprint == nano_identity.fingerprint
    for component in COMPONENTS:
        payload = manifest.payloads[component]
        data = rtx_plan.read(component)
        assert data[:4] == b"vtrt" and payload.file == f"{component}.engine"
        assert payload.parity["relative"] < 5e-2 and payload.layers["convolution"] > 5
    layers = manifest.payloads["denoiser"].layers
    assert layers["attention_input"] == layers["attention_output"] > 10  # the native operator, not matrix products


def test_a_plan_of_engines_is_signed(rtx_plan, tmp_path, monkeypatch):
    assert rtx_plan.trusted and Plan.open(rtx_plan.path).trusted
    assert key_path().stat().st_mode & 0o777 == 0o600
    data = rtx_plan.manifest.to_json().encode()
    assert is_signed(data, sign(data)) and not is_signed(data + b" ", sign(data))
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path))
    assert not Plan.open(rtx_plan.path).trusted
    assert not key_path().exists()  # reading makes no key
    assert Plan.open(rtx_plan.path, trust=True).trusted
    key_path().write_bytes(b"short")
    with pytest.raises(BadFileError, match="32 bytes, this has 5"):
        sign(b"")


def test_a_corrupted_payload_is_refused(rtx_plan, tmp_path):
    raw = bytearray(rtx_plan.path.read_bytes())
    raw[raw.index(rtx_plan.read("denoiser")) + 5000] ^= 1
    broken = tmp_path / "broken.plan"
    broken.write_bytes(raw)
    plan = Plan.open(broken)
    with pytest.raises(BadFileError, match="denoiser"):
        plan.read("denoiser")


def test_profiles_cover_the_batches_and_image_sizes(nano_base):
    side = nano_base.config.latent_tile
    inputs = {"x": [-1, 4, side, side], "t": [-1], "strength": [1]}
    parts, tile = components(nano_base), nano_base.config.tile
    ladder = plan_profiles(inputs, tile, parts["denoiser"].scales, BuildOptions())
    assert [profile["x"] for profile in ladder] == [[[b, 4, side, side]] * 3 for b in (1, 2, 4, 8)]
    assert [profile["t"] for profile in ladder] == [[[b]] * 3 for b in (1, 2, 4, 8)]
    assert all("strength" not in profile for profile in ladder)
    assert plan_profiles({"image": [-1, 3, -1, -1]}, tile, parts["encoder"].scales, BuildOptions()) == [
        {"image": [[1, 3, tile, tile], [1, 3, tile, tile], [1, 3, 1280, 1280]]}
    ]
    small = BuildOptions(largest_side=16)
    latent = plan_profiles({"latent": [-1, 4, -1, -1]}, tile, parts["decoder"].scales, small)
    assert latent == [{"latent": [[1, 4, side, side]] * 3}]


def build(graph_and_file, base, file, component="denoiser", **options):
    graph, model = graph_and_file
    scales = components(base)[component].scales
    builder = EngineBuilder("tensorrt-rtx", BuildOptions(**options))
    builder.build(component, graph.origins, model, base.config.tile, scales, file)
    return file.read_bytes()


def test_one_engine_with_a_ladder_is_smaller_than_an_engine_for_each_batch(
    rtx_plan, nano_base, nano_identity, tmp_path
):
    graph = build_graph(fuse(denoiser(nano_base, nano_identity)), "fp16")
    half = graph, graph.save(tmp_path)
    single = [len(build(half, nano_base, tmp_path / "engine", batches=(batch,))) for batch in SMALL.batches]
    assert len(rtx_plan.read("denoiser")) < sum(single)


def fused_kernels(engine):
    """The number of fused attentions of an engine.

    The engine keeps the source of the kernels that are compiled where it runs; a fused attention names its traits.
    """
    return len(re.findall(rb"using Kernel_traits = fmha::", engine))


@pytest.mark.parametrize(("head_size", "fused"), [(PRESETS["portrait"].head_size, 1), (PRESETS["nano"].head_size, 0)])
def test_an_attention_with_the_heads_of_the_shipped_base_is_fused(head_size, fused, tmp_path):
    shape = ["batch", 4, 1024, head_size]
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in group] for group in ("qkv", "o")
    ]
    graph = helper.make_graph([helper.make_node("Attention", list("qkv"), ["o"])], "attention", *ports)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "a.onnx")
    builder = EngineBuilder("tensorrt-rtx", BuildOptions(batches=(1,)))
    built = builder.build("denoiser", {}, tmp_path / "a.onnx", 64, {}, tmp_path / "engine")
    assert built.layers["attention_input"] == 1
    assert fused_kernels((tmp_path / "engine").read_bytes()) == fused


@pytest.mark.slow
def test_the_shipped_base_is_built_with_fused_attention(tmp_path):
    plan = export_plan(tmp_path / "portrait.plan", None, "portrait", "tensorrt-rtx", options=BuildOptions(batches=(1,)))
    attention = plan.manifest.payloads["denoiser"].layers["attention_input"]
    # The structure encoder's four have one head, which no kernel takes.
    assert attention == 22 and fused_kernels(plan.read("denoiser")) >= 18
    assert {payload.precision for payload in plan.manifest.payloads.values()} == {"fp16"}


def test_fp32_engines_are_built(nano_base, nano_identity, tmp_path):
    options = BuildOptions(batches=(1,), compute_capabilities=("8.9",))
    plan = export_plan(tmp_path / "a.plan", nano_identity, nano_base, "tensorrt-rtx", "fp32", options)
    assert plan.manifest.precision == "fp32" and plan.read("denoiser")[:4] == b"vtrt"
    layers = plan.manifest.payloads["denoiser"].layers
    assert "attention_input" not in layers and layers["softmax"] > 10


def test_compute_capabilities_are_sorted_and_built(nano_base, tmp_path):
    graph = build_graph(fuse(encoder(nano_base)), "fp16")
    options = BuildOptions(compute_capabilities=("12.0", "8.9"))
    builder = EngineBuilder("tensorrt-rtx", options)
    assert builder.capabilities == ["8.9", "12.0"]
    model, scales = graph.save(tmp_path), encoder(nano_base).scales
    builder.build("encoder", graph.origins, model, nano_base.config.tile, scales, tmp_path / "engine")
    assert (tmp_path / "engine").read_bytes()[:4] == b"vtrt"


@pytest.mark.parametrize("name", ["8.99", "nine", "9.0", "89"])
def test_unknown_compute_capabilities_are_refused_at_once(name, tmp_path):
    options = BuildOptions(compute_capabilities=(name,))
    with pytest.raises(MissingBackendError, match=rf"capability '{name}'.*builds for .*8\.9.* or current"):
        export_plan(tmp_path / "a.plan", None, "no such base", "tensorrt-rtx", options=options)


def test_known_compute_capabilities_are_listed_in_the_order_of_their_numbers():
    with pytest.raises(MissingBackendError) as caught:
        EngineBuilder("tensorrt-rtx", BuildOptions(compute_capabilities=("1.0",)))
    listed = str(caught.value).split("builds for ")[1].split(" or current")[0].split(", ")
    assert len(listed) > 3 and listed == sorted(listed, key=lambda name: [int(n) for n in name.split(".")])


def test_the_current_capability_needs_a_gpu(without_gpu):
    with pytest.raises(MissingBackendError, match="torch sees none"):
        EngineBuilder("tensorrt-rtx", BuildOptions(compute_capabilities=("current",)))


def test_a_gpu_that_tensorrt_rtx_refuses_is_refused_before_the_build(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake H100")
    with pytest.raises(MissingBackendError, match=r"does not run on the Fake H100 \(compute capability 9\.0\); use"):
        EngineBuilder("tensorrt-rtx", BuildOptions(compute_capabilities=("current",)))


def test_the_current_capability_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU")
    builder = EngineBuilder("tensorrt-rtx", BuildOptions(compute_capabilities=("current",)))
    assert builder.capabilities == ["8.6"]
    trt = builder.library.module
    config = trt.Builder(builder.library.logger()).create_builder_config()
    builder._configure(config)
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.CURRENT
    with pytest.raises(MissingBackendError, match="this machine's GPU alone"):
        EngineBuilder("tensorrt-rtx", BuildOptions(compute_capabilities=("8.9", "current")))


def test_the_full_tensorrt_builds_for_its_own_gpu_alone(monkeypatch):
    module = pytest.importorskip("tensorrt_rtx")  # the same interface
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(MissingBackendError, match="times kernels on the GPU that it builds for"):
        EngineBuilder("tensorrt", BuildOptions(compute_capabilities=("8.9",)))


def test_a_missing_library_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'pfstorer-rt\[tensorrt\]'"):
        export_plan(tmp_path / "a.plan", None, "no such base", "tensorrt")


def test_a_node_that_the_parser_rejects_is_named_with_its_module(nano_base, tmp_path):
    graph = build_graph(fuse(encoder(nano_base)))
    model = graph.save(tmp_path)
    proto = onnx.load(model)
    node = next(n for n in proto.graph.node if n.op_type == "Conv")
    assert graph.origins[node.name] == "vae.encoder.layers.0"
    node.op_type = "NoSuchOperator"
    onnx.save(proto, model)
    with pytest.raises(PFStorerError, match=rf"NoSuchOperator '{node.name}' of vae\.encoder\.layers\.0: "):
        build((graph, model), nano_base, tmp_path / "engine", "encoder")


def test_a_failed_build_reports_the_reason(nano_base, tmp_path):
    graph = build_graph(fuse(encoder(nano_base)), "fp16")
    with pytest.raises(PFStorerError, match=r"encoder: .* could not build an engine \(\S+"):
        build((graph, graph.save(tmp_path)), nano_base, tmp_path / "engine", "encoder", workspace=1)


def test_a_shared_denoiser_is_built_with_the_identity_as_inputs(nano_base, nano_identity, tmp_path):
    component = fuse(denoiser(nano_base, nano_identity))
    graph = build_graph(component, "fp16", identity="inputs")
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph.save(tmp_path))), parser.get_error(0).desc()
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    assert names == ["x", "t", "z_lq", "strength", *component.module.identity_tensors()]


SD21 = """
import gc, json, resource, sys
from pathlib import Path
from pfstorer_rt.export.build import halve_weights
from pfstorer_rt.export.graph import build_graph, fuse
from pfstorer_rt.export.tensorrt import BuildOptions, EngineBuilder
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.components import components

base, folder, saved = build_base("sd21"), Path(sys.argv[1]), {}
halve_weights(base)
for name, component in components(base).items():
    graph = build_graph(fuse(component), "fp16")
    saved[name] = graph.save(folder / name), graph.origins, component.scales
tile, built = base.config.tile, {}
del base, graph, component
gc.collect()
for component, (model, origins, scales) in saved.items():
    file = folder / f"{component}.engine"
    builder = EngineBuilder("tensorrt-rtx", BuildOptions(batches=(1,)))
    about = builder.build(component, origins, model, tile, scales, file)
    with file.open("rb") as handle:
        built[component] = {"mark": handle.read(4).decode(), "bytes": file.stat().st_size, "layers": about.layers}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "built": built}))
"""


@pytest.mark.slow
def test_a_full_size_base_is_built_within_12_gb(tmp_path):
    run = subprocess.run([sys.executable, "-c", SD21, str(tmp_path)], capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    assert report["peak"] < 12e9
    for component, built in report["built"].items():
        assert built["mark"] == "vtrt", component
    assert report["built"]["denoiser"]["bytes"] > 1.7e9
    # 16 spatial transformers with two each, 7 in the structure encoder.
    assert report["built"]["denoiser"]["layers"]["attention_input"] == 2 * 16 + 7
