import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_a_dry_run_predicts_the_run_and_writes_nothing(restore, save, tree, tmp_path):
    save(tmp_path / "a.png", 150, 100)
    before = tree(tmp_path)
    planned = restore(tmp_path / "a.png", "--dry-run", "--json")
    assert planned.status == 0 and tree(tmp_path) == before
    said = json.loads(planned.out)
    assert said["status"] == "planned" and (said["width"], said["height"], said["steps"]) == (160, 128, 1)
    assert said["predicted_peak_mb"] > 50 and said["predicted_seconds"] > 0
    assert json.loads(restore(tmp_path / "a.png", "--json").out)["tiles"] == said["tiles"] == 3 * 3
    assert "tiles: 9 in batches of 4; steps: 1;" in restore(tmp_path / "a.png", "--dry-run").out


def test_a_dry_run_skips_existing_results(restore, save, tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name)
    assert restore(tmp_path / "in" / "a.png", "-o", tmp_path / "out/").status == 0
    planned = restore(tmp_path / "in", "-o", tmp_path / "out", "--dry-run", "--json").out.splitlines()
    assert [json.loads(line)["status"] for line in planned] == ["skipped", "planned"]
    again = restore(tmp_path / "in", "-o", tmp_path / "out", "--dry-run", "--json", "--overwrite").out.splitlines()
    assert [json.loads(line)["status"] for line in again] == ["planned", "planned"]


def test_a_quality_without_effect_is_noted(restore, save, tmp_path):
    image, word = save(tmp_path / "a.png"), "--quality changes nothing"
    assert word in restore(image, "-o", tmp_path / "b.png", "--quality", 50).err
    assert word not in restore(image, "-o", tmp_path / "c.png").err
    assert word not in restore(image, "-o", tmp_path / "d.jpg", "--quality", 50).err


