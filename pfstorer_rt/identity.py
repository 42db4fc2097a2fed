"""Identity files: the learned weights of one person, as safetensors with string metadata. Biometric data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pfstorer_rt import checks
from pfstorer_rt.config import unsupported_setting
from pfstorer_rt.encryption import MAGIC, VARIABLE, passphrase_of_user, seal, unseal
from pfstorer_rt.errors import BadFileError, MismatchError, SettingError, one_line
from pfstorer_rt.files import (
    atomic_write,
    check_fingerprint,
    fingerprint_tensors,
    home,
    is_name,
    make_folder,
    open_plain,
    show_path,
)

if TYPE_CHECKING:
    import torch

SCHEMA = "1"
KIND = "pfstorer-identity"
METHODS = ("pfstorer", "vico", "dreambooth")
_LAYER = r"(?:(?:down|up)_blocks\.\d{1,2}|mid_block)\.attentions\.\d{1,2}"
_LARGEST_HEADER = 16 << 20
"""Bytes of the header of an identity file. The header of a full-size base has about 100 KB."""


def _settings(value: Any, name: str) -> None:
    """Check the settings that restoring uses; the others are for the reader only."""
    checks.table_of(lambda value, name: None, 200)(value, name)
    used: dict[str, checks.Check] = {"rank": checks.whole(0, 4096), "subject_prompt": checks.text(1000)}
    for key, check in used.items():
        if key in value:
            check(value[key], key)


_VALUES: dict[str, checks.Check] = {
    "layers": checks.list_of(checks.text(64, _LAYER, "such as up_blocks.1.attentions.0"), 64),
    "settings": _settings,
    "references": checks.list_of(checks.text(64), 10_000, least=1),
    "gamma": checks.table_of(checks.table_of(checks.number(0, 1e6), 8), 64),
}
"""Check of every entry of the metadata that is JSON."""


@dataclass(eq=False)
class Identity:
    """The learned weights and metadata of one person.

    Tensors: `blocks.{i}.*` (personalization block i, including `gamma`), `token` (D,), and the cached reference
    `reference.{i}` (S_i, C_i) with `mask.{i}` (S_i,). The method `dreambooth` stores `unet.*` instead. `face` (128,) is
    the mean embedding of the faces in the reference photographs; an identity that was learned without the `metrics`
    extra has none.
    """

    name: str
    base_fingerprint: str
    base_name: str
    method: str
    layers: tuple[str, ...]
    settings: dict[str, Any]
    """Configuration of the training, as JSON values."""
    references: tuple[str, ...]
    """SHA-256 of the file of each reference photograph."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    gamma: dict[str, dict[str, float]] = field(default_factory=dict)
    """Layer -> mean and maximum of |gamma|."""

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the names, types and bytes of the tensors, sorted by name."""
        return fingerprint_tensors(sorted(self.tensors.items()))

    @property
    def face(self) -> list[float]:
        """Return the embedding of the person's face, empty if it is not known."""
        return self.tensors["face"].tolist() if "face" in self.tensors else []

    def check_base(self, fingerprint: str) -> None:
        """Raise `MismatchError` unless the identity was trained on the base with this fingerprint."""
        if fingerprint != self.base_fingerprint:
            raise MismatchError(
                f"identity {self.name!r} was learned on base {self.base_name!r} ({self.base_fingerprint[:12]}), "
                f"got base {fingerprint[:12]}; use its own base or personalize again"
            )

    def save(self, path: Path, passphrase: str | None = None) -> Path:
        """Write the file, readable by its owner only; returns the path.

        passphrase: encrypt the file. Without it, the same content gives the same bytes.
        """
        import safetensors.torch

        tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(self.tensors.items())}
        make_folder(path.parent)
        metadata = {**self.metadata(), "fingerprint": self.fingerprint}
        data = _with_sorted_header(safetensors.torch.save(tensors, metadata=metadata))
        data = seal(data, passphrase) if passphrase else data
        with atomic_write(path, mode=0o600) as file:
            file.write(data)
        return path

    def metadata(self) -> dict[str, str]:
        """Return everything but the tensors, as strings."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "name": self.name,
            "base_fingerprint": self.base_fingerprint,
            "base_name": self.base_name,
            "method": self.method,
            "layers": json.dumps(self.layers),
            "settings": json.dumps(self.settings, sort_keys=True),
            "references": json.dumps(self.references),
            "gamma": json.dumps(self.gamma, sort_keys=True),
        }

    @classmethod
    def load(cls, path: str | Path, tensors: bool = True) -> Identity:
        """Read an identity file; `tensors=False` reads the metadata only.

        An encrypted file is decrypted with the user's passphrase (`encryption`).
        Raises `BadFileError` if the file is missing, damaged, not an identity, or from a newer version, and for a
        missing or wrong passphrase.
        """
        path = Path(path)
        content = read_content(path)
        meta = read_metadata(path, content)
        try:
            values = {key: checks.read_json(meta[key], _LARGEST_HEADER) for key in _VALUES}
            check_values(meta, values)
            identity = cls(
                meta["name"],
                meta["base_fingerprint"],
                meta["base_name"],
                meta["method"],
                tuple(values["layers"]),
                values["settings"],
                tuple(values["references"]),
                gamma=values["gamma"],
            )
            reason = unsupported_setting(identity.settings)
        except (KeyError, ValueError, TypeError) as error:
            what = f"its metadata are incomplete or wrong ({error}); personalize again"
            raise BadFileError(f"{show_path(path)}: {what}") from error
        if reason:
            raise BadFileError(f"{show_path(path)}: it was trained with {reason}; personalize again")
        if tensors:
            import safetensors.torch

            identity.tensors = safetensors.torch.load_file(path) if content is None else safetensors.torch.load(content)
            if identity.fingerprint != meta["fingerprint"]:
                raise BadFileError(f"{show_path(path)}: its tensors do not match its fingerprint; personalize again")
            try:
                check_tensors(identity)
            except ValueError as error:
                raise BadFileError(f"{show_path(path)}: {error}; personalize again") from error
        return identity


def check_values(meta: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless every name and value in the metadata is valid.

    An identity file may come from another person, and its names become paths, network modules and commands that a user
    copies.
    """
    check_fingerprint(meta["fingerprint"], "identity")
    check_fingerprint(meta["base_fingerprint"], "base")
    for key, check in _VALUES.items():
        check(values[key], key)
    for digest in values["references"]:
        check_fingerprint(digest, "reference photograph")
    for key in ("name", "base_name"):
        if not is_name(meta[key]):
            raise SettingError(f"{key} {meta[key][:80]!r}, expected letters a-z, digits, '_', '-' or '.', at most 64")
    if meta["method"] not in METHODS:
        raise SettingError(f"method {meta['method'][:80]!r}, expected one of {', '.join(METHODS)}")
    layers = values["layers"]
    if len(set(layers)) < len(layers) or bool(layers) != (meta["method"] != "dreambooth"):
        raise SettingError(f"{len(layers)} layers, expected different ones for the method {meta['method']}")


