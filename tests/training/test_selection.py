"""Which reference photographs are used for learning, and which are left out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import SettingError
from pfstorer_rt.faces.dlib import SAME_PERSON
from pfstorer_rt.faces.finding import Face
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.training.contact_sheet import GAP, SIDE, check_place, save_contact_sheet
from pfstorer_rt.training.framing import read_references, used_references
from pfstorer_rt.training.selection import Candidate, judge, mixed_people

PORTRAIT = Image.fromarray(data.astronaut()[:256, 96:352])


def picture(seed):
    """A portrait on noise that depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC)
    image.paste(PORTRAIT.resize((160, 160)), (80, 80))
    return image


@pytest.fixture
def read(tmp_path):
    """Function (name -> (image, embedding or None), reverse, settings) -> (references, notes without folders)."""

    def call(photographs, reverse=False, search=True, **settings):
        notes, people = [], []
        for name, (image, person) in photographs.items():
            image.save(tmp_path / name)
            people.append([] if person is None else [Face(100.0, 100.0, 120.0, np.full(1, person))])
        order = list(zip(photographs, people, strict=True))[:: -1 if reverse else 1]
        # a photograph without a face is searched in four orientations
        faces = iter([face for _, found in order for face in ([found] if found else [[]] * 4)])
        paths = [tmp_path / name for name, _ in order]
        find = (lambda pixels: next(faces)) if search else None
        references = read_references(paths, PersonalizeConfig(**settings), 192, notes.append, find)
        return references, [note.replace(f"{tmp_path}/", "") for note in notes]

    return call


def names(references):
    return {reference.path.name for reference in used_references(references)}


def good(count):
    return {f"{i}.png": (picture(i), i / 100) for i in range(count)}


BAD = {
    "blurred": (picture(7).filter(ImageFilter.GaussianBlur(5)), 0.0),
    "faceless": (picture(7), None),
    "stranger": (picture(7), 2 * SAME_PERSON),
    "smaller copy": (picture(0).resize((131, 131), Image.Resampling.LANCZOS), 0.0),
}
REASONS = {
    "blurred": "left out: the face is blurred",
    "faceless": "left out: no face found",
    "stranger": "left out: may show another person: its distance to the other photographs is 1.19",
    "smaller copy": "left out: almost the same image as 0.png",
}


def test_good_photographs_are_all_used(read):
    references, notes = read(good(6))
    assert names(references) == set(good(6)) and not notes


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_an_unsuitable_photograph_is_left_out(read, kind, reverse):
    references, notes = read({"z.png": BAD[kind], **good(3)}, reverse)
    assert names(references) == set(good(3))
    assert len(notes) == 1 and notes[0].startswith(f"z.png: {REASONS[kind]}")


@pytest.mark.parametrize("kind", BAD)
def test_keep_all_uses_every_photograph_and_keeps_the_notes(read, kind):
    references, notes = read({"z.png": BAD[kind], **good(3)}, keep_all=True)
    assert len(names(references)) == 4
    assert notes[0].startswith(f"z.png: {REASONS[kind].removeprefix('left out: ')}")


def test_a_face_unlike_the_others_is_used_with_a_note(read):
    photographs = {**good(4), "relative.png": (picture(7), 0.55)}
    references, notes = read(photographs)
    assert names(references) == set(photographs)
    assert notes == [
        "relative.png: may show another person: its distance to the other photographs is 0.53, and their distance to "
        "each other is 0.01"
    ]


def test_a_varied_face_gets_no_note(read):
    varied = (0.55, 0.0, 0.05, -0.4, -0.42)  # the first is 0.55 from the others, their median distance is 0.41
    assert not read({f"{i}.png": (picture(i), place) for i, place in enumerate(varied)})[1]


def test_a_recompressed_copy_is_left_out_without_a_face_model(read, without_dlib):
    photographs = {"0.png": (picture(0), None), "1.png": (picture(1), None), "copy.jpg": (picture(0), None)}
    references, notes = read(photographs, search=False)
    assert names(references) == {"0.png", "1.png"}
    assert "copy.jpg: left out: almost the same image as 0.png" in notes


