"""What the tab that restores shows."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.likeness import read_likeness
from pfstorer_rt.studio import fragments, restoring
from pfstorer_rt.studio.engines import NOBODY
from pfstorer_rt.studio.restore_tab import RestoreTab

PAGE = SimpleNamespace(session_hash="a page")


def silent(*_, **__):
    """A report that nobody reads."""


@pytest.fixture
def tab(workspace, engines):
    with gr.Blocks():
        return RestoreTab(workspace, engines)


@pytest.fixture
def restored(workspace, session, engines, drop, face, monkeypatch):
    """Function (choice): restores the face so well that the result shows the same face."""
    monkeypatch.setattr("pfstorer_rt.studio.plans.why_none", lambda name: "not here")

    def make(choice):
        (path,), _ = restoring.take_pictures(workspace, session, drop("face.png", pixels=face))
        (outcome,) = restoring.restore(workspace, session, engines, choice, restoring.Dials(), silent)
        shutil.copyfile(path, outcome.job.target)
        return path

    return make


def shown(updates):
    """Return the last value of every component."""
    last = {}
    for update in updates:
        last |= update
    return last


def test_a_result_without_a_face_is_shown_with_all_results(tab, session, restored):
    """The likeness of a result without a face has no number."""
    path = restored(NOBODY)
    outcome = session.outcomes[path]
    session.outcomes[path] = replace(outcome, details={**outcome.details, "id_distance": None})
    last = shown(tab.finish(session, None))
    assert "No face was found in the result" in last[tab.reading] and "Distance" not in last[tab.reading]
    assert "face_restored.png" in last[tab.results] and "restored.zip" in last[tab.zip]
    assert "Distance to your photographs: 0.50." in fragments.reading(read_likeness(0.5), dropped=True)


def test_removed_photographs_leave_the_likeness_to_the_person(tab, session, drop, face, known_alice, restored):
    path = restored(known_alice)
    photographs = drop("good.png", seed=3, pixels=face[:, ::-1].copy())
    last = shown(tab.on_references(photographs, known_alice, PAGE))
    to_photographs = session.outcomes[path].details["id_distance"]
    assert f"Distance to your photographs: {to_photographs:.2f}." in last[tab.reading]
    last = shown(tab.on_references([], NOBODY, PAGE))
    to_person = session.outcomes[path].details["id_distance"]
    assert to_person < 0.05 < to_photographs, "the person that restored it, not the one that is chosen now"
    assert f"Distance to the photographs that were learned: {to_person:.2f}." in last[tab.reading]


def test_removed_photographs_leave_no_likeness_without_a_person(tab, session, drop, face, restored):
    path = restored(NOBODY)
    last = shown(tab.on_references(drop("good.png", seed=3, pixels=face), NOBODY, PAGE))
    assert "Distance to your photographs" in last[tab.reading] and "Very likely" in last[tab.results]
    last = shown(tab.on_references(None, NOBODY, PAGE))
    assert last[tab.reading] == "" and "Very likely" not in last[tab.results]
    assert not [key for key in session.outcomes[path].details if key.startswith("id_distance")]


def test_photographs_without_a_face_replace_the_ones_before(tab, session, drop, face, known_alice, restored):
    path = restored(known_alice)
    shown(tab.on_references(drop("good.png", seed=3, pixels=face[:, ::-1].copy()), known_alice, PAGE))
    last = {}
    with pytest.raises(BadFileError, match="no face found"):
        for updates in tab.on_references(drop("none.png", seed=4, pixels=np.zeros((64, 64, 3))), known_alice, PAGE):
            last |= updates
    assert "Distance to the photographs that were learned: 0.0" in last[tab.reading]
    assert session.outcomes[path].details["id_distance"] < 0.05


def test_a_deleted_person_leaves_no_likeness(tab, session, home, drop, face, known_alice, restored):
    path = restored(known_alice)
    shown(tab.on_references(drop("good.png", seed=3, pixels=face), known_alice, PAGE))
    (home / "identities" / "alice.safetensors").unlink()
    last = shown(tab.on_references([], NOBODY, PAGE))
    assert last[tab.reading] == "" and restoring.likeness(session.outcomes[path]) is None
