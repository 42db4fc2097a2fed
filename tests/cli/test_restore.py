import io
import json
import os
import signal
import sys
import threading
import time
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.engine import onnxruntime
from pfstorer_rt.engine.session import BACKENDS, Backend, Session

# ---- names


def test_an_existing_target_is_replaced_only_with_overwrite(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"precious")
    before = tree(tmp_path)
    done = restore(tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert done.status == 1 and "--overwrite" in done.errors[0] and tree(tmp_path) == before
    assert restore(tmp_path / "a.png", "-o", tmp_path / "b.png", "--overwrite").status == 0
    assert tree(tmp_path)["b.png"][:4] == b"\x89PNG"


def test_a_second_run_of_a_folder_restores_only_missing_results(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    assert restore(tmp_path).status == 0
    assert sorted(tree(tmp_path)) == ["a.png", "a_restored.png"]
    (tmp_path / "a_restored.png").write_bytes(b"kept")
    save(tmp_path / "sub" / "b.png")
    done = restore(tmp_path, "--json")
    assert done.status == 0
    assert [json.loads(line)["status"] for line in done.out.splitlines()] == ["skipped", "done"]
    assert sorted(tree(tmp_path)) == ["a.png", "a_restored.png", "sub/b.png", "sub/b_restored.png"]
    assert tree(tmp_path)["a_restored.png"] == b"kept"


def test_output_is_a_file_for_one_input_and_a_folder_for_several(restore, save, tree, tmp_path):
    a, b = save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.webp", seed=1)
    assert restore(a, "-o", tmp_path / "new" / "x.tif").status == 0
    assert restore(a, b, "-o", tmp_path / "both").status == 0
    (tmp_path / "there").mkdir()
    assert restore(b, "-o", tmp_path / "there").status == 0
    save(tmp_path / "one" / "a.png")
    assert restore(tmp_path / "one", "-o", f"{tmp_path / 'x.png'}/").status == 0
    assert sorted(set(tree(tmp_path)) - {"in/a.png", "in/b.webp", "one/a.png"}) == [
        "both/a_restored.png",
        "both/b_restored.webp",
        "new/x.tif",
        "there/b_restored.webp",
        "x.png/a_restored.png",
    ]
    with Image.open(tmp_path / "new" / "x.tif") as result:
        assert result.format == "TIFF"


def test_glob_patterns_are_expanded(restore, save, tree, tmp_path):
    save(tmp_path / "in" / "a1.png")
    save(tmp_path / "in" / "a2.png")
    save(tmp_path / "in" / "b.png")
    save(tmp_path / "in" / "[x].png")
    assert restore(tmp_path / "in" / "a?.png", "-o", tmp_path / "out").status == 0
    assert restore(tmp_path / "in" / "[x].png", "-o", tmp_path / "x.png").status == 0, "a real name with brackets"
    assert sorted(tree(tmp_path / "out")) == ["a1_restored.png", "a2_restored.png"]
    (tmp_path / "in" / "notes.txt").write_text("holiday")
    (tmp_path / "in" / "old.psd").write_bytes(b"")
    save(tmp_path / "in" / "sub" / "c.png")
    every = restore(tmp_path / "in" / "**", "-o", tmp_path / "all")
    assert every.status == 0 and "old.psd" in every.err
    assert sorted(tree(tmp_path / "all")) == [f"{name}_restored.png" for name in ("[x]", "a1", "a2", "b", "c")]
    none = restore(tmp_path / "in" / "c*.png")
    assert none.status == 2 and "no images" in none.errors[0]
    save(tmp_path / "results" / "a_restored.png")
    none = restore(tmp_path / "results", "-o", tmp_path / "o")
    assert none.status == 2 and "1 earlier result(s) of this program" in none.errors[0]


@pytest.mark.parametrize("names", [("a.gif", "a.png"), ("x/a.png", "y/a.png")])
def test_two_inputs_with_the_same_result_name_are_refused_before_restoring(restore, save, tree, tmp_path, names):
    inputs = [save(tmp_path / name) for name in names]
    before = tree(tmp_path)
    done = restore(*inputs, "-o", tmp_path / "out")
    assert done.status == 2 and "a_restored.png" in done.errors[0] and tree(tmp_path) == before


def test_an_input_given_twice_is_restored_once(restore, save, tmp_path):
    a = save(tmp_path / "a.png")
    done = restore(a, a, "-o", f"{tmp_path}/out/", "--json")
    assert done.status == 0 and len(done.out.splitlines()) == 1


# ---- streams


@pytest.mark.parametrize("arguments", [("-",), ("-", "-o", "-"), ("-", "-o", "-", "--json")])
def test_stdin_to_stdout_writes_only_a_png(restore, save, tmp_path, arguments):
    done = restore(*arguments, stdin=save(tmp_path / "a.jpg").read_bytes())
    assert done.status == 0, done.err
    assert done.stdout.startswith(b"\x89PNG") and done.stdout.endswith(b"IEND\xaeB`\x82")
    with Image.open(io.BytesIO(done.stdout)) as result:
        result.load()
        assert result.size == (40, 24)


def test_stdin_to_a_file_and_a_file_to_stdout(restore, save, tmp_path):
    image = save(tmp_path / "a.png")
    assert restore("-", "-o", tmp_path / "b.png", stdin=image.read_bytes()).status == 0
    assert restore(image, "-o", "-").stdout == (tmp_path / "b.png").read_bytes()


def test_an_empty_stdin_prints_one_line_and_no_image(restore):
    done = restore("-", stdin=b"")
    assert (done.status, done.stdout, len(done.errors)) == (1, b"", 1) and "0 bytes" in done.errors[0]


# ---- disks


def test_an_output_folder_that_cannot_be_made_prints_one_line(restore, save, tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    done = restore(save(tmp_path / "a.png"), "-o", tmp_path / "file" / "out.png")
    assert done.status == 1 and len(done.errors) == 1
    assert str(tmp_path / "file") in done.errors[0] and "Errno" not in done.errors[0] and ";" in done.errors[0]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_an_unknown_output_format_prints_one_line(restore, save, tree, tmp_path):
    done = restore(save(tmp_path / "a.png"), "-o", tmp_path / "b.xyz")
    assert done.status == 2 and len(done.errors) == 1 and ".xyz" in done.errors[0] and list(tree(tmp_path)) == ["a.png"]


def test_a_full_disk_leaves_the_old_target_and_no_temporary_file(restore, save, tree, tmp_path, full_disk):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"precious")
    before = tree(tmp_path)
    done = restore(tmp_path / "a.png", "-o", tmp_path / "b.png", "--overwrite")
    assert done.status == 1 and "no space left" in done.errors[0] and tree(tmp_path) == before
    full_disk.undo()
    assert restore(tmp_path / "a.png", "-o", tmp_path / "b.png", "--overwrite").status == 0


def test_an_interruption_keeps_finished_results(restore, save, tree, tmp_path):
    names = [f"{i:02d}" for i in range(40)]
    for name in names:
        save(tmp_path / "in" / f"{name}.png")

    def interrupt_after_the_first_result():
        while not (tmp_path / "out" / "00_restored.png").exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_after_the_first_result, daemon=True).start()
    done = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert done.status == 130 and len(done.errors) == 1 and "Interrupted" in done.errors[0]
    results = list(tree(tmp_path / "out"))
    assert 0 < len(results) < len(names) and results == [f"{name}_restored.png" for name in names[: len(results)]]


# ---- reports and seeds


def test_json_prints_one_object_per_image(restore, save, tmp_path):
    good, bad = save(tmp_path / "a.png"), tmp_path / "none.png"
    done = restore(good, bad, "-o", tmp_path / "out", "--json", "--seed", 3)
    first, second = map(json.loads, done.out.splitlines())
    known = {"status": "done", "width": 40, "height": 24, "seed": 3, "steps": 1, "sampler": "ddpm", "strength": 1.0}
    assert known.items() <= first.items() and first["backend"] == "onnxruntime" and first["seconds"] > 0
    assert first["output"] == str(tmp_path / "out" / "a_restored.png")
    assert second["status"] == "failed" and second["input"] == str(bad)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_seed_determines_the_bytes(restore, save, tmp_path, suffix):
    image = save(tmp_path / "a.png")

    def with_seed(seed, name):
        assert restore(image, "-o", tmp_path / f"{name}.{suffix}", "--seed", seed).status == 0
        return (tmp_path / f"{name}.{suffix}").read_bytes()

    assert with_seed(1, "b") == with_seed(1, "c") != with_seed(2, "d")


class FirstIsNaN(Session):
    """A session whose first run returns NaN."""

    def __init__(self, session):
        self.session, self.runs = session, 0
        self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider

    def compute(self, **arrays):
        self.runs += 1
        factor = np.float32("nan" if self.runs == 1 else 1)
        return {name: array * factor for name, array in self.session.run(**arrays).items()}


def test_a_result_that_is_not_finite_fails_only_its_image(restore, save, tree, tmp_path, monkeypatch):
    backend = ModuleType("failing_backend")
    backend.check = lambda: None
    backend.open_component = lambda *arguments: FirstIsNaN(onnxruntime.open_component(*arguments))
    monkeypatch.setitem(sys.modules, "failing_backend", backend)
    monkeypatch.setitem(BACKENDS, "onnxruntime", Backend("failing_backend", ("onnx",)))
    inputs = [save(tmp_path / "in" / name) for name in ("a.png", "b.png")]
    done = restore(*inputs, "-o", tmp_path / "out")
    assert done.status == 1 and len(done.errors) == 1
    assert "a.png" in done.errors[0] and "not finite" in done.errors[0]
    assert list(tree(tmp_path / "out")) == ["b_restored.png"]
