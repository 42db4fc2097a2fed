"""Invalid calls are refused before any work, in one line with advice."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Training, run_training


def test_sigterm_removes_temporary_files(run, monkeypatch, tmp_path, nano_base_dir):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    work, out = tmp_path / "home" / "cache" / "work", tmp_path / "out"
    out.mkdir()

    def end_at_the_first_file():
        while not list(work.glob(".pfstorer-*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_at_the_first_file, daemon=True).start()
    result = run("export", "--base", nano_base_dir, "-o", out / "a.plan")
    assert result.status == 130
    assert result.errors == ["Error: Interrupted. Unfinished files were removed."]
    assert not list(work.iterdir()) and not list(out.iterdir())


@pytest.mark.parametrize("rate", ["nan", "-1", "0", "inf"])
def test_invalid_learning_rates_are_refused(refused, tree, photos, tmp_path, nano_base_dir, rate):
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
        words=["learning", "rate"],
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


def test_an_unusable_data_directory_is_reported(refused, photos, tmp_path, nano_base_dir, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "file" / "home"))
    line = refused(1, "personalize", "--identity", "x", "--base", nano_base_dir, *photos, words=["cannot be made"])
    assert "Errno" not in line


def test_inspecting_an_image_names_the_expected_files(refused, save, tmp_path):
    refused(2, "inspect", save(tmp_path / "a.png"), words=["a.png", "plan", "identity"])


@pytest.mark.parametrize("scale", ["0", "nan", "99"])
def test_a_scale_out_of_range_is_refused_before_restoring(refused, save, tree, tmp_path, nano_plan, scale):
    engine = getattr(nano_plan, "path", nano_plan)
    image = save(tmp_path / "in" / "a.png")
    refused(2, "restore", "--engine", engine, image, "--scale", scale, words=["scale"])
    assert list(tree(tmp_path / "in")) == ["a.png"]


def test_an_old_checkpoint_format_is_read_and_a_text_file_is_refused(tmp_path, refused):
    from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint

    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.ckpt")["a"], torch.arange(3.0))
    (tmp_path / "text.ckpt").write_text("hello")
    line = refused(2, "import-base", tmp_path / "text.ckpt", "-o", tmp_path / "out", words=["text.ckpt"])
    assert "mmap" not in line


def test_tensorrt_options_need_a_tensorrt_target(refused, tmp_path):
    words = ["goes with --target tensorrt;"]
    call = ("export", "--base", "portrait", "-o", tmp_path / "a.plan")
    refused(2, *call, "--target", "tensorrt-rtx", "--timing-cache", tmp_path / "times", words=words)
    for option in (["--compute-capability", "8.9"], ["--verbose-engine"], ["--workspace", "64"]):
        refused(2, *call, *option, words=("--target tensorrt",))


def test_an_untrusted_tensorrt_plan_is_refused(refused, base_plan, save, tmp_path, monkeypatch, without_gpu):
    from dataclasses import replace

    from pfstorer_rt.plan import COMPONENTS, write_plan

    manifest = replace(base_plan.manifest, target="tensorrt-rtx")
    plan = write_plan(tmp_path / "a.plan", manifest, {c: base_plan.read(c) for c in COMPONENTS}).path
    image = save(tmp_path / "old.png", 40, 40)
    refused(2, "restore", "--engine", plan, image, words=("NVIDIA GPU", "target onnx"))
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "stranger"))
    refused(
        2, "restore", "--engine", plan, image, words=("executable code", "--trust-plan", "`pfstorer-rt export --base")
    )
    refused(2, "restore", "--engine", plan, image, "--trust-plan", words=("NVIDIA GPU",))
    refused(2, "bench", "--engine", plan, words=("--trust-plan",))


def test_import_base_reports_unusable_paths_in_one_line(refused, tmp_path):
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "taken").write_text("mine")
    refused(2, "import-base", tmp_path / "folder.ckpt", "-o", tmp_path / "out", words=["folder.ckpt: a folder"])
    line = refused(2, "import-base", tmp_path / "x.ckpt", "-o", tmp_path / "taken", words=["taken: a file"])
    assert "Errno" not in line and (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def one_backend(monkeypatch):
    """`--check` compares on ONNX Runtime alone; tests/export/test_compare.py compares on all backends."""
    from pfstorer_rt.export import compare

    monkeypatch.setattr(compare, "BACKENDS", {"onnxruntime": compare.BACKENDS["onnxruntime"]})


@pytest.fixture
def one_batch(monkeypatch):
    """Engines for one batch size; tests/export/test_tensorrt.py builds engines for several."""
    from pfstorer_rt.export import tensorrt

    monkeypatch.setattr(tensorrt, "BuildOptions", partial(tensorrt.BuildOptions, batches=(1,)))


@pytest.mark.parametrize("old", [None, b"an earlier plan"])
def test_a_plan_that_fails_its_check_is_not_written(run, tree, tmp_path, nano_base_dir, monkeypatch, one_backend, old):
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


def test_a_plan_that_passes_its_check_is_written(run, tree, tmp_path, nano_base_dir, one_backend):
    done = run("export", "--base", nano_base_dir, "--check", "-o", tmp_path / "a.plan")
    assert done.status == 0 and "torch / onnxruntime" in done.out and "not run" not in done.out
    assert list(tree(tmp_path)) == ["a.plan"]


def test_engines_without_a_gpu_are_checked_by_their_onnx_graphs(
    run, tree, tmp_path, nano_base_dir, without_gpu, one_backend, one_batch
):
    pytest.importorskip("tensorrt_rtx")
    from pfstorer_rt.plan import Plan

    rtx = "--target", "tensorrt-rtx", "--compute-capability", "8.9"
    done = run("export", "--base", nano_base_dir, *rtx, "--check", "-o", tmp_path / "a.plan")
    assert done.status == 0 and list(tree(tmp_path)) == ["a.plan"]
    assert "engines themselves were not run here (TensorRT needs an NVIDIA GPU" in done.out
    assert "component image  tile photo  pair torch / onnxruntime" in done.out
    plan = Plan.open(tmp_path / "a.plan")
    assert plan.trusted and plan.read("denoiser")[:4] == b"vtrt"


def test_inspecting_a_name_that_does_not_exist_lists_what_it_may_be(refused, people):
    refused(2, "inspect", "carol", words=["carol: not found", "a base directory", "expected one of alice"])


def test_restoring_with_a_folder_as_the_plan_names_it(refused, nano_base_dir, save, tmp_path):
    words = ["a folder; expected a plan file"]
    refused(2, "restore", "--engine", nano_base_dir, save(tmp_path / "a.png"), words=words)


def test_a_file_that_is_named_like_an_option_is_named_with_its_folder(restore, save, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "-a b.png")
    refused = restore("-a b.png")
    assert refused.status == 2 and "give './-a b.png' (pfstorer-rt restore --help)" in refused.errors[0]
    assert restore("./-a b.png").status == restore("--overwrite", "--", "-a b.png").status == 0
    assert sorted(tree(tmp_path)) == ["-a b.png", "-a b_restored.png"]


@pytest.mark.parametrize("command", [("restore", "a.png"), ("bench",)])
def test_an_identity_or_a_base_in_place_of_a_plan_gets_the_command_that_was_meant(
    refused, run, people, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b b.safetensors").write_bytes((people / "alice.safetensors").read_bytes())
    for name, export, instead in (
        ("alice", "export --identity alice -o alice.plan", "--base portrait --identity alice"),
        (
            "b b.safetensors",
            "export --identity 'b b.safetensors' -o 'b b.plan'",
            "--identity 'b b.safetensors'",
        ),
        ("portrait", "export --base portrait -o portrait.plan", "--base portrait"),
    ):
        words = [f"{name}: a", "expected a plan; to export it: `pfstorer-rt " + export + "`", instead]
        refused(2, *command, "--engine", name, words=words)
    refused(2, *command, "--engine", "carol", words=["carol: no such plan; check the path"])
    (tmp_path / "carol.plan").touch()
    refused(2, *command, "--engine", "carol", words=["carol: no such plan; did you mean carol.plan?"])


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    refused, tree, photos, quick_plan, nano_base_dir, tmp_path
):
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    export = ("export", "--base", nano_base_dir, "-o")
    bench = ("bench", "--engine", quick_plan.path)
    learn = ("personalize", "--identity", "x", "--base", nano_base_dir, *photos, "-o")
    for command in (export, (*bench, "--csv"), (*bench, "--plot"), learn):
        name = tmp_path / ("folder.safetensors" if command is learn else "folder")
        name.mkdir(exist_ok=True)
        refused(2, *command, name, "--overwrite", words=[f"{name}: a folder; choose a file name"])
    for command in (export, (*bench, "--csv"), (*bench, "--plot")):
        inside = quick_plan.path / "none" / "a.png"
        refused(2, *command, inside, words=[f"{quick_plan.path} is a file; expected a folder: choose another one"])
    refused(2, *learn, tmp_path / "x.txt", words=["x.txt: expected a file name that ends with .safetensors (-o)"])
    assert tree(tmp_path) == before


def test_a_plan_in_place_of_an_identity_is_named(refused, people, quick_plan, nano_base_dir, tmp_path):
    words = ["alice.plan: a plan, expected an identity"]
    for name in (quick_plan.path, "alice.plan"):
        refused(2, "restore", "--base", nano_base_dir, "--identity", name, "a.png", words=words)
        refused(2, "export", "--base", nano_base_dir, "--identity", name, "-o", tmp_path / "b.plan", words=words)
        refused(2, "identities", "show", name, words=words)


def test_a_wrong_option_refers_to_the_help_of_its_command(refused):
    refused(2, "restore", "--stepz", "a.png", words=["(pfstorer-rt restore --help)"])
    refused(2, "identities", "sow", words=["(pfstorer-rt identities --help)"])


def test_inspecting_a_missing_plan_reports_a_missing_file(refused, tmp_path):
    refused(2, "inspect", tmp_path / "alice.plan", words=["alice.plan: no such file"])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_int8_is_refused_for_tensorrt_before_loading_a_base(refused, tmp_path, target):
    refused(
        2,
        "export",
        "--base",
        "portrait",
        "--precision",
        "int8",
        "--target",
        target,
        "-o",
        tmp_path / "a.plan",
        words=["int8", "ONNX", "fp16"],
    )


def test_standard_input_goes_with_one_engine(refused, tmp_path):
    engines = [tmp_path / name for name in ("a.plan", "b.plan")]
    for engine in engines:
        engine.touch()
    refused(2, "restore", "-", "--engine", engines[0], "--engine", engines[1], words=["one --engine"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_is_no_input_image(tmp_path):
    import pty

    (tmp_path / "a.plan").touch()
    _, terminal = pty.openpty()
    call = [sys.executable, "-m", "pfstorer_rt", "restore", "-", "--engine", tmp_path / "a.plan"]
    done = subprocess.run(call, stdin=terminal, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "standard input is a terminal" in done.stderr
