"""`pfstorer-rt inspect`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import click

from pfstorer_rt.console import printable
from pfstorer_rt.errors import BadFileError

if TYPE_CHECKING:
    from pfstorer_rt.plan import Plan

ENGINE_MARKS = {"TensorRT-RTX engine": b"vtrt", "TensorRT engine": b"ftrt"}
"""What serialized engines begin with."""


@click.command()
@click.argument("path", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: str, as_json: bool) -> None:
    """Show what a base directory, an identity file or a plan holds, and check that it is whole.

    \b
    Examples:
      pfstorer-rt inspect alice.plan
      pfstorer-rt inspect tiny --json
    """
    print_report(describe(path), as_json)


def describe(path: str) -> dict[str, Any]:
    """Describe any of the three artefacts; raises `BadFileError` for anything else."""
    from pfstorer_rt.identity import identity_path

    file = Path(path)
    if path.endswith(".safetensors"):
        return describe_identity(file)
    if file.is_file():
        if file.suffix != ".plan" and not is_zipfile(file):
            raise BadFileError(f"{path}: neither a base directory, an identity (.safetensors) nor a plan")
        return describe_plan(file)
    if not file.exists() and os.sep not in path and identity_path(path).is_file():
        return describe_identity(identity_path(path))
    if file.suffix == ".plan" and not file.exists():
        raise BadFileError(f"{path}: no such file")
    return describe_base(path)


def describe_plan(path: Path) -> dict[str, Any]:
    """Describe a plan after reading every payload."""
    from pfstorer_rt.plan import COMPONENTS, Plan

    plan = Plan.open(path)
    report = json.loads(plan.manifest.to_json())
    for name in COMPONENTS:
        report["payloads"][name] |= describe_payload(plan, name)
    report["trusted"] = plan.trusted
    return {"artefact": "plan", "file": str(path), "bytes": path.stat().st_size, **report}


def describe_payload(plan: Plan, component: str) -> dict[str, Any]:
    """Describe what a payload's own bytes say: an ONNX graph's operators, or an engine's mark.

    An engine's layers are in the manifest, as counted when it was built: reading them back needs its GPU.
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
        "artefact": "identity",
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
        read_config,
        reading_base,
    )
    from pfstorer_rt.config import to_json

    folder = find_base(path)
    with reading_base(folder):
        return {
            "artefact": "base",
            "folder": str(folder),
            "fingerprint": fingerprint_directory(folder),
            "parameters": count_parameters(folder),
            "config": json.loads(to_json(read_config(folder))),
        }


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print a description as JSON, or indented and shortened for reading."""
    if as_json:
        click.echo(json.dumps(report))
        return
    _print_level({k: v for k, v in report.items() if k not in ("tensors", "settings", "config")}, "")
    if "tensors" in report:
        click.echo(f"tensors: {len(report['tensors'])} (--json lists them, and the settings)")


def _print_level(values: dict[str, Any], indent: str) -> None:
    for key, value in values.items():
        if key == "layers" and isinstance(value, dict) and value:
            kinds = ", ".join(f"{n} {k}" for k, n in value.items())
            click.echo(indent + printable(f"layers: {sum(value.values())}: {kinds}"))
        elif isinstance(value, dict):
            click.echo(indent + printable(f"{key}:"))
            _print_level(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            click.echo(indent + printable(f"{key}: {text}"))
