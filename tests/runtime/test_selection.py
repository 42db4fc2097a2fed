"""Where the identity acts in an image with several people."""

import re
from dataclasses import replace

import numpy as np
import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.faces.finding import Face, embed_largest
from pfstorer_rt.faces.references import References
from pfstorer_rt.imaging.rows import Spool, from_pixels, read_pixels
from pfstorer_rt.plan import Manifest
from pfstorer_rt.runtime import selection
from pfstorer_rt.runtime.batch import BatchConfig, restore_files
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.runtime.selection import Area, Chooser, Selection

ALICE, STRANGER = np.zeros(128), np.full(128, 0.1)  # at a distance of 1.13
ENGINE = Manifest(
    "onnx", "fp32", 64, 8, 4, "epsilon", "ddpm", 2, "nano", "0" * 64, "alice", "1" * 64, [0.0] * 128, "pfstorer", True
)
BASE = RestoreConfig(steps=2, sampler="ddpm", strength=0.0)
WITH = replace(BASE, strength=1.0)


def image(height, width, make_image):
    return Spool.of(from_pixels(make_image(height, width)))


def restored(restorer, rows, config, chosen=None):
    passes = replace(restorer.passes(rows, config), selection=chosen)
    seen = []
    result = restorer.restore_rows(rows, config, lambda done, total: seen.append((done, total)), passes)
    assert seen[-1] == (passes.total, passes.total)
    return read_pixels(result, 0, result.height)


def near_and_far(chosen, size):
    """Where the soft map is 1, and where it is 0."""
    y, x = ((np.arange(n) + 0.5) / n for n in size)
    weights = chosen.weights(y, x)
    assert (weights == 1).any() and (weights == 0).any()
    return weights == 1, weights == 0


