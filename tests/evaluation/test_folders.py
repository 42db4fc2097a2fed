"""Matching results to originals, and results that cannot be measured."""

import numpy as np
import pytest
from PIL import Image

import pfstorer_rt
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.evaluation.folders import evaluate, evenly, image_seconds, match
from pfstorer_rt.evaluation.registry import load_metrics
from pfstorer_rt.imaging.similarity import psnr


@pytest.fixture
def put(tmp_path, make_image):
    """Function (relative name, pixels or size, **save options) -> path of a new image."""

    def write(name, pixels=(24, 20), mode="RGB", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = make_image(*pixels) if isinstance(pixels, tuple) else pixels
        Image.fromarray((levels * 255).round().astype(np.uint8)).convert(mode).save(path, **options)
        return path

    return write


@pytest.fixture
def folders(put, tmp_path):
    """refs, hq with a and b, out with their results."""
    put("refs/r.png")
    for name in ("a", "b"):
        put(f"hq/{name}.jpg", quality=95)
        put(f"out/{name}_restored.png")
    return tmp_path / "refs", tmp_path / "hq", tmp_path / "out"


def test_figures_are_computed_from_the_files(folders, simple, tmp_path):
    report = evaluate(*folders, metrics=simple)
    read = [np.asarray(Image.open(tmp_path / n), np.float32) / 255 for n in ("out/a_restored.png", "hq/a.jpg")]
    row = next(row for row in report.rows if (row.method, row.image) == ("out", "a"))
    assert row.figures["psnr"] == pytest.approx(psnr(*read), abs=1e-6) and row.thumbnail[:2] == b"\xff\xd8"
    assert report.methods == ["out", "original"] and pfstorer_rt.evaluate is evaluate
    assert evaluate(*map(str, folders), metrics=simple).rows == report.rows


def test_several_methods_inputs_and_seconds(folders, simple, put):
    refs, hq, out = folders
    for name in ("a", "b"):
        put(f"bad/{name}_degraded.png")
    done = []
    report = evaluate(
        refs,
        hq,
        {"ours": out, "theirs": out},
        out.parent / "bad",
        metrics=simple,
        seconds={"ours": {"a": 1.0, "b_degraded": 3.0}, "theirs": 5.0},
        progress=lambda *step: done.append(step),
    )
    means = {name: summary.means["seconds"] for name, summary in report.summary().items()}
    assert means == {"input": None, "ours": 2.0, "theirs": 5.0, "original": None}
    assert done == [(1, 2), (2, 2)]


def test_results_without_an_original_are_named(folders, simple, put):
    assert not [note for note in evaluate(*folders, metrics=simple).notes if "original" in note]
    put("out/misnamed.png")
    (note,) = evaluate(*folders, metrics=simple).notes
    assert note == "out: 1 image(s) without an original of this name were left out: misnamed.png"


def test_files_are_matched_by_name(put, tmp_path):
    hq = {name: put(f"hq/{name}.jpg") for name in ("a", "a_restored", "b", "c", "d", "s/e")}
    expected = {
        "a": put("out/a.png"),
        "a_restored": put("out/a_restored.png"),
        "b": put("out/b_degraded_restored.webp"),
        "c": put("out/c_out.png"),
        "d": None,
        "s/e": put("out/s/e_restored.jpg"),
    }
    put("out/e.png")
    assert match(hq, tmp_path / "out") == expected


def test_two_results_of_one_name_are_refused(folders, simple, put):
    put("out/a_restored.jpg")
    with pytest.raises(BadFileError, match=r"a_restored\.png and a_restored\.jpg|a_restored\.jpg and a_restored\.png"):
        evaluate(*folders, metrics=simple)


def test_an_image_and_its_result_in_one_folder_are_refused(put, tmp_path):
    hq = {"a": put("hq/a.jpg")}
    put("out/a.jpg")
    put("out/a_restored.jpg")
    with pytest.raises(BadFileError, match=r"a\.jpg and a_restored\.jpg are both named as results of a"):
        match(hq, tmp_path / "out")


@pytest.mark.parametrize("spoil", ["missing", "size", "damaged", "empty"])
def test_an_unreadable_result_is_a_row_with_a_note(folders, simple, put, spoil):
    bad = folders[2] / "a_restored.png"
    if spoil == "missing":
        bad.unlink()
    elif spoil == "size":
        put("out/a_restored.png", (48, 40))
    else:
        bad.write_bytes(bad.read_bytes()[:100] if spoil == "damaged" else b"")
    report = evaluate(*folders, metrics=simple, seconds={"out": 1.0})
    row = next(row for row in report.rows if (row.method, row.image) == ("out", "a"))
    words = {"missing": "no result", "size": "40x48, its original 20x24", "damaged": "a_restored.", "empty": "0 bytes"}
    assert row.failed and words[spoil] in row.note and set(row.figures.values()) == {None} and row.seconds is None
    summary = report.summary()["out"]
    assert (summary.images, summary.failed, summary.counts["psnr"]) == (2, 1, 1)
    assert any("a" in note and row.note in note for note in report.notes)


def test_a_damaged_original_affects_only_its_rows(folders, simple):
    (folders[1] / "a.jpg").write_bytes(b"no image")
    report = evaluate(*folders, metrics=simple)
    failed = [(row.method, row.image) for row in report.rows if row.failed and "original: " in row.note]
    assert failed == [("out", "a"), ("original", "a")] and report.summary()["out"].counts["psnr"] == 1


def test_seconds_are_found_by_the_path():
    times = {"in/ann/0": 1.0, "in/bob/0": 2.0, "in/bob/10": 3.0, "0_degraded": 4.0}
    assert [image_seconds(times, name) for name in ("ann/0", "bob/0", "10", "1")] == [1.0, 2.0, 3.0, None]
    assert image_seconds({"in/0": 1.0, "0": 5.0}, "0") == 5.0 and image_seconds(2.5, "x") == 2.5


def test_failures_count_as_not_verified(folders, put, tmp_path):
    from skimage.data import astronaut

    face = astronaut()[:256, 96:352] / 255
    for name in ("refs/r.png", "hq/a.png", "hq/b.png", "out/a.png"):
        put(name, face)
    for name in ("hq/a.jpg", "hq/b.jpg", "out/a_restored.png", "out/b_restored.png"):
        (tmp_path / name).unlink()
    verification = load_metrics(["verification_dlib", "id_dlib"])
    summary = evaluate(*folders, metrics=verification).summary()["out"]
    assert summary.means["verification_dlib"] == 0.5 and summary.counts["id_dlib"] == 1


def test_no_face_in_the_references_is_a_note(folders):
    report = evaluate(*folders, metrics=load_metrics(["id_dlib", "verification_dlib"]))
    assert any("no face was found in the references" in note for note in report.notes)
    assert report.summary()["out"].means == {"id_dlib": None, "verification_dlib": None, "seconds": None}


def test_no_measurable_result_is_an_error(folders, simple):
    for path in folders[2].iterdir():
        path.rename(path.with_stem("other-" + path.stem))
    with pytest.raises(BadFileError, match=r"out: no result could be measured; a: no result"):
        evaluate(*folders, metrics=simple)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_folders_must_contain_images(folders, simple, tmp_path, missing):
    (tmp_path / "none").mkdir()
    for path, word in ((tmp_path / "none", "no images"), (tmp_path / "absent", "no such folder")):
        changed = [path if i == missing else folder for i, folder in enumerate(folders)]
        with pytest.raises(BadFileError, match=word):
            evaluate(*changed, metrics=simple)


@pytest.mark.parametrize("name", ["input", "original"])
def test_reserved_method_names_are_refused(folders, simple, name):
    with pytest.raises(ValueError, match=name):
        evaluate(folders[0], folders[1], {name: folders[2]}, metrics=simple)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_greyscale_alpha_and_palette_images_are_measured(folders, simple, put, mode, make_image):
    grey = np.repeat(make_image(24, 20).mean(2, keepdims=True), 3, 2)
    put("hq/a.jpg", grey, quality=95)
    put("out/a_restored.png", grey, mode=mode)
    report = evaluate(*folders, metrics=simple)
    row = next(row for row in report.rows if (row.method, row.image) == ("out", "a"))
    assert not row.failed and row.figures["psnr"] > (20 if mode == "P" else 30)  # of JPEG, and of 216 colours


def test_each_person_has_references(put, tmp_path, metrics):
    from skimage.data import astronaut

    face = astronaut()[:256, 96:352] / 255
    for person, pixels in (("ann", face), ("bob", (64, 64))):
        put(f"refs/{person}/r.png", pixels)
        put(f"hq/{person}/0.png", face)
    ids = load_metrics(["id_dlib"])
    report = evaluate(tmp_path / "refs", tmp_path / "hq", {}, metrics=ids)
    figures = {row.image: row.figures["id_dlib"] for row in report.rows}
    assert figures == {"ann/0": pytest.approx(0, abs=1e-6), "bob/0": None}
    assert any(note.startswith("bob: identity was not measured") for note in report.notes)
    put("hq/cyd/0.png", face)
    measured = []
    with pytest.raises(BadFileError, match="no references of cyd/0; expected a folder cyd"):
        evaluate(tmp_path / "refs", tmp_path / "hq", {}, metrics=ids, progress=lambda *step: measured.append(step))
    assert not measured, "refused before the first measurement"
    put("refs/r.png", face)  # for people without a folder
    rows = evaluate(tmp_path / "refs", tmp_path / "hq", {}, metrics=ids).rows
    figures = {row.image: row.figures["id_dlib"] for row in rows}
    assert figures["bob/0"] is None and figures["cyd/0"] == pytest.approx(0, abs=1e-6)


def test_shown_images_are_evenly_spread():
    assert evenly(list("abcdefg"), 3) == ["a", "d", "g"] and evenly(list("ab"), 24) == ["a", "b"]
