import getpass
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pfstorer_rt.export.build as build
import pfstorer_rt.export.graph as graph
import pytest
import torch
from pfstorer_rt.export import export_plan, parity
from torch import nn

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.session import open_session
from pfstorer_rt.errors import MismatchError, ParityError
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.components import components, denoiser
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.plan import COMPONENTS, Plan
from pfstorer_rt.runtime.restorer import Restorer


def inputs(base, identity=None, batch=2):
    return denoiser(base, identity).example_inputs(batch)


def fuse(base, identity=None):
    return graph.fuse(denoiser(base, identity)).module


@torch.no_grad()
def run(module, arrays, strength=None):
    arrays = {**arrays, "strength": torch.tensor([strength])} if strength is not None else arrays
    return module(*arrays.values())


def psnr(first, second):
    return -10 * np.log10(max(np.mean((first.astype(np.float64) - second) ** 2), 1e-20))


def restore(engine, pixels, **settings):
    with engine as restorer:
        return restorer.restore(pixels, RestoreConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ref_source": "self"},
        {"rank": 2},
        {"method": "vico"},
    ],
)
def test_the_fused_denoiser_agrees_with_the_unfused(nano_base, make_nano_identity, settings):
    identity = make_nano_identity(gammas=(1.0, 0.0, 1.0, 1.0), **settings)
    arrays = inputs(nano_base, identity)
    unfused, fused = Denoiser(nano_base, identity), fuse(nano_base, identity)
    for strength in (1.0, 0.4):
        expected = run(unfused, arrays, strength)
        # The same matrix products, at most in another batch: fp32 rounding.
        assert torch.allclose(run(fused, arrays, strength), expected, rtol=0, atol=2e-5)
    assert not torch.allclose(expected, run(unfused, arrays, 0.0), rtol=0, atol=1e-3)


def test_a_fused_base_agrees_with_the_unfused(nano_base):
    arrays = inputs(nano_base)
    assert torch.allclose(run(fuse(nano_base), arrays), run(Denoiser(nano_base), arrays), rtol=0, atol=2e-5)


def test_a_fused_dreambooth_identity_agrees_with_the_unfused(nano_base, make_nano_identity):
    identity = make_nano_identity(method="dreambooth")
    identity.tensors["unet.conv_out.bias"] = identity.tensors["unet.conv_out.bias"] + 1
    fused, arrays = fuse(nano_base, identity), inputs(nano_base, identity)
    assert "strength" not in arrays
    assert torch.allclose(run(fused, arrays), run(Denoiser(nano_base, identity), arrays), rtol=0, atol=2e-5)
    # The weights are stored in fp16; the remaining difference is the bias.
    assert torch.allclose(run(fused, arrays), run(Denoiser(nano_base), arrays) + 1, rtol=0, atol=2e-2)


def test_fusing_leaves_the_base_unchanged(nano_base, nano_identity):
    arrays = inputs(nano_base, nano_identity)
    before = run(Denoiser(nano_base, nano_identity), arrays)
    names = set(nano_base.unet.state_dict())
    fuse(nano_base, nano_identity)
    assert set(nano_base.unet.state_dict()) == names
    assert all(p.dtype == torch.float32 for p in nano_base.unet.parameters())
    assert torch.equal(run(Denoiser(nano_base, nano_identity), arrays), before)


def test_prompt_and_reference_projections_are_constants(nano_base, nano_identity):
    fused = fuse(nano_base, nano_identity)
    for name, module in fused.named_modules():
        if name.endswith("attn2"):
            assert isinstance(module.to_k, nn.Identity) and isinstance(module.to_v, nn.Identity)
            assert module.k.shape == module.v.shape
            assert module.k.shape[0] == 1


def test_blocks_with_zero_gamma_are_removed(nano_base, nano_identity, make_nano_identity):
    fused = fuse(nano_base, nano_identity)
    layers = nano_base.config.layers
    assert fused.denoiser.blocks.layers == (layers[0], *layers[2:])
    assert len(fused.denoiser.blocks) == 3
    untrained = denoiser(nano_base, make_nano_identity(gammas=(0.0,) * 4))
    assert "strength" in untrained.inputs and "strength" not in graph.fuse(untrained).inputs
    nothing = graph.fuse(untrained).module
    assert nothing.identity_tensors() == {}
    arrays = inputs(nano_base)
    assert torch.equal(run(nothing, arrays), run(fuse(nano_base), arrays))


