"""The plan file: one uncompressed zip of `manifest.json` and one payload, with its weights, for each component."""

from __future__ import annotations

import json
import mmap
import re
import shlex
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from pfstorer_rt.diffusion import Schedule
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import (
    atomic_write,
    check_fingerprint,
    is_name,
    move_file,
    sha256_bytes,
    show_path,
    work_folder,
)
from pfstorer_rt.onnx_message import external_files
from pfstorer_rt.signing import is_signed, sign

SCHEMA = 2
"""What is written; 1, which knows no weights beside a payload, is read too."""
KIND = "pfstorer-plan"
COMPONENTS = ("encoder", "denoiser", "decoder")
TARGETS = ("onnx", "tensorrt", "tensorrt-rtx")
"""Values of `Manifest.target` in a file. A base in memory has `torch`."""
PRECISIONS = ("fp32", "fp16", "int8")
DATA_TARGETS = ("onnx",)
"""Targets whose payloads are plain data; those of all others are executable code, and are signed."""
SIGNATURE = "signature"
SHIPPED = ("tiny",)
"""Bases that are known by their names."""
_CAPABILITY = re.compile(r"[0-9]+\.[0-9]+\+?")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same content


@dataclass(frozen=True)
class Payload:
    """One component inside a plan."""

    file: str
    sha256: str
    inputs: dict[str, dict[str, Any]]
    """By name: `shape` (integers and dimension names) and `type` (numpy name)."""
    outputs: dict[str, dict[str, Any]]
    parity: dict[str, float] = field(default_factory=dict)
    """How far it is from the PyTorch original, measured when it was built."""
    precision: str = "fp32"
    """What it computes in; a component may need more than the plan's."""
    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """For TensorRT, by input: the smallest, usual and largest shape of each optimization profile."""
    layers: dict[str, int] = field(default_factory=dict)
    """For TensorRT, how many layers of each kind the network had when it was built."""
    weights: str = ""
    """For a large ONNX graph, the file of its external data: the zip, unpacked, is a model as it is."""
    weights_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """All that a runtime has to know; also made for a base in memory (`target="torch"`)."""

    target: str
    precision: str
    tile: int
    """Pixels."""
    factor: int
    """Pixels per latent pixel."""
    latent_channels: int
    prediction_type: str
    sampler: str
    steps: int
    base_name: str
    base_fingerprint: str
    identity_name: str | None = None
    identity_fingerprint: str | None = None
    method: str | None = None
    strength: bool = False
    """Whether the denoiser takes `strength`."""
    cfw: bool = False
    """Whether the decoder takes the LQ image's features and `cfw_weight`."""
    cfw_weight: float = 0.0
    """Its value unless told otherwise."""
    schedule: Schedule = field(default_factory=Schedule)
    """Noise schedule of the base; a plan of an earlier version has none, which means StableSR's."""
    licence: str = "unknown"
    compute_capabilities: list[str] = field(default_factory=list)
    """For TensorRT, the GPUs it was built for, such as `8.9`; a `+` after one takes in all later ones."""
    tools: dict[str, str] = field(default_factory=dict)
    payloads: dict[str, Payload] = field(default_factory=dict)
    kind: str = KIND
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return stable, indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read the JSON form; raises `ValueError` for what does not fit."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown fields {unknown}")
        payloads = {name: Payload(**payload) for name, payload in data["payloads"].items()}
        try:
            schedule = Schedule(**data.get("schedule", {}))
            manifest = cls(**{**data, "payloads": payloads, "schedule": schedule})
        except TypeError as error:
            raise ValueError(str(error)) from error
        manifest.check_names()
        return manifest

    def check_names(self) -> None:
        """Raise `ValueError` unless every string that names something has the form of such a name.

        A plan is another person's file, and these strings become paths, modules and commands to copy.
        """
        check_fingerprint(self.base_fingerprint, "base")
        if self.identity_fingerprint is not None:
            check_fingerprint(self.identity_fingerprint, "identity")
        for name in (self.base_name, self.identity_name or "none"):
            if not is_name(name):
                raise ValueError(f"name {name!r}, expected letters a-z, digits, '_', '-' or '.', at most 64")
        if self.target not in TARGETS or self.precision not in PRECISIONS:
            raise ValueError(
                f"target {self.target!r}, precision {self.precision!r}, expected one of {TARGETS} and of {PRECISIONS}"
            )
        capabilities, tools = self.compute_capabilities, self.tools
        if not isinstance(capabilities, list) or not all(_CAPABILITY.fullmatch(str(name)) for name in capabilities):
            raise ValueError(f"compute_capabilities {capabilities!r}, expected such as ['8.9', '12.0+']")
        if not isinstance(tools, dict) or not all(isinstance(value, str) for value in tools.values()):
            raise ValueError(f"tools {tools!r}, expected names and versions")
        for component, payload in self.payloads.items():
            files = {f"{component}.onnx", f"{component}.engine"}, {"", f"{component}.weights"}
            if payload.file not in files[0] or payload.weights not in files[1]:
                raise ValueError(f"payload {payload.file!r} with weights {payload.weights!r} for the {component}")


