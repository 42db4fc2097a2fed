import json

import numpy as np
import pytest
from PIL import Image


def truncated(path, save):
    whole = save(path, 64, 64).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD = {
    "missing": (lambda path, save: None, "no such file"),
    "empty": (lambda path, save: path.write_bytes(b""), "0 bytes"),
    "truncated": (truncated, "cut off or damaged"),
    "text": (lambda path, save: path.write_text("not an image"), "not a readable image"),
}


# ---- bad input


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_image_prints_one_line_and_exits_with_1(restore, save, tree, tmp_path, kind):
    make, words = BAD[kind]
    make(tmp_path / "bad.png", save)
    before = tree(tmp_path)
    done = restore(tmp_path / "bad.png", "-o", tmp_path / "out.png")
    assert (done.status, done.out, len(done.errors)) == (1, "", 1)
    assert "bad.png" in done.errors[0] and words in done.errors[0] and len(done.errors[0]) < 400
    assert tree(tmp_path) == before


def test_a_folder_without_images_exits_with_2(restore, tmp_path):
    (tmp_path / "empty").mkdir()
    done = restore(tmp_path / "empty", "-o", tmp_path / "out")
    assert done.status == 2 and "no images" in done.errors[0] and not (tmp_path / "out").exists()


def test_one_unreadable_image_does_not_stop_the_others(restore, save, tree, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    save(scans / "a.png")
    save(scans / "sub" / "deep" / "b.JPG", seed=1)
    (scans / "sub" / "bad.png").write_bytes(b"\x89PNG\r\n")
    (scans / "notes.txt").write_text("not an image, and not listed")
    before = tree(scans)
    done = restore(scans, "-o", out, "--json")
    assert done.status == 1
    assert sorted(tree(out)) == ["a_restored.png", "sub/deep/b_restored.jpg"]
    reports = {r["input"]: r for r in map(json.loads, done.out.splitlines())}
    assert [reports[k]["status"] for k in sorted(reports)] == ["done", "failed", "done"]
    assert "bad.png" in reports[str(scans / "sub" / "bad.png")]["error"]
    assert tree(scans) == before


def test_the_last_line_counts_the_images_of_a_batch(restore, save, tmp_path):
    save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"text")
    save(tmp_path / "out" / "b_restored.png")
    done = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert done.err.splitlines()[-1] == "3 images: 1 done, 1 skipped, 1 failed"
    assert "images:" not in restore(tmp_path / "in" / "a.png").err


def test_a_batch_without_work_opens_no_engine(run, save, tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "out" / "a_restored.png")
    done = run("restore", "--engine", tmp_path / "missing.plan", tmp_path / "in", "-o", tmp_path / "out")
    assert done.status == 0 and "exists, skipped" in done.out


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
def test_a_damaged_plan_is_refused_before_any_image(refused, save, tmp_path, nano_plan, make):
    make(tmp_path / "bad.plan", nano_plan)
    image = save(tmp_path / "a.png")
    refused(2, "restore", "--engine", tmp_path / "bad.plan", image, words=["bad.plan"])
    assert not (tmp_path / "a_restored.png").exists()


def test_an_identity_of_another_base_is_refused(refused, save, tmp_path, nano_identity):
    from pfstorer_rt.models.base import build_base

    other = build_base("nano", seed=7).save(tmp_path / "other")
    mine = nano_identity.save(tmp_path / "alice.safetensors")
    image = save(tmp_path / "a.png")
    refused(2, "restore", "--base", other, "--identity", mine, image, words=["alice", "learned on base"])
    assert not (tmp_path / "a_restored.png").exists()


def test_a_base_and_an_identity_run_without_a_plan(run, save, tmp_path, nano_base_dir, nano_identity):
    mine = nano_identity.save(tmp_path / "alice.safetensors")
    image = save(tmp_path / "a.png")
    done = run("restore", "--base", nano_base_dir, "--identity", mine, "--steps", 1, image)
    assert done.status == 0 and Image.open(tmp_path / "a_restored.png").size == (40, 24)


@pytest.mark.parametrize(
    "arguments", [(), ("--engine", "a.plan", "--base", "portrait"), ("--engine", "a.plan", "--identity", "bob")]
)
def test_contradictory_options_are_refused(run, save, tmp_path, arguments):
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


def test_attention_applies_only_to_pytorch(run, save, tmp_path, nano_plan, nano_base_dir):
    image = save(tmp_path / "a.png")
    done = run("restore", "--engine", nano_plan.path, "--attention", "math", image)
    assert done.status == 2 and "--backend torch" in done.errors[0]
    here = ("restore", "--base", nano_base_dir, image, "--steps", 1)
    assert run(*here, "--attention", "math", "-o", tmp_path / "b.png").status == 0
    refused = run(*here, "--attention", "triton", "-o", tmp_path / "c.png")
    assert refused.status == 2 and "heads of 8 channels" in refused.errors[0] and not (tmp_path / "c.png").exists()


# ---- every kind of image


def grey16(path):
    Image.fromarray(np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)).save(path)


def as_mode(mode):
    return lambda path: Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 20).convert("RGB").convert(mode).save(path)


IMAGES = {
    "grey.png": (as_mode("L"), (40, 24)),
    "grey16.png": (grey16, (40, 24)),
    "print.jpg": (as_mode("CMYK"), (40, 24)),
    "palette.png": (as_mode("P"), (40, 24)),
    "one.png": (lambda path: Image.new("RGB", (1, 1), (200, 90, 30)).save(path), (1, 1)),
    "line.png": (lambda path: Image.new("RGB", (1000, 3), (200, 90, 30)).save(path), (1000, 3)),
    "column.bmp": (lambda path: Image.new("1", (3, 200), 1).save(path), (3, 200)),
}


def test_unusual_images_keep_their_size(restore, tmp_path):
    (tmp_path / "in").mkdir()
    for name, (make, _) in IMAGES.items():
        make(tmp_path / "in" / name)
    done = restore(tmp_path / "in", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    for name, (_, size) in IMAGES.items():
        with Image.open(tmp_path / "out" / name.replace(".", "_restored.").replace(".bmp", ".png")) as result:
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


def test_a_rotated_photograph_is_restored_upright(restore, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: its top row is the right edge
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert restore(tmp_path / "a.png", "-o", tmp_path / "b.png").status == 0
    with Image.open(tmp_path / "b.png") as result:
        assert result.size == (24, 40) and result.getexif()[0x0112] == 1
        assert np.asarray(result)[:, 14:].mean() > np.asarray(result)[:, :10].mean() + 50


def test_the_first_frame_of_an_animation_is_restored(restore, tmp_path):
    frames = [Image.new("RGB", (40, 24), colour) for colour in ("navy", "gold")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = restore(tmp_path / "a.gif")
    assert done.status == 0 and "2 frames: the first was used" in done.out
    with Image.open(tmp_path / "a_restored.png") as result:
        assert result.size == (40, 24)
