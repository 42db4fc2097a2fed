import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.evaluation.faces import Face, face_finder
from pfstorer_rt.training.framing import frame_face, read_references

PORTRAIT = data.astronaut()[:256, 96:352]


def snapshot(*places, height=900, width=1400):
    """A grey wall with the portrait on it, at (top, left, side) each."""
    wall = Image.fromarray(np.tile(np.linspace(90, 140, width).astype(np.uint8)[None, :, None], (height, 1, 3)))
    for top, left, side in places:
        wall.paste(Image.fromarray(PORTRAIT).resize((side, side)), (left, top))
    return wall


@pytest.fixture
def read(tmp_path):
    def read(picture, **settings):
        picture.save(tmp_path / "a.png")
        notes = []
        (photo,) = read_references([tmp_path / "a.png"], PersonalizeConfig(**settings), 192, notes.append)
        return photo, [note.split("a.png: ")[1] for note in notes]

    return read


def test_a_snapshot_becomes_a_portrait_of_its_face(read):
    photo, notes = read(snapshot((500, 1050, 300)))
    (face,) = face_finder()(photo.permute(1, 2, 0).numpy())
    side = photo.shape[-1]
    assert photo.shape == (3, side, side) and side < 400 and not notes
    assert 0.4 < face.side / side < 0.6
    assert abs(face.left + face.side / 2 - 0.5 * side) < 0.1 * side
    assert abs(face.top + face.side / 2 - 0.57 * side) < 0.1 * side


def test_a_portrait_is_left_whole_and_so_is_every_photograph_on_demand(read):
    whole = torch.from_numpy(PORTRAIT / np.float32(255)).permute(2, 0, 1)
    assert torch.allclose(read(Image.fromarray(PORTRAIT))[0], whole, rtol=0, atol=1e-6)
    assert read(snapshot((500, 1050, 300)), framing="none")[0].shape == (3, 900, 1400)


def test_of_several_faces_the_largest_is_learned_and_said(read):
    photo, notes = read(snapshot((80, 100, 260), (300, 700, 520)))
    (face,) = face_finder()(photo.permute(1, 2, 0).numpy())
    assert face.side > 150
    assert notes == ["2 faces; the largest is learned"]


def test_a_face_that_is_small_or_missing_is_said(read):
    assert "its face is" in read(snapshot((400, 600, 110), height=700, width=1000))[1][0]
    photo, notes = read(snapshot())
    assert photo.shape == (3, 900, 1400) and notes == ["no face found; the middle of the photograph is learned"]


def test_without_a_face_model_photographs_are_left_whole(read, monkeypatch):
    monkeypatch.setattr("pfstorer_rt.training.framing.face_finder", lambda: None)
    photo, notes = read(snapshot((500, 1050, 300)))
    assert photo.shape == (3, 900, 1400) and not notes


def test_squares_lie_in_the_photograph_and_hold_the_face():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(50, 400, 2)
        side = rng.uniform(10, min(height, width))
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cut = frame_face(torch.stack([rows, columns, rows]), Face(left, top, side))
        middle = round(top + side / 2), round(left + side / 2)
        assert all(int(plane.min()) <= m <= int(plane.max()) for plane, m in zip(cut, middle, strict=False))
        if cut.shape[1:] != (height, width):
            assert cut.shape[1] == cut.shape[2] <= min(height, width)
            assert int(cut[0].min()) <= max(0, np.ceil(top)) and int(cut[0].max()) >= np.floor(top + side) - 2