@dataclass(frozen=True)
class Plan:
    """A plan on disk: its manifest, and its payloads read one at a time when asked for."""

    path: Path
    manifest: Manifest
    trusted: bool = True
    """Whether its payloads may be run: plain data, code signed by this user, or code that was vouched for."""

    @classmethod
    def open(cls, path: str | Path, trust: bool = False) -> Plan:
        """Open and check a plan without reading its payloads.

        trust: take executable payloads for good whoever made them.
        Raises `BadFileError` when it is missing, empty, damaged, foreign or from a newer version.
        """
        path, name = Path(path), show_path(path)
        if not path.is_file():
            raise BadFileError(f"{name}: no such plan; make one with `pfstorer-rt export`")
        try:
            with zipfile.ZipFile(path) as archive:
                written = archive.read("manifest.json")
                data, present = json.loads(written), set(archive.namelist())
                signature = archive.read(SIGNATURE).decode("ascii", "replace") if SIGNATURE in present else ""
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
            raise BadFileError(f"{name}: not a plan, or cut off ({error}); export it again") from error
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise BadFileError(f"{name}: a zip file, but not a plan made by `pfstorer-rt export`")
        if data.get("schema") not in range(1, SCHEMA + 1):
            raise BadFileError(
                f"{name}: plan schema {data.get('schema')}, this version reads 1 to {SCHEMA}; export it again"
            )
        try:
            manifest = Manifest.from_dict(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadFileError(f"{name}: its manifest does not fit ({error}); export it again") from error
        missing = [c for c in COMPONENTS if not _files(manifest.payloads.get(c)) <= present]
        if missing:
            raise BadFileError(f"{name}: lacks {', '.join(missing)}; export it again")
        plain = manifest.target in DATA_TARGETS
        return cls(path, manifest, plain or trust or is_signed(written, signature))

    def check_trusted(self) -> None:
        """Raise `BadFileError` for executable payloads that nobody vouches for; call it before they are run."""
        if not self.trusted:
            raise BadFileError(
                f"{show_path(self.path)}: a {self.manifest.target} plan is executable code, and this one was not built "
                f"by you on this machine, or was changed; {self.rebuild()}, or trust this plan if you know its maker",
                setting="trust",
            )

    def rebuild(self, current: bool = False) -> str:
        """Say how to make this plan again; `current`: for the GPU of this machine."""
        m = self.manifest
        base = m.base_name if m.base_name in SHIPPED else "DIR"  # where an imported base lies is not in a plan
        source = f"--identity {m.identity_name}" if m.identity_name else f"--base {base}"
        if m.identity_name and base == "DIR":
            source += " --base DIR"
        # A `+` is only in the set that is built for without the option.
        named = [] if any("+" in name for name in m.compute_capabilities) else m.compute_capabilities
        named = ["current"] if current else named if m.target == "tensorrt-rtx" else []
        gpus = "".join(f"--compute-capability {name} " for name in named)
        return (
            f"build it with `pfstorer-rt export {source} --target {m.target} --precision {m.precision} {gpus}"
            f"-o {shlex.quote(self.path.name)} --overwrite`"
        )

    def read(self, component: str) -> bytes:
        """Return a component's payload; it and its weights are checked against their sha256.

        Raises `BadFileError` when one of them is damaged.
        """
        payload = self.manifest.payloads[component]
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(payload.file)
        except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
            raise BadFileError(f"{show_path(self.path)}: {component} is damaged ({error}); export it again") from error
        with self.map_weights(component) as weights:
            digests = [sha256_bytes(data), *map(sha256_bytes, weights.values())]
        if digests != [payload.sha256, *[payload.weights_sha256] * bool(payload.weights)]:
            raise BadFileError(
                f"{show_path(self.path)}: the {component} does not match its sha256; copy or export the plan again"
            )
        if self.manifest.target in DATA_TARGETS:
            self._check_external_data(component, data)
        return data

    def _check_external_data(self, component: str, data: bytes) -> None:
        """Raise `BadFileError` for an ONNX graph that reads another file than the weights beside it, or runs code.

        An operator EPContext holds or names an engine, such as TensorRT's, that ONNX Runtime hands to its provider.
        """
        if b"EPContext" in data:
            raise BadFileError(
                f"{show_path(self.path)}: the {component} holds a compiled engine (EPContext), which is code; do not "
                "use it"
            )
        allowed = {self.manifest.payloads[component].weights} - {""}
        try:
            foreign = sorted(external_files(data) - allowed)
        except ValueError as error:
            raise BadFileError(f"{show_path(self.path)}: the {component} is not an ONNX graph ({error})") from error
        if foreign:
            raise BadFileError(
                f"{show_path(self.path)}: the {component} reads other files ({', '.join(map(repr, foreign))[:200]}), "
                "which no plan of this program does; do not use it"
            )

    @contextmanager
    def map_weights(self, component: str) -> Iterator[dict[str, memoryview]]:
        """Map the weights beside a component's payload, which `read` checks: {file: bytes}, empty where it has none.

        Pages are read from the plan as they are used. Raises `BadFileError` when they are damaged.
        """
        name = self.manifest.payloads[component].weights
        if not name:
            yield {}
            return
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self.path.open("rb"))
                start, size = _place(file, name)
                mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                whole = stack.enter_context(memoryview(mapped))
                view = stack.enter_context(whole[start : start + size])
            except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, struct.error) as error:
                raise BadFileError(
                    f"{show_path(self.path)}: the weights of the {component} are damaged ({error}); export it again"
                ) from error
            yield {name: view}

    @contextmanager
    def unpack(self, component: str) -> Iterator[Path]:
        """Write a component's payload and its weights, checked, to a folder of their own that is deleted afterwards.

        Yields the payload's path.
        """
        with work_folder() as folder:
            path = Path(folder, self.manifest.payloads[component].file)
            path.write_bytes(self.read(component))
            with self.map_weights(component) as weights:
                for name, data in weights.items():
                    path.with_name(name).write_bytes(data)
            yield path


