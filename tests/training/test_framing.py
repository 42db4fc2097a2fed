import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import SettingError
from pfstorer_rt.faces.finding import Face, face_finder
from pfstorer_rt.training import framing
from pfstorer_rt.training.framing import as_restored, choose_face, common_faces, frame_face, read_references

PORTRAIT = data.astronaut()[:256, 96:352]


def snapshot(*places, height=900, width=1400):
    """A grey wall with the portrait on it, at (top, left, side) each."""
    wall = Image.fromarray(np.tile(np.linspace(90, 140, width).astype(np.uint8)[None, :, None], (height, 1, 3)))
    for top, left, side in places:
        wall.paste(Image.fromarray(PORTRAIT).resize((side, side)), (left, top))
    return wall


@pytest.fixture
def read(tmp_path):
    def read(image, **settings):
        image.save(tmp_path / "a.png")
        notes = []
        (reference,) = read_references([tmp_path / "a.png"], PersonalizeConfig(**settings), 192, notes.append)
        return reference.photo, [note.removeprefix(f"{tmp_path / 'a.png'}: ") for note in notes]

    return read


def test_a_snapshot_is_cropped_to_its_face(read):
    photo, notes = read(snapshot((500, 1050, 300)))
    (face,) = face_finder()(photo.permute(1, 2, 0).numpy())
    side = photo.shape[-1]
    assert photo.shape == (3, side, side) and side < 400 and not notes
    assert 0.4 < face.side / side < 0.6
    assert abs(face.left + face.side / 2 - 0.5 * side) < 0.1 * side
    assert abs(face.top + face.side / 2 - 0.57 * side) < 0.1 * side


def test_portraits_and_photographs_with_framing_none_stay_whole(read):
    whole = torch.from_numpy(PORTRAIT / np.float32(255)).permute(2, 0, 1)
    assert torch.allclose(read(Image.fromarray(PORTRAIT))[0], whole, rtol=0, atol=1e-6)
    assert read(snapshot((250, 120, 300), height=500, width=560), framing="none")[0].shape == (3, 500, 560)


def test_a_large_photograph_is_reduced_to_three_tiles(read):
    """A random crop has at least 1 / 1.25 of the short side, and is reduced to one tile of 192 pixels."""
    photo, _ = read(snapshot((500, 1050, 300)), framing="none")
    assert photo.shape == (3, 3 * 192, 896)
    whole = np.asarray(snapshot((500, 1050, 300)).resize((896, 3 * 192), Image.Resampling.BOX)) / 255
    assert np.abs(photo.permute(1, 2, 0).numpy() - whole).mean() < 0.02


def test_grey_photographs_are_learned_in_skin_tones():
    photo = torch.rand((3, 20, 30), generator=torch.Generator().manual_seed(0))
    assert as_restored(photo) is photo
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = torch.einsum("c,chw->hw", weights, photo).expand(3, -1, -1)
    toned = as_restored(grey)
    assert (torch.einsum("c,chw->hw", weights, toned) - grey[0]).abs().max() < 1e-3
    assert (toned[0] > toned[1]).all() and (toned[1] > toned[2]).all()


def test_photographs_are_counted_while_they_are_read(tmp_path):
    paths, seen = [tmp_path / f"{i}.png" for i in range(3)], []
    for i, path in enumerate(paths[:2]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"no image")
    notes = []
    read_references(paths, PersonalizeConfig(), 192, notes.append, lambda pixels: [], seen.append)
    assert [(p.stage, p.done, p.total) for p in seen] == [("photographs", i, 3) for i in range(4)]
    assert notes[0].startswith(f"left out: {paths[2]}")


def test_one_photograph_is_in_memory_at_full_size(tmp_path, monkeypatch):
    paths, alive = [tmp_path / f"{i}.png" for i in range(4)], []
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (900, 900, 3), dtype=np.uint8)).save(path)
    read_photo, most = framing.read_photo, []

    def counted(path):
        photo = read_photo(path)
        alive.append(weakref.ref(photo.untyped_storage()))
        most.append(sum(reference() is not None for reference in alive))
        return photo

    monkeypatch.setattr(framing, "read_photo", counted)
    faces = [Face(100.0, 100.0, 300.0, np.zeros(1)), Face(500.0, 500.0, 200.0, np.ones(1))]
    read_references(paths, PersonalizeConfig(keep_all=True), 192, lambda _: None, lambda pixels: list(faces))
    assert max(most) <= 2


def test_the_largest_of_several_faces_is_used_and_reported(read):
    photo, notes = read(snapshot((80, 100, 260), (300, 700, 520)))
    (face,) = face_finder()(photo.permute(1, 2, 0).numpy())
    assert face.side > 150
    assert re.match(r"2 faces found; using the one that is 2.. pixels wide, 8.. from the left", notes[0])


def made_up(*numbers):
    """Faces with embeddings of one number, the largest first."""
    return [Face(10.0 * i, 0.0, 50.0 - i, np.full(1, n)) for i, n in enumerate(numbers)]


