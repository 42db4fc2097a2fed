"""`identities`: list, show, verify and rm."""

import json
import sys

import numpy as np
import pytest

from pfstorer_rt.engine.compiled import ENGINES


def test_list_includes_unreadable_identities(run, people):
    (people / "broken.safetensors").write_bytes(b"")
    (people / "notes.txt").write_text("not an identity")
    rows = [json.loads(line) for line in run("identities", "list", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == ["alice", "broken"]
    assert rows[0]["method"] == "pfstorer" and rows[0]["references"] == 1 and "error" in rows[1]
    text = run("identities", "list")
    assert (
        text.status == 0 and "alice  pfstorer on nano, 1 reference, " in text.out and "broken  unreadable" in text.out
    )


def test_encrypting_needs_a_terminal_or_the_variable(run, people, monkeypatch):
    monkeypatch.delenv("PFSTORER_PASSPHRASE", raising=False)
    done = run("identities", "encrypt", "alice")
    assert done.status == 2 and "set PFSTORER_PASSPHRASE" in done.errors[0]


def test_list_names_encrypted_identities(run, people, monkeypatch):
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "correct horse battery staple")
    assert run("identities", "encrypt", "alice").status == 0
    for passphrase, words in (("", "; give its passphrase in"), ("another", " with another passphrase, or changed;")):
        monkeypatch.setenv("PFSTORER_PASSPHRASE", passphrase)
        listed = run("identities", "list")
        assert listed.status == 0 and listed.out.startswith(f"alice  encrypted{words}")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert "pfstorer-rt[encrypt]" in run("identities", "list").out


def test_listing_no_identities_succeeds(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "nowhere"))
    assert (run("identities", "list", "--json").out, run("identities", "list").status) == ("", 0)
    assert "personalize" in run("identities", "list").err and not (tmp_path / "nowhere").exists()


def test_show_prints_an_identity_as_json(run, people, nano_identity):
    report = json.loads(run("identities", "show", "alice", "--json").out)
    assert report["base_fingerprint"] == nano_identity.base_fingerprint and set(report["gamma"]) == set(
        nano_identity.layers
    )


@pytest.mark.parametrize("command", ["show", "verify", "rm"])
@pytest.mark.parametrize("name", ["bob", "no such/bob.safetensors", "?", ""])
def test_unknown_identities_are_refused(refused, people, tree, command, name):
    before = tree(people)
    refused(2, "identities", command, name)
    assert tree(people) == before


def test_list_shows_unfinished_trainings(run, refused, people):
    (people / "bob.training.pt").write_bytes(b"weights")
    (people / "carol.crops").mkdir()
    lines = run("identities", "list").out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["alice", "bob", "carol"]
    assert all("training not finished" in line for line in lines[1:])
    refused(2, "identities", "show", "bob", words=["its training is not finished"])


def test_verify_checks_file_permissions_base_and_references(run, people, save, monkeypatch, nano_base_dir):
    monkeypatch.chdir(nano_base_dir.parent)  # the base is found by its name there
    good = run("identities", "verify", "alice")
    assert good.status == 0 and "FAILED" not in good.out and good.out.count("ok ") == 3
    stranger = run("identities", "verify", "alice", save(people / "x.png"))
    assert stranger.status == 1 and "FAILED  not learned from" in stranger.out
    assert f"learned from {people / 'x.png'}" in run("identities", "verify", "alice", people).out, "folders too"
    (people / "alice.safetensors").chmod(0o644)
    assert "FAILED  readable by its owner only" in run("identities", "verify", "alice").out


def test_verify_fails_without_the_base_or_with_another_base(run, people, monkeypatch, other_base_dir):
    missing = run("identities", "verify", "alice")
    assert missing.status == 1 and "no such base" in missing.out
    other_base_dir.rename(other_base_dir.with_name("nano"))
    monkeypatch.chdir(other_base_dir.parent)
    assert "FAILED  base nano" in run("identities", "verify", "alice").out


def test_rm_deletes_an_identity_and_its_training_checkpoint(run, people, tree):
    (people / "alice.training.pt").write_bytes(b"weights")
    (people / "notes.txt").write_text("kept")
    assert run("identities", "rm", "alice", stdin=b"n\n").status == 0
    unanswered = run("identities", "rm", "alice")
    assert (
        unanswered.status == 2
        and "alice was not deleted: the question was not answered; pass --yes" in unanswered.errors[0]
    )
    assert len(tree(people)) == 3
    assert run("identities", "rm", "alice", "--yes").out == "alice: deleted\n"
    assert list(tree(people)) == ["notes.txt"]


