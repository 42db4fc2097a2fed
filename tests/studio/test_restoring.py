"""The actions of the tab that restores."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.errors import PFStorerError, SettingError
from pfstorer_rt.faces.finding import Face
from pfstorer_rt.faces.marking import choose_person
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.progress import CancelledError
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.studio import restoring
from pfstorer_rt.studio.engines import NOBODY
from pfstorer_rt.studio.restoring import Dials


def silent(*_, **__):
    """A report that nobody reads."""


@pytest.fixture
def alice(home, make_nano_identity):
    identity = make_nano_identity(gammas=(2.0, 2.0, 2.0, 2.0))
    identity.save(home / "identities" / "alice.safetensors")
    return "identity:alice"


def restore(workspace, session, engines, choice=NOBODY, dials=None, report=silent, only=None):
    return restoring.restore(workspace, session, engines, choice, dials or Dials(), report, only)


def test_all_pictures_are_restored_as_the_library_does(workspace, session, engines, drop):
    paths, _ = restoring.take_pictures(workspace, session, drop("a.png", "b.jpg"))
    outcomes = restore(workspace, session, engines, dials=Dials(seed=3, steps=2, scale=2))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert (outcomes[0].width, outcomes[0].height) == (120, 140)
    with Restorer.from_base(engines.base()) as restorer:
        expected = restorer.restore(load_image(paths[0]).pixels, Dials(seed=3, steps=2, scale=2).config())
    assert np.abs(load_image(outcomes[0].job.target).pixels - expected).max() < 1 / 255


def test_scratches_are_removed_on_demand():
    assert [Dials(remove_scratches=wanted).config().remove_scratches for wanted in (False, True)] == [False, True]


def test_the_strength_changes_one_picture_and_keeps_the_others(workspace, session, engines, drop, alice):
    paths, _ = restoring.take_pictures(workspace, session, drop("a.png", "b.png"))
    restore(workspace, session, engines, alice)
    targets = [session.outcomes[path].job.target for path in paths]
    before = [target.read_bytes() for target in targets]
    (again,) = restore(workspace, session, engines, alice, Dials(strength=0), only=paths[0])
    assert again.details["strength"] == 0
    assert targets[0].read_bytes() != before[0] and targets[1].read_bytes() == before[1]


def test_choices(engines, alice, home):
    (home / "identities" / "bad.safetensors").write_bytes(b"x")
    assert engines.choices() == [("alice", "identity:alice"), ("Anybody: without a learned person", NOBODY)]


def test_plans_of_one_name_have_different_labels(engines, monkeypatch, tmp_path):
    plans = (tmp_path / "a" / "bob.plan", tmp_path / "b" / "bob.plan", tmp_path / "carol.plan")
    monkeypatch.setattr(engines, "config", replace(engines.config, plans=plans))
    labels = [label for label, choice in engines.choices() if choice.startswith("plan:")]
    assert labels == [f"{plans[0]} (plan)", f"{plans[1]} (plan)", "carol (plan)"]


@pytest.mark.parametrize("choice", ["plan:0", "identity:../../x", "anything", "identity:bob"])
def test_other_choices_are_refused(workspace, session, engines, drop, choice):
    restoring.take_pictures(workspace, session, drop("a.png"))
    with pytest.raises((PFStorerError, ValueError)):
        restore(workspace, session, engines, choice)


def test_cancelling_keeps_finished_results(workspace, session, engines, drop):
    paths, _ = restoring.take_pictures(workspace, session, drop("a.png", "b.png", "c.png"))

    def stop(text, share=None, extra=None):
        if "c.png" in text:
            raise CancelledError

    with pytest.raises(CancelledError):
        restore(workspace, session, engines, report=stop)
    assert set(session.outcomes) >= {paths[0]} and paths[2] not in session.outcomes
    assert session.outcomes[paths[0]].job.target.exists()


def test_progress_names_the_picture_and_the_share(workspace, session, engines, drop):
    restoring.take_pictures(workspace, session, drop("a.png", "b.png"))
    seen = []
    restore(workspace, session, engines, report=lambda text, share=None, extra=None: seen.append((text, share)))
    assert ("restoring b.png (2 of 2)", 1.0) in seen
    shares = [share for _, share in seen if share]
    assert shares == sorted(shares)


def test_the_zip_has_results_and_a_report_without_folders(workspace, session, engines, drop):
    restoring.take_pictures(workspace, session, drop("a.png", "b.png"))
    with pytest.raises(SettingError, match="no image was restored"):
        restoring.package(workspace, session)
    restore(workspace, session, engines)
    address = restoring.package(workspace, session)
    with zipfile.ZipFile(workspace.published(address.removeprefix("pictures/"))) as archive:
        assert sorted(archive.namelist()) == ["a_restored.png", "b_restored.png", "report.json"]
        text = archive.read("report.json").decode()
    assert [entry["output"] for entry in json.loads(text)] == ["a_restored.png", "b_restored.png"]
    assert str(session.folder) not in text


def test_results_of_one_stem_keep_apart(workspace, session, engines, drop, make_image):
    names = ["IMG_1.png", "IMG_1.gif", "img_1.PNG", "IMG_1_2.png", "IMG_1.jpg"]
    heights = dict(zip(names, range(40, 60, 4), strict=True))
    files = [drop(name, seed=seed, pixels=make_image(heights[name], 40))[0] for seed, name in enumerate(names)]
    paths, _ = restoring.take_pictures(workspace, session, files)
    outcomes = restore(workspace, session, engines)
    for path, outcome in zip(paths, outcomes, strict=True):
        addresses = restoring.before_and_after(workspace, session, path)
        before, after = (workspace.published(address.removeprefix("pictures/")) for address in addresses)
        assert after == outcome.job.target and Image.open(before).size == Image.open(after).size, path.name
        assert Image.open(after).height == heights[path.name], "the picture's own result"
    address = restoring.package(workspace, session)
    with zipfile.ZipFile(workspace.published(address.removeprefix("pictures/"))) as archive:
        entries = json.loads(archive.read("report.json"))
        packed = {entry["input"]: Image.open(archive.open(entry["output"])).height for entry in entries}
    assert packed == heights
    assert [outcome.job.target.name for outcome in outcomes] == [
        "IMG_1_restored.png",
        "IMG_1_2_restored.png",
        "img_1_3_restored.png",
        "IMG_1_2_2_restored.png",
        "IMG_1_restored.jpg",
    ]
    (again,) = restore(workspace, session, engines, only=paths[1])
    assert again.job == outcomes[1].job, "one picture alone keeps the name of its result"


def test_a_damaged_picture_is_left_out_by_name(workspace, session, drop):
    bad = workspace.uploads / "bad picture.png"
    bad.write_bytes(b"no picture")
    paths, (refused,) = restoring.take_pictures(workspace, session, [str(bad), *drop("a.png")])
    assert [path.name for path in paths] == ["a.png"] == [path.name for path in session.inputs]
    assert workspace.without_folders(refused).startswith("bad picture.png: ")


def test_without_pictures(workspace, session, engines):
    with pytest.raises(SettingError, match="no picture: drop one first"):
        restore(workspace, session, engines)


def test_faces_and_likeness(workspace, session, engines, drop, face):
    restoring.take_pictures(workspace, session, drop("face.png", pixels=face) + drop("none.png", seed=7))
    first, second = restoring.find_faces(workspace, session, engines, NOBODY, silent)
    assert first.text == "One face found." and second.text.startswith("No face found")
    text = restoring.take_references(workspace, session, drop("good.png", pixels=face))
    assert text == "The likeness is compared with 1 face."
    first, _ = restoring.find_faces(workspace, session, engines, NOBODY, silent)
    assert first.text == "The green frame shows the person."
    marked = Image.open(workspace.published(first.picture.removeprefix("pictures/"))).convert("RGB")
    green = np.abs(np.asarray(marked, float) - (0x2F, 0x9E, 0x6E)).max(-1) < 40
    assert green.sum() > 100
    restore(workspace, session, engines)
    found = restoring.likeness(session.outcomes[session.inputs[0]])
    assert found is not None and found.text


def test_without_photographs_the_person_is_known_from_the_identity(
    workspace, session, engines, drop, face, known_alice, monkeypatch
):
    monkeypatch.setattr("pfstorer_rt.studio.plans.why_none", lambda name: "not here")
    restoring.take_pictures(workspace, session, drop("face.png", pixels=face))
    (found,) = restoring.find_faces(workspace, session, engines, known_alice, silent)
    assert found.text == "The green frame shows the person."
    (outcome,) = restore(workspace, session, engines, known_alice)
    assert outcome.details["id_distance_input"] < 0.05, "the same face"
    restoring.take_references(workspace, session, drop("good.png", pixels=face[:, ::-1].copy()))
    restoring.compare_results(workspace, session, engines, silent)
    again = session.outcomes[session.inputs[0]].details["id_distance_input"]
    assert again > outcome.details["id_distance_input"], "compared with the dropped photograph"
    restoring.take_references(workspace, session, [])
    assert restoring.likeness(session.outcomes[session.inputs[0]]) is None, "measured with forgotten photographs"
    restoring.compare_results(workspace, session, engines, silent)
    assert session.outcomes[session.inputs[0]] == outcome, "compared with the identity again"


def test_without_the_extra_metrics_there_are_no_faces(workspace, session, engines, drop, without_dlib):
    restoring.take_pictures(workspace, session, drop("a.png"))
    assert restoring.find_faces(workspace, session, engines, NOBODY, silent) == []


def test_the_person_is_the_nearest_face_or_nobody():
    faces = [Face(0, 0, 50, np.full(128, 1.0)), Face(60, 0, 20, np.zeros(128))]
    assert choose_person(faces, []) == 0
    assert choose_person(faces, [np.zeros(128)]) == 1
    assert choose_person(faces[:1], [np.zeros(128)]) is None
    assert choose_person([], [np.zeros(128)]) is None
