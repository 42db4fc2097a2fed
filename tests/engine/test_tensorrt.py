import gc
import os
import sys
import weakref
import zipfile
from dataclasses import replace

import fake_tensorrt as fake
import numpy as np
import pytest
import torch

import pfstorer_rt.engine.tensorrt as engine
from pfstorer_rt.cli.export import resolve_target
from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.engine.cuda import Cuda
from pfstorer_rt.engine.session import choose_backend, open_session
from pfstorer_rt.engine.tensorrt import Library, TensorRTSession, check_fits, load_library
from pfstorer_rt.errors import BadFileError, MismatchError, MissingBackendError, PFStorerError
from pfstorer_rt.files import cache_home, sha256_bytes
from pfstorer_rt.plan import COMPONENTS, Plan, write_plan
from pfstorer_rt.runtime.restorer import Restorer

LADDER = [{"x": [[b, 3]] * 3} for b in (1, 2, 4)]


def scaled(x, strength):
    return {"y": x * 2 + strength}


def scaled_payload(types=None):
    inputs, outputs = {"x": [-1, 3], "strength": [1]}, {"y": lambda shapes: shapes["x"]}
    return fake.payload("scaled", inputs, outputs, LADDER, types)


def open_scaled(cuda=None, types=None, graphs=True, **options):
    """Open the engine `scaled`; returns (session, GPU, log). options: of `make_library`."""
    cuda = cuda or fake.FakeCuda()
    module = fake.make_library(cuda, {"scaled": scaled}, **options)
    return TensorRTSession(Library("tensorrt-rtx", module), scaled_payload(types), cuda, graphs), cuda, module.log


def runs(log):
    return [entry[2] for entry in log if entry[0] == "run"]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
def test_any_number_of_rows_runs_in_the_profiles(rows):
    session, _, log = open_scaled()
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    found = session.compute(x=x, strength=torch.tensor([0.5]))["y"]
    assert torch.equal(found, x * 2 + 0.5)
    sizes = {1: [1], 2: [2], 3: [4], 4: [4], 5: [4, 1], 8: [4, 4], 9: [4, 4, 1]}[rows]
    assert [len(inputs["x"]) for inputs in runs(log)] == sizes
    assert all(inputs["strength"].shape == (1,) for inputs in runs(log))
    if rows == 3:  # filled up with the last row: zeros would be another image's statistics
        assert torch.equal(runs(log)[0]["x"][3], x[2])


def test_calls_with_wrong_inputs_or_rows_are_refused():
    inputs, outputs = {"x": [-1, 3], "t": [-1]}, {"y": lambda shapes: shapes["x"]}
    data = fake.payload("two", inputs, outputs, [{"x": [[4, 3]] * 3, "t": [[4]] * 3}])
    cuda = fake.FakeCuda()
    module = fake.make_library(cuda, {})
    session = TensorRTSession(Library("tensorrt", module), data, cuda)
    x, t = torch.ones(3, 3), torch.ones(3)
    for wrong in ({"x": x}, {"x": x, "t": t, "strength": t}):
        with pytest.raises(ValueError, match=r"inputs x.*: this engine takes x, t$"):
            session.compute(**wrong)
    for wrong in ({"x": x, "t": t[:1]}, {"x": x[:0], "t": t[:0]}):
        with pytest.raises(ValueError, match=r"rows of the inputs \{'x': \d, 't': \d\}: expected one or more"):
            session.compute(**wrong)
    assert cuda.memory == {}


def test_names_and_types_come_from_the_engine():
    session, _, log = open_scaled(types={"x": "HALF", "y": "HALF"})
    assert session.inputs == ("x", "strength") and session.outputs == ("y",)
    assert session.provider == "TensorRT-RTX 1.7.1.116 on Fake GPU 4090"
    out = session.run(strength=np.ones(1, np.float32), x=np.full((1, 3), 1 / 3, np.float32))["y"]
    assert runs(log)[0]["x"].dtype == torch.float16 and runs(log)[0]["strength"].dtype == torch.float32
    assert out.dtype == np.float32 and np.allclose(out, 5 / 3, atol=1e-3)


def test_buffers_are_allocated_once_for_a_shape():
    session, cuda, _ = open_scaled()
    for rows in (1, 4, 3, 1, 4):
        session.compute(x=torch.ones(rows, 3), strength=torch.zeros(1))
    assert len(cuda.memory) == 2 * 3  # two profiles, three tensors each


def test_an_output_survives_the_next_run():
    session, _, _ = open_scaled()
    first = session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))["y"]
    session.compute(x=torch.zeros(1, 3), strength=torch.zeros(1))
    assert torch.equal(first, torch.full((1, 3), 2.0))