def check_tensors(identity: Identity) -> None:
    """Raise `ValueError` unless the tensors are those that the method stores: names, types, shapes, finite values."""
    import torch

    tensors, count = identity.tensors, len(identity.layers)
    if identity.method == "dreambooth":
        wanted, pattern = {"unet.conv_in.weight"}, r"unet\..+|face"
    else:
        wanted = {"token", *(f"blocks.{i}.gamma" for i in range(count))}
        pattern = r"token|face|(?:blocks\.(\d{1,2})\..+|(?:reference|mask)\.(\d{1,2}))"
        if identity.settings.get("ref_source", "cached") == "cached":
            wanted |= {f"{kind}.{i}" for kind in ("reference", "mask") for i in range(count)}
    if missing := sorted(wanted - set(tensors)):
        raise SettingError(f"its tensors lack {', '.join(missing[:3])}")
    for name, tensor in tensors.items():
        found = re.fullmatch(pattern, name)
        if not found or any(group and int(group) >= count for group in found.groups()):
            raise SettingError(f"its tensor {name[:80]!r} belongs to no identity")
        kind = torch.bool if name.startswith("mask.") else torch.float16
        axes = {"token": 1, "face": 1, "mask": 1, "reference": 2}.get(name.split(".")[0])
        shape = tuple(tensor.shape)
        if tensor.dtype != kind or not tensor.numel() or (axes and len(shape) != axes):
            raise SettingError(f"its tensor {name[:80]!r} is {tensor.dtype} {shape}, expected {kind}")
        if name == "face" and shape != (checks.FACE_SIZE,):
            raise SettingError(f"its tensor 'face' is {shape}, expected ({checks.FACE_SIZE},)")
        if kind is torch.float16 and not bool(torch.isfinite(tensor).all()):
            raise SettingError(f"its tensor {name[:80]!r} has values that are not finite")
        if name.startswith("mask.") and shape != tuple(tensors["reference" + name[4:]].shape[:1]):
            raise SettingError(f"its tensor {name!r} is {shape}, expected a value for every token of the reference")
        if kind is torch.bool and not bool(tensor.any()):
            raise SettingError(f"its tensor {name!r} excludes every token, expected at least one")


