import io
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def restore(run, nano_plan):
    """`restore` with the nano plan in as few steps as there are."""
    fixed = ("restore", "--engine", nano_plan.path, "--backend", "onnxruntime", "--steps", 1)
    return lambda *arguments, **more: run(*fixed, *arguments, **more)


def truncated(path, save):
    whole = save(path, 64, 64).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD = {
    "missing": (lambda path, save: None, "no such file"),
    "empty": (lambda path, save: path.write_bytes(b""), "0 bytes"),
    "truncated": (truncated, "cut off or damaged"),
    "text": (lambda path, save: path.write_text("not a picture"), "not a readable image"),
}


# ---- bad input


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_gets_one_line_and_status_1(restore, save, tree, tmp_path, kind):
    make, words = BAD[kind]
    make(tmp_path / "bad.png", save)
    before = tree(tmp_path)
    done = restore(tmp_path / "bad.png", "-o", tmp_path / "out.png")
    assert (done.status, done.out, len(done.errors)) == (1, "", 1)
    assert "bad.png" in done.errors[0] and words in done.errors[0] and len(done.errors[0]) < 400
    assert tree(tmp_path) == before


def test_a_folder_without_pictures_is_a_wrong_call(restore, tmp_path):
    (tmp_path / "empty").mkdir()
    done = restore(tmp_path / "empty", "-o", tmp_path / "out")
    assert done.status == 2 and "no pictures" in done.errors[0] and not (tmp_path / "out").exists()


def test_one_bad_picture_among_good_ones_loses_nothing(restore, save, tree, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    save(scans / "a.png")
    save(scans / "sub" / "deep" / "b.JPG", seed=1)
    (scans / "sub" / "bad.png").write_bytes(b"\x89PNG\r\n")
    (scans / "notes.txt").write_text("not a picture, and not listed")
    before = tree(scans)
    done = restore(scans, "-o", out, "--json")
    assert done.status == 1
    assert sorted(tree(out)) == ["a_restored.png", "sub/deep/b_restored.jpg"]
    reports = {r["input"]: r for r in map(json.loads, done.out.splitlines())}
    assert [reports[k]["status"] for k in sorted(reports)] == ["done", "failed", "done"]
    assert "bad.png" in reports[str(scans / "sub" / "bad.png")]["error"]
    assert tree(scans) == before


def test_too_many_pixels_are_refused(restore, save, tmp_path):
    done = restore(save(tmp_path / "a.png", 20, 10), "--max-pixels", 199)
    assert done.status == 1 and "200 pixels" in done.errors[0] and "--max-pixels" in done.errors[0]


def foreign_zip(path, plan):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")


def damaged(path, plan):
    data = bytearray(plan.path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda path, plan: None,
        lambda path, plan: path.write_bytes(b""),
        lambda path, plan: path.write_text("alice"),
        lambda path, plan: path.write_bytes(plan.path.read_bytes()[:-100]),
        lambda path, plan: path.mkdir(),
        foreign_zip,
        damaged,
    ],
    ids=["missing", "empty", "text", "truncated", "folder", "foreign zip", "damaged"],
)
def test_a_bad_plan_is_refused_before_any_picture(refused, save, tmp_path, nano_plan, make):
    make(tmp_path / "bad.plan", nano_plan)
    picture = save(tmp_path / "a.png")
    refused(2, "restore", "--engine", tmp_path / "bad.plan", picture, words=["bad.plan"])
    assert not (tmp_path / "a_restored.png").exists()


def test_an_identity_of_another_base_is_refused(refused, save, tmp_path, nano_identity):
    from pfstorer_rt.models.base import build_base

    other = build_base("nano", seed=7).save(tmp_path / "other")
    mine = nano_identity.save(tmp_path / "alice.safetensors")
    picture = save(tmp_path / "a.png")
    refused(2, "restore", "--base", other, "--identity", mine, picture, words=["alice", "learned on base"])
    assert not (tmp_path / "a_restored.png").exists()


