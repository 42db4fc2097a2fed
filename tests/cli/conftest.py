import io
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: bytes
    err: str

    @property
    def out(self):
        return self.stdout.decode()

    @property
    def errors(self):
        """The lines that report a failure."""
        return [line for line in self.err.splitlines() if "Error:" in line or "failed:" in line]


@pytest.fixture
def run(capsysbinary, monkeypatch):
    """Function (*arguments, stdin=b"") -> Outcome of one command, in this process."""
    from pfstorer_rt.cli import main

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsysbinary.readouterr()
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code or 0
        captured = capsysbinary.readouterr()
        outcome = Outcome(status, captured.out, captured.err.decode())
        assert "Traceback" not in outcome.err and b"Traceback" not in outcome.stdout
        return outcome

    return call


@pytest.fixture(scope="session")
def quick_plan(nano_plan, tmp_path_factory):
    """The nano plan with a denoiser of one operator, which loads in a hundredth of the time.

    It predicts the velocity -z_lq, so that the clean latent is nearly z_lq, with a small share of the noise.
    """
    from pfstorer_rt.files import sha256_bytes
    from pfstorer_rt.plan import COMPONENTS, write_plan

    whole = nano_plan.manifest.payloads["denoiser"]
    graph = negation("z_lq", whole.inputs, whole.outputs)
    parts = {name: nano_plan.read(name) for name in COMPONENTS} | {"denoiser": graph}
    payloads = {**nano_plan.manifest.payloads, "denoiser": replace(whole, sha256=sha256_bytes(graph))}
    manifest = replace(nano_plan.manifest, payloads=payloads, prediction_type="v_prediction")
    return write_plan(tmp_path_factory.mktemp("quick") / "alice.plan", manifest, parts)


def negation(name, inputs, outputs):
    """A serialized graph with these ports; its only output is the negative of the input `name`."""
    from onnx import TensorProto, helper

    groups = [
        [helper.make_tensor_value_info(port, TensorProto.FLOAT, facts["shape"]) for port, facts in ports.items()]
        for ports in (inputs, outputs)
    ]
    graph = helper.make_graph([helper.make_node("Neg", [name], [*outputs])], "negation", *groups)
    opset = helper.make_opsetid("", 23)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


@pytest.fixture
def restore(run, quick_plan):
    """`restore` with the quick plan in one step."""
    fixed = ("restore", "--engine", quick_plan.path, "--backend", "onnxruntime", "--steps", 1)
    return lambda *arguments, **more: run(*fixed, *arguments, **more)


@pytest.fixture
def refused(run):
    """Like `run`, for a call that must end with a status, one line on stderr, and nothing on stdout."""

    def call(status, *arguments, words=()):
        outcome = run(*arguments)
        lines = [line for line in outcome.err.splitlines() if line.strip()]
        assert (outcome.status, outcome.out, len(lines)) == (status, "", 1), outcome
        assert lines[0].startswith("Error: ") and all(word in lines[0] for word in words), lines
        return lines[0]

    return call


@pytest.fixture
def save(make_image):
    """Function (path, width, height, seed=0, **options of Pillow's save) -> path of a new RGB image."""

    def write(path, width=40, height=24, seed=0, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = (make_image(height, width, seed) * 255).round().astype(np.uint8)
        Image.fromarray(levels).save(path, **options)
        return path

    return write


@pytest.fixture
def photos(save, tmp_path):
    """Three reference photographs."""
    return [save(tmp_path / "refs" / f"{i}.png", 72, 80, seed=i) for i in range(3)]


@pytest.fixture
def tree():
    """Function folder -> {relative name: bytes} of every file below it."""

    def read(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


@pytest.fixture
def people(monkeypatch, tmp_path, nano_identity):
    """A data directory with the identity `alice` in it; returns its folder of identities."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    nano_identity.save(tmp_path / "home" / "identities" / "alice.safetensors")
    return tmp_path / "home" / "identities"


@pytest.fixture
def other_base_dir(tmp_path):
    from pfstorer_rt.models.base import build_base

    return build_base("nano", seed=7).save(tmp_path / "other")
