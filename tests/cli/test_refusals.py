"""Calls that are wrong are refused before any work, in one line that says what to do."""

import math
import os
import signal

import pytest
import torch

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Training, run_training


@pytest.fixture
def signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_command_that_is_told_to_end_cleans_up_first(run, signals, monkeypatch, tmp_path, nano_base_dir):
    from pfstorer_rt.export import build

    monkeypatch.setattr(build, "export_component", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    result = run("export", "--base", nano_base_dir, "-o", tmp_path / "a.plan")
    assert result.status == 130
    assert result.errors == ["Error: Interrupted. Run the same command again to resume."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", ["nan", "-1", "0", "inf"])
def test_a_learning_rate_that_cannot_train(refused, tree, photos, tmp_path, nano_base_dir, rate):
    target = tmp_path / "x.safetensors"
    refused(
        2,
        "personalize",
        "--identity",
        "x",
        "--base",
        nano_base_dir,
        "--learning-rate",
        rate,
        "-o",
        target,
        *photos,
        words=["learning rate"],
    )
    assert not target.exists()


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path):
    class Diverging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {"loss": (self.w * batch["x"]).sum()}

    config = TrainConfig(iterations=4, checkpoint_every=1, precision="fp32", device="cpu")
    checkpoint, values = tmp_path / "state.pt", [1.0, 1.0, math.nan, 1.0]

    def batches(iteration, _number):
        return {"x": torch.tensor([values[iteration]])}

    training = Training("test", Diverging(), batches, config, checkpoint, "mark")
    with pytest.raises(PFStorerError, match="after 3 iterations"), accelerated(config) as accelerator:
        run_training(training, accelerator)
    state = torch.load(checkpoint, weights_only=True)
    assert state["iteration"] == 2 and bool(torch.isfinite(state["parameters"]["w"]).all())


def test_a_home_that_cannot_be_made(refused, photos, tmp_path, nano_base_dir, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "file" / "home"))
    line = refused(1, "personalize", "--identity", "x", "--base", nano_base_dir, *photos, words=["cannot be made"])
    assert "Errno" not in line


def test_inspecting_a_picture_says_what_is_expected(refused, save, tmp_path):
    refused(2, "inspect", save(tmp_path / "a.png"), words=["a.png", "plan", "identity"])


@pytest.mark.parametrize("scale", ["0", "nan", "99"])
def test_a_scale_out_of_range_is_found_before_the_work(refused, save, tree, tmp_path, nano_plan, scale):
    engine = getattr(nano_plan, "path", nano_plan)
    picture = save(tmp_path / "in" / "a.png")
    refused(2, "restore", "--engine", engine, picture, "--scale", scale, words=["scale"])
    assert list(tree(tmp_path / "in")) == ["a.png"]


def test_an_old_format_checkpoint_is_read_and_text_is_called_no_checkpoint(tmp_path, refused):
    from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint

    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.ckpt")["a"], torch.arange(3.0))
    (tmp_path / "text.ckpt").write_text("hello")
    line = refused(2, "import-base", tmp_path / "text.ckpt", "-o", tmp_path / "out", words=["text.ckpt"])
    assert "mmap" not in line


def test_options_of_tensorrt_need_its_target(refused, tmp_path):
    for option in (["--compute-capability", "8.9"], ["--verbose-engine"], ["--workspace", "64"]):
        refused(2, "export", "--base", "tiny", "-o", tmp_path / "a.plan", *option, words=("--target tensorrt",))


def test_a_plan_of_executable_code_is_not_run_for_strangers(refused, base_plan, save, tmp_path, monkeypatch):
    from dataclasses import replace

    from pfstorer_rt.plan import COMPONENTS, write_plan

    manifest = replace(base_plan.manifest, target="tensorrt-rtx")
    plan = write_plan(tmp_path / "a.plan", manifest, {c: base_plan.read(c) for c in COMPONENTS}).path
    picture = save(tmp_path / "old.png", 40, 40)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(2, "restore", "--engine", plan, picture, words=("NVIDIA GPU", "target onnx"))
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "stranger"))
    refused(
        2, "restore", "--engine", plan, picture, words=("executable code", "--trust-plan", "`pfstorer-rt export --base")
    )
    refused(2, "restore", "--engine", plan, picture, "--trust-plan", words=("NVIDIA GPU",))
    refused(2, "bench", "--engine", plan, words=("--trust-plan",))


def test_what_import_base_cannot_read_or_write_is_told_in_a_line(refused, tmp_path):
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "taken").write_text("mine")
    refused(2, "import-base", tmp_path / "folder.ckpt", "-o", tmp_path / "out", words=["folder.ckpt: a folder"])
    line = refused(2, "import-base", tmp_path / "x.ckpt", "-o", tmp_path / "taken", words=["taken: a file"])
    assert "Errno" not in line and (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("old", [None, b"an earlier plan"])
def test_a_plan_that_fails_its_check_is_not_kept(run, tree, tmp_path, nano_base_dir, monkeypatch, old):
    from pfstorer_rt.export import compare

    if old:
        (tmp_path / "a.plan").write_bytes(old)
    before = tree(tmp_path)
    monkeypatch.setattr(compare, "agreement", lambda found, expected: 30.0)
    output = ("--check", "--overwrite", "-o", tmp_path / "a.plan")
    outcome = run("export", "--base", nano_base_dir, *output)
    (error,) = outcome.errors
    assert (outcome.status, outcome.out) == (1, "") and "30.0 dB" in error and "no plan was written" in error
    assert tree(tmp_path) == before


def test_a_plan_that_passes_its_check_takes_its_name(run, tree, tmp_path, nano_base_dir):
    done = run("export", "--base", nano_base_dir, "--check", "-o", tmp_path / "a.plan")
    assert done.status == 0 and "torch / onnxruntime" in done.out and "not run" not in done.out
    assert list(tree(tmp_path)) == ["a.plan"]


def test_engines_that_cannot_run_here_are_checked_by_their_graphs(run, tree, tmp_path, nano_base_dir, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from pfstorer_rt.plan import Plan

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run("export", "--base", nano_base_dir, "--target", "tensorrt-rtx", "--check", "-o", tmp_path / "a.plan")
    assert done.status == 0 and list(tree(tmp_path)) == ["a.plan"]
    assert "engines themselves were not run here (TensorRT needs an NVIDIA GPU" in done.out
    assert "component picture  tile photo  pair torch / onnxruntime" in done.out
    plan = Plan.open(tmp_path / "a.plan")
    assert plan.trusted and plan.read("denoiser")[:4] == b"vtrt"


def test_inspecting_a_plan_that_is_not_there_speaks_of_a_file(refused, tmp_path):
    refused(2, "inspect", tmp_path / "alice.plan", words=["alice.plan: no such file"])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_int8_is_refused_for_tensorrt_before_anything_is_loaded(refused, tmp_path, target):
    refused(
        2,
        "export",
        "--base",
        "tiny",
        "--precision",
        "int8",
        "--target",
        target,
        "-o",
        tmp_path / "a.plan",
        words=["int8", "ONNX", "fp16"],
    )


def test_wrapping_is_trained_on_a_base_that_is_there(refused, photos, tmp_path):
    refused(2, "train-base", *photos, "-o", tmp_path / "a", "--train", "wrapping", words=["--prior"])
