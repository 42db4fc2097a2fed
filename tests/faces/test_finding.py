"""One finder: framing, losses, metrics and references find the same faces in the same image."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import dlib
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.transform import resize

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.evaluation.registry import Sample, load_metrics
from pfstorer_rt.faces import finding
from pfstorer_rt.faces.dlib import _read_dlib
from pfstorer_rt.faces.finding import Box, Face, embed_largest, face_finder, find_boxes, find_largest, landmarks_at_side
from pfstorer_rt.faces.references import References
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.rows import Spool, from_pixels
from pfstorer_rt.training.framing import read_references
from pfstorer_rt.training.image_loss import face_maps

EYES = np.array([[203, 101], [247, 103]])
"""The pupils of the astronaut, (x, y) in pixels of the 512 x 512 image, read from it by eye."""


def shrunken(side):
    """The whole astronaut, in which the face takes a fifth of the side."""
    pixels = astronaut() / np.float32(255)
    return pixels if side == 512 else resize(pixels, (side, side), anti_aliasing=True).astype(np.float32)


def users(pixels, folder):
    """Name of a user of faces -> whether it finds one in (H, W, 3)."""
    save_image(folder / "a.png", pixels, overwrite=True)
    notes, sample = [], Sample(pixels)
    read_references([folder / "a.png"], PersonalizeConfig(), 192, notes.append)
    figures = load_metrics(["lmse_dlib", "id_dlib"]).measure(sample, sample, [sample])
    return {
        "framing": not any("no face" in note for note in notes),
        "losses": bool(np.isfinite(face_maps([pixels])).all()),
        "landmarks": figures["lmse_dlib"] is not None,
        "identity": figures["id_dlib"] is not None,
    }


@pytest.mark.parametrize("side", [2048, 512, 192, 128, 40])
def test_all_callers_find_the_same_faces(side, tmp_path):
    found = users(shrunken(side), tmp_path)
    assert set(found.values()) == {side >= 128}, found


@pytest.mark.parametrize("side", [2048, 512, 192])
def test_boxes_and_landmarks_are_in_pixels_of_the_image(side):
    pixels, scale = shrunken(side), side / 512
    box = find_largest(pixels)
    assert np.allclose([box.left, box.top, box.side], np.array([179, 83, 88]) * scale, atol=12 * scale)
    points = landmarks_at_side(pixels, box)
    eyes = np.stack([points[36:42].mean(0), points[42:48].mean(0)])
    assert np.abs(eyes - EYES).max() < 5


def test_the_face_map_of_the_loss_shows_the_same_face():
    pixels = shrunken(512)
    map_ = torch.from_numpy(face_maps([pixels]))
    x, y = (map_[0, :, 2].numpy() + 1) * 256  # the middle of the recognizer's square
    box = find_largest(pixels)
    assert abs(x - box.left - box.side / 2) < 0.2 * box.side and abs(y - box.top - box.side / 2) < 0.3 * box.side


def test_the_largest_face_is_the_first_and_its_embedding_is_that_of_the_metrics():
    face = astronaut()[:256, 96:352] / np.float32(255)
    small = np.pad(face[::2, ::2][:, ::-1], ((64, 64), (0, 0), (0, 0)))
    crowd = np.concatenate([small, face], 1)
    first, second = face_finder()(crowd)
    assert first.side > 1.5 * second.side and first.left > 128 > second.left
    assert np.array_equal(first.embedding, embed_largest(crowd))
    assert np.linalg.norm(first.embedding - embed_largest(face)) < 0.15


def test_references_find_the_face_of_a_shrunken_photograph(tmp_path):
    pixels = shrunken(192)
    save_image(tmp_path / "a.png", pixels)
    assert References.read(tmp_path).distance(Spool.of(from_pixels(pixels))) < 0.1


def test_a_result_farther_from_the_references_than_the_input_gets_a_note(tmp_path):
    save_image(tmp_path / "white.png", np.ones((8, 8, 3), np.float32))
    (tmp_path / "damaged.png").write_bytes(b"no image")
    references = References.read(
        tmp_path, find=lambda pixels: [Face(0, 0, 8, np.array([pixels.mean()]))]
    )  # of the brightness
    assert len(references.notes) == 1 and "damaged.png" in references.notes[0]
    white, grey = (Spool.of(np.full((3, 8, 8), value, np.float32)) for value in (1, 0))
    facts = references.facts(source=white, result=grey)
    assert (facts["id_distance_input"], facts["id_distance"]) == (0, 0.5)
    assert "farther from the references than the input" in facts["notes"][0]
    assert facts["notes"][0].endswith("; try another strength, number of steps or seed")
    assert references.facts(white, grey, "use a plan")["notes"][0].endswith("; use a plan")
    assert "notes" not in references.facts(source=grey, result=white)
    almost = Spool.of(np.full((3, 8, 8), 0.97, np.float32))  # a distance of 0.015
    assert "notes" not in references.facts(source=white, result=almost)


def test_references_in_sub_folders_are_not_read(tmp_path):
    (tmp_path / "alice").mkdir()
    save_image(tmp_path / "alice" / "a.png", np.ones((8, 8, 3), np.float32))
    with pytest.raises(BadFileError, match="no images directly in this folder; expected photographs of the person"):
        References.read(tmp_path)


def test_a_reference_without_a_face_gets_a_note(tmp_path):
    for name, value in (("a.png", 1), ("b.png", 0)):
        save_image(tmp_path / name, np.full((8, 8, 3), value, np.float32))
    references = References.read(
        tmp_path, find=lambda pixels: [Face(0, 0, 8, np.array([pixels.mean()]))] * bool(pixels.max())
    )
    assert references.notes == [f"reference skipped: {tmp_path / 'b.png'}: no face found"]


def test_an_image_is_searched_once_and_changed_pixels_again(monkeypatch):
    searches = []
    monkeypatch.setattr(finding, "load_dlib", lambda: [lambda image, enlarged: searches.append(image) or [rectangle()]])
    monkeypatch.setattr(finding, "_remembered", {})
    pixels = np.zeros((600, 700, 3), np.float32)
    first = find_boxes(pixels)
    first.clear()  # the caller's list is its own
    assert find_boxes(pixels) == [Box(1, 2, 3)] and len(searches) == 1
    pixels[0, 0] = 1
    for other in (pixels, pixels.reshape(700, 600, 3), pixels[::-1]):
        find_boxes(other)
    find_boxes(pixels, sides=(2048,))
    assert len(searches) == 5


def test_boxes_of_the_oldest_images_are_forgotten(monkeypatch):
    monkeypatch.setattr(finding, "load_dlib", lambda: [lambda image, enlarged: [rectangle()]])
    monkeypatch.setattr(finding, "_remembered", {})
    for value in range(finding.REMEMBERED + 5):
        find_boxes(np.full((8, 8, 3), value / 100, np.float32))
    assert len(finding._remembered) == finding.REMEMBERED


def rectangle():
    """A rectangle as dlib's detector returns it."""
    return SimpleNamespace(left=lambda: 1, top=lambda: 2, width=lambda: 3)