def test_a_profile_is_captured_once_after_a_plain_run_and_replayed():
    session, cuda, _ = open_scaled()
    for i in range(4):
        found = session.compute(x=torch.full((2, 3), float(i)), strength=torch.zeros(1))["y"]
        assert torch.equal(found, torch.full((2, 3), 2.0 * i))
    assert (cuda.captures, cuda.replays) == (1, 3)
    session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))
    assert cuda.captures == 1  # another profile, first run
    assert session.no_graph == ""


@pytest.mark.parametrize(("graphs", "strategy"), [(True, "EAGER"), (False, "LAZY")])
def test_kernels_are_compiled_before_they_are_captured(graphs, strategy):
    session, cuda, log = open_scaled(graphs=graphs)
    for _ in range(2):
        session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))
    assert ("context", strategy) in log and cuda.captures == graphs


def test_a_failed_capture_falls_back_to_plain_runs():
    session, cuda, log = open_scaled(fake.FakeCuda(capturable=False))
    for i in range(3):
        found = session.compute(x=torch.full((2, 3), float(i)), strength=torch.zeros(1))["y"]
        assert torch.equal(found, torch.full((2, 3), 2.0 * i))
    assert cuda.captures == 1 and "not permitted when stream is capturing" in session.no_graph
    assert len(runs(log)) == 3


def test_a_stream_that_cannot_be_captured_is_not_captured():
    session, cuda, _ = open_scaled(capturable=False)
    for _ in range(2):
        session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))
    assert cuda.captures == 0 and session.no_graph


def test_varying_shapes_are_bound_again_and_not_captured():
    profile = {"image": [[1, 1, 4, 4], [1, 1, 4, 4], [1, 1, 8, 8]]}
    data = fake.payload("sum", {"image": [-1, 1, -1, -1]}, {"y": lambda s: (s["image"][0], 1)}, [profile])
    cuda = fake.FakeCuda()
    module = fake.make_library(cuda, {"sum": lambda image: {"y": image.sum((1, 2, 3))[:, None]}})
    session = TensorRTSession(Library("tensorrt", module), data, cuda)
    for side in (4, 8, 4, 4):
        assert session.compute(image=torch.ones(1, 1, side, side))["y"].item() == side**2
    assert cuda.captures == 0
    for shape in ((1, 1, 9, 4), (1, 1, 3, 4), (1, 1, 4)):
        told = rf"image of shape \[{', '.join(map(str, shape))}\].*takes \[1, 1, 4, 4\] to \[1, 1, 8, 8\]"
        with pytest.raises(PFStorerError, match=told):
            session.compute(image=torch.ones(shape))
    assert session.compute(image=torch.ones(1, 1, 4, 4))["y"].item() == 16  # a refusal changes nothing
    two = session.compute(image=torch.ones(2, 1, 4, 4))["y"]
    assert two.flatten().tolist() == [16.0, 16.0]


def test_a_graph_of_other_shapes_is_not_replayed():
    profile = {"image": [[1, 1], [1, 1], [1, 8]]}
    data = fake.payload("sum", {"image": [-1, -1]}, {"y": lambda s: (s["image"][0], 1)}, [profile])
    cuda = fake.FakeCuda()
    module = fake.make_library(cuda, {"sum": lambda image: {"y": image.sum(1)[:, None]}})
    session = TensorRTSession(Library("tensorrt", module), data, cuda, graphs=True)
    for side in (4, 4, 4, 8, 4):
        assert session.compute(image=torch.ones(1, side))["y"].item() == side
    assert (cuda.captures, cuda.replays) == (1, 2)  # of the second and the third run
    cuda.full = (1, 1)  # no memory for the output
    with pytest.raises(MemoryError):
        session.compute(image=torch.ones(1, 5))
    cuda.full = None
    assert session.compute(image=torch.ones(1, 4))["y"].item() == 4


def test_a_failed_run_raises_an_error_with_the_reason():
    session, _, _ = open_scaled(error="misaligned address")
    with pytest.raises(PFStorerError, match=r"TensorRT-RTX 1.* on Fake GPU 4090 failed \(misaligned address\)"):
        session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))


def kernel_cache(version):
    """The file of the kernels that are compiled for the engine `scaled`."""
    name = f"{sha256_bytes(scaled_payload())[:32]}_{version}_Fake-GPU-4090.cache"
    return cache_home() / "tensorrt-rtx" / name


