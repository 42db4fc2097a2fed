"""The plan file: an uncompressed zip of `manifest.json` and, for each component, a payload and its weights."""

from __future__ import annotations

import json
import mmap
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, get_args

from pfstorer_rt import checks
from pfstorer_rt.archive import check_entries, place, read_entries
from pfstorer_rt.config import Method
from pfstorer_rt.diffusion import SAMPLERS, Schedule
from pfstorer_rt.errors import BadFileError, Rebuild, one_line
from pfstorer_rt.files import (
    atomic_write,
    is_name,
    move_file,
    open_plain,
    sha256_bytes,
    show_path,
    work_folder,
)
from pfstorer_rt.graph_check import check_graph
from pfstorer_rt.signing import is_signed, sign

SCHEMA = 2
"""Schema of written plans. Schema 1, without external weights, can also be read."""
KIND = "pfstorer-plan"
COMPONENTS = ("encoder", "denoiser", "decoder")
TARGETS = ("onnx", "tensorrt", "tensorrt-rtx")
"""Values of `Manifest.target` in a file. The target of a base in memory is `torch`."""
PRECISIONS = ("fp32", "fp16", "int8")
DATA_TARGETS = ("onnx",)
"""Targets whose payloads are plain data. The payloads of other targets are executable code and are signed."""
SIGNATURE = "signature"
SHIPPED = ("portrait",)
"""Names of the bases in the package."""
DEFAULT_BASE = SHIPPED[0]
_DAMAGES = (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, NotImplementedError, RuntimeError)
"""Errors of reading a damaged zip. RuntimeError: an encrypted entry; NotImplementedError: an unknown method."""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time, so that the same content gives the same bytes


_LARGEST_MANIFEST = 4 << 20
"""Bytes of a manifest. A manifest of Stable Diffusion has about 10 KB."""
_FINGERPRINT = checks.text(64, r"[0-9a-f]{64}", "64 hexadecimal digits")
_FIGURE = checks.number(-1e30, 1e30)
_PORT = checks.record(
    {"shape": checks.list_of(checks.either(checks.whole(1, 1 << 31), checks.text(80)), 8), "type": checks.text(20)},
    ("shape", "type"),
)
_PAYLOAD = checks.record(
    {
        "file": checks.text(),
        "sha256": _FINGERPRINT,
        "inputs": checks.table_of(_PORT, 64),
        "outputs": checks.table_of(_PORT, 64),
        "parity": checks.table_of(_FIGURE, 16),
        "precision": checks.one_of(*PRECISIONS),
        "profiles": checks.list_of(
            checks.table_of(checks.list_of(checks.list_of(checks.whole(1, 1 << 31), 8), 3, 3), 64), 64
        ),
        "layers": checks.table_of(checks.whole(0, 1 << 31), 1000),
        "weights": checks.text(),
        "weights_sha256": checks.either(checks.one_of(""), _FINGERPRINT),
    },
    ("file", "sha256", "inputs", "outputs"),
)
_MANIFEST: dict[str, checks.Check] = {
    "target": checks.one_of(*TARGETS),
    "precision": checks.one_of(*PRECISIONS),
    "tile": checks.whole(16, 8192),
    "factor": checks.whole(1, 64),
    "latent_channels": checks.whole(1, 1024),
    "prediction_type": checks.one_of("epsilon", "v_prediction"),
    "sampler": checks.one_of(*SAMPLERS),
    "steps": checks.whole(1, 1000),
    "base_name": checks.text(),
    "base_fingerprint": _FINGERPRINT,
    "identity_name": checks.optional(checks.text()),
    "identity_fingerprint": checks.optional(_FINGERPRINT),
    "face": checks.either(checks.list_of(_FIGURE, 0), checks.list_of(_FIGURE, checks.FACE_SIZE, checks.FACE_SIZE)),
    "method": checks.one_of(None, *get_args(Method)),
    "strength": checks.boolean,
    "cfw": checks.boolean,
    "cfw_weight": checks.number(-10, 10),
    "schedule": checks.record(
        {"kind": checks.text(), "beta_start": _FIGURE, "beta_end": _FIGURE, "steps": checks.whole(1, 10_000)}
    ),
    "licence": checks.text(),
    "compute_capabilities": checks.list_of(checks.text(8, r"[0-9]+\.[0-9]+\+?", "such as '8.9' or '12.0+'"), 32),
    "tools": checks.table_of(checks.text(), 32),
    "payloads": checks.table_of(_PAYLOAD, len(COMPONENTS)),
    "kind": checks.one_of(KIND),
    "schema": checks.whole(1, SCHEMA),
}
"""Check of every field of `Manifest` in a file."""