LAYOUTS = {
    "one tile": ((64, 64), {}),
    "tiles": ((130, 260), {}),
    "coarse to fine": ((200, 400), {"coarse": "on"}),
    "parity": ((130, 260), {"tile": TileConfig("parity", chop=128, chop_stride=96)}),
    "scaled, with noise": ((60, 120), {"scale": 1.7, "sampler": "ddim", "eta": 1.0, "init": "noise"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stranger_gets_the_bytes_of_the_base_and_the_person_the_identity(personal, make_image, name):
    size, settings = LAYOUTS[name]
    rows, side = image(*size, make_image), size[0] // 5
    chosen = Selection(*size, (Area(side, side, side, side),), (Area(size[1] - 2 * side, side, side, side),))
    base = restored(personal, rows, replace(BASE, **settings))
    everywhere = restored(personal, rows, replace(WITH, **settings))
    found = restored(personal, rows, replace(WITH, **settings), chosen)
    near, far = near_and_far(chosen, found.shape[:2])
    assert np.array_equal(found[far], base[far])
    assert np.abs(everywhere - base)[near].mean() > 1e-3
    likeness = np.abs(found - everywhere)[near].mean() / np.abs(found - base)[near].mean()
    assert likeness < 1, f"{likeness:.2f}: nearer to the result with the identity than to the base"


def test_the_bytes_of_a_fused_plan_are_those_of_its_base(nano_plan, make_image):
    rows = image(130, 260, make_image)
    chosen = Selection(130, 260, (Area(30, 30, 26, 26),))
    with Restorer.from_plan(nano_plan.path, "onnxruntime") as engine:
        base, found = restored(engine, rows, BASE), restored(engine, rows, WITH, chosen)
    near, far = near_and_far(chosen, (130, 260))
    assert np.array_equal(found[far], base[far]) and np.abs(found - base)[near].mean() > 1e-3


def test_only_the_tiles_around_the_person_run_with_the_identity(personal, counting, make_image):
    sessions = {name: counting(session) for name, session in personal.sessions.items()}
    engine, rows = Restorer(personal.manifest, sessions, "torch"), image(192, 640, make_image)
    restored(engine, rows, replace(WITH, steps=1), Selection(192, 640, (Area(20, 20, 20, 20),)))
    tiles = dict.fromkeys((0.0, 1.0), 0)
    for call in sessions["denoiser"].calls:
        tiles[float(call["strength"][0])] += len(call["x"])
    assert 0 < tiles[1.0] < tiles[0.0] / 4


def test_the_map_is_0_on_other_faces_and_1_on_a_face_that_stands_apart():
    chosen, other = Area(10, 10, 20, 20), Area(31, 12, 20, 20)
    y, x = ((np.arange(n) + 0.5) / n for n in (60, 80))
    beside = Selection(60, 80, (chosen,), (other,)).weights(y, x)
    assert (beside[12:32, 31:51] == 0).all() and (beside[10:30, 10:24] == 1).all()
    apart = Selection(60, 80, (chosen,), (Area(60, 35, 15, 15),)).weights(y, x)
    assert (apart[10:30, 10:30] == 1).all() and (apart[:, 45:] == 0).all() and np.abs(np.diff(apart)).max() < 0.3


# ---- the choice


@pytest.fixture
def choose():
    """Function (faces, ...): choose among faces with these embeddings, 40 pixels wide, from the left."""

    def run(embeddings, apply_to="matching", engine=ENGINE, **settings):
        faces = [Face(60 * i, 30, 40, embedding) for i, embedding in enumerate(embeddings)]
        chooser = Chooser(engine, RestoreConfig(**settings), apply_to, find=lambda pixels: faces)
        return chooser.choose(Spool(100, 300))

    return run


def test_the_identity_acts_on_the_face_that_resembles_the_person(choose):
    found = choose([STRANGER, ALICE, STRANGER])
    assert found.selection == Selection(100, 300, (Area(60, 30, 40, 40),), (Area(0, 30, 40, 40), Area(120, 30, 40, 40)))
    assert "3 faces found" in found.notes[0] and "60 from the left" in found.notes[0]


def test_the_identity_acts_on_several_faces_that_certainly_are_the_person(choose):
    sure, unsure = np.full(128, 0.49 / 128**0.5), np.full(128, 0.51 / 128**0.5)
    found = choose([STRANGER, sure, ALICE, unsure])
    assert found.selection.chosen == (Area(120, 30, 40, 40), Area(60, 30, 40, 40))
    assert found.selection.others == (Area(0, 30, 40, 40), Area(180, 30, 40, 40))
    (note,) = found.notes
    assert "4 faces found; the identity acts on 2 of them, of which the nearest is 40 pixels wide, 120 from" in note
    assert choose([sure, ALICE]) == choose([ALICE]), "everybody in the image is the person"
    assert choose([unsure, unsure]).selection.chosen == (Area(0, 30, 40, 40),)


def test_an_image_without_the_person_gets_a_note_and_keeps_its_behaviour(choose):
    found = choose([STRANGER, STRANGER])
    assert found.selection is None and "none of 2 faces resembles the person (distance 1.13" in found.notes[0]
    assert "the face does not resemble" in choose([STRANGER]).notes[0]
    assert choose([]).notes == ("no face found; the identity acts on the whole image",) and choose([]).selection is None


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_is_upright_after_a_turn_is_found(turns):
    """The image has a mark in its upper left corner when it is upright; the face is found only there."""
    upright = np.full((90, 60, 3), -1, np.float32)
    upright[:10, :10] = 1
    place = Face(20, 30, 25, ALICE)

    def find(pixels):
        return [place, Face(0, 0, 12, STRANGER)] if pixels[:10, :10].mean() > 0.9 else []

    def find_stranger(pixels):
        return [face._replace(embedding=STRANGER) for face in find(pixels)]

    source = Spool.of(np.ascontiguousarray(np.rot90(upright, turns).transpose(2, 0, 1)))
    found = Chooser(ENGINE, RestoreConfig(), find=find).choose(source)
    assert found.turns == turns and "face was found with the image turned by" in found.notes[0]
    assert ("anticlockwise" in found.notes[0]) == (turns == 3)
    assert found.selection == Selection(90, 60, (Area(20, 30, 25, 25),), (Area(0, 0, 12, 12),))
    assert not Chooser(ENGINE, RestoreConfig(), find=find).choose(Spool.of(upright.transpose(2, 0, 1))).turns
    refused = Chooser(ENGINE, RestoreConfig(), find=find_stranger).choose(source)
    assert not refused.turns and "no face found" in refused.notes[0], "what is not the person may be no face at all"
    assert Chooser(ENGINE, RestoreConfig(), "largest", find=find_stranger).choose(source).turns == turns


@pytest.mark.parametrize(
    ("embeddings", "settings"),
    [([ALICE], {}), ([STRANGER, ALICE], {"strength": 0}), ([STRANGER, ALICE], {"apply_to": "all"})],
)
def test_the_whole_image_is_restored_without_a_note(choose, embeddings, settings):
    found = choose(embeddings, **settings)
    assert found.selection is None and not found.notes


def test_the_largest_face_and_a_rectangle_can_be_chosen(choose):
    assert choose([STRANGER, ALICE], "largest").selection.chosen == (Area(0, 30, 40, 40),)
    assert "no face found" in choose([], "largest").notes[0]
    assert choose([], Area(5, 6, 20, 30)).selection == Selection(100, 300, (Area(5, 6, 20, 30),))
    for outside in (Area(300, 6, 20, 30), Area(0, 0, 0, 5), Area(-1, 0, 5, 5)):
        with pytest.raises(SettingError, match="inside the image of 300 x 100 pixels"):
            choose([], outside)
    with pytest.raises(SettingError, match="apply_to 'everybody'"):
        choose([], "everybody")


def test_a_rectangle_without_a_face_gets_a_note(choose):
    for faces, area, noted in (
        ([STRANGER], Area(0, 30, 40, 40), False),
        ([STRANGER], Area(0, 0, 300, 100), False),  # a face in a large rectangle
        ([STRANGER, ALICE], Area(75, 45, 5, 5), False),  # a part of the second face
        ([STRANGER, ALICE], Area(200, 30, 40, 40), True),
        ([], Area(0, 30, 40, 40), True),
    ):
        found = choose(faces, area)
        assert found.selection.chosen == (area,)
        assert found.notes == ("no face found in the rectangle; the identity acts there",) * noted


@pytest.mark.parametrize(
    "area", [(0, 0, np.nan, 5), (0, 0, 5, np.inf), (np.nan, 0, 5, 5), (0, 0, 10**400, 5), ("0", 0, 5, 5)]
)
def test_a_rectangle_without_finite_numbers_is_refused(choose, area):
    with pytest.raises(SettingError, match="inside the image of 300 x 100 pixels") as caught:
        choose([], Area(*area))
    assert len(str(caught.value)) < 200


def test_photographs_of_another_person_do_not_move_the_identity_to_that_person():
    faces = [Face(0, 30, 40, STRANGER), Face(60, 30, 40, ALICE)]
    warning = "another person than this engine (distance 1.13"
    for known, note in ((STRANGER, warning), (ALICE + 0.01, None), (None, None)):
        chooser = Chooser(ENGINE, RestoreConfig(), known=known, find=lambda pixels: faces)
        assert chooser.choose(Spool(100, 300)).selection.chosen == (Area(60, 30, 40, 40),)
        assert [note in text for text in chooser.notes()] == [True] * bool(note)


def test_an_identity_without_gates_acts_on_the_whole_image(choose):
    found = choose([STRANGER, ALICE], engine=replace(ENGINE, strength=False, method="dreambooth"))
    assert found.selection is None and "cannot be limited to one face" in found.notes[0]


def test_what_the_choice_needs_is_named(monkeypatch):
    plain = RestoreConfig()
    assert not list(Chooser(ENGINE, plain, find=lambda pixels: []).notes())
    (text,) = Chooser(replace(ENGINE, face=[]), plain, find=lambda pixels: []).notes()
    assert "no embedding of the person's face" in text
    assert not list(Chooser(replace(ENGINE, face=[]), plain, known=ALICE, find=lambda pixels: []).notes())
    monkeypatch.setattr(selection, "face_models", lambda: None)
    (text,) = Chooser(ENGINE, plain).notes()
    assert "pip install 'pfstorer-rt[metrics]'" in text and not Chooser(ENGINE, plain).searches
    assert not list(Chooser(replace(ENGINE, identity_name=None), plain).notes())
    with pytest.raises(MissingBackendError, match="largest face needs the metrics extra"):
        Chooser(ENGINE, plain, "largest")


def test_faces_of_all_sizes_are_found_in_pixels_of_the_image(face):
    small = np.pad(face[::2, ::2][:, ::-1], ((64, 64), (0, 0), (0, 0)))
    crowd = Spool.of(from_pixels(np.concatenate([small, face], 1)))
    chosen = Chooser(ENGINE, RestoreConfig(), "largest").choose(crowd).selection
    assert chosen.chosen[0].left > 128 > chosen.others[0].left
    both = Chooser(replace(ENGINE, face=[]), RestoreConfig(), known=embed_largest(face)).choose(crowd)
    assert both.selection is None and not both.notes, "both faces are the person"


def test_a_batch_restores_the_person_of_the_references_and_leaves_the_stranger(personal, face, tmp_path):
    from importlib.resources import files

    from PIL import Image

    with Image.open(files("pfstorer_rt") / "demo_images" / "reference_1.jpg") as photo:
        person = np.asarray(photo.convert("RGB").resize((256, 256)))
    (tmp_path / "references").mkdir()
    Image.fromarray(person).save(tmp_path / "references" / "a.png")
    stranger = (face * 255).astype(np.uint8)
    Image.fromarray(np.concatenate([stranger, person], 1)).save(tmp_path / "both.png")
    results = {}
    for strength in (0.0, 1.0):
        settings = BatchConfig(
            replace(BASE, strength=strength, steps=1), references=References.read(tmp_path / "references")
        )
        (done,) = restore_files(personal, [tmp_path / "both.png"], tmp_path / f"{strength}.png", settings)
        results[strength] = np.asarray(Image.open(tmp_path / f"{strength}.png"), np.float32)
    side, left = map(
        int, re.search(r"2 faces found; .* (\d+) pixels wide, (\d+) from the left", done.notes[0]).groups()
    )
    changed = np.abs(results[1.0] - results[0.0]).max(-1)
    near = int(left - 0.6 * side)  # the identity acts up to 0.6 sides from the face
    assert near > 180 and changed[:, :near].max() == 0, "the stranger"
    assert changed[60:220, 300:460].mean() > 0.5, "the person"