def test_identity_tensors_of_a_fused_denoiser(nano_base, nano_identity):
    tensors = fuse(nano_base, nano_identity).identity_tensors()
    kept = [layer for layer in nano_base.config.layers if layer != nano_base.config.layers[1]]
    assert {name.rsplit(".", 1)[0] for name in tensors if name.endswith(".gamma")} == set(kept)
    for layer in kept:
        i = nano_identity.layers.index(layer)
        stored = {k: v.float() for k, v in nano_identity.tensors.items()}
        tokens = stored[f"reference.{i}"][stored[f"mask.{i}"].bool()].double()
        assert torch.equal(tensors[f"{layer}.gamma"], stored[f"blocks.{i}.gamma"])
        for kind in "kv":
            expected = tokens @ stored[f"blocks.{i}.block.attn2.to_{kind}.weight"].double().T
            # Softmax does not see what all keys have in common, and halves hold the rest better.
            expected = expected - expected.mean(0) if kind == "k" else expected
            found = tensors[f"{layer}.{kind}"]
            assert found.shape[:-1] == (1, expected.shape[1] // found.shape[-1], len(expected))  # by heads
            assert torch.allclose(found[0].transpose(0, 1).flatten(1).double(), expected, rtol=0, atol=1e-5)
        assert f"{layer}.attn1.to_q.weight" in tensors


@pytest.mark.parametrize("name", ["nano_plan", "base_plan"])
def test_parity_is_measured_and_small(name, request):
    plan = request.getfixturevalue(name)
    for component in COMPONENTS:
        figures = plan.manifest.payloads[component].parity
        assert figures.keys() == {"max_abs", "std", "relative", "rms"}
        assert 0 <= figures["rms"] <= figures["relative"] <= 1e-4
        assert figures["std"] > 1e-3


def test_manifest_of_an_identitys_plan(nano_plan, nano_base, nano_identity):
    m = nano_plan.manifest
    assert (m.target, m.precision, m.method, m.strength) == ("onnx", "fp32", "pfstorer", True)
    assert (m.base_fingerprint, m.identity_fingerprint) == (nano_base.fingerprint, nano_identity.fingerprint)
    assert (m.base_name, m.identity_name) == ("nano", "alice")
    assert (m.tile, m.factor, m.latent_channels, m.steps, m.sampler) == (64, 8, 4, 4, "ddpm")
    assert {"torch", "onnx", "onnxruntime", "diffusers", "pfstorer-rt", "opset"} <= m.tools.keys()
    for component in COMPONENTS:
        payload = m.payloads[component]
        model = onnx.load_from_string(nano_plan.read(component))
        assert sha256_bytes(nano_plan.read(component)) == payload.sha256
        assert {i.name for i in model.graph.input} == payload.inputs.keys()
        assert {o.name for o in model.graph.output} == payload.outputs.keys()
        assert all(port["type"] == "float32" for port in (payload.inputs | payload.outputs).values())
    assert m.payloads["denoiser"].inputs.keys() == {"x", "t", "z_lq", "strength"}


def test_manifest_of_a_bases_plan(base_plan):
    m = base_plan.manifest
    assert (m.identity_name, m.identity_fingerprint, m.method, m.strength) == (None, None, None, False)
    assert m.payloads["denoiser"].inputs.keys() == {"x", "t", "z_lq"}


def test_images_of_plan_and_torch_agree(nano_plan, base_plan, nano_base, nano_identity, make_image):
    pixels = make_image(64, 96)
    for plan, identity in ((nano_plan, nano_identity), (base_plan, None)):
        ours = restore(Restorer.from_plan(plan.path, "onnxruntime"), pixels, seed=3)
        expected = restore(Restorer.from_base(nano_base, identity, device="cpu"), pixels, seed=3)
        assert psnr(ours, expected) >= 50
        assert expected.std() > 0.02


def test_strength_zero_equals_the_plan_of_the_base(nano_plan, base_plan, make_image):
    pixels = make_image(64, 64)
    off = restore(Restorer.from_plan(nano_plan.path, "onnxruntime"), pixels, strength=0.0)
    base = restore(Restorer.from_plan(base_plan.path, "onnxruntime"), pixels)
    assert psnr(off, base) >= 90  # two graphs: operators may be scheduled differently
    assert psnr(restore(Restorer.from_plan(nano_plan.path, "onnxruntime"), pixels), base) < 60


def test_a_batch_equals_its_rows(nano_plan, nano_base, nano_identity):
    arrays = {k: v.numpy() for k, v in inputs(nano_base, nano_identity, batch=3).items()}
    with open_session(nano_plan, "denoiser", "onnxruntime") as session:
        together = session.run(**arrays)["prediction"]
        for i in range(3):
            one = {k: v if k == "strength" else v[i : i + 1] for k, v in arrays.items()}
            assert np.allclose(session.run(**one)["prediction"][0], together[i], rtol=0, atol=2e-5)


def test_encoder_and_decoder_take_any_size(base_plan, nano_base):
    for height, width in ((64, 64), (96, 160), (128, 32)):
        image = np.random.default_rng(0).uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        with open_session(base_plan, "encoder", "onnxruntime") as session:
            mean = session.run(image=image)["mean"]
        with torch.no_grad():
            expected = nano_base.encode(torch.from_numpy(image)).numpy()
        assert np.allclose(mean, expected, rtol=0, atol=1e-4 * expected.std())
        with open_session(base_plan, "decoder", "onnxruntime") as session:
            assert session.run(latent=mean)["image"].shape == image.shape


def test_no_trace_of_the_machine_in_a_plan(nano_plan):
    data = nano_plan.path.read_bytes()
    root = Path(build.__file__).resolve().parent.parent
    traces = {str(root), str(Path.home()), str(nano_plan.path.parent), torch.__path__[0], "site-packages", ".py"}
    user = getpass.getuser() if os.environ.get("USER") else ""
    for trace in {t for t in traces | {user} if len(t) > 2 and t != "root"}:
        assert trace.encode() not in data, trace


def test_the_same_base_gives_the_same_payloads(nano_plan, base_plan):
    # Two exports in one process; encoder and decoder do not depend on the identity.
    for component in ("encoder", "decoder"):
        assert nano_plan.read(component) == base_plan.read(component)
    assert nano_plan.read("denoiser") != base_plan.read("denoiser")


def tampered(model_bytes):
    """The same graph with one thing changed: the largest constant, by 1 %."""
    model = onnx.load_from_string(model_bytes)
    largest = max(model.graph.initializer, key=lambda i: int(np.prod(i.dims)) if i.data_type == 1 else 0)
    array = onnx.numpy_helper.to_array(largest) * np.float32(1.01)
    largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))
    return model.SerializeToString()