def _with_sorted_header(data: bytes) -> bytes:
    """Sort the header of a safetensors file, because the library writes metadata in random order."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def is_encrypted(path: Path) -> bool:
    """Whether a file is encrypted; raises `BadFileError` if it is missing or cannot be read."""
    if not path.is_file():
        raise BadFileError(no_such_identity(path))
    try:
        with open_plain(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise BadFileError(f"{show_path(path)}: cannot be read ({one_line(error)}); check its permissions") from error


def read_content(path: Path) -> bytes | None:
    """Return the decrypted content of an identity file, None for a file that is not encrypted."""
    if not is_encrypted(path):
        return None
    name, passphrase = show_path(path), passphrase_of_user()
    if passphrase is None:
        raise BadFileError(f"{name}: encrypted; give its passphrase in the environment variable {VARIABLE}")
    try:
        return unseal(path.read_bytes(), passphrase)
    except (ValueError, OSError) as error:
        raise BadFileError(f"{name}: {one_line(error)}") from error


def read_metadata(path: Path, content: bytes | None = None) -> dict[str, str]:
    """Read the metadata of an identity file; raises `BadFileError` if the file is not an identity.

    content: the decrypted content of an encrypted file.
    """
    name = show_path(path)
    if not path.is_file():
        raise BadFileError(no_such_identity(path))
    try:
        with open_plain(path) if content is None else BytesIO(content) as file:
            header = _read_header(file)
        meta: dict[str, str] = header.pop("__metadata__", {})
        checks.table_of(checks.text(_LARGEST_HEADER), 64)(meta, "__metadata__")
    except (ValueError, OSError) as error:
        raise _unreadable(path) from error
    if meta.get("kind") != KIND:
        raise BadFileError(f"{name}: a safetensors file, but not an identity; choose another file")
    if meta.get("schema") != SCHEMA:
        raise BadFileError(
            f"{name}: identity schema {show_path(str(meta.get('schema'))[:80])}, this version reads {SCHEMA}; "
            "update this program or personalize again"
        )
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        if content is not None:
            deserialize(content)
            return meta
        with safe_open(path, "np"):  # checks that the tensors fill the file, as `deserialize` does
            return meta
    except (SafetensorError, OSError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> BadFileError:
    found = f"not a readable safetensors file ({path.stat().st_size} bytes)"
    advice = "damaged, cut off, or of another kind: copy it again, or personalize again"
    return BadFileError(f"{show_path(path)}: {found}; {advice}")


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the JSON header of a safetensors file; raises `ValueError` for another file."""
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= _LARGEST_HEADER:
        raise ValueError(f"a header of {size} bytes, expected at most {_LARGEST_HEADER}")
    header = checks.read_json(file.read(size), _LARGEST_HEADER)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("a header that is no object")
    return header


def identities_dir() -> Path:
    """Return the folder of named identities."""
    return home() / "identities"


def identity_path(name_or_file: str | Path) -> Path:
    """Return the file of an identity, given by name (in the user's data directory) or by path.

    Raises `ValueError` for an invalid name.
    """
    text = str(name_or_file)
    if text.endswith(".plan"):
        raise SettingError(f"{show_path(text)}: a plan, expected an identity; a plan contains its identity already")
    if text.endswith(".safetensors") or os.sep in text:
        return Path(text)
    return named_identity(text)


def named_identity(name: str) -> Path:
    """Return the file of a named identity in the user's data directory; raises `ValueError` for an invalid name."""
    if not is_name(name) or name.endswith(".safetensors"):
        raise SettingError(
            f"identity name {name!r}: expected letters a-z or A-Z, digits, '_', '-' or '.', at most 64 of them, "
            "without .safetensors at the end"
        )
    return identities_dir() / f"{name}.safetensors"


def training_files(identity: Path) -> tuple[Path, Path]:
    """Return the checkpoint and the folder of crops of a training, beside the file of its identity."""
    return identity.with_name(identity.stem + ".training.pt"), identity.with_name(identity.stem + ".crops")


def kept_plan(identity: Path) -> Path:
    """Return the plan that the studio keeps beside the file of a named identity."""
    return identity.with_name(identity.stem + ".plan")


def list_identities() -> list[Path]:
    """List the named identity files, sorted; raises `BadFileError` if their folder cannot be read."""
    return [identities_dir() / name for name in _stored() if name.endswith(".safetensors")]


def list_unfinished() -> list[str]:
    """List the names of identities whose training was interrupted, sorted; raises as `list_identities`."""
    ends = (".training.pt", ".crops")
    return sorted({name.removesuffix(end) for name in _stored() for end in ends if name.endswith(end)})


def _stored() -> list[str]:
    """Return the sorted names of the files in the folder of named identities; none if there is no folder."""
    try:
        return sorted(os.listdir(identities_dir()))
    except FileNotFoundError:
        return []
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        folder = show_path(identities_dir())
        advice = "check its permissions, or set PFSTORER_HOME to another folder"
        raise BadFileError(f"{folder}: this folder cannot be read ({reason}); {advice}") from error


def no_such_identity(path: Path) -> str:
    """Return the message for an identity file that does not exist; a named identity appears under its name."""
    named = path.parent == identities_dir()
    name = path.stem if named else show_path(path)
    if named and any(file.exists() for file in training_files(path)):
        return f"{name}: its training is not finished; repeat the call that learns it to resume"
    if named and Path(name).is_file():
        return f"{name}: a file, but no identity of this name; an identity file ends with .safetensors"
    if not named:
        return f"{name}: no such identity file; expected a file, or the name of an identity without a folder"
    return f"{name}: no such identity; {known_identities()}"


def known_identities() -> str:
    """Return the names of the identities for an error message, at most ten of them."""
    names = [path.stem for path in list_identities()]
    if not names:
        return f"there are none in {show_path(identities_dir())}; learn one first"
    return f"expected one of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