@dataclass(frozen=True)
class Payload:
    """Description of one component of a plan."""

    file: str
    sha256: str
    inputs: dict[str, dict[str, Any]]
    """Input name -> `shape` (integers and dimension names) and `type` (numpy name)."""
    outputs: dict[str, dict[str, Any]]
    parity: dict[str, float] = field(default_factory=dict)
    """Differences from the PyTorch component, measured when the plan was built."""
    precision: str = "fp32"
    """Precision of the computation; a component may need a higher precision than the plan."""
    profiles: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """TensorRT only: input name -> smallest, usual and largest shape, for each optimization profile."""
    layers: dict[str, int] = field(default_factory=dict)
    """TensorRT only: number of layers of each kind when the engine was built."""
    weights: str = ""
    """File of the external data of a large ONNX graph. The unpacked zip is a valid ONNX model."""
    weights_sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """The metadata that the runtime needs; a base in memory also has a manifest (`target="torch"`)."""

    target: str
    precision: str
    tile: int
    """Side of a tile in pixels."""
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
    face: list[float] = field(default_factory=list)
    """Embedding of the person's face, to find the person in an image; empty if it is not known."""
    method: str | None = None
    strength: bool = False
    """Whether the denoiser has the input `strength`."""
    cfw: bool = False
    """Whether the decoder has inputs for the features of the LQ image and `cfw_weight`."""
    cfw_weight: float = 0.0
    """Default of the decoder's input `cfw_weight`."""
    schedule: Schedule = field(default_factory=Schedule)
    """Noise schedule of the base. Plans of earlier versions have none and use the default, StableSR's schedule."""
    licence: str = "unknown"
    compute_capabilities: list[str] = field(default_factory=list)
    """TensorRT only: compute capabilities of the supported GPUs, such as `8.9`; `8.9+` includes all later ones."""
    tools: dict[str, str] = field(default_factory=dict)
    payloads: dict[str, Payload] = field(default_factory=dict)
    kind: str = KIND
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return stable, indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read the JSON form; raises `ValueError` for invalid content."""
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        checks.record(_MANIFEST, [*needed, "payloads"])(data, "manifest")
        payloads = {name: Payload(**payload) for name, payload in data["payloads"].items()}
        manifest = cls(**{**data, "payloads": payloads, "schedule": Schedule(**data.get("schedule", {}))})
        manifest.check_names()
        manifest.check_networks()
        return manifest

    def check_names(self) -> None:
        """Raise `ValueError` unless every name in the manifest is valid.

        A plan may come from another person, and its names become paths, modules and commands that a user copies.
        """
        for name in (self.base_name, self.identity_name or "none"):
            if not is_name(name):
                raise ValueError(f"name {name!r}, expected letters a-z, digits, '_', '-' or '.', at most 64")
        for component, payload in self.payloads.items():
            files = {f"{component}.onnx", f"{component}.engine"}, {"", f"{component}.weights"}
            if payload.file not in files[0] or payload.weights not in files[1]:
                raise ValueError(f"payload {payload.file!r} with weights {payload.weights!r} for the {component}")
            if bool(payload.weights) != bool(payload.weights_sha256):
                raise ValueError(f"weights and weights_sha256 of the {component}: expected both or none")

    def check_networks(self) -> None:
        """Raise `ValueError` for a tile that is not divided by the factor, and for inputs that the networks lack."""
        if self.tile % self.factor:
            raise ValueError(f"tile {self.tile}, expected a multiple of the factor {self.factor}")
        for name, wanted, component in (("cfw", "cfw_weight", "decoder"), ("strength", "strength", "denoiser")):
            payload = self.payloads.get(component)
            if getattr(self, name) and payload and wanted not in payload.inputs:
                raise ValueError(f"{name} true, but the {component} has no input {wanted!r}")


@dataclass(frozen=True)
class Plan:
    """A plan on disk: the manifest, and payloads that are read on demand."""

    path: Path
    manifest: Manifest
    trusted: bool = True
    """Whether the payloads may run: plain data, code signed by this user, or code that the caller trusts."""

    @classmethod
    def open(cls, path: str | Path, trust: bool = False) -> Plan:
        """Open and check a plan without reading its payloads.

        trust: accept executable payloads from any author.
        Raises `BadFileError` if the file is missing, empty, damaged, not a plan, or from a newer version.
        """
        path, name = Path(path), show_path(path)
        if path.is_dir():
            raise BadFileError(f"{name}: a folder; expected a plan file")
        if not path.is_file():
            raise BadFileError(f"{name}: no such plan; check the path, or export a plan")
        try:
            read, present = read_entries(path, {"manifest.json": _LARGEST_MANIFEST, SIGNATURE: 64})
            written, signature = read["manifest.json"], read.get(SIGNATURE, b"").decode("ascii", "replace")
            data = checks.read_json(written, _LARGEST_MANIFEST)
        except PermissionError as error:
            raise BadFileError(f"{name}: cannot be opened ({one_line(error)}); check its permissions") from error
        except _DAMAGES as error:
            other = isinstance(error, (zipfile.BadZipFile, KeyError))
            found = f"{path.stat().st_size} bytes" if other else one_line(error)
            raise BadFileError(f"{name}: not a plan, or cut off ({found}); copy or export it again") from error
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise BadFileError(f"{name}: a zip file, but not a plan; choose another file")
        if data.get("schema") not in [*range(1, SCHEMA + 1)]:
            raise BadFileError(
                f"{name}: plan schema {show_path(str(data.get('schema'))[:80])}, this version reads 1 to {SCHEMA}; "
                "export it again"
            )
        try:
            manifest = Manifest.from_dict(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadFileError(f"{name}: its manifest does not fit ({error}); export it again") from error
        missing = [c for c in COMPONENTS if not _files(manifest.payloads.get(c)) <= present]
        if missing:
            raise BadFileError(f"{name}: lacks {', '.join(missing)}; export it again")
        wanted = {"manifest.json", SIGNATURE}.union(*(_files(manifest.payloads[c]) for c in COMPONENTS))
        if foreign := sorted(present - wanted):
            raise BadFileError(f"{name}: its entry {foreign[0][:80]!r} belongs to no plan; export it again")
        plain = manifest.target in DATA_TARGETS
        return cls(path, manifest, plain or trust or is_signed(written, signature))

    def check_trusted(self) -> None:
        """Raise `BadFileError` for untrusted executable payloads; call this method before running a payload."""
        if not self.trusted:
            raise BadFileError(
                f"{show_path(self.path)}: a {self.manifest.target} plan is executable code, and this one was not built "
                "by you on this machine, or was changed; export it again, or trust this plan if you know its maker",
                setting="trust",
                rebuild=self.rebuild(),
            )

    def rebuild(self, current: bool = False) -> Rebuild:
        """Return the settings of an export that replaces this plan. current: build for the GPU of this machine."""
        m = self.manifest
        # Only the default set of capabilities, which is not given, contains a `+`.
        named = [] if any("+" in name for name in m.compute_capabilities) else m.compute_capabilities
        named = ["current"] if current else named if m.target == "tensorrt-rtx" else []
        base = m.base_name if m.base_name in SHIPPED else None
        return Rebuild(m.identity_name, base, m.target, m.precision, tuple(named), self.path.name)

    def read(self, component: str) -> bytes:
        """Return the payload of a component, after checking the sha256 of the payload and its weights.

        Raises `BadFileError` if the payload or the weights are damaged.
        """
        payload = self.manifest.payloads[component]
        try:
            with open_plain(self.path) as file, zipfile.ZipFile(file) as archive:
                check_entries(archive, file)  # the file may have changed since it was opened
                data = archive.read(payload.file)
        except _DAMAGES as error:
            raise BadFileError(f"{show_path(self.path)}: {component} is damaged ({error}); export it again") from error
        with self.map_weights(component) as weights:
            digests = [sha256_bytes(data), *map(sha256_bytes, weights.values())]
            size = sum(map(len, weights.values()))
        if digests != [payload.sha256, *[payload.weights_sha256] * bool(payload.weights)]:
            raise BadFileError(
                f"{show_path(self.path)}: the {component} does not match its sha256; copy or export the plan again"
            )
        if self.manifest.target in DATA_TARGETS:
            self._check_graph(component, data, size)
        return data

    def _check_graph(self, component: str, data: bytes, weights: int) -> None:
        """Raise `BadFileError` unless an ONNX graph has the form that the manifest describes; see `graph_check`.

        An EPContext operator contains or names a compiled engine, such as TensorRT's, which ONNX Runtime passes to its
        provider.
        """
        name = show_path(self.path)
        if b"EPContext" in data:
            raise BadFileError(
                f"{name}: the {component} holds a compiled engine (EPContext), which is code; do not use it"
            )
        try:
            check_graph(data, self.manifest, component, weights)
        except ValueError as error:
            raise BadFileError(f"{name}: the {component} {one_line(error)}; export the plan again") from error

    @contextmanager
    def map_weights(self, component: str) -> Iterator[dict[str, memoryview]]:
        """Map the external weights of a component into memory: {file name: bytes}, empty if it has none.

        `read` checks their sha256. The system reads pages on demand. Raises `BadFileError` if the zip is damaged.
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
            except _DAMAGES as error:
                raise BadFileError(
                    f"{show_path(self.path)}: the weights of the {component} are damaged ({error}); export it again"
                ) from error
            yield {name: view}

    @contextmanager
    def unpack(self, component: str) -> Iterator[Path]:
        """Check a component's payload and weights and write both to a temporary folder.

        Yields the path of the payload. The folder is deleted afterwards.
        """
        with work_folder() as folder:
            path = Path(folder, self.manifest.payloads[component].file)
            path.write_bytes(self.read(component))
            with self.map_weights(component) as weights:
                for name, data in weights.items():
                    path.with_name(name).write_bytes(data)
            yield path


