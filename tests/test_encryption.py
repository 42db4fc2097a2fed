"""Identities that are encrypted with a passphrase."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pfstorer_rt import encryption
from pfstorer_rt.engine.compiled import ENGINES, cache_folder
from pfstorer_rt.errors import BadFileError, MissingBackendError, SettingError
from pfstorer_rt.identity import Identity, is_encrypted
from pfstorer_rt.runtime.identities import (
    decrypt_identity,
    delete_identity,
    encrypt_identity,
    import_identity,
    rename_identity,
    verify_identity,
)

WORDS = "correct horse battery staple"


@pytest.fixture
def alice(nano_identity, tmp_path, monkeypatch):
    """The file of an identity in a data directory of its own; no passphrase is given."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(encryption.VARIABLE, raising=False)
    return nano_identity.save(tmp_path / "home" / "identities" / "alice.safetensors")


@pytest.fixture
def give(monkeypatch):
    """Function (passphrase): set the environment variable."""
    return lambda words: monkeypatch.setenv(encryption.VARIABLE, words)


def test_the_file_format_is_that_of_the_documentation():
    sealed = encryption.seal(b"a face", WORDS)
    magic, salt, nonce = sealed[:21], sealed[21:37], sealed[37:49]
    key = Scrypt(salt, 32, 2**17, 8, 1).derive(WORDS.encode())
    assert magic == b"pfstorer-encrypted-1\n"
    assert AESGCM(key).decrypt(nonce, sealed[49:], magic + salt) == b"a face"
    assert encryption.unseal(sealed, WORDS) == b"a face"
    assert encryption.seal(b"a face", WORDS)[21:] != sealed[21:], "a new salt and nonce for each file"


def test_an_encrypted_identity_is_read_with_its_passphrase_only(alice, give, nano_identity):
    before = alice.read_bytes()
    encrypt_identity("alice", WORDS)
    sealed = alice.read_bytes()
    assert alice.stat().st_mode & 0o777 == 0o600
    assert b"pfstorer-identity" not in sealed and nano_identity.fingerprint.encode() not in sealed
    with pytest.raises(BadFileError, match="encrypted; give its passphrase in the environment variable PFSTORER_PASS"):
        Identity.load(alice)
    give("another one")
    with pytest.raises(BadFileError, match="another passphrase, or changed; check the passphrase"):
        Identity.load(alice)
    give(WORDS)
    assert Identity.load(alice).fingerprint == nano_identity.fingerprint
    assert Identity.load(alice, tensors=False).name == "alice"
    decrypt_identity("alice")
    assert alice.read_bytes() == before


def test_changed_and_cut_files_are_refused(alice, give):
    give(WORDS)
    encrypt_identity("alice", WORDS)
    sealed = alice.read_bytes()
    for position in (25, 40, 60, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        alice.write_bytes(changed)
        with pytest.raises(BadFileError, match="another passphrase, or changed"):
            Identity.load(alice)
    alice.write_bytes(sealed[:50])
    with pytest.raises(BadFileError, match=r"an encrypted file that is cut off; copy it again$"):
        Identity.load(alice)


def test_the_question_is_asked_once_and_only_without_the_variable(alice, give, monkeypatch):
    encrypt_identity("alice", WORDS)
    asked = []

    def ask():
        asked.append(1)
        return WORDS

    monkeypatch.setattr(encryption, "ask", ask)
    Identity.load(alice)
    Identity.load(alice)
    assert len(asked) == 1
    monkeypatch.setattr(encryption, "ask", lambda: "")
    with pytest.raises(BadFileError, match="encrypted; give its passphrase"):
        Identity.load(alice)
    give("another one")
    with pytest.raises(BadFileError):
        Identity.load(alice)


def test_what_is_encrypted_already_and_what_is_not(alice, give):
    with pytest.raises(SettingError, match="not encrypted; nothing was changed"):
        decrypt_identity("alice")
    give(WORDS)
    encrypt_identity("alice", WORDS)
    with pytest.raises(SettingError, match="encrypted already"):
        encrypt_identity("alice", WORDS)
    assert verify_identity("alice")[0].passed


def test_a_renamed_and_an_imported_identity_stay_encrypted(alice, give, nano_identity, tmp_path):
    give(WORDS)
    encrypt_identity("alice", WORDS)
    rename_identity("alice", "ann")
    ann = alice.with_name("ann.safetensors")
    import_identity(ann, "anna")
    for path in (ann, alice.with_name("anna.safetensors")):
        assert path.read_bytes().startswith(encryption.MAGIC)
        assert Identity.load(path).fingerprint == nano_identity.fingerprint
    decrypt_identity("ann")
    rename_identity("ann", "alice")
    assert not is_encrypted(alice), "the passphrase that is set does not encrypt a plain identity"


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_networks_are_deleted_when_an_identity_is_encrypted(alice, nano_identity, engine):
    networks = cache_folder(engine, nano_identity.fingerprint)
    networks.mkdir(parents=True)
    (networks / "a.blob").write_bytes(b"weights of a person")
    encrypt_identity("alice", WORDS)
    assert not networks.exists()


def test_an_identity_is_deleted_without_its_passphrase(alice):
    encrypt_identity("alice", WORDS)
    delete_identity("alice")
    assert not alice.exists()


def test_a_new_identity_is_encrypted_if_a_passphrase_is_given(nano_base, tmp_path, make_image, give):
    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.imaging.files import save_image
    from pfstorer_rt.training.personalize import personalize

    give(WORDS)
    save_image(tmp_path / "photo.png", make_image(80, 72))
    config = PersonalizeConfig.for_base(
        nano_base.config, {"iterations": 1, "batch": 1, "device": "cpu"}, pool=2, framing="none"
    )
    target = tmp_path / "alice.safetensors"
    personalize("alice", [tmp_path / "photo.png"], nano_base, config, target)
    assert target.read_bytes().startswith(encryption.MAGIC) and Identity.load(target).name == "alice"


def test_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingBackendError, match=r"pfstorer-rt\[encrypt\]"):
        encryption.seal(b"a face", WORDS)