def test_a_base_and_an_identity_run_without_a_plan(run, save, tmp_path, nano_base_dir, nano_identity):
    mine = nano_identity.save(tmp_path / "alice.safetensors")
    picture = save(tmp_path / "a.png")
    done = run("restore", "--base", nano_base_dir, "--identity", mine, "--steps", 1, picture)
    assert done.status == 0 and Image.open(tmp_path / "a_restored.png").size == (40, 24)


@pytest.mark.parametrize(
    "arguments", [(), ("--engine", "a.plan", "--base", "tiny"), ("--engine", "a.plan", "--identity", "bob")]
)
def test_calls_that_contradict_themselves_are_refused(run, save, tmp_path, arguments):
    done = run("restore", *arguments, save(tmp_path / "a.png"))
    assert done.status == 2 and len(done.errors) == 1 and "--" in done.errors[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--scale", 0), ("--scale", "nan"), ("--strength", "inf"), ("--overlap", 7), ("--overlap", 64)],
)
def test_settings_out_of_range_are_refused(run, save, tmp_path, nano_plan, option, value):
    done = run("restore", "--engine", nano_plan.path, option, value, save(tmp_path / "a.png"))
    assert done.status == 2 and len(done.errors) == 1 and option[2:] in done.errors[0]
    assert not (tmp_path / "a_restored.png").exists()


# ---- every kind of picture


def grey16(path):
    Image.fromarray(np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)).save(path)


def as_mode(mode):
    return lambda path: Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 20).convert("RGB").convert(mode).save(path)


PICTURES = {
    "grey.png": (as_mode("L"), (40, 24)),
    "grey16.png": (grey16, (40, 24)),
    "print.jpg": (as_mode("CMYK"), (40, 24)),
    "palette.png": (as_mode("P"), (40, 24)),
    "one.png": (lambda path: Image.new("RGB", (1, 1), (200, 90, 30)).save(path), (1, 1)),
    "line.png": (lambda path: Image.new("RGB", (1000, 3), (200, 90, 30)).save(path), (1000, 3)),
    "column.bmp": (lambda path: Image.new("1", (3, 200), 1).save(path), (3, 200)),
}


def test_awkward_pictures_keep_their_size(restore, tmp_path):
    (tmp_path / "in").mkdir()
    for name, (make, _) in PICTURES.items():
        make(tmp_path / "in" / name)
    done = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    for name, (_, size) in PICTURES.items():
        with Image.open(tmp_path / "out" / name.replace(".", "_restored.")) as result:
            result.load()
            assert (result.size, result.mode) == (size, "RGB"), name


def test_alpha_is_kept_at_the_size_of_the_result(restore, tmp_path):
    levels = np.zeros((24, 40, 4), np.uint8)
    levels[..., :3], levels[:, 20:, 3] = 128, 255
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert restore(tmp_path / "a.png", "--scale", 2, "-o", tmp_path / "b.png").status == 0
    with Image.open(tmp_path / "b.png") as result:
        assert (result.mode, result.size) == ("RGBA", (80, 48))
        alpha = np.asarray(result)[..., 3]
    assert alpha[:, :36].max() == 0 and alpha[:, 44:].min() == 255


