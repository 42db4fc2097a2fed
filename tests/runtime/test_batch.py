"""A batch as a library call: outcomes and callbacks, and nothing on the terminal."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.faces.finding import Face
from pfstorer_rt.imaging.rows import Spool
from pfstorer_rt.runtime import selection, watch
from pfstorer_rt.runtime.batch import (
    BatchConfig,
    Saving,
    restore_files,
    without_effect,
)
from pfstorer_rt.runtime.degrading import degrade_files
from pfstorer_rt.runtime.jobs import Naming, NoImagesError, plan_jobs
from pfstorer_rt.runtime.watch import watch_folder


@dataclass
class Copying:
    """Takes a restorer's place: every result is its input, in two steps."""

    steps: int = 2
    sampler: str = "ddpm"
    backend: str = "none"
    provider: str = "cpu"
    manifest = SimpleNamespace(identity_name=None, strength=False, face=[])

    def recipe(self, config):
        if config.scale not in (1, 8):
            raise SettingError(f"scale {config.scale}: expected 1 or 8")
        return SimpleNamespace(steps=config.steps or self.steps, sampler=self.sampler)

    def prepared(self, rows, config):
        return rows

    def passes(self, rows, config):
        found = SimpleNamespace(fine=SimpleNamespace(recipe=self.recipe(config)), facts=lambda: {"tiles": 1}, notes=())
        return SimpleNamespace(chosen=lambda choice: found)

    def restore_rows(self, rows, config, step=None, passes=None):
        for done in (1, 2) if step else ():
            step(done, 2)
        return Spool.of(rows.read(0, rows.height))


