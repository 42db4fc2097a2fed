"""The cache of compiled networks: one owner-only folder per engine and identity."""

from __future__ import annotations

import os
from pathlib import Path

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import atomic_write, cache_home, check_fingerprint, inside, make_folder, open_plain, sha256_bytes
from pfstorer_rt.plan import Plan

ENGINES = ("onnxruntime", "openvino")
"""Engines that keep compiled networks; also the names of their folders in the cache directory."""


def cache_folder(engine: str, fingerprint: str) -> Path:
    """Return the folder of an engine's compiled networks of an identity, or of a base without an identity.

    fingerprint: fingerprint of the identity or base, 64 hexadecimal digits. Raises `ValueError` for any other value.
    """
    return inside(cache_home(), engine, check_fingerprint(fingerprint, "plan")[:16])


def make_cache_folder(engine: str, plan: Plan) -> Path | None:
    """Make the folder of an engine's compiled networks of a plan; returns None if that fails.

    Compiled networks contain the weights of the identity. Only the owner can therefore read the folder, and its name is
    the start of the identity's fingerprint, so that `identities rm` can delete it.
    """
    try:
        folder = make_folder(cache_folder(engine, plan.manifest.identity_fingerprint or plan.manifest.base_fingerprint))
        folder.chmod(0o700)
    except (PFStorerError, OSError, ValueError):  # ValueError: a symbolic link leads out of the cache directory
        return None
    return folder if os.access(folder, os.W_OK) else None


def read_entry(path: Path) -> bytes | None:
    """Return the content of an entry, or None if there is none or its SHA-256 does not match content and name."""
    try:
        with open_plain(path) as file:
            digest, data = file.read(64), file.read()
    except (PFStorerError, OSError):
        return None
    return data if _digest(path, data) == digest else None


def write_entry(path: Path, data: bytes) -> None:
    """Write an entry: the SHA-256 of its name and content, and the content. A link in its place is replaced.

    Raises PFStorerError or OSError if the entry cannot be written.
    """
    if path.is_symlink():
        path.unlink()
    with atomic_write(path, mode=0o600) as file:
        file.write(_digest(path, data))
        file.write(data)


def _digest(path: Path, data: bytes) -> bytes:
    return sha256_bytes(os.fsencode(path.name) + data).encode()