def test_a_turned_photograph_comes_out_upright(restore, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: its top row is the right edge
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert restore(tmp_path / "a.png", "-o", tmp_path / "b.png").status == 0
    with Image.open(tmp_path / "b.png") as result:
        assert result.size == (24, 40) and result.getexif()[0x0112] == 1
        assert np.asarray(result)[:, 14:].mean() > np.asarray(result)[:, :10].mean() + 50


def test_of_an_animation_the_first_frame_is_restored(restore, tmp_path):
    frames = [Image.new("RGB", (40, 24), colour) for colour in ("navy", "gold")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = restore(tmp_path / "a.gif")
    assert done.status == 0 and "2 frames: the first was used" in done.out
    with Image.open(tmp_path / "a_restored.png") as result:
        assert result.size == (40, 24)


# ---- names


def test_an_existing_target_is_replaced_only_on_demand(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"precious")
    before = tree(tmp_path)
    done = restore(tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert done.status == 1 and "--overwrite" in done.errors[0] and tree(tmp_path) == before
    assert restore(tmp_path / "a.png", "-o", tmp_path / "b.png", "--overwrite").status == 0
    assert tree(tmp_path)["b.png"][:4] == b"\x89PNG"


def test_a_second_run_of_a_folder_does_only_what_is_missing(restore, save, tree, tmp_path):
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
    assert restore(tmp_path / "one", "-o", tmp_path / "x.png").status == 0
    assert sorted(set(tree(tmp_path)) - {"in/a.png", "in/b.webp", "one/a.png"}) == [
        "both/a_restored.png", "both/b_restored.webp", "new/x.tif", "there/b_restored.webp", "x.png/a_restored.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "new" / "x.tif") as result:
        assert result.format == "TIFF"


def test_globs_are_expanded_for_shells_that_do_not(restore, save, tree, tmp_path):
    save(tmp_path / "in" / "a1.png")
    save(tmp_path / "in" / "a2.png")
    save(tmp_path / "in" / "b.png")
    save(tmp_path / "in" / "[x].png")
    assert restore(tmp_path / "in" / "a?.png", "-o", tmp_path / "out").status == 0
    assert restore(tmp_path / "in" / "[x].png", "-o", tmp_path / "x.png").status == 0, "a real name with brackets"
    assert sorted(tree(tmp_path / "out")) == ["a1_restored.png", "a2_restored.png"]
    none = restore(tmp_path / "in" / "c*.png")
    assert none.status == 2 and "no pictures" in none.errors[0]


@pytest.mark.parametrize("names", [("a.gif", "a.png"), ("x/a.png", "y/a.png")])
def test_two_inputs_for_one_name_are_refused_before_any_work(restore, save, tree, tmp_path, names):
    inputs = [save(tmp_path / name) for name in names]
    before = tree(tmp_path)
    done = restore(*inputs, "-o", tmp_path / "out")
    assert done.status == 2 and "a_restored.png" in done.errors[0] and tree(tmp_path) == before


def test_the_same_input_named_twice_is_done_once(restore, save, tmp_path):
    a = save(tmp_path / "a.png")
    done = restore(a, a, "-o", f"{tmp_path}/out/", "--json")
    assert done.status == 0 and len(done.out.splitlines()) == 1


# ---- streams


@pytest.mark.parametrize("arguments", [("-",), ("-", "-o", "-"), ("-", "-o", "-", "--json")])
def test_stdin_to_stdout_gives_a_png_and_nothing_else(restore, save, tmp_path, arguments):
    done = restore(*arguments, stdin=save(tmp_path / "a.jpg").read_bytes())
    assert done.status == 0, done.err
    assert done.stdout.startswith(b"\x89PNG") and done.stdout.endswith(b"IEND\xaeB`\x82")
    with Image.open(io.BytesIO(done.stdout)) as result:
        result.load()
        assert result.size == (40, 24)


def test_stdin_to_a_file_and_a_file_to_stdout(restore, save, tmp_path):
    picture = save(tmp_path / "a.png")
    assert restore("-", "-o", tmp_path / "b.png", stdin=picture.read_bytes()).status == 0
    assert restore(picture, "-o", "-").stdout == (tmp_path / "b.png").read_bytes()


def test_a_bad_stdin_gets_one_line_and_an_empty_stdout(restore):
    done = restore("-", stdin=b"")
    assert (done.status, done.stdout, len(done.errors)) == (1, b"", 1) and "0 bytes" in done.errors[0]


# ---- disks


def test_a_folder_that_cannot_be_made_is_one_line(restore, save, tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    done = restore(save(tmp_path / "a.png"), "-o", tmp_path / "file" / "out.png")
    assert done.status == 1 and len(done.errors) == 1
    assert str(tmp_path / "file") in done.errors[0] and "Errno" not in done.errors[0] and ";" in done.errors[0]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_suffix_that_cannot_be_written_is_one_line(restore, save, tree, tmp_path):
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


def test_an_interruption_keeps_what_is_done(restore, save, tree, tmp_path, monkeypatch):
    from pfstorer_rt.cli import jobs

    for i, name in enumerate("abcd"):
        save(tmp_path / "in" / f"{name}.png", seed=i)
    scan, calls = jobs.scan_image, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # read ahead after the first result was written
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return scan(*arguments)

    monkeypatch.setattr(jobs, "scan_image", interrupted)
    done = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert done.status == 130 and len(done.errors) == 1 and "interrupted" in done.errors[0]
    assert set(tree(tmp_path / "out")) in ({"a_restored.png"}, {"a_restored.png", "b_restored.png"})


# ---- reports and seeds


def test_json_is_one_object_a_picture(restore, save, tmp_path):
    good, bad = save(tmp_path / "a.png"), tmp_path / "none.png"
    done = restore(good, bad, "-o", tmp_path / "out", "--json", "--seed", 3)
    first, second = map(json.loads, done.out.splitlines())
    known = {"status": "done", "width": 40, "height": 24, "seed": 3, "steps": 1, "sampler": "ddpm", "strength": 1.0}
    assert known.items() <= first.items() and first["backend"] == "onnxruntime" and first["seconds"] > 0
    assert first["output"] == str(tmp_path / "out" / "a_restored.png")
    assert second["status"] == "failed" and second["input"] == str(bad)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_seed_fixes_the_bytes(restore, save, tmp_path, suffix):
    picture = save(tmp_path / "a.png")

    def with_seed(seed, name):
        assert restore(picture, "-o", tmp_path / f"{name}.{suffix}", "--seed", seed).status == 0
        return (tmp_path / f"{name}.{suffix}").read_bytes()

    assert with_seed(1, "b") == with_seed(1, "c") != with_seed(2, "d")


def test_a_failing_engine_names_the_picture_and_goes_on(restore, save, tree, tmp_path, monkeypatch):
    from pfstorer_rt import canvas

    real = canvas.color_fix
    seen = SimpleNamespace(first=True)

    def poisoned(decoded, style, kind):
        value, seen.first = float("nan") if seen.first else 0.0, False
        return real(decoded, style, kind) + value

    monkeypatch.setattr(canvas, "color_fix", poisoned)
    inputs = [save(tmp_path / "in" / name) for name in ("a.png", "b.png")]
    done = restore(*inputs, "-o", tmp_path / "out")
    assert done.status == 1 and len(done.errors) == 1
    assert "a.png" in done.errors[0] and "not finite" in done.errors[0]
    assert list(tree(tmp_path / "out")) == ["b_restored.png"]


# ---- tiles, memory, and what people expect


def test_a_dry_run_says_what_the_run_will_do_and_does_nothing(restore, save, tree, tmp_path):
    save(tmp_path / "a.png", 150, 100)
    before = tree(tmp_path)
    planned = restore(tmp_path / "a.png", "--dry-run", "--json")
    assert planned.status == 0 and tree(tmp_path) == before
    said = json.loads(planned.out)
    assert said["status"] == "planned" and (said["width"], said["height"], said["steps"]) == (160, 128, 1)
    assert said["predicted_peak_mb"] > 50 and said["predicted_seconds"] > 0
    assert json.loads(restore(tmp_path / "a.png", "--json").out)["tiles"] == said["tiles"] == 3 * 3
    assert "9 tiles in batches of 4, 1 steps" in restore(tmp_path / "a.png", "--dry-run").out


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
    over = restore(tmp_path / "in", "--suffix", "")
    assert over.status == 2 and "over an input" in over.errors[0]


def test_comparison_and_preview_lie_beside_and_are_no_inputs(restore, save, tree, tmp_path):
    save(tmp_path / "a.png")
    report = json.loads(restore(tmp_path / "a.png", "--compare", "--preview", "--json", "--scale", 2).out)
    assert sorted(tree(tmp_path)) == ["a.png", "a_restored.png", "a_restored_compare.png", "a_restored_preview.png"]
    with Image.open(report["compare"]) as both, Image.open(tmp_path / "a_restored.png") as result:
        assert both.size == (2 * 80 + 8, 48)
        assert np.array_equal(np.asarray(both)[:, 88:], np.asarray(result))
        large = np.asarray(Image.open(tmp_path / "a.png").resize((80, 48), Image.Resampling.BICUBIC), float)
        assert np.abs(np.asarray(both)[:, :80] - large).mean() < 5  # another cubic kernel
    again = restore(tmp_path, "--json")
    assert [json.loads(line)["input"] for line in again.out.splitlines()] == [str(tmp_path / "a.png")]


def test_what_lies_beside_a_result_is_not_overwritten_either(restore, save, tmp_path):
    save(tmp_path / "a.png")
    mine = [save(tmp_path / f"a_restored_{word}.png", seed=7) or tmp_path / f"a_restored_{word}.png"
            for word in ("preview", "compare")]  # fmt: skip
    before = [path.read_bytes() for path in mine]
    report = json.loads(restore(tmp_path / "a.png", "--compare", "--preview", "--json").out)
    assert [path.read_bytes() for path in mine] == before
    assert report["status"] == "done" and all("was left as it is" in note for note in report["notes"])
    assert restore(tmp_path / "a.png", "--compare", "--preview", "--overwrite").status == 0
    assert all(path.read_bytes() != old for path, old in zip(mine, before, strict=True))


def test_a_report_that_cannot_be_written_is_a_failure(restore, save, tmp_path, monkeypatch):
    from pfstorer_rt.cli import jobs

    def full(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path / "a.png")
    monkeypatch.setattr(jobs, "show", full)
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
    threading.Timer(0.5, lambda: save(tmp_path / "in" / "a.png")).start()
    done = restore("--watch", tmp_path / "in", "-o", tmp_path / "out", "--idle", 4)
    assert done.status == 0 and list(tree(tmp_path / "out")) == ["a_restored.png"]


def test_a_watched_folder_with_two_pictures_of_one_name_says_so(restore, save, tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "a.jpg")
    done = restore("--watch", tmp_path / "in", "-o", tmp_path / "out", "--format", "png", "--idle", 4)
    assert done.status == 2 and "several inputs would be written to" in done.errors[0]


def test_an_input_is_safe_however_it_is_spelled(restore, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "real" / "a.png")
    save(tmp_path / "real" / "a_restored.png")
    before = [p.read_bytes() for p in sorted((tmp_path / "real").iterdir())]
    calls = [("real/a.png", "-o", tmp_path / "real" / "a.png"), ("real/a.png", "-o", "link/a.png"),
             ("real/a.png", "real/a_restored.png")]  # fmt: skip
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
def test_watching_and_naming_exclude_each_other(restore, arguments):
    done = restore(*arguments)
    assert done.status == 2 and "--watch" in done.errors[0]


def test_distances_to_references_are_reported_and_warned_of(restore, save, tmp_path, monkeypatch):
    from pfstorer_rt.cli import references

    # A "face" is the mean brightness: the references are bright, the input is, the result is not.
    monkeypatch.setattr(references, "face_embedder", lambda: lambda pixels: np.array([pixels.mean()]))
    monkeypatch.setattr("pfstorer_rt.canvas.color_fix", lambda content, style, kind: content * 0 - 1)
    Image.new("RGB", (40, 24), "white").save(tmp_path / "white.png")
    Image.new("RGB", (40, 24), "white").save(tmp_path / "a.png")
    (tmp_path / "refs").mkdir()
    (tmp_path / "white.png").rename(tmp_path / "refs" / "white.png")
    done = restore(tmp_path / "a.png", "--refs", tmp_path / "refs", "--json", "--color-fix", "none")
    report = json.loads(done.out)
    assert report["id_distance"] == 1 and report["id_distance_input"] == 0
    assert "farther from the references" in report["notes"][0]


def test_references_need_the_metrics(restore, save, tmp_path, monkeypatch):
    from pfstorer_rt.cli import references

    monkeypatch.setattr(references, "face_embedder", lambda: None)
    done = restore(save(tmp_path / "a.png"), "--refs", tmp_path)
    assert done.status == 2 and "pip install 'pfstorer-rt[metrics]'" in done.errors[0]