def test_compiled_kernels_are_cached_for_the_next_start():
    with open_scaled()[0] as session:
        session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))
        path = kernel_cache("1.7.1.116")
        assert not path.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    kept = path.read_bytes()
    os.utime(path, (1, 1))
    session, _, log = open_scaled()
    with session:
        assert ("cache", kept) in log and ("set cache",) in log
    assert path.stat().st_mtime == 1  # nothing new, nothing written
    path.write_bytes(b"rubbish")
    session, _, log = open_scaled()
    with session:
        assert not any(entry[0] == "cache" for entry in log) and ("set cache",) in log
        assert session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))["y"].sum() == 6
    assert path.read_bytes().startswith(b"kernels")
    path.unlink()
    path.mkdir()  # cannot be read or written
    with open_scaled()[0] as session:
        assert session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))["y"].sum() == 6
    path.rmdir()


def test_a_library_without_runtime_cache_and_validity_check_works():
    session, cuda, log = open_scaled(
        drop=(
            "IRuntimeConfig.create_runtime_cache",
            "Runtime.get_engine_validity",
            "ICudaEngine.create_runtime_config",
            "IExecutionContext.is_stream_capturable",
            "DynamicShapesKernelSpecializationStrategy",
        ),
        version="10.16.1",
    )
    with session:
        for _ in range(3):
            assert session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))["y"].sum() == 6
    assert ("context", None) in log and cuda.captures == 1 and not kernel_cache("10.16.1").exists()


def test_a_failing_runtime_cache_is_ignored():
    with open_scaled(config=fake.FailingConfig)[0] as session:
        assert session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))["y"].sum() == 6


def test_closing_frees_the_engine_after_an_error():
    cuda = fake.FakeCuda(broken=RuntimeError("misaligned address"))
    session, _, _ = open_scaled(cuda)
    session.compute(x=torch.ones(1, 3), strength=torch.zeros(1))
    buffers = [weakref.ref(tensor) for tensor in cuda.memory.values()]
    cuda.memory.clear()
    assert all(buffer() is not None for buffer in buffers)
    with pytest.raises(RuntimeError, match="misaligned address"), session:
        pass
    gc.collect()
    assert all(buffer() is None for buffer in buffers)


def test_payloads_that_are_no_engine_are_refused():
    cuda = fake.FakeCuda()
    module = fake.make_library(cuda, {})
    library = Library("tensorrt-rtx", module)
    with pytest.raises(BadFileError, match="version mismatch, malformed engine"):
        TensorRTSession(library, b"not an engine at all", cuda)
    assert ("deserialize",) not in module.log
    with pytest.raises(BadFileError, match=r"machine \(CUDA driver version is insufficient\)"):
        TensorRTSession(library, b"no driver... for it", cuda)
    with pytest.raises(BadFileError, match=r"cannot be loaded by TensorRT-RTX \(magic tag does not match\)"):
        TensorRTSession(library, fake.ENGINE + b"unknown", cuda)


def tensorrt_plan(source, path, **changes):
    """An ONNX plan turned into one of fake engines: (plan, functions of the engines)."""
    made = {c: fake.from_onnx_plan(source, c) for c in COMPONENTS}
    payloads = {
        c: replace(entry, file=f"{c}.engine", sha256=sha256_bytes(made[c][0]))
        for c, entry in source.manifest.payloads.items()
    }
    about = {
        "target": "tensorrt-rtx",
        "compute_capabilities": ["8.0", "8.6", "8.9", "12.0+"],
        "payloads": payloads,
        "tools": {**source.manifest.tools, "tensorrt-rtx": "1.7.1.116"},
        **changes,
    }
    plan = write_plan(path, replace(source.manifest, **about), {c: made[c][0] for c in COMPONENTS})
    return plan, {c: made[c][1] for c in COMPONENTS}


@pytest.fixture
def fake_gpu(monkeypatch):
    """Function functions -> (cuda, module): puts a fake GPU and library in the place of real ones."""

    def put(functions, **gpu):
        cuda = fake.FakeCuda(**gpu)
        module = fake.make_library(cuda, functions)
        monkeypatch.setattr(engine, "Cuda", lambda: cuda)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
        return cuda, module

    return put