def test_without_dlib_the_message_names_the_extra(without_dlib):
    with pytest.raises(MissingBackendError, match=r"pip install 'pfstorer-rt\[metrics\]'"):
        find_boxes(shrunken(128))


class Fragile:
    """Fails where dlib's networks overwrite their own memory: when two threads call it at once."""

    def __init__(self, *_):
        self.busy = False

    def __call__(self, _):
        assert not self.busy
        self.busy = True
        time.sleep(0.01)
        self.busy = False

    compute_face_descriptor = __call__


def test_dlibs_networks_do_one_call_at_a_time(monkeypatch, tmp_path):
    for name in ("get_frontal_face_detector", "shape_predictor", "face_recognition_model_v1"):
        monkeypatch.setattr(dlib, name, Fragile)
    for network in _read_dlib.__wrapped__(tmp_path):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(network, range(4)))


def test_faces_are_found_without_the_weights_of_the_other_networks(tmp_path):
    detector, landmarks, _ = _read_dlib.__wrapped__(tmp_path)  # an empty folder
    assert list(detector(np.zeros((90, 90, 3), np.uint8), 0)) == []
    with pytest.raises(RuntimeError):
        landmarks(np.zeros((90, 90, 3), np.uint8), dlib.rectangle(0, 0, 80, 80))
