"""Describe a base, an identity or a plan; everything is read, to check that it is complete."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from pfstorer_rt.errors import BadFileError

if TYPE_CHECKING:
    from pfstorer_rt.plan import Plan

ENGINE_MARKS = {"TensorRT-RTX engine": b"vtrt", "TensorRT engine": b"ftrt"}
"""First bytes of serialized engines."""


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a base directory, an identity or a plan as JSON values, after reading all of it.

    path: a file, a directory, or the name of an identity or of a shipped base. Raises `BadFileError` for any other
    path and for a damaged file.
    """
    from pfstorer_rt.base_files import shipped_bases
    from pfstorer_rt.identity import identity_path, known_identities

    path, file = f"{path}", Path(path)
    if path.endswith(".safetensors"):
        return describe_identity(file)
    if file.is_file():
        if file.suffix != ".plan" and not is_zipfile(file):
            raise BadFileError(f"{path}: neither a base directory, an identity (.safetensors) nor a plan")
        return describe_plan(file)
    if not file.exists() and file.suffix == ".plan":
        raise BadFileError(f"{path}: no such file")
    if not file.exists() and os.sep not in path and identity_path(path).is_file():
        return describe_identity(identity_path(path))
    if not file.exists() and path not in shipped_bases():
        known = f"expected a file, a base directory, the name of a shipped base, or an identity; {known_identities()}"
        raise BadFileError(f"{path}: not found; {known}")
    return describe_base(path)


def describe_plan(path: Path) -> dict[str, Any]:
    """Describe a plan after reading every payload."""
    from pfstorer_rt.plan import COMPONENTS, Plan

    plan = Plan.open(path)
    report = json.loads(plan.manifest.to_json())
    for name in COMPONENTS:
        report["payloads"][name] |= describe_payload(plan, name)
    report["face"] = bool(report["face"])  # the numbers of the embedding are of no use to a reader
    report["trusted"] = plan.trusted
    return {"type": "plan", "file": str(path), "bytes": path.stat().st_size, **report}


def describe_payload(plan: Plan, component: str) -> dict[str, Any]:
    """Describe the bytes of a payload: the operators of an ONNX graph, or the type of an engine.

    The manifest has the number of an engine's layers; reading them from the engine would need its GPU.
    """
    data = plan.read(component)
    with plan.map_weights(component) as weights:
        sizes = {"bytes": len(data), "weights_bytes": sum(map(len, weights.values()))}
    if plan.manifest.target == "onnx":
        from pfstorer_rt.onnx_message import count_operators

        return {**sizes, "format": "ONNX", "layers": dict(sorted(count_operators(data).items()))}
    known = {mark: name for name, mark in ENGINE_MARKS.items()}
    return {**sizes, "format": known.get(data[:4], f"unknown (begins with {data[:4]!r})")}


def describe_identity(path: Path) -> dict[str, Any]:
    """Describe an identity after reading every tensor."""
    from pfstorer_rt.identity import Identity

    identity = Identity.load(path)
    return {
        "type": "identity",
        "file": str(path),
        "bytes": path.stat().st_size,
        "name": identity.name,
        "method": identity.method,
        "base": identity.base_name,
        "base_fingerprint": identity.base_fingerprint,
        "fingerprint": identity.fingerprint,
        "references": list(identity.references),
        "layers": list(identity.layers),
        "gamma": identity.gamma,
        "settings": identity.settings,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in identity.tensors.items()},
    }


def describe_base(path: str) -> dict[str, Any]:
    """Describe a base directory after reading every tensor."""
    from pfstorer_rt.base_files import (
        count_parameters,
        find_base,
        fingerprint_directory,
        prior_kind,
        read_config,
        reading_base,
    )
    from pfstorer_rt.config import PersonalizeConfig, to_json

    folder = find_base(path)
    with reading_base(folder):
        config = read_config(folder)
        return {
            "type": "base",
            "folder": str(folder),
            "fingerprint": fingerprint_directory(folder),
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "parameters": count_parameters(folder),
            "prior": prior_kind(folder),
            "personalization": json.loads(json.dumps(asdict(PersonalizeConfig.for_base(config)))),
            "config": json.loads(to_json(config)),
        }