@pytest.mark.parametrize("name", ["nano_plan", "base_plan"])
def test_engines_restore_the_same_image_as_their_graphs(name, request, tmp_path, make_image, fake_gpu):
    source = request.getfixturevalue(name)
    plan, functions = tensorrt_plan(source, tmp_path / "a.plan")
    cuda, _ = fake_gpu(functions)
    config = RestoreConfig(steps=2, sampler="ddpm", strength=1.0, tile=TileConfig(batch=3))
    pixels = make_image(70, 90)  # four tiles: a whole batch and a part of one
    with Restorer.from_plan(source.path, "onnxruntime") as restorer:
        expected = restorer.restore(pixels, config)
    with Restorer.from_plan(plan.path) as restorer:
        assert restorer.backend == "tensorrt"
        found = restorer.restore(pixels, config)
    assert np.array_equal(found, expected)
    assert cuda.captures > 0 and cuda.replays > 0


def test_plans_of_another_gpu_or_release_are_refused_before_loading(base_plan, tmp_path, fake_gpu):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    _, module = fake_gpu(functions, capability=(7, 5))
    with pytest.raises(MismatchError, match=r"8\.0, 8\.6, 8\.9, 12\.0\+, the Fake GPU 4090 here has 7\.5") as caught:
        open_session(plan, "encoder", "tensorrt")
    assert caught.value.rebuild == plan.rebuild(current=True) and "export the plan again" in str(caught.value)
    other, _ = tensorrt_plan(base_plan, tmp_path / "b.plan", tools={"tensorrt-rtx": "2.0.0.1"})
    with pytest.raises(MismatchError, match=r"built by TensorRT-RTX 2\.0\.0\.1, this machine has 1\.7\.1\.116"):
        open_session(other, "encoder", "tensorrt")
    assert module.log == []


@pytest.mark.parametrize("capability", [(7, 0), (9, 0), (10, 3), (11, 0)])
def test_tensorrt_rtx_is_refused_on_gpus_that_it_does_not_support(
    base_plan, tmp_path, fake_gpu, monkeypatch, capability
):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    _, module = fake_gpu(functions, capability=capability)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = rf"TensorRT-RTX does not run on the Fake GPU 4090 \(compute capability {capability[0]}\.{capability[1]}\)"
    with pytest.raises(MissingBackendError, match=reason):
        engine.check()
    with pytest.raises(MissingBackendError, match=reason):
        engine.open_component(plan, "encoder")
    assert resolve_target("auto", "auto") == "onnx" and module.log == []
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert engine.usable_target() == resolve_target("auto", "fp16") == "tensorrt"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_auto_takes_tensorrt_rtx_where_it_runs(fake_gpu, capability):
    fake_gpu({}, capability=capability)
    assert engine.usable_target() == resolve_target("auto", "auto") == "tensorrt-rtx"
    assert resolve_target("auto", "int8") == resolve_target("onnx", "auto") == "onnx"


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        (["8.9"], (8, 9), True),
        (["8.9"], (8, 6), False),
        (["12.0+"], (12, 1), True),
        (["12.0+"], (10, 0), False),
        (["8.0", "12.0+"], (13, 0), True),
        ([], (8, 9), False),
    ],
)
def test_compute_capabilities(base_plan, built, here, fits):
    tools = {"tensorrt-rtx": "1.2"}
    plan = Plan(base_plan.path, replace(base_plan.manifest, compute_capabilities=built, tools=tools))
    library = Library("tensorrt-rtx", fake.make_library(None, {}, version="1.7"))
    if fits:
        check_fits(plan, library, fake.FakeCuda(here))
    else:
        with pytest.raises(MismatchError):
            check_fits(plan, library, fake.FakeCuda(here))


def test_untrusted_plans_are_refused(base_plan, tmp_path, fake_gpu, monkeypatch, make_image):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    _, module = fake_gpu(functions)
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "another user"))
    with pytest.raises(BadFileError, match=r"executable code.*not built by you.*trust this plan") as refusal:
        Restorer.from_plan(plan.path)
    assert module.log == [] and refusal.value.setting == "trust"
    with Restorer.from_plan(plan.path, trust=True) as restorer:
        assert restorer.restore(make_image(64, 64)).shape == (64, 64, 3)
    # Its own key does not make a foreign plan its own.
    tensorrt_plan(base_plan, tmp_path / "own.plan")
    assert Plan.open(tmp_path / "own.plan").trusted and not Plan.open(plan.path).trusted