def _files(payload: Payload | None) -> set[str]:
    """Names in the zip; a component that is not there has one that no zip has."""
    return {payload.file, payload.weights or payload.file} if payload else {""}


def _place(file: BinaryIO, name: str) -> tuple[int, int]:
    """Return where in a zip the bytes of an uncompressed member begin, and how many there are."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])), info.file_size


def write_plan(
    path: Path, manifest: Manifest, payloads: Mapping[str, bytes | Path], weights: Mapping[str, Path] | None = None
) -> Plan:
    """Write a plan atomically and open it; the same content gives the same bytes.

    payloads: {component: its bytes, or a file that holds them}, for each entry of `manifest.payloads`; weights: files
    of those that have weights beside. All are streamed.
    Executable ones are signed: the signature is of the manifest, which names the sha256 of every payload.
    """
    text = manifest.to_json()
    mode = 0o600 if manifest.identity_name else None  # with an identity it is biometric data
    with atomic_write(path, mode) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("manifest.json", _EPOCH), text)
        if manifest.target not in DATA_TARGETS:
            archive.writestr(zipfile.ZipInfo(SIGNATURE, _EPOCH), sign(text.encode()))
        for component, data in payloads.items():
            _add(archive, manifest.payloads[component].file, data)
            if weights and component in weights:
                _add(archive, manifest.payloads[component].weights, weights[component])
    return Plan.open(path)


def move_plan(plan: Plan, path: Path) -> Plan:
    """Give a plan another name on the same file system and open it there; its signature is of what it holds."""
    move_file(plan.path, path)
    return Plan.open(path)


def _add(archive: zipfile.ZipFile, name: str, data: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    with BytesIO(data) if isinstance(data, bytes) else data.open("rb") as source:
        entry.file_size = source.seek(0, SEEK_END)  # so that zipfile writes zip64 where it is needed
        source.seek(0)
        with archive.open(entry, "w") as out:
            shutil.copyfileobj(source, out, 1 << 20)