def test_a_changed_graph_is_refused(nano_plan, nano_base, nano_identity):
    expected = build.expect(denoiser(nano_base, nano_identity), "fp32")
    good = nano_plan.read("denoiser")
    assert parity.within(build.compare(good, expected), "fp32")
    with pytest.raises(ParityError, match="denoiser: the largest error of the exported graph against PyTorch"):
        parity.check("denoiser", build.compare(tampered(good), expected), "fp32")


def test_a_failed_parity_check_leaves_no_file(nano_base, nano_identity, tmp_path, monkeypatch):
    def tamper(component):
        fused = graph.fuse(component)
        if component.name == "encoder":
            first = next(fused.module.parameters())
            first.data = 1.05 * first.data
        return fused

    monkeypatch.setattr(build, "fuse", tamper)
    with pytest.raises(ParityError, match=r"encoder.*no plan was written"):
        export_plan(tmp_path / "a.plan", nano_identity, nano_base)
    assert list(tmp_path.iterdir()) == []


def test_parity_figures_are_checked_against_their_limits():
    class Twice(nn.Module):
        def forward(self, a):
            return 2 * a

    class Session:
        inputs, outputs, provider = ("a",), ("b",), "test"

        def __init__(self, error):
            self.error = error

        def run(self, a):
            return {"b": 2 * a + self.error}

    a = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    error = np.array([[0.0, 0.25, -0.5, 0.0]], np.float32)
    expected = parity.outputs_of(Twice(), {"a": a})
    figures = parity.measure(expected, Session(error), {"a": a})
    spread = float(np.std([0.0, 2.0, 4.0, 10.0]))
    rms = float(np.sqrt((0.25**2 + 0.5**2) / 4)) / spread
    assert figures == pytest.approx({"max_abs": 0.5, "std": spread, "relative": 0.5 / spread, "rms": rms})
    for bad in (np.nan, np.inf):
        figures = parity.measure(expected, Session(error + np.float32(bad)), {"a": a})
        for precision in parity.LIMIT:
            with pytest.raises(ParityError):
                parity.check("denoiser", figures, precision)
    parity.check("denoiser", {"relative": 3e-4}, "fp32")
    parity.check("denoiser", {"relative": 1.0, "rms": 0.3}, "int8")
    with pytest.raises(ParityError, match="at most 3e-04"):
        parity.check("denoiser", {"relative": 3.1e-4}, "fp32")