def test_a_changed_manifest_breaks_the_signature(base_plan, tmp_path, fake_gpu):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    fake_gpu(functions)
    changed = tmp_path / "b.plan"
    with zipfile.ZipFile(plan.path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            new.writestr(entry, data.replace(b'"licence": "', b'"licence": "x') if entry == "manifest.json" else data)
    assert plan.trusted and not Plan.open(changed).trusted
    with pytest.raises(BadFileError, match="or was changed"):
        open_session(Plan.open(changed), "encoder", "tensorrt")
    unsigned = tmp_path / "c.plan"
    with zipfile.ZipFile(plan.path) as old, zipfile.ZipFile(unsigned, "w") as new:
        for entry in old.namelist():
            if entry != "signature":
                new.writestr(entry, old.read(entry))
    assert not Plan.open(unsigned).trusted


def test_a_flipped_byte_of_an_engine_is_refused_before_loading(base_plan, tmp_path, fake_gpu):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    _, module = fake_gpu(functions)
    raw = bytearray(plan.path.read_bytes())
    raw[raw.index(fake.ENGINE + b"decoder") + 3] ^= 1
    plan.path.write_bytes(raw)
    with pytest.raises(BadFileError, match="decoder"):
        open_session(Plan.open(plan.path), "decoder", "tensorrt")
    assert module.log == []


def test_an_engine_that_does_not_load_names_the_export_command(base_plan, tmp_path, fake_gpu, monkeypatch):
    plan, functions = tensorrt_plan(base_plan, tmp_path / "a.plan")
    fake_gpu(functions)
    monkeypatch.delitem(fake.ENGINES, "decoder")
    told = r"a\.plan: the decoder cannot be loaded by TensorRT-RTX \(magic tag does not match\); export the plan again"
    with pytest.raises(BadFileError, match=told) as refusal:
        open_session(plan, "decoder", "tensorrt")
    assert refusal.value.rebuild == plan.rebuild()


def test_a_plan_without_a_gpu_is_refused(base_plan, tmp_path, without_gpu):
    plan, _ = tensorrt_plan(base_plan, tmp_path / "a.plan")
    with pytest.raises(MissingBackendError, match=r"TensorRT needs an NVIDIA GPU: (this torch|torch sees)"):
        Restorer.from_plan(plan.path)
    with pytest.raises(MissingBackendError, match="NVIDIA GPU"):
        Cuda()
    assert choose_backend("auto", "onnx").name in ("openvino", "onnxruntime")


def test_a_missing_library_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'pfstorer-rt\[tensorrt-rtx\]'"):
        load_library("tensorrt-rtx")

    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingBackendError, match=r"libnvinfer.*: pip install 'pfstorer-rt\[tensorrt\]'"):
        load_library("tensorrt")


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_the_backend_needs_a_gpu_and_one_of_the_libraries(library, monkeypatch, without_gpu, fake_gpu):
    with pytest.raises(MissingBackendError, match="needs an NVIDIA GPU"):
        engine.check()
    fake_gpu({})
    for name in engine.MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingBackendError, match=r"rt\[tensorrt-rtx\]'; .*rt\[tensorrt\]'"):
        engine.check()
    monkeypatch.setitem(sys.modules, library, fake.make_library(None, {}))
    engine.check()


def test_the_real_library_has_every_used_name():
    trt = pytest.importorskip("tensorrt_rtx")
    library = Library("tensorrt-rtx", trt)
    used = [
        "Runtime.deserialize_cuda_engine",
        "Runtime.engine_header_size",
        "Runtime.get_engine_validity",
        "EngineValidity.INVALID",
        "TensorIOMode.INPUT",
        "ILogger.ERROR",
        "ILogger.INTERNAL_ERROR",
        "ICudaEngine.get_tensor_profile_shape",
        "ICudaEngine.create_runtime_config",
        "ICudaEngine.num_io_tensors",
        "ICudaEngine.num_optimization_profiles",
        "ICudaEngine.get_tensor_mode",
        "ICudaEngine.get_tensor_dtype",
        "ICudaEngine.get_tensor_shape",
        "ICudaEngine.create_execution_context",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.serialize",
        "IRuntimeCache.deserialize",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.get_tensor_shape",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "EngineInvalidityDiagnostics.MALFORMED_ENGINE",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        *(f"DataType.{kind}" for kind in ("FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL")),
    ]
    assert [name for name in used if not library.has(name)] == []
    assert not library.has("IRuntimeConfig.no_such_thing")
    assert engine._diagnostics(library, 2 | 64) == "unsupported cc, cuda error"
    messages = library.logger()
    for severity, message in ((trt.ILogger.WARNING, "a"), (trt.ILogger.ERROR, "b\n c"), (trt.ILogger.ERROR, "d")):
        messages.log(severity, message)
    assert messages.last() == "b c; d"
    assert library.logger() is messages and messages.last() == ""
    with pytest.raises(BadFileError, match=r"is no engine for this machine \(malformed engine\)"):
        TensorRTSession(library, b"not an engine" * 10, fake.FakeCuda())