def test_rm_deletes_nothing_when_one_name_is_unknown(refused, people, tree):
    before = tree(people)
    refused(2, "identities", "rm", "alice", "bob", "--yes", words=["bob"])
    assert tree(people) == before


def test_rm_deletes_a_damaged_identity_but_no_other_file(run, refused, people, tmp_path):
    (people / "broken.safetensors").write_bytes(b"cut off")
    assert run("identities", "rm", "broken", "--yes").status == 0
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    refused(2, "identities", "rm", thesis, "--yes", words=["thesis.txt"])
    assert thesis.read_text() == "years of work"


def hostile_identity(path, fingerprint, source=None):
    """An identity file with the fingerprint of another one, or with a path in its place."""
    import safetensors.numpy
    from safetensors import safe_open

    tensors, meta = {}, {"kind": "pfstorer-identity", "schema": "1"}
    if source:
        with safe_open(source, "np") as handle:
            meta = handle.metadata()
        tensors = {"token": np.zeros(4, np.float32)}
    safetensors.numpy.save_file(tensors, path, {**meta, "fingerprint": fingerprint})
    return path


@pytest.mark.parametrize("form", ["{folder}", "..", "", "../../{name}", "."])
@pytest.mark.parametrize("whole", [True, False])
def test_rm_deletes_no_folder_named_in_an_identity_file(run, people, tree, tmp_path, form, whole):
    folder = tmp_path / "photographs"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.jpg").write_bytes(b"a memory")
    cache = people.parent / "cache" / "openvino" / "0123456789abcdef"
    cache.mkdir(parents=True)
    (cache / "a.blob").write_bytes(b"somebody else's")
    source = people / "alice.safetensors" if whole else None
    named = form.format(folder=folder, name=folder.name)
    gift = hostile_identity(tmp_path / "gift.safetensors", named, source)
    hostile_identity(people / "mallory.safetensors", named, source)
    run("identities", "rm", gift, "--yes")
    assert run("identities", "rm", "mallory", "--yes").status == 0
    assert tree(folder) == {"deep/a.jpg": b"a memory"}
    assert tree(cache) == {"a.blob": b"somebody else's"}


@pytest.mark.parametrize("engine", ENGINES)
def test_rm_deletes_only_the_compiled_networks_of_this_identity(run, people, nano_identity, engine):
    own = people.parent / "cache" / engine / nano_identity.fingerprint[:16]
    own.mkdir(parents=True)
    (own / "a.blob").write_bytes(b"weights")
    hostile_identity(people / "mallory.safetensors", nano_identity.fingerprint, people / "alice.safetensors")
    assert run("identities", "rm", "mallory", "--yes").status == 0
    assert own.is_dir(), "the tensors of that file do not have this fingerprint"
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not own.exists()


def test_rm_deletes_the_crops_of_an_interrupted_training(run, people, tmp_path):
    for folder in (people / "alice.crops", people / "bob.crops", tmp_path / "carol.crops"):
        folder.mkdir()
        (folder / "latents.npy").write_bytes(b"a face")
    for name in ("alice", "bob", tmp_path / "carol.safetensors"):
        assert run("identities", "rm", name, "--yes").status == 0
    assert not list(people.glob("*.crops")) and not list(tmp_path.glob("*.crops"))


def test_rm_by_path_deletes_no_file_of_another_program(run, refused, tmp_path):
    import torch

    folder = tmp_path / "photos.training.pt"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"a memory")
    harvest = tmp_path / "farm.crops"
    harvest.mkdir()
    (harvest / "wheat.csv").touch()
    thesis, own = tmp_path / "model.training.pt", tmp_path / "alice.training.pt"
    torch.save({"weights": torch.zeros(3)}, thesis)
    torch.save({"iteration": 1, "signature": "", "parameters": {}}, own)
    for name in ("photos", "model", "farm"):
        refused(2, "identities", "rm", tmp_path / f"{name}.safetensors", "--yes", words=("no such identity",))
    assert (folder / "a.jpg").exists() and thesis.exists() and (harvest / "wheat.csv").exists()
    assert run("identities", "rm", tmp_path / "alice.safetensors", "--yes").status == 0
    assert not own.exists()


def test_rm_deletes_the_networks_before_the_identity(run, people, nano_identity, monkeypatch):
    """Without the identity, nothing could tell which networks are its own."""
    own = people.parent / "cache" / "openvino" / nano_identity.fingerprint[:16]
    own.mkdir(parents=True)

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fails)
        assert run("identities", "rm", "alice", "--yes").status == 1
    assert (people / "alice.safetensors").exists()
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not own.exists()