def _files(payload: Payload | None) -> set[str]:
    """Return the file names of a payload. A missing payload has the name "", which no zip contains."""
    return {payload.file, payload.weights or payload.file} if payload else {""}


def _place(file: BinaryIO, name: str) -> tuple[int, int]:
    """Return (offset, size) of the bytes of a zip entry."""
    with zipfile.ZipFile(file) as archive:
        check_entries(archive, file)
        info = archive.getinfo(name)
        return place(file, info), info.file_size


def write_plan(
    path: Path, manifest: Manifest, payloads: Mapping[str, bytes | Path], weights: Mapping[str, Path] | None = None
) -> Plan:
    """Write a plan atomically and open it. The same content gives the same bytes.

    payloads: {component: bytes or path}, for each entry of `manifest.payloads`. weights: {component: path} of external
    weights. Files are streamed.
    A plan with executable payloads is signed. The signature covers the manifest, which contains the sha256 of every
    payload.
    """
    text = manifest.to_json()
    mode = 0o600 if manifest.identity_name else None  # a plan with an identity is biometric data
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
    """Rename a plan within the same file system and open it. The signature remains valid."""
    move_file(plan.path, path)
    return Plan.open(path)


def _add(archive: zipfile.ZipFile, name: str, data: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    with BytesIO(data) if isinstance(data, bytes) else data.open("rb") as source:
        entry.file_size = source.seek(0, SEEK_END)  # zipfile uses the size to choose zip64
        source.seek(0)
        with archive.open(entry, "w") as out:
            shutil.copyfileobj(source, out, 1 << 20)
