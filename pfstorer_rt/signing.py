"""Signatures of plans with executable code, made and checked with a local key of the user."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import atomic_write, home, make_folder, open_plain, show_path

KEY_BYTES = 32


def key_path() -> Path:
    """Return the file of the signing key, in the user's data directory."""
    return home() / "signing.key"


def sign(data: bytes) -> str:
    """Sign bytes (HMAC-SHA256, 64 hexadecimal digits). The first call makes the key, readable by its owner only."""
    return _digest(_read_key() or _make_key(), data)


def is_signed(data: bytes, signature: str) -> bool:
    """Whether `signature` is a signature of these bytes with the user's key; False if there is no key."""
    key = _read_key()
    return key is not None and hmac.compare_digest(_digest(key, data).encode(), signature.encode())


def _digest(key: bytes, data: bytes) -> str:
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def _read_key() -> bytes | None:
    path = key_path()
    try:
        with open_plain(path) as file:
            key = file.read(KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadFileError(f"{show_path(path)}: the signing key cannot be read ({reason})") from error
    if len(key) != KEY_BYTES:
        size = f"{len(key)}" if len(key) < KEY_BYTES else "more"
        raise BadFileError(
            f"{show_path(path)}: a signing key has {KEY_BYTES} bytes, this has {size}; "
            "delete it and export the TensorRT plans again"
        )
    return key


def _make_key() -> bytes:
    key = secrets.token_bytes(KEY_BYTES)
    make_folder(key_path().parent)
    with atomic_write(key_path(), mode=0o600) as file:
        file.write(key)
    return key
