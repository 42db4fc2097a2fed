"""Odd files in the data directory, such as pipes and links, and a passphrase that is not text."""

import os

import pytest

from pfstorer_rt import encryption, signing
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.identity import Identity, identities_dir, list_identities
from pfstorer_rt.runtime.identities import delete_identity, encrypt_identity


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty data directory."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    identities_dir().mkdir(parents=True)
    return tmp_path / "home"


MAKERS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "long file": lambda path: path.write_bytes(bytes(1 << 20)),
    "short file": lambda path: path.write_bytes(b"x"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_signing_key_that_is_no_key_is_refused_at_once(home, kind):
    MAKERS[kind](signing.key_path())
    for use in (lambda: signing.sign(b"a"), lambda: signing.is_signed(b"a", "0" * 64)):
        with pytest.raises(BadFileError, match=r"signing\.key") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_link_that_leads_nowhere_is_deleted_by_its_name(home):
    link = identities_dir() / "alice.safetensors"
    link.symlink_to(home / "missing")
    assert list_identities() == [link]
    delete_identity("alice")
    assert list_identities() == []


def test_a_passphrase_of_bytes_that_are_not_text(home, nano_identity, monkeypatch):
    words = os.fsdecode(b"pass\xe4word")
    path = nano_identity.save(identities_dir() / "alice.safetensors")
    encrypt_identity("alice", words)
    monkeypatch.setenv(encryption.VARIABLE, words)
    assert Identity.load(path).fingerprint == nano_identity.fingerprint