def test_unknown_targets_and_other_bases_are_refused(nano_base, make_nano_identity, tmp_path):
    output = tmp_path / "a.plan"
    with pytest.raises(MismatchError, match="was learned on base"):
        export_plan(output, make_nano_identity(), build_base("nano", seed=8))
    with pytest.raises(ValueError, match="expected one of"):
        export_plan(output, None, nano_base, target="coreml")
    with pytest.raises(ValueError, match="expected one of"):
        export_plan(output, None, nano_base, precision="int4")
    assert not output.exists()


def test_a_plan_opens_anywhere(nano_plan, tmp_path):
    moved = tmp_path / "moved.plan"
    moved.write_bytes(nano_plan.path.read_bytes())
    assert replace(Plan.open(moved), path=nano_plan.path) == nano_plan
    with OnnxRuntimeSession(Plan.open(moved).read("decoder")) as session:
        assert session.outputs == ("image",)


def test_an_identity_on_an_unshipped_base_needs_the_base(nano_identity, tmp_path):
    with pytest.raises(MismatchError, match=r"base 'nano'.*not shipped.*give its directory as the base"):
        export_plan(tmp_path / "a.plan", nano_identity)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large_plan(nano_base, nano_identity, tmp_path_factory):
    """The nano plan with separate files of weights, as for a large model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SELF_CONTAINED", 0)
        patch.setattr(graph.Graph, "to_bytes", None)  # would hold the model twice
        return export_plan(tmp_path_factory.mktemp("large") / "alice.plan", nano_identity, nano_base)


def test_large_graphs_store_their_weights_in_separate_files(large_plan, nano_plan, tmp_path):
    beside = {name: payload.weights for name, payload in large_plan.manifest.payloads.items()}
    assert beside == {c: f"{c}.weights" for c in COMPONENTS}
    assert not any(p.weights for p in nano_plan.manifest.payloads.values())
    with zipfile.ZipFile(large_plan.path) as archive:
        archive.extractall(tmp_path)
    for component in COMPONENTS:  # an unpacked payload is a valid model
        model = onnx.load(tmp_path / f"{component}.onnx")
        whole = onnx.load_from_string(nano_plan.read(component))
        found, expected = ({i.name: onnx.numpy_helper.to_array(i) for i in m.graph.initializer} for m in (model, whole))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert len(large_plan.read(component)) < len(nano_plan.read(component)) / 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_separate_weights_give_the_same_image(large_plan, nano_plan, backend, make_image):
    if backend == "openvino":
        pytest.importorskip("openvino")
    pixels = make_image(64, 64)
    images = [restore(Restorer.from_plan(plan.path, backend), pixels, seed=3) for plan in (large_plan, nano_plan)]
    assert np.array_equal(*images)


def test_a_session_outlives_the_mapping_of_its_weights(large_plan, nano_plan, nano_base, nano_identity):
    arrays = {k: v.numpy() for k, v in inputs(nano_base, nano_identity).items()}
    with open_session(large_plan, "denoiser", "onnxruntime") as session:
        copy = large_plan.path.read_bytes()
        large_plan.path.write_bytes(bytes(len(copy)))  # in place: a mapping would see it
        found = session.run(**arrays)["prediction"]
        large_plan.path.write_bytes(copy)
    with open_session(nano_plan, "denoiser", "onnxruntime") as session:
        assert np.array_equal(found, session.run(**arrays)["prediction"])


@pytest.mark.parametrize("component", ["decoder", pytest.param("denoiser", marks=pytest.mark.slow)])
def test_a_graph_is_exported_to_the_same_bytes_again(nano_base, component, request):
    """The first graph may be one that was traced in a run before: it and the graph of this run agree."""
    part = components(nano_base)[component]
    first = graph.build_graph(graph.fuse(part)).to_bytes()
    request.getfixturevalue("own_graphs")
    assert graph.build_graph(graph.fuse(part)).to_bytes() == first


def test_the_same_large_base_gives_the_same_bytes(large_plan, nano_base, nano_identity, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SELF_CONTAINED", 0)
    again = export_plan(tmp_path / "again.plan", nano_identity, nano_base)
    assert again.path.read_bytes() == large_plan.path.read_bytes()


def test_a_check_runs_before_the_plan_is_moved_to_its_path(nano_base, tmp_path):
    seen = []

    def check(plan):
        seen.append((plan.path, plan.read("decoder")))
        assert list(tmp_path.iterdir()) == [], "a killed export leaves nothing beside its output"
        assert plan.path.parent.stat().st_mode & 0o077 == 0

    plan = export_plan(tmp_path / "a.plan", None, nano_base, check=check)
    assert seen[0][1] == plan.read("decoder") and seen[0][0] != plan.path
    assert list(tmp_path.iterdir()) == [plan.path]