def test_without_any_face_all_photographs_are_used(read):
    references, notes = read({name: (image, None) for name, (image, _) in good(3).items()})
    assert names(references) == set(good(3))
    assert notes == [f"{name}: no face found; using the centre crop" for name in good(3)]


@pytest.mark.parametrize("people", [(0, 1), (0, 1, 2)])
def test_few_people_without_a_majority_are_all_used(read, people):
    references, notes = read({f"{i}.png": (picture(i), float(person)) for i, person in enumerate(people)})
    assert len(names(references)) == len(people)
    assert all("may show another person" in note and "left out" not in note for note in notes) and notes


def test_a_blurred_photograph_is_used_among_few(read):
    references, notes = read({"z.png": BAD["blurred"], **good(2)})
    assert len(names(references)) == 3
    assert notes == ["z.png: the face is blurred in comparison with the other photographs"]


def test_at_least_one_photograph_is_used(tmp_path):
    rng = np.random.default_rng(0)
    for count, _ in itertools.product(range(1, 7), range(50)):
        thumbnails = rng.integers(0, 3, count)
        made = [
            Candidate(
                tmp_path / str(i),
                int(rng.integers(1, 3)),
                np.full((2, 2), thumbnails[i], np.float32),
                None if rng.random() < 0.3 else rng.integers(0, 3, 1).astype(float),
                float(10.0 ** rng.integers(-3, 3)),
            )
            for i in range(count)
        ]
        assert any(finding is None or not finding.leave_out for finding in judge(made))


def test_the_contact_sheet_shows_left_out_photographs_in_grey(read, tmp_path):
    references, _ = read({"0.png": (picture(0), 0.0), "1.png": (picture(1), 0.1), "z.png": BAD["faceless"]})
    (tmp_path / "out").mkdir()
    save_contact_sheet(tmp_path / "out" / "sheet.png", references)
    pixels = load_image(tmp_path / "out" / "sheet.png").pixels
    cells = [pixels[GAP : GAP + SIDE, GAP + i * (SIDE + GAP) :][:, :SIDE] for i in range(3)]
    assert [bool(np.ptp(cell, axis=2).max() > 0.1) for cell in cells] == [True, True, False]
    texts = [pixels[GAP + SIDE :, GAP + i * (SIDE + GAP) :][:, :SIDE] for i in range(3)]
    assert all(text.min() < 0.5 for text in texts) and texts[2].mean() < texts[0].mean(), "the reason has more letters"


def test_a_contact_sheet_among_the_photographs_is_refused(tmp_path):
    check_place(tmp_path / "sheet.png", [tmp_path / "alice" / "0.png"])
    with pytest.raises(SettingError, match="another folder"):
        check_place(tmp_path / "alice" / "0.png", [tmp_path / "alice" / "0.png"])


def person(name, *numbers):
    """Candidates with embeddings of one number."""
    return [Candidate(Path(f"{name}{i}.png"), 9, np.zeros((2, 2)), np.full(1, n), 1.0) for i, n in enumerate(numbers)]


def test_several_people_of_equal_number_are_named():
    alice, bob = person("alice", 0.0, 0.1, 0.2), person("bob", 2.0, 2.1, 2.2)
    assert [[path.stem for path in group] for group in mixed_people([alice[0], *bob, *alice[1:]])] == [
        ["alice0", "alice1", "alice2"],
        ["bob0", "bob1", "bob2"],
    ]
    assert mixed_people(alice) == mixed_people([*alice, bob[0]]) == [], "most photographs show one person"
    assert mixed_people(person("child", 0.0, 0.5, 1.0, 1.5, 2.0)) == [], "a person who changes over the years"
    assert mixed_people(person("far", 0.0, 1.0, 2.0, 3.0)) == [], "no two faces are alike"


def test_photographs_of_several_people_are_refused(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (90, 100, 3), dtype=np.uint8)).save(path)
    embeddings = [0.0, 0.1, 2.0, 2.1]

    def read(**settings):
        faces = iter([[Face(10.0, 10.0, 50.0, np.full(1, n))] for n in embeddings])
        return read_references(paths, PersonalizeConfig(**settings), 192, lambda _: None, lambda _: next(faces))

    with pytest.raises(SettingError, match=r"several people.*0.png, 1.png / 2.png, 3.png"):
        read()
    assert len(read(keep_all=True)) == 4
