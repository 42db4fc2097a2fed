"""The actions of the tab of people."""

from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.progress import CancelledError
from pfstorer_rt.studio import people
from pfstorer_rt.studio.people import Learning
from pfstorer_rt.studio.people_tab import PeopleTab


def silent(*_, **__):
    """A report that nobody reads."""


@pytest.fixture
def photographs(workspace, session, engines, drop, without_dlib):
    """Three photographs in the session."""
    return people.judge_photographs(workspace, session, engines, drop("1.png", "2.png", "3.png"), silent)


def test_copies_are_refused_with_a_reason(workspace, session, engines, drop, without_dlib):
    files = drop("1.png", "2.png") + drop("copy.png")
    judged = people.judge_photographs(workspace, session, engines, files, silent)
    assert [(one.name, bool(one.reason)) for one in judged] == [("1.png", False), ("2.png", False), ("copy.png", True)]
    assert judged[2].reason == "almost the same image as 1.png"
    assert all(workspace.published(one.crop.removeprefix("pictures/")).exists() for one in judged)


def test_nothing_is_learned_without_consent(workspace, session, engines, photographs, home):
    with pytest.raises(SettingError, match="consent is missing"):
        people.learn(workspace, session, engines, Learning("bob", False), silent)
    assert not (home / "identities").exists()


def test_learning_reports_progress_and_previews(workspace, session, engines, photographs):
    seen = []
    report = lambda text, share=None, extra=None: seen.append((text, share, extra))  # noqa: E731
    identity, _ = people.learn(workspace, session, engines, Learning("bob", True), report)
    assert Identity.load(identity_path("bob")).fingerprint == identity.fingerprint
    previews = [extra for _, _, extra in seen if extra]
    assert len(previews) == 3, "after every iteration but the last"
    assert all(workspace.published(address.removeprefix("pictures/")).exists() for address in previews[-1])
    shares = [share for _, share, _ in seen if share is not None]
    assert shares == sorted(shares) and shares[-1] == 1
    assert engines.choices()[0] == ("bob", "identity:bob")
    with pytest.raises(PFStorerError, match="known already"):
        people.learn(workspace, session, engines, Learning("bob", True), silent)


def test_previews_do_not_change_what_is_learned(workspace, session, engines, photographs, tmp_path):
    from pfstorer_rt.training.personalize import personalize

    identity, _ = people.learn(workspace, session, engines, Learning("bob", True), silent)
    paths = sorted((session.folder / "photographs").iterdir())
    plain = personalize("bob", paths, engines.config.base, output=tmp_path / "bob.safetensors")
    assert plain.fingerprint == identity.fingerprint


def test_a_cancelled_training_is_resumed(workspace, session, engines, photographs):
    def stop(text, share=None, extra=None):
        if text == "learning: 2 of 4":
            raise CancelledError

    with pytest.raises(CancelledError):
        people.learn(workspace, session, engines, Learning("bob", True), stop)
    (unfinished,) = people.known_people(engines)
    assert unfinished.name == "bob" and not unfinished.finished
    seen = []
    people.learn(workspace, session, engines, Learning("bob", True), lambda text, *_, **__: seen.append(text))
    assert "learning: 2 of 4" in seen and "learning: 1 of 4" not in seen
    assert [person.finished for person in people.known_people(engines)] == [True]


def test_the_page_lists_a_cancelled_training(workspace, engines, photographs, monkeypatch):
    def cancel(*_):
        identity_path("bob").parent.mkdir(parents=True)
        identity_path("bob").with_suffix(".training.pt").touch()
        raise CancelledError

    monkeypatch.setattr(people, "learn", cancel)
    with gr.Blocks():
        tab = PeopleTab(workspace, engines, gr.Dropdown())
    shown = {}
    with pytest.raises(CancelledError):
        for updates in tab.on_learn("bob", "Usual", True, SimpleNamespace(session_hash="a page")):
            shown |= updates
    assert "learn the same photographs to resume it" in shown[tab.table]


def test_an_unreadable_photograph_comes_last_and_is_named_once(workspace, session, engines, drop, without_dlib):
    files = drop("1.png", "2.png")
    Path(files[0]).write_bytes(b"no picture")
    good, bad = people.judge_photographs(workspace, session, engines, files, silent)
    assert (good.name, good.reason) == ("2.png", "") and bad.name == "1.png"
    assert bad.reason.startswith("not a readable image") and not bad.crop


@pytest.fixture
def alice(home, nano_identity):
    nano_identity.save(home / "identities" / "alice.safetensors")


def test_rename(engines, alice):
    assert people.rename("alice", "ann") == "alice is now named ann."
    assert Identity.load(identity_path("ann")).name == "ann" and not identity_path("alice").exists()
    with pytest.raises(PFStorerError, match="this name is used already"):
        people.rename("ann", "ann")
    with pytest.raises(SettingError, match="identity name"):
        people.rename("ann", "../ann")


def test_delete_needs_the_name_and_leaves_nothing(engines, alice, home):
    checkpoint = home / "identities" / "alice.training.pt"
    checkpoint.write_bytes(b"x")
    (home / "identities" / "alice.plan").write_bytes(b"x")
    with pytest.raises(SettingError, match="type the name alice"):
        people.delete("alice", "alic")
    assert people.delete("alice", "alice ") == "alice is deleted (3 files). Plans that you exported yourself are left."
    assert list((home / "identities").iterdir()) == []
    with pytest.raises(SettingError, match="nobody is chosen"):
        people.delete(None, "")


def test_export_and_import(workspace, session, engines, alice):
    address = people.export_file(workspace, session, "alice")
    exported = workspace.published(address.removeprefix("pictures/"))
    dropped = workspace.uploads / exported.name
    dropped.write_bytes(exported.read_bytes())
    people.delete("alice", "alice")
    assert people.import_file(workspace, session, str(dropped)) == "alice is stored on this machine."
    assert Identity.load(identity_path("alice")).name == "alice"
    with pytest.raises(PFStorerError, match="this name is used already"):
        people.import_file(workspace, session, str(dropped))
    dropped.write_bytes(b"no identity")
    with pytest.raises(BadFileError):
        people.import_file(workspace, session, str(dropped), "eve")
    assert [person.name for person in people.known_people(engines)] == ["alice"]


def test_an_encrypted_person_is_named_without_the_extra_that_decrypts(engines, home, nano_identity, monkeypatch):
    import sys

    nano_identity.save(home / "identities" / "alice.safetensors", "correct horse battery staple")
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "correct horse battery staple")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    (alice,) = people.known_people(engines)
    assert alice.name == "alice" and "pfstorer-rt[encrypt]" in alice.text and engines.people() == []
