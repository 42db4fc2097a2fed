import json
import re
import sys
import zipfile
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pfstorer_rt.export.build import TARGETS

from pfstorer_rt.engine import onnxruntime as ort_engine
from pfstorer_rt.engine.openvino import OpenVinoSession
from pfstorer_rt.engine.session import BACKENDS, Backend, choose_backend, open_session
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import BadFileError, MismatchError, MissingBackendError, PFStorerError, SettingError
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.models.components import encoder, manifest
from pfstorer_rt.ops import math, sdpa
from pfstorer_rt.plan import COMPONENTS, Plan, write_plan
from pfstorer_rt.runtime.doctor import diagnose
from pfstorer_rt.runtime.restorer import Restorer


def without(monkeypatch, *modules):
    """Make `import module` fail as if it were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_every_target_has_a_backend_and_every_backend_a_target():
    assert {target for backend in BACKENDS.values() for target in backend.targets} == set(TARGETS)
    assert all(backend.targets for backend in BACKENDS.values())


def test_auto_chooses_the_fastest_installed_backend(monkeypatch):
    assert choose_backend().name == "openvino" and choose_backend().refused == {}
    without(monkeypatch, "openvino")
    choice = choose_backend()
    assert choice.name == "onnxruntime"
    assert choice.open_component is ort_engine.open_component
    assert choice.refused == {"openvino": "openvino is not installed: pip install 'pfstorer-rt[openvino]'"}


def test_auto_prefers_onnxruntime_with_cuda_to_openvino(monkeypatch):
    on_gpu = ModuleType("onnxruntime_on_gpu")
    vars(on_gpu).update(on_gpu=lambda: True, check=lambda: None, open_component=None)
    monkeypatch.setitem(sys.modules, "onnxruntime_on_gpu", on_gpu)
    monkeypatch.setitem(BACKENDS, "onnxruntime", Backend("onnxruntime_on_gpu", ("onnx",)))
    assert choose_backend().name == "onnxruntime"


def test_errors_name_the_package_to_install(monkeypatch):
    without(monkeypatch, "onnxruntime", "openvino")
    with pytest.raises(MissingBackendError, match=r"openvino is not installed: pip install 'pfstorer-rt\[openvino\]'"):
        choose_backend("openvino")
    with pytest.raises(MissingBackendError, match="pip install onnxruntime"):
        choose_backend("onnxruntime")
    with pytest.raises(MissingBackendError, match=r"openvino is not .*; onnxruntime is not"):
        choose_backend("auto")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="expected auto, torch or one of tensorrt, openvino, onnxruntime"):
        choose_backend("coreml")


def test_choosing_a_backend_imports_no_other_backend(monkeypatch):
    for name in BACKENDS:
        if name != "openvino":
            monkeypatch.setitem(BACKENDS, name, Backend("no_such_module", ("onnx",)))
    assert choose_backend("openvino").name == "openvino"


def test_an_onnxruntime_session_runs_the_decoder(base_plan):
    with open_session(base_plan, "decoder", "onnxruntime") as session:
        assert (session.inputs, session.outputs) == (("latent",), ("image",))
        assert session.provider in ort_engine.providers()
        found = session.run(latent=np.zeros((2, 4, 8, 8), np.float32))
    assert found["image"].shape == (2, 3, 64, 64)
    assert found["image"].dtype == np.float32


@pytest.mark.parametrize("identity", [False, True])
def test_torch_sessions_have_the_inputs_and_outputs_of_the_plan(
    identity, nano_base, nano_identity, nano_plan, base_plan
):
    plan = nano_plan if identity else base_plan
    for name, session in open_sessions(nano_base, nano_identity if identity else None).items():
        payload = plan.manifest.payloads[name]
        with open_session(plan, name, "onnxruntime") as other:
            assert (session.inputs, session.outputs) == (other.inputs, other.outputs)
        assert set(session.inputs) == payload.inputs.keys()
        assert set(session.outputs) == payload.outputs.keys()


def test_a_variational_encoder_returns_mean_and_deviation(nano_base):
    variational = replace(nano_base, vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    assert encoder(nano_base).outputs == ("mean",)
    assert encoder(variational).outputs == ("mean", "std")
    assert len(encoder(variational).module(torch.zeros(1, 3, 64, 64))) == 2


def test_sessions_of_one_base_keep_their_own_kernels(nano_base):
    before = nano_base.unet.kernels
    first, second = (open_sessions(nano_base, attention=name)["denoiser"].module.unet for name in ("math", "sdpa"))
    assert (first.kernels.attention, second.kernels.attention) == (math, sdpa)
    assert nano_base.unet.kernels is before
    assert first.conv_in.weight.data_ptr() == nano_base.unet.conv_in.weight.data_ptr()  # no copy of the weights


def test_the_manifest_of_a_base_equals_the_manifest_of_its_plan(nano_base, nano_identity, nano_plan):
    made = manifest(nano_base, nano_identity, "onnx")
    expected = replace(nano_plan.manifest, payloads={}, tools={})
    assert made == expected


def with_payload(plan, path, component, data, **changes):
    """A plan whose manifest is right about a payload that is not."""
    parts = {c: plan.read(c) for c in COMPONENTS} | {component: data}
    entries = dict(plan.manifest.payloads)
    entries[component] = replace(entries[component], sha256=sha256_bytes(data))
    return write_plan(path, replace(plan.manifest, payloads=entries, **changes), parts)


@pytest.mark.parametrize("data", [b"", b"not a graph at all", bytes(200)])
def test_payloads_that_are_no_graph_are_refused(base_plan, tmp_path, data):
    plan = with_payload(base_plan, tmp_path / "bad.plan", "decoder", data)
    with pytest.raises(BadFileError, match=r"cannot load the decoder|decoder is not an ONNX graph") as caught:
        open_session(plan, "decoder", "onnxruntime")
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_refused_before_it_runs(base_plan, tmp_path):
    raw = bytearray(base_plan.path.read_bytes())
    raw[raw.index(base_plan.read("denoiser")) + 1000] ^= 4
    path = tmp_path / "flipped.plan"
    path.write_bytes(raw)
    with pytest.raises(BadFileError, match="denoiser"):
        Restorer.from_plan(path, "onnxruntime")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_plans_for_another_target_are_refused(base_plan, backend):
    foreign = Plan(base_plan.path, replace(base_plan.manifest, target="tensorrt"))
    with pytest.raises(MissingBackendError, match="target onnx, this one was built for tensorrt"):
        open_session(foreign, "decoder", backend)
    with pytest.raises(MissingBackendError, match=r"target tensorrt or tensorrt-rtx, .* built for onnx"):
        open_session(base_plan, "decoder", "tensorrt")


def test_sessions_compute_with_arrays_of_their_own_kind(base_plan, nano_base):
    z = torch.randn(2, nano_base.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for session in (open_session(base_plan, "decoder", "onnxruntime"), open_sessions(nano_base)["decoder"]):
        with session:
            by_array, own = session.run(latent=z.numpy()), session.compute(latent=session.place(z))
            turned = session.run(latent=z.flip(2).numpy()[:, :, ::-1])  # arrays that tensors cannot share memory with
            assert np.array_equal(turned["image"], by_array["image"])
            assert type(own["image"]) is type(session.place(np.zeros(1)))
            assert np.array_equal(by_array["image"], session.fetch(own["image"]))


def test_torch_backend_finds_base_and_identity(nano_plan, nano_base_dir, nano_identity, make_image):
    from pfstorer_rt.identity import identity_path

    with pytest.raises(MismatchError, match=r"identity '.*' is not in .*identities"):
        Restorer.from_plan(nano_plan.path, "torch", nano_base_dir)
    file = nano_identity.save(identity_path("kept-under-another-name"))
    try:
        with Restorer.from_plan(nano_plan.path, "torch", nano_base_dir) as restorer:
            assert restorer.backend == "torch"
            assert restorer.manifest.identity_fingerprint == nano_identity.fingerprint
    finally:
        file.unlink()


def test_torch_backend_refuses_another_base(base_plan, tmp_path):
    from pfstorer_rt.models.base import build_base

    other = build_base("nano", seed=5).save(tmp_path / "other")
    with pytest.raises(MismatchError, match="the plan was made of base 'nano'"):
        Restorer.from_plan(base_plan.path, "torch", other)


def test_sessions_are_closed_with_the_restorer(base_plan):
    with Restorer.from_plan(base_plan.path, "onnxruntime") as restorer:
        session = restorer.sessions["decoder"]
        session.run(latent=np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(SettingError, match="closed; open the plan again"):
        session.run(latent=np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        ("can't alloc", PFStorerError, "too little memory to load the encoder; close other programs"),
        ("no kernel", BadFileError, "cannot load the encoder (no kernel)"),
    ],
)
def test_a_component_that_cannot_be_loaded(base_plan, monkeypatch, backend, reason, kind, words):
    module = import_module(BACKENDS[backend].module)
    session = {"onnxruntime": "OnnxRuntimeSession", "openvino": "OpenVinoSession"}[backend]

    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(module, session, fail)
    with pytest.raises(PFStorerError, match=re.escape(words)) as caught:
        open_session(base_plan, "encoder", backend)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_a_torch_session_returns_arrays_without_gradients(nano_base):
    session = open_sessions(nano_base)["decoder"]
    found = session.run(latent=np.zeros((1, 4, 8, 8), np.float32))
    with torch.no_grad():
        expected = nano_base.decode(torch.zeros(1, 4, 8, 8)).numpy()
    assert np.array_equal(found["image"], expected)


def test_the_manifest_file_describes_the_payloads(base_plan):
    with zipfile.ZipFile(base_plan.path) as archive:
        data = json.loads(archive.read("manifest.json"))
    assert data["kind"] == "pfstorer-plan"
    assert data["schema"] == 2
    assert data["payloads"]["denoiser"]["inputs"]["x"]["shape"][1:] == [4, 8, 8]
    assert isinstance(data["payloads"]["denoiser"]["inputs"]["x"]["shape"][0], str)  # any batch


# ---- OpenVINO and providers


def test_onnxruntime_threads_stop_spinning_after_a_run(base_plan):
    with open_session(base_plan, "encoder", "onnxruntime") as session:
        options = session._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_onnxruntime_sessions_share_one_memory_arena(base_plan):
    with open_session(base_plan, "encoder", "onnxruntime") as one, open_session(base_plan, "decoder", "onnxruntime"):
        options = one._session.get_session_options()
        assert options.get_session_config_entry("session.use_env_allocators") == "1"
        assert ort_engine.share_memory.cache_info().currsize == 1, "the arena is made once"


@pytest.mark.parametrize("component", COMPONENTS)
def test_openvino_agrees_with_onnxruntime(nano_plan, component):
    rng = np.random.default_rng(0)
    fast = open_session(nano_plan, component, "openvino", "CPU:f32")
    with fast, open_session(nano_plan, component, "onnxruntime") as slow:
        for batch in (3, 1, 4):  # three are filled up to four
            latent = {name: rng.standard_normal((batch, 4, 8, 8), np.float32) for name in ("x", "z_lq", "latent")}
            other = {"image": rng.standard_normal((batch, 3, 64, 72), np.float32), "strength": np.ones(1, np.float32)}
            every = {**latent, **other, "t": rng.uniform(0, 999, batch).astype(np.float32)}
            arrays = {name: every[name] for name in slow.inputs}
            found, expected = fast.run(**arrays), slow.run(**arrays)
            for name, array in expected.items():
                assert found[name].shape == array.shape
                # fp32 sums in another order: relative to the spread of the output
                np.testing.assert_allclose(found[name], array, atol=2e-3 * array.std())


def test_openvinos_cache_is_private(nano_plan, private_home):
    open_session(nano_plan, "encoder", "openvino")
    folder = private_home / "cache" / "openvino" / nano_plan.manifest.identity_fingerprint[:16]
    assert list(folder.iterdir()) and folder.stat().st_mode & 0o077 == 0


def computes_bf16():
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_openvinos_cache_separates_precisions(nano_plan, tmp_path):
    rng = np.random.default_rng(0)
    payload = nano_plan.read("denoiser")
    x, z_lq = rng.standard_normal((2, 1, 4, 8, 8), np.float32)
    inputs = {"x": x, "t": np.full(1, 500, np.float32), "z_lq": z_lq, "strength": np.ones(1, np.float32)}

    def run(precision, cache):
        with OpenVinoSession(payload, f"CPU:{precision}", cache) as session:
            return session.run(**inputs)["prediction"]

    run("f32", tmp_path)
    if not computes_bf16():
        with pytest.raises(MissingBackendError, match="OpenVINO CPU does not compute in bf16 here; take CPU:f32"):
            run("bf16", None)
        return
    for _ in range(2):  # compiled, and loaded
        assert np.array_equal(run("bf16", tmp_path), run("bf16", None))


def test_providers_are_chosen_by_name(base_plan):
    for name in ("cpu", "CPUExecutionProvider"):
        with open_session(base_plan, "encoder", "onnxruntime", name) as session:
            assert session.provider == "CPUExecutionProvider"
    with open_session(base_plan, "encoder", "openvino", "cpu:f32") as session:
        assert session.provider.endswith("CPU f32")
    for backend, provider, error, message in (
        ("onnxruntime", "abacus", MissingBackendError, "abacus: not in this build"),
        ("onnxruntime", "CPU:bf16", MissingBackendError, "only the backend openvino takes a precision after a colon"),
        ("openvino", "NPU", MissingBackendError, "NPU: not here; it sees CPU"),
        ("openvino", "CPU:int4", ValueError, "precision 'int4': expected one of f32"),
    ):
        with pytest.raises(error, match=message):
            open_session(base_plan, "encoder", backend, provider)


@pytest.fixture
def cuda_build(monkeypatch):
    """Function (attribute, stand-in): ONNX Runtime as built with CUDA, with stand-ins for the calls to the device."""
    import onnxruntime

    def put(**stand_ins):
        for name, stand_in in {"load_provider": lambda folder: None, "count_gpus": lambda: 1, **stand_ins}.items():
            monkeypatch.setattr(ort_engine, name, stand_in)
        ort_engine.cuda_refusal.cache_clear()

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_engine.CUDA, ort_engine.CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcudnn.so.9\n"))
    yield put
    ort_engine.cuda_refusal.cache_clear()


def raises(message):
    def call(*_):
        raise OSError(message)

    return call


@pytest.mark.parametrize(
    ("stand_ins", "reason"),
    [
        (
            {"load_provider": raises("libcublasLt.so.12: cannot open shared object file")},
            "libcublasLt.so.12: cannot open",
        ),
        ({"count_gpus": raises("libcuda.so.1: cannot open shared object file")}, "libcuda.so.1: cannot open"),
        ({"count_gpus": lambda: 0}, "the NVIDIA driver sees no GPU"),
    ],
)
def test_a_cuda_provider_that_cannot_run_is_refused_with_the_reason(cuda_build, base_plan, capfd, stand_ins, reason):
    cuda_build(**stand_ins)
    assert ort_engine.providers() == [ort_engine.CPU] and not ort_engine.on_gpu()
    assert choose_backend("auto").name == "openvino"
    with pytest.raises(MissingBackendError, match=f"provider cuda: .*{reason}.*; use cpu"):
        open_session(base_plan, "encoder", "onnxruntime", "cuda")
    assert reason in diagnose().engines["onnxruntime on CUDA"]
    assert capfd.readouterr() == ("", "")


def test_a_cuda_provider_that_can_run_comes_first(cuda_build):
    cuda_build()
    assert ort_engine.providers() == ort_engine.providers("cuda") == [ort_engine.CUDA, ort_engine.CPU]
    assert choose_backend("auto").name == "onnxruntime"
    assert diagnose().engines["onnxruntime on CUDA"] is None


def test_a_session_on_another_device_than_the_wanted_one_is_refused(cuda_build, base_plan, capfd):
    cuda_build()  # the build of this machine has no CUDA provider, so that ONNX Runtime goes on with the CPU
    with pytest.raises(MissingBackendError, match="could not use CUDAExecutionProvider and would run on CPUExecution"):
        open_session(base_plan, "encoder", "onnxruntime", "cuda")
    assert "onnxruntime:" not in capfd.readouterr().err