def test_the_face_that_appears_in_other_photographs_is_used():
    alone = [np.full(1, 1.0), np.full(1, 1.2)]
    assert choose_face(made_up(5.0, 1.1, 3.0), alone).embedding == 1.1
    assert choose_face(made_up(5.0, 1.1), []).embedding == 5.0 and choose_face([], alone) is None


def test_the_person_of_groups_is_the_one_in_every_photograph():
    groups = [made_up(5.0, 1.0, 3.0), made_up(7.0, 1.1), made_up(1.2, 9.0, 3.0, 8.0)]
    assert common_faces(groups) == [1.1]
    assert common_faces(groups[:1]) == [] and common_faces([*groups, made_up(20.0)]) == []
    assert common_faces([groups[0], groups[2]]) == [1.0, 3.0], "two people are in both"


def read_groups(tmp_path, groups, **settings):
    """Read one photograph for each list of faces; returns the embeddings of the faces that are used."""
    paths, found = [tmp_path / f"{i}.png" for i in range(len(groups))], iter(groups)
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(path)
    notes = []
    read_references(paths, PersonalizeConfig(**settings), 192, notes.append, lambda pixels: next(found))
    return [int(note.split(" from the left")[0].split()[-1]) // 10 for note in notes if "faces found" in note]


def test_groups_of_the_same_people_are_refused(tmp_path):
    assert read_groups(tmp_path, [made_up(5.0, 1.0), made_up(7.0, 8.0, 1.1)]) == [1, 2]
    same = [made_up(5.0, 1.0), made_up(1.1, 5.1)]
    with pytest.raises(SettingError, match="2 people are in every photograph"):
        read_groups(tmp_path, same)
    assert read_groups(tmp_path, same, keep_all=True) == [0, 0]


def test_a_turned_photograph_is_used_upright(tmp_path):
    """Faces are found where the upper left corner is white; the note names the turn, and a small face is not used."""
    upright = np.zeros((90, 60, 3), np.uint8)
    upright[:20, :20] = 255
    path, notes = tmp_path / "turned.png", []
    Image.fromarray(np.rot90(upright)).save(path)

    def find(pixels):
        return made_up(1.0) if pixels[:10, :10].mean() > 0.9 else []

    (found,) = read_references([path], PersonalizeConfig(), 192, notes.append, find)
    assert found.photo.shape == (3, 60, 60) and found.photo[:, :10, :10].mean() > 0.9
    small = [face._replace(side=14.0) for face in made_up(1.0)]  # of 60 pixels

    (kept,) = read_references(
        [path], PersonalizeConfig(), 192, notes.append, lambda pixels: small if pixels[:10, :10].mean() > 0.9 else []
    )
    assert kept.photo[:, :10, :10].mean() < 0.9 and "no face found" in notes[1]
    assert "with the photograph turned by 90 degrees clockwise; it is used in this orientation" in notes[0]


def test_a_photograph_of_another_person_is_reported(tmp_path):
    people = iter([made_up(0.0), made_up(0.1), made_up(0.9, 0.2), made_up(2.0)])
    paths, notes = [tmp_path / f"{i}.png" for i in range(4)], []
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(path)
    read_references(paths, PersonalizeConfig(), 192, notes.append, lambda pixels: next(people))
    assert [note.split(": ")[0] for note in notes] == [str(paths[2]), str(paths[3])]
    assert "2 faces found; using the one that is 49" in notes[0] and "left out: may show another person" in notes[1]


def test_a_wide_photograph_of_a_large_face_is_cropped(read):
    photo, _ = read(snapshot((0, 450, 500), height=500, width=1400))
    (face,) = face_finder()(photo.permute(1, 2, 0).numpy())
    assert photo.shape == (3, 500, 500) or photo.shape[1] == photo.shape[2] < 500
    assert abs(face.left + face.side / 2 - photo.shape[2] / 2) < 0.1 * photo.shape[2]


def test_faces_that_are_small_in_a_large_photograph_are_found(read):
    photo, notes = read(snapshot((1900, 3100, 230), height=2400, width=3600))
    assert photo.shape[1] < 300 and not notes


def test_a_small_or_missing_face_is_reported(read):
    assert "the face is" in read(snapshot((400, 600, 110), height=700, width=1000))[1][0]
    photo, notes = read(snapshot())
    assert photo.shape == (3, 576, 576) and notes == ["no face found; using the centre crop"]


def test_photographs_stay_whole_without_a_face_model(read, without_dlib):
    photo, notes = read(snapshot((500, 1050, 300)))
    assert photo.shape == (3, 576, 896) and "pfstorer-rt[metrics]" in notes[0]


def test_crops_are_inside_the_photograph_and_contain_the_face():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(50, 400, 2)
        side = rng.uniform(10, min(height, width))
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cut = frame_face(torch.stack([rows, columns, rows]), Face(left, top, side, np.zeros(1)))
        middle = round(top + side / 2), round(left + side / 2)
        assert all(int(plane.min()) <= m <= int(plane.max()) for plane, m in zip(cut, middle, strict=False))
        if cut.shape[1:] != (height, width):
            assert cut.shape[1] == cut.shape[2] <= min(height, width)
            assert int(cut[0].min()) <= max(0, np.ceil(top)) and int(cut[0].max()) >= np.floor(top + side) - 2
