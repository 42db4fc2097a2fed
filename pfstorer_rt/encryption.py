"""Encryption of identity files with a passphrase: scrypt for the key, AES-256-GCM for the content (extra `encrypt`).

File: `MAGIC`, 16 bytes of salt, 12 bytes of nonce, and the ciphertext with its tag of 16 bytes. Magic and salt are
authenticated too. scrypt (RFC 7914): n = 2^17, r = 8, p = 1, as OWASP recommends; 128 MB and about half a second.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.extras import needed_by

MAGIC = b"pfstorer-encrypted-1\n"
VARIABLE = "PFSTORER_PASSPHRASE"
"""Environment variable with the passphrase."""
SHORTEST = 8
"""Characters of the shortest passphrase that `identities encrypt` accepts."""
_SALT, _NONCE, _TAG = 16, 12, 16
_COST, _MEMORY = 1 << 17, 192 << 20

ask: Callable[[], str] | None = None
"""Asks the user for the passphrase, an empty answer is none; None where nobody can answer. The command line sets it."""


def passphrase_given() -> str | None:
    """Return the passphrase of the environment variable, None without it."""
    return os.environ.get(VARIABLE) or None


def passphrase_of_user() -> str | None:
    """Return the passphrase of the environment variable, or else the user's answer; None without both."""
    return passphrase_given() or (_answer(ask) if ask else None) or None


@lru_cache(maxsize=1)
def _answer(ask: Callable[[], str]) -> str:
    return ask()


def seal(data: bytes, passphrase: str) -> bytes:
    """Encrypt bytes; raises `MissingBackendError` without the extra `encrypt`."""
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    return MAGIC + salt + nonce + _cipher(passphrase, salt).encrypt(nonce, data, MAGIC + salt)


def unseal(data: bytes, passphrase: str) -> bytes:
    """Decrypt bytes from `seal`; raises `ValueError` for another passphrase and for changed bytes."""
    head = len(MAGIC) + _SALT
    if len(data) < head + _NONCE + _TAG:
        raise ValueError("an encrypted file that is cut off; copy it again")
    salt, nonce = data[len(MAGIC) : head], data[head : head + _NONCE]
    cipher = _cipher(passphrase, salt)
    from cryptography.exceptions import InvalidTag

    try:
        plain: bytes = cipher.decrypt(nonce, data[head + _NONCE :], data[:head])
    except InvalidTag as error:
        raise ValueError("encrypted with another passphrase, or changed; check the passphrase") from error
    return plain


def _cipher(passphrase: str, salt: bytes) -> Any:
    with needed_by("an encrypted identity", "encrypt"):
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    return AESGCM(_key(passphrase, salt))


@lru_cache(maxsize=8)
def _key(passphrase: str, salt: bytes) -> bytes:
    if not passphrase:
        raise PFStorerError("an empty passphrase; choose one of several words")
    words = passphrase.encode(errors="surrogateescape")  # an environment variable may contain bytes that are not UTF-8
    return hashlib.scrypt(words, salt=salt, n=_COST, r=8, p=1, maxmem=_MEMORY, dklen=32)