@pytest.fixture
def save(tmp_path, make_image):
    def write(name, seed=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((make_image(24, 40, seed) * 255).round().astype(np.uint8)).save(path)
        return path

    return write


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_damaged_image_is_an_outcome_and_the_others_are_restored(save, tmp_path, capfd):
    a, c = save("in/a.png", 1), save("in/c.png", 2)
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    seen, steps = [], []
    done = restore_files(
        Copying(),
        [tmp_path / "in"],
        tmp_path / "out",
        on_outcome=seen.append,
        on_step=lambda job, n, total: steps.append((job.source.name, n, total)),
    )
    assert done == seen and [outcome.status for outcome in done] == ["done", "failed", "done"]
    assert isinstance(done[1].error, BadFileError) and "b.png" in done[1].report()["error"]
    assert (done[0].width, done[0].height, done[0].details["tiles"]) == (40, 24, 1)
    for source, outcome in ((a, done[0]), (c, done[2])):
        assert np.array_equal(pixels(outcome.job.target), pixels(source))
    tiles = [(name, n, 2) for name in ("a.png", "c.png") for n in (1, 2)]
    assert [entry for entry in steps if entry[2]] == tiles
    assert [entry[0] for entry in steps if not entry[2]] == ["a.png", "b.png", "c.png"]
    assert capfd.readouterr() == ("", "")


def test_a_second_run_skips_results_of_a_folder_and_refuses_a_named_result(save, tmp_path):
    source = save("in/a.png")
    restore_files(Copying(), [tmp_path / "in"], tmp_path / "out")
    assert [o.status for o in restore_files(Copying(), [tmp_path / "in"], tmp_path / "out")] == ["skipped"]
    (refused,) = restore_files(Copying(), [source], tmp_path / "out" / "a_restored.png")
    assert refused.status == "failed" and refused.error.setting == "overwrite"
    settings = BatchConfig(saving=Saving(overwrite=True))
    assert [o.status for o in restore_files(Copying(), [source], tmp_path / "out", settings)] == ["done"]


def test_settings_that_do_not_fit_are_refused_before_any_work(save, tmp_path):
    with pytest.raises(SettingError, match="scale 2"):
        restore_files(Copying(), [save("a.png")], settings=BatchConfig(RestoreConfig(scale=2)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_preview_and_comparison_are_written_beside_the_result(save, tmp_path):
    source = save("a.png")
    (done,) = restore_files(Copying(), [source], settings=BatchConfig(compare=True, preview=True))
    assert pixels(tmp_path / "a_restored_compare.png").shape == (24, 2 * 40 + 8, 3)
    assert pixels(tmp_path / "a_restored_preview.png").shape == (24, 40, 3)
    assert done.details["compare"] == str(tmp_path / "a_restored_compare.png")
    again = BatchConfig(naming=Naming(label="_b"), compare=True)
    save("a_b_restored_compare.png", 5)
    (kept,) = restore_files(Copying(), [source], settings=again)
    assert "left as it is" in kept.notes[0] and "compare" not in kept.details


def test_an_error_of_the_callback_is_raised_once_all_results_are_written(save, tmp_path):
    save("in/a.png", 1)
    save("in/b.png", 2)

    def full(outcome):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        restore_files(Copying(), [tmp_path / "in"], tmp_path / "out", on_outcome=full)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_restored.png", "b_restored.png"]


def test_a_watched_folder_is_restored_as_it_fills(save, tmp_path):
    (tmp_path / "in").mkdir()
    threading.Timer(0.2, lambda: save("in/a.png")).start()
    (done,) = watch_folder(Copying(), tmp_path / "in", tmp_path / "out", idle=1)
    assert done.status == "done" and (tmp_path / "out" / "a_restored.png").is_file()
    with pytest.raises(SettingError, match="give a folder"):
        watch_folder(Copying(), tmp_path / "in", tmp_path / "one.png", idle=1)


def test_a_file_that_was_read_half_written_is_tried_again_and_a_replaced_one_is_restored_again(save, tmp_path):
    whole = save("a.png", 1).read_bytes()
    other = save("b.png", 2).read_bytes()
    (tmp_path / "in").mkdir()
    arriving = tmp_path / "in" / "a.png"
    arriving.write_bytes(whole[: len(whole) // 2])

    def next_step(outcome):
        if len(seen) < 2:
            arriving.write_bytes([whole, other][len(seen)])
        seen.append(outcome.status)

    seen = []
    done = watch_folder(Copying(), tmp_path / "in", tmp_path / "out", idle=1, on_outcome=next_step)
    assert seen == ["failed", "done", "done"] and [outcome.status for outcome in done] == ["done"]
    assert np.array_equal(pixels(tmp_path / "out" / "a_restored.png"), pixels(tmp_path / "b.png"))


def test_images_with_one_result_name_do_not_end_the_watching(save, tmp_path):
    save("in/a.png", 1)

    def next_step(outcome):
        seen.append((outcome.job.source.name, outcome.status))
        if len(seen) == 1:
            save("in/a.gif", 2)
        elif len(seen) == 2:
            (tmp_path / "in" / "a.gif").rename(tmp_path / "in" / "c.gif")
            save("in/b.png", 3)

    seen = []
    done = watch_folder(Copying(), tmp_path / "in", tmp_path / "out", idle=1, on_outcome=next_step)
    assert seen == [("a.png", "done"), ("a.gif", "failed"), ("b.png", "done"), ("c.gif", "done")]
    assert "a.gif and" in str(done[1].error) and "would all be written to" in str(done[1].error)


def test_a_watched_folder_keeps_a_result_that_it_did_not_write(save, tmp_path):
    save("in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_restored.png").write_bytes(b"mine")
    (done,) = watch_folder(Copying(), tmp_path / "in", tmp_path / "out", idle=0)
    assert done.status == "skipped" and (tmp_path / "out" / "a_restored.png").read_bytes() == b"mine"


def test_a_watched_folder_reports_empty_files_and_passed_over_files_once(save, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "EMPTY", 2.0)
    save("in/a.png")
    (tmp_path / "in" / "b.png").touch()
    (tmp_path / "in" / "c.png").symlink_to(tmp_path / "missing.png")
    notes, seen = [], []
    watch_folder(
        Copying(),
        tmp_path / "in",
        idle=0,
        on_outcome=lambda outcome: seen.append((outcome.job.source.name, outcome.status, str(outcome.error))),
        note=notes.append,
    )
    assert [outcome[:2] for outcome in seen] == [("a.png", "done"), ("b.png", "failed")] and "empty" in seen[1][2]
    assert len(notes) == 1 and "links" in notes[0].replace("(s)", "s") and "c.png" in notes[0]


# ---- limits


class Idle(Copying):
    """Fails if it has to restore: a limit has to be found before the work."""

    def restore_rows(self, rows, config, step=None):
        raise AssertionError("the work began")


def wide(path, width):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (width, 4), "teal").save(path)
    return path


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BatchConfig(RestoreConfig(scale=8), Naming(extension=".webp")), "24000 x 32 is too large for WEBP"),
        (BatchConfig(RestoreConfig(scale=8), max_pixels=100_000), "768000 pixels; expected at most 100000"),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path, settings, words):
    wide(tmp_path / "in" / "a.png", 3000)
    (refused,) = restore_files(Idle(), [tmp_path / "in"], tmp_path / "out", settings)
    assert refused.status == "failed" and words in str(refused.error) and not list((tmp_path / "out").iterdir())


def test_a_name_that_is_too_long_and_a_closed_folder_are_refused_before_the_work(save, tmp_path, monkeypatch):
    save("in/a.png")
    save(f"in/{'b' * 248}.png")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "locked")
    first, second = restore_files(Idle(), [tmp_path / "in"], tmp_path / "locked")
    assert "permission denied" in str(first.error) and "choose a folder" in str(first.error)
    assert "file name too long" in str(second.error) and "choose a shorter name" in str(second.error)
    (done, _) = restore_files(Copying(), [tmp_path / "in"], tmp_path / "out")
    assert done.status == "done"


def test_a_comparison_and_a_result_have_different_names(save, tmp_path):
    save("in/a.png")
    save("in/a_compare.png")
    settings = BatchConfig(naming=Naming(suffix=""), compare=True)
    with pytest.raises(SettingError, match=r"a_compare\.png is an input or a result"):
        restore_files(Idle(), [tmp_path / "in"], tmp_path / "out", settings)


def test_a_comparison_that_is_too_large_is_replaced_by_a_note(tmp_path):
    wide(tmp_path / "a.png", 9000)
    settings = BatchConfig(naming=Naming(extension=".webp"), compare=True)
    (done,) = restore_files(Copying(), [tmp_path / "a.png"], tmp_path / "out", settings)
    assert done.status == "done" and "18008 x 4 is too large for WEBP" in done.notes[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_restored.webp"]


# ---- results and metadata


def test_results_are_marked_and_are_no_inputs_of_a_second_run(save, tmp_path):
    save("in/a.png")
    restore_files(Copying(), [tmp_path / "in" / "a.png"], tmp_path / "in" / "other.png")
    notes = []
    (again,) = plan_jobs([tmp_path / "in"], None, None, notes.append)
    assert again.source == tmp_path / "in" / "a.png" and len(notes) == 1 and "other.png" in notes[0]
    pattern = [str(tmp_path / "in" / "*.png")]
    restore_files(Copying(), pattern)
    assert [outcome.status for outcome in restore_files(Copying(), pattern)] == ["skipped"]
    assert [job.source.name for job in plan_jobs([tmp_path / "in" / "other.png"])] == ["other.png"], "named alone"
    unmarked = BatchConfig(saving=Saving(mark=False))
    restore_files(Copying(), [tmp_path / "in" / "a.png"], tmp_path / "in" / "plain.png", unmarked)
    assert [job.source.name for job in plan_jobs([tmp_path / "in"])] == ["a.png", "plain.png"]
    assert b"DigitalSourceType" not in (tmp_path / "in" / "plain.png").read_bytes()


def test_a_degraded_image_is_not_marked(save, tmp_path):
    degrade_files([save("a.png")], tmp_path / "b.png")
    assert b"DigitalSourceType" not in (tmp_path / "b.png").read_bytes()


def test_the_resolution_of_a_result_grows_with_its_size(save, tmp_path):
    from pfstorer_rt.imaging.files import load_image
    from pfstorer_rt.imaging.metadata import Metadata
    from pfstorer_rt.runtime.batch import read, write

    path = save("a.jpg")
    Image.open(path).save(path, dpi=(300, 300))
    job = plan_jobs([path], tmp_path / "b.jpg")[0]
    write(job, read(job, Saving(), 10**6), Spool(48, 80), Saving())
    found = load_image(tmp_path / "b.jpg").metadata
    assert found.dpi == (600, 600) and found.xmp == Metadata().marked().xmp


def test_settings_without_effect_are_found():
    settings = BatchConfig(RestoreConfig(strength=0.5, eta=0.5, steps=1), preview=True)
    assert [found.setting for found in without_effect(Copying(), settings)] == ["strength", "eta", "preview"]
    assert not without_effect(Copying(sampler="ddim"), BatchConfig(RestoreConfig(eta=0.5), preview=True))


def test_degraded_files_have_consecutive_seeds(save, tmp_path):
    import torch

    save("in/a.png", 1)
    second = save("in/b.png", 2)
    done = degrade_files([tmp_path / "in"], tmp_path / "out", "light", seed=7)
    image = torch.from_numpy(pixels(second).astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    expected = (degrade(image, "light", 8).permute(1, 2, 0).clamp(0, 1) * 255).numpy()
    assert [outcome.job.target.name for outcome in done] == ["a_degraded.png", "b_degraded.png"]
    assert np.abs(pixels(done[1].job.target) - expected).max() <= 1


@pytest.mark.parametrize(
    ("inputs", "output", "naming", "words"),
    [
        (["a.png", "b.png"], "one.png", Naming(), "give a folder"),
        (["a.png"], "one.jpg", Naming(extension=".webp"), "leave one of them out"),
        (["a.png"], "a.png", Naming(), "over an input"),
        (["a.png"], "a.xyz", Naming(), "cannot be written"),
        (["a.png", "x/a.png"], "out", Naming(), "would all be written"),
        (["a.png", ""], "out", Naming(), "an empty name among the inputs"),
        ("", "out", Naming(), "an empty name among the inputs"),
        (["a.png"], "", Naming(), "an empty name of the output"),
    ],
)
def test_outputs_that_contradict_the_inputs_are_refused(save, tmp_path, monkeypatch, inputs, output, naming, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "x/a.png"):
        save(name)
    with pytest.raises(SettingError, match=words):
        plan_jobs(inputs, output, naming)


def test_images_whose_results_would_have_one_name_fail_and_the_others_are_done(save, tmp_path):
    for name in ("in/a.png", "in/b.png", "in/a.bmp"):
        save(name)
    outcomes = restore_files(Copying(), [tmp_path / "in"], tmp_path / "out")
    assert [(outcome.job.source.name, outcome.status) for outcome in outcomes] == [
        ("a.bmp", "failed"),
        ("a.png", "failed"),
        ("b.png", "done"),
    ]
    assert "a.bmp and" in str(outcomes[0].error) and "would all be written to" in str(outcomes[0].error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b_restored.png"]
    again = restore_files(Idle(), [tmp_path / "in"], tmp_path / "out")
    assert [outcome.status for outcome in again] == ["failed", "failed", "skipped"]


def test_a_single_path_is_an_input(save, tmp_path):
    source = save("in/a.png")
    for given in (source, str(source), tmp_path / "in"):
        (job,) = plan_jobs(given, tmp_path / "out")
        assert job.source == source and job.target == tmp_path / "out" / "a_restored.png"


def test_a_folder_without_images_and_a_suffix_with_a_path_are_errors_of_the_caller(save, tmp_path):
    save("in/a_restored.png")
    with pytest.raises(NoImagesError, match=r"1 earlier result\(s\) of this program") as refusal:
        plan_jobs([tmp_path / "in"])
    assert isinstance(refusal.value, ValueError) and isinstance(refusal.value, PFStorerError)
    with pytest.raises(ValueError, match="suffix 'x/y'"):
        Naming(suffix="x/y")


class Marking(Copying):
    """Makes the row below the upper edge of its image red."""

    manifest = SimpleNamespace(identity_name="alice", strength=True, face=[0.0] * 128)

    def restore_rows(self, rows, config, step=None, passes=None):
        band = rows.read(0, rows.height)
        band[:, 0] = np.array([1, -1, -1])[:, None]
        return Spool.of(band)


@pytest.mark.parametrize("turns", range(4))
def test_an_image_is_restored_upright_and_turned_back(turns, tmp_path, monkeypatch):
    """The face is found where the upper left corner is white; then the upper edge becomes red."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:6, :6] = 255
    seen = []

    def find(pixels):
        return [Face(0, 0, 6, np.zeros(128))] if pixels[1:5, 1:5].mean() > 0.9 else []

    def facts(source, result):
        seen.extend((source, result))
        return {}

    monkeypatch.setattr(selection, "_faces", find)
    monkeypatch.setattr(selection, "face_models", lambda: tmp_path)
    Image.fromarray(np.rot90(upright, turns)).save(tmp_path / "a.png")
    references = SimpleNamespace(mean=np.zeros(128), facts=facts)
    settings = BatchConfig(preview=True, references=references)
    restore_files(Marking(), [tmp_path / "a.png"], tmp_path / "b.png", settings)
    expected = upright.copy()
    expected[0] = [255, 0, 0]
    for name in ("b.png", "b_preview.png"):
        np.testing.assert_array_equal(pixels(tmp_path / name), np.rot90(expected, turns))
    assert [rows.read(0, 1)[0, 0, 20] for rows in seen] == [-1, 1], "both are upright"