def test_rm_removes_temporary_files_of_killed_processes(run, people):
    left = [people / ".pfstorer-1.tmp", people.parent / "cache" / "work" / ".pfstorer-2.tmp"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a person")
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("engine", ENGINES)
def test_rm_warns_about_networks_outside_the_cache(run, people, tmp_path, engine):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (people.parent / "cache").mkdir(exist_ok=True)
    (people.parent / "cache" / engine).symlink_to(elsewhere)
    made = run("identities", "rm", "alice", "--yes")
    assert made.status == 0 and "may be left in" in made.err


def test_all_commands_name_a_missing_identity_in_the_same_words(refused, people, nano_base_dir):
    calls = [
        ("identities", "show", "carol"),
        ("identities", "verify", "carol"),
        ("identities", "rm", "carol", "--yes"),
        ("export", "--base", nano_base_dir, "--identity", "carol", "-o", "carol.plan"),
    ]
    assert {refused(2, *call) for call in calls} == {"Error: carol: no such identity; expected one of alice"}


def test_verify_is_honest_about_file_systems_without_owners(people, monkeypatch, nano_base_dir):
    from pfstorer_rt.runtime import identities

    monkeypatch.chdir(nano_base_dir.parent)
    path = people / "alice.safetensors"
    path.chmod(0o777)  # as on exFAT: every file has all bits
    text = "readable by its owner only"
    assert {c.text: c.passed for c in identities.verify_identity("alice")}[text] is False
    monkeypatch.setattr(identities, "keeps_modes", lambda folder: False)
    checks = identities.verify_identity("alice")
    assert all(check.passed for check in checks)
    assert any("no owner-only files: everybody who can read this disk" in check.text for check in checks)


def test_files_of_a_disk_with_owners_keep_their_modes(tmp_path, monkeypatch):
    import os

    from pfstorer_rt.files import keeps_modes

    assert keeps_modes(tmp_path) and not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "fchmod", lambda *_: None)  # a mount whose mode bits are fixed
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: original(path, flags, 0o777))
    assert not keeps_modes(tmp_path) and not list(tmp_path.iterdir())


def test_verify_lists_all_files_of_an_identity_and_what_a_deletion_left(run, people):
    (people / "alice.training.pt").write_bytes(b"weights")
    shown = run("identities", "verify", "alice").out
    assert f"also on this machine: {people / 'alice.training.pt'}" in shown
    (people / "alice.safetensors").unlink()
    left = run("identities", "verify", "alice")
    assert left.status == 1 and "no identity, but a part is left" in left.out and "alice.training.pt" in left.out
    assert run("identities", "rm", "alice", "--yes").status == 0
    assert run("identities", "verify", "alice").status == 2


@pytest.mark.parametrize("spelling", ["relative", "link"])
def test_rm_and_encrypt_by_path_know_a_named_identity(run, people, tmp_path, monkeypatch, spelling):
    (people / "alice.plan").write_bytes(b"the weights of alice")
    if spelling == "relative":
        monkeypatch.chdir(people)
        path = "alice.safetensors"
    else:
        (tmp_path / "link").symlink_to(people)
        path = tmp_path / "link" / "alice.safetensors"
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "a long passphrase")
    assert run("identities", "encrypt", path).status == 0
    assert not (people / "alice.plan").exists(), "the plan contains the weights"
    (people / "alice.plan").write_bytes(b"the weights of alice")
    assert run("identities", "rm", path, path, "--yes").status == 0, "a path may be given twice"
    assert not (people / "alice.plan").exists() and not (people / "alice.safetensors").exists()


def test_encrypt_and_decrypt_check_all_names_first(run, refused, people, tree, monkeypatch):
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "correct horse battery staple")
    before = tree(people)
    refused(2, "identities", "encrypt", "alice", "nobody", words=["nobody"])
    assert tree(people) == before
    assert run("identities", "encrypt", "alice").status == 0
    before = tree(people)
    refused(2, "identities", "decrypt", "alice", "nobody", words=["nobody"])
    refused(2, "identities", "encrypt", "alice", words=["encrypted already"])
    assert tree(people) == before


def test_a_path_that_is_no_identity_is_not_listed_as_a_name(refused, people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(2, "identities", "show", "./alice", words=["no such identity file", "without a folder"])
    (tmp_path / "old.jpg").write_bytes(b"x")
    refused(2, "identities", "rm", "old.jpg", "--yes", words=["a file, but no identity", ".safetensors"])
    assert (tmp_path / "old.jpg").exists()


def test_a_short_passphrase_is_refused(refused, people, tree, monkeypatch):
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "abc")
    before = tree(people)
    refused(2, "identities", "encrypt", "alice", words=["a passphrase of 3 characters", "8 or more"])
    assert tree(people) == before
