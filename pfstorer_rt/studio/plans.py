"""The plan that the studio makes for a person, so that restoring on a CPU takes less time than in PyTorch."""

from __future__ import annotations

from pathlib import Path

from pfstorer_rt.errors import PFStorerError, one_line
from pfstorer_rt.identity import Identity, is_encrypted, kept_plan, named_identity, read_content, read_metadata
from pfstorer_rt.plan import COMPONENTS, Plan
from pfstorer_rt.studio.work import Report

FAILURES = (PFStorerError, OSError, MemoryError, RuntimeError, ValueError)
"""Errors of an export; the last two come from PyTorch's exporter."""


def find_plan(name: str) -> Path | None:
    """Return the plan that the studio keeps for a person; None if it is missing, damaged, or of other weights."""
    identity = named_identity(name)
    path = kept_plan(identity)
    if not path.is_file() or not identity.is_file():
        return None
    try:
        manifest = Plan.open(path).manifest
        meta = read_metadata(identity, read_content(identity))
    except PFStorerError:
        return None
    wanted = ("onnx", meta.get("fingerprint"), meta.get("base_fingerprint"))
    return path if (manifest.target, manifest.identity_fingerprint, manifest.base_fingerprint) == wanted else None


def why_none(name: str) -> str:
    """Return why this machine makes no plan for a person; empty if it makes one."""
    try:
        import pfstorer_rt.export  # noqa: F401
        from pfstorer_rt.device import choose_device
    except ModuleNotFoundError:
        return "the extra export is not installed"
    if choose_device().device.type != "cpu":
        return "PyTorch uses the GPU"
    if is_encrypted(named_identity(name)):
        return "the identity is encrypted, and a plan would not be"
    return ""


def ensure_plan(name: str, base: str | Path, report: Report) -> str:
    """Export the plan of a person if it is missing; returns a note if the export failed, empty otherwise.

    base: name or directory of the person's base. The part that is exported is reported, without a share, because the
    parts take different times. Raises `CancelledError`; then no plan is written.
    """
    if find_plan(name) is not None or why_none(name):
        return ""
    from pfstorer_rt.export import export_plan
    from pfstorer_rt.export.progress import Progress

    def follow(line: str, done: int = 0, total: int = 0) -> None:
        component, _, stage = line.partition(": ")
        if component in COMPONENTS and (total or stage == "exporting"):
            part = f"part {COMPONENTS.index(component) + 1} of {len(COMPONENTS)}, {line}"
            steps = f" ({done} of {total})" if total else ""
            report(f"preparing {name} for fast restoration, only once: {part}{steps}")

    identity = named_identity(name)
    report(f"preparing {name} for fast restoration, only once")
    try:
        export_plan(kept_plan(identity), Identity.load(identity), base, progress=Progress(line=follow, phase=follow))
    except FAILURES as error:
        return f"{name} could not be prepared for fast restoration and is restored in PyTorch: {one_line(error)}"
    return ""