def test_suffix_format_and_quality(restore, save, tree, tmp_path):
    for name in ("a.png", "b.jpg"):
        save(tmp_path / "in" / name)
    sizes = []
    for quality in (30, 95):
        out = tmp_path / str(quality)
        done = restore(tmp_path / "in", "-o", out, "--suffix", "-new", "--format", "webp", "--quality", quality)
        assert done.status == 0 and sorted(tree(out)) == ["a-new.webp", "b-new.webp"]
        sizes.append(len(tree(out)["a-new.webp"]))
    assert sizes[0] < sizes[1]
    streamed = restore(tmp_path / "in" / "a.png", "-o", "-", "--format", "webp").stdout
    assert Image.open(io.BytesIO(streamed)).format == "WEBP"
    over = restore(tmp_path / "in", "--suffix", "")
    assert over.status == 2 and "over an input" in over.errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("in/a.png", "-o", "out.jpg", "--format", "webp"), "leave one of them out"),
        (("in", "-o", "out.png"), "give a folder"),
        (("in/a.png", "in/b.jpg", "-o", "out.png"), "give a folder"),
        (("in/a.png", "--suffix", "x/y"), "suffix 'x/y'"),
        (("in/a.png", "--seed", 2**32), "4294967296 is not in the range"),
    ],
)
def test_contradictory_outputs_are_refused(restore, save, tree, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.jpg")
    before = tree(tmp_path)
    done = restore(*arguments)
    assert done.status == 2 and words in done.errors[0]
    assert tree(tmp_path) == before and not (tmp_path / "out.png").exists()


def test_comparison_and_preview_are_written_beside_the_result_and_not_restored(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    report = json.loads(restore(tmp_path / "a.png", "--compare", "--preview", "--steps", 2, "--json", "--scale", 2).out)
    assert sorted(tree(tmp_path)) == ["a.png", "a_restored.png", "a_restored_compare.png", "a_restored_preview.png"]
    with Image.open(report["compare"]) as both, Image.open(tmp_path / "a_restored.png") as result:
        assert both.size == (2 * 80 + 8, 48)
        assert np.array_equal(np.asarray(both)[:, 88:], np.asarray(result))
        large = np.asarray(Image.open(tmp_path / "a.png").resize((80, 48), Image.Resampling.BICUBIC), float)
        assert np.abs(np.asarray(both)[:, :80] - large).mean() < 5  # another cubic kernel
    again = restore(tmp_path, "--json")
    assert [json.loads(line)["input"] for line in again.out.splitlines()] == [str(tmp_path / "a.png")]


def test_a_preview_of_a_one_step_result_is_replaced_by_a_note(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    done = restore(tmp_path / "a.png", "--preview", "--steps", 1)
    assert done.status == 0 and "--preview changes nothing" in done.err
    assert sorted(tree(tmp_path)) == ["a.png", "a_restored.png"]


def test_existing_previews_and_comparisons_are_not_overwritten(restore, save, tmp_path):
    save(tmp_path / "a.png")
    mine = [
        save(tmp_path / f"a_restored_{word}.png", seed=7) or tmp_path / f"a_restored_{word}.png"
        for word in ("preview", "compare")
    ]
    before = [path.read_bytes() for path in mine]
    report = json.loads(restore(tmp_path / "a.png", "--compare", "--preview", "--steps", 2, "--json").out)
    assert [path.read_bytes() for path in mine] == before
    assert report["status"] == "done" and all("was left as it is" in note for note in report["notes"])
    assert restore(tmp_path / "a.png", "--compare", "--preview", "--steps", 2, "--overwrite").status == 0
    assert all(path.read_bytes() != old for path, old in zip(mine, before, strict=True))


def test_a_report_that_cannot_be_written_is_a_failure(restore, save, tmp_path):
    save(tmp_path / "a.png")
    with Path("/dev/full").open("wb", buffering=0) as full:
        screen = io.TextIOWrapper(full, write_through=True)
        with contextlib.redirect_stdout(screen):
            done = restore(tmp_path / "a.png", "--json")
    assert done.status == 1 and "No space left" in done.errors[-1]
    assert (tmp_path / "a_restored.png").exists()


def test_several_engines_over_one_folder(run, save, tree, tmp_path, nano_plan, base_plan):
    save(tmp_path / "in" / "a.png")
    engines = ("--engine", nano_plan.path, "--engine", base_plan.path)
    assert run("restore", *engines, "--steps", 1, tmp_path / "in", "-o", tmp_path / "out").status == 0
    assert sorted(tree(tmp_path / "out")) == ["a_alice_restored.png", "a_base_restored.png"]
    twice = run("restore", "--engine", nano_plan.path, "--engine", nano_plan.path, tmp_path / "in")
    assert twice.status == 2 and "rename one" in twice.errors[0]


def test_a_watched_folder_is_restored_as_it_fills(restore, save, tree, tmp_path):
    import threading

    (tmp_path / "in").mkdir()
    threading.Timer(0.2, lambda: save(tmp_path / "in" / "a.png")).start()
    done = restore("--watch", tmp_path / "in", "-o", tmp_path / "out", "--idle", 1)
    assert done.status == 0 and list(tree(tmp_path / "out")) == ["a_restored.png"]


def test_watched_images_with_the_same_result_name_are_refused(restore, save, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "a.jpg")
    done = restore("--watch", tmp_path / "in", "-o", tmp_path / "out", "--format", "png", "--idle", 1)
    assert done.status == 1 and all(word in done.errors[0] for word in ("a.png", "a.jpg", "would all be written to"))


def test_a_watched_folder_needs_a_folder_for_its_results(refused, nano_plan, tmp_path):
    words = ["one.png", "give a folder"]
    refused(2, "restore", "--engine", nano_plan.path, "--watch", tmp_path, "-o", tmp_path / "one.png", words=words)


def test_settings_without_effect_are_noted(run, save, base_plan, tmp_path):
    save(tmp_path / "a.png")
    fixed = ("restore", "--engine", base_plan.path, "--backend", "onnxruntime", "--steps", 1, tmp_path / "a.png")
    done = run(*fixed, "--strength", 0.5, "--eta", 0.5, "--sampler", "ddpm")
    assert done.status == 0
    assert [line.split(" changes")[0] for line in done.err.splitlines() if "note:" in line] == [
        "note: --strength 0.5",
        "note: --eta 0.5",
    ]
    ddim = (*fixed, "--eta", 0.5, "--sampler", "ddim", "--overwrite")
    assert "note: --eta 0.5 changes nothing: no noise is added after the last step" in run(*ddim).err
    assert "note:" not in run(*ddim, "--steps", 2).err


def test_an_input_is_not_overwritten_through_another_path(restore, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "real" / "a.png")
    save(tmp_path / "real" / "a_restored.png")
    before = [p.read_bytes() for p in sorted((tmp_path / "real").iterdir())]
    calls = [
        ("real/a.png", "-o", tmp_path / "real" / "a.png"),
        ("real/a.png", "-o", "link/a.png"),
        ("real/a.png", "real/a_restored.png"),
    ]
    for call in calls:
        done = restore(*call, "--overwrite")
        assert done.status == 2 and "over an input" in done.errors[0], call
    assert [p.read_bytes() for p in sorted((tmp_path / "real").iterdir())] == before


def test_results_inside_the_folder_of_inputs_are_not_restored_again(restore, save, tree, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png")
    for _ in range(2):
        done = restore(tmp_path / "in", "-o", tmp_path / "in" / "out", "--suffix", "")
        assert done.status == 0
    assert sorted(tree(tmp_path / "in")) == ["a.png", "out/a.png"]


@pytest.mark.parametrize("arguments", [(), ("--watch", ".", "a.png"), ("--idle", "1", "a.png")])
def test_watch_and_named_inputs_exclude_each_other(restore, arguments):
    done = restore(*arguments)
    assert done.status == 2 and "--watch" in done.errors[0]


def test_distances_to_references_are_reported(restore, face, tmp_path):
    (tmp_path / "refs").mkdir()
    for path in (tmp_path / "a.png", tmp_path / "refs" / "a.png"):
        Image.fromarray((face * 255).round().astype(np.uint8)).save(path)
    (tmp_path / "refs" / "damaged.png").write_bytes(b"no image")
    done = restore(tmp_path / "a.png", "--refs", tmp_path / "refs", "--json", "--color-fix", "none")
    report = json.loads(done.out)
    assert report["id_distance_input"] == 0 and "damaged.png" in done.err
    assert report["id_distance"] is None and "no face found in the result" in report["notes"][0]


def test_references_need_the_metrics_extra(restore, save, tmp_path, without_dlib):
    done = restore(save(tmp_path / "a.png"), "--refs", tmp_path)
    assert done.status == 2 and "pip install 'pfstorer-rt[metrics]'" in done.errors[0]


def test_the_face_can_be_chosen_by_a_rectangle(restore, save, tmp_path):
    numbers = ("1,2,3", "1,2,3,4,5", "1,2,3,4,", "1,2,0,4", "1,2,3,0", "-1,2,3,4", "9" * 400 + ",0,1,1")
    for place in (*numbers, "1.5,2,3,4", "1,2,3,1_0", "1,2,3,\u0664", "nan,0,1,1", ""):
        done = restore(save(tmp_path / "a.png"), "--apply-to", place)
        assert done.status == 2 and "four whole numbers X,Y,W,H" in done.err and len(done.errors) == 1, place
    done = restore(save(tmp_path / "a.png"), "--apply-to", "10,12,9000,20", "-o", tmp_path / "b.png")
    assert done.status == 0, done.err


def test_a_strength_far_from_the_trained_one_gets_a_note(restore, save, tmp_path):
    image = save(tmp_path / "a.png")
    assert "note: --strength 5: " in restore(image, "--strength", 5, "-o", tmp_path / "b.png").err
    assert "--strength" not in restore(image, "--strength", 1.5, "-o", tmp_path / "c.png").err
    refused = restore(image, "--strength", 40, "-o", tmp_path / "d.png")
    assert refused.status == 2 and "note: --strength" not in refused.err


def test_a_place_changes_nothing_without_an_identity(run, restore, save, base_plan, tmp_path):
    image, word = save(tmp_path / "a.png"), "--apply-to changes nothing: this engine contains no identity"
    call = ("restore", "--engine", base_plan.path, "--backend", "onnxruntime", "--steps", 1, image)
    assert word in run(*call, "--apply-to", "10,12,20,20").err
    assert word not in run(*call, "--overwrite").err
    assert word not in restore(image, "--overwrite", "--apply-to", "10,12,20,20").err


def test_files_beside_standard_output_are_noted(restore, save, tmp_path):
    done = restore(save(tmp_path / "a.png"), "-o", "-", "--compare")
    assert done.status == 0 and "--compare changes nothing" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


@pytest.mark.parametrize(("weight", "noted"), [("7", True), ("-0.5", True), ("0.5", False)])
def test_a_weight_outside_its_range_gets_a_note(run, nano_base_dir, save, tmp_path, weight, noted):
    done = run("restore", "--base", nano_base_dir, save(tmp_path / "a.png"), "--cfw-weight", weight)
    assert ("expected 0 to 1; other values give false colours" in done.err) == noted


def test_scratches_are_removed_before_the_restoration(restore, tmp_path, monkeypatch):
    from pfstorer_rt.imaging.rows import Spool
    from pfstorer_rt.runtime import restorer

    plain = np.full((64, 70, 3), 90, np.uint8)
    plain[::7] = 120
    marked = plain.copy()
    marked[30:33] = 255
    for name, image in (("plain.png", plain), ("marked.png", marked)):
        Image.fromarray(image).save(tmp_path / name)
    clean = Spool.of(plain.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    monkeypatch.setattr(restorer, "without_scratches", lambda rows: clean)
    results = []
    for number, call in enumerate([("plain.png",), ("marked.png", "--remove-scratches"), ("marked.png",)]):
        target = tmp_path / f"{number}.png"
        assert restore(tmp_path / call[0], *call[1:], "-o", target).status == 0
        results.append(np.asarray(Image.open(target)))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])
    monkeypatch.setattr(restorer, "without_scratches", lambda rows: rows)
    done = restore(tmp_path / "plain.png", "--remove-scratches", "-o", tmp_path / "3.png", "--json")
    assert json.loads(done.out)["notes"] == ["no scratches were found"]
    assert np.array_equal(results[0], np.asarray(Image.open(tmp_path / "3.png")))
