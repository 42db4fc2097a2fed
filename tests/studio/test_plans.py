"""The plan that the studio makes for a person: when it is made, used, and deleted."""

import shutil
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from pfstorer_rt.encryption import MAGIC
from pfstorer_rt.errors import ParityError, SettingError
from pfstorer_rt.identity import Identity, kept_plan, named_identity
from pfstorer_rt.plan import Plan
from pfstorer_rt.progress import CancelledError
from pfstorer_rt.runtime.identities import encrypt_identity, find_kept, rename_identity
from pfstorer_rt.studio import machine, plans
from pfstorer_rt.studio.config import StudioConfig
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.machine_tab import MachineTab
from pfstorer_rt.studio.plans import ensure_plan, find_plan


def silent(*_, **__):
    """A report that nobody reads."""


@pytest.fixture
def alice(home, nano_identity):
    nano_identity.save(home / "identities" / "alice.safetensors")


@pytest.fixture
def planned(alice, nano_plan):
    """Alice with her plan."""
    return shutil.copyfile(nano_plan.path, kept_plan(named_identity("alice")))


def test_a_person_gets_a_plan_once(alice, quick_base, engines, nano_identity):
    seen = []
    assert ensure_plan("alice", quick_base, lambda text, *_: seen.append(text)) == ""
    path = find_plan("alice")
    assert Plan.open(path).manifest.identity_fingerprint == nano_identity.fingerprint
    assert path.stat().st_mode & 0o077 == 0
    assert [text for text in seen if "part 2 of 3, denoiser: " in text] and "only once" in seen[0]
    with engines.use("identity:alice") as restorer:
        assert restorer.backend != "torch" and restorer.manifest.strength
    assert engines.plans() == [path]
    seen.clear()
    ensure_plan("alice", quick_base, lambda text, *_: seen.append(text))
    assert seen == []


def test_plans_of_one_name_can_each_be_timed(planned, workspace, session, quick_base, tmp_path, monkeypatch):
    given = tmp_path / "given" / "alice.plan"
    given.parent.mkdir()
    given.write_bytes(b"another plan")
    engines = Engines(StudioConfig(base=quick_base, plans=(given,)))
    timed = []
    monkeypatch.setattr(machine, "measure_plan", lambda path, *_: timed.append(path))
    monkeypatch.setattr(machine, "draw", lambda target, _: target.touch())
    with gr.Blocks():
        tab = MachineTab(workspace, engines)
    shown = tab.refreshed()
    choices = shown[tab.plan]["choices"]
    for name in choices:
        list(tab.on_time(name, SimpleNamespace(session_hash="a page")))
        assert f'<th scope="row">{name}</th>' in shown[tab.listed], "the list has the names of the choices"
    assert timed == [given, planned] and choices == ["alice.plan", "alice.plan (2)"]
    with pytest.raises(SettingError, match="no plan is chosen"):
        list(tab.on_time(None, SimpleNamespace(session_hash="a page")))


def test_a_plan_of_other_weights_is_not_used(planned, make_nano_identity):
    assert find_plan("alice") is not None
    make_nano_identity(seed=9).save(named_identity("alice"))
    assert find_plan("alice") is None
    shutil.copyfile(named_identity("alice"), kept_plan(named_identity("alice")))
    assert find_plan("alice") is None, "damaged"


def test_a_cancelled_export_writes_nothing(alice, quick_base, home):
    def stop(text, *_):
        if "denoiser" in text:
            raise CancelledError

    with pytest.raises(CancelledError):
        ensure_plan("alice", quick_base, stop)
    assert [path.name for path in (home / "identities").iterdir()] == ["alice.safetensors"]


@pytest.mark.parametrize("error", [ParityError, ValueError, RuntimeError])
def test_a_failed_export_is_noted_and_pytorch_is_used(alice, engines, monkeypatch, error):
    def fail(*_, **__):
        raise error("denoiser: too far")

    monkeypatch.setattr("pfstorer_rt.export.export_plan", fail)
    assert "denoiser: too far" in engines.prepare("identity:alice", silent)
    with engines.use("identity:alice") as restorer:
        assert restorer.backend == "torch"


def test_where_no_plan_is_made(alice, quick_base, monkeypatch):
    monkeypatch.setattr(plans, "why_none", lambda name: "PyTorch uses the GPU")
    assert ensure_plan("alice", quick_base, silent) == "" and find_plan("alice") is None


def test_an_encrypted_identity_has_no_plan(planned, monkeypatch):
    monkeypatch.setattr("pfstorer_rt.runtime.identities.seal", lambda data, passphrase: MAGIC + bytes(40))
    encrypt_identity("alice", "correct horse")
    assert not kept_plan(named_identity("alice")).exists()
    assert "encrypted" in plans.why_none("alice")


def test_the_plan_belongs_to_the_files_of_the_person(planned, home):
    assert kept_plan(named_identity("alice")) in find_kept("alice").files
    rename_identity("alice", "ann")
    assert [path.name for path in (home / "identities").iterdir()] == ["ann.safetensors"]
    assert Identity.load(named_identity("ann")).name == "ann"


def test_the_face_of_a_choice(engines, home, make_nano_identity):
    import torch

    identity = make_nano_identity()
    identity.tensors["face"] = torch.arange(128).half()
    identity.save(home / "identities" / "alice.safetensors")
    assert np.array_equal(engines.face("identity:alice"), np.arange(128))
    assert engines.face("base") == []
