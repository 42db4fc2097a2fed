"""Actions of the tab about this machine: what can run, plans, and a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pfstorer_rt.errors import PFStorerError, SettingError, one_line
from pfstorer_rt.plan import Plan
from pfstorer_rt.runtime.bench import BenchConfig, measure_plan
from pfstorer_rt.runtime.benchplot import draw
from pfstorer_rt.runtime.doctor import diagnose
from pfstorer_rt.studio.work import Report
from pfstorer_rt.studio.workspace import Session, Workspace

Rows = list[tuple[str, str]]


def diagnosis() -> list[tuple[str, Rows]]:
    """Return tables (title, rows) of what this machine can run."""
    found = asdict(diagnose())
    machine = found["machine"]
    hardware: Rows = [
        ("System", f"{machine['system']}, Python {machine['python']}"),
        ("Processor", f"{machine['cores']} cores, {machine['memory_gb']} GB"),
        ("GPU", str(machine["gpu"] or "none visible to PyTorch")),
        ("Data directory", str(found["home"])),
        ("People", str(found["identities"])),
    ]
    tables = [("This machine", hardware)]
    titles = {"extras": "Extras", "engines": "Engines", "builders": "Builders", "metrics": "Metrics"}
    for key, title in titles.items():
        tables.append((title, [(name, refusal or "ready") for name, refusal in found[key].items()]))
    return tables


def name_plans(plans: Sequence[Path]) -> dict[str, Path]:
    """Return the plans by the name of their file, with a number where a name occurs twice."""
    found: dict[str, Path] = {}
    for path in plans:
        name, number = path.name, 1
        while name in found:
            number += 1
            name = f"{path.name} ({number})"
        found[name] = path
    return found


def describe_plans(plans: Mapping[str, Path]) -> Rows:
    """Return (name, description) of every plan of `name_plans`, or one row where there is none."""
    if not plans:
        return [("None", "The studio makes a plan for each person, unless PyTorch uses a GPU.")]
    rows: Rows = []
    for name, path in plans.items():
        try:
            manifest = Plan.open(path).manifest
            person = f"person {manifest.identity_name}" if manifest.identity_name else "no person"
            text = f"{person}, base {manifest.base_name}, {manifest.target} {manifest.precision}"
            rows.append((name, f"{text}, {path.stat().st_size / 1e6:.0f} MB"))
        except PFStorerError as error:
            rows.append((name, one_line(error)))
    return rows


def benchmark(workspace: Workspace, session: Session, plans: Sequence[Path], name: str | None, report: Report) -> str:
    """Time a plan for a minute at most; returns the address of the plot. Raises `SettingError` without a plan.

    name: one of `name_plans`.
    """
    path = name_plans(plans).get(name or "")
    if path is None:
        raise SettingError("no plan is chosen: learn a person first, the studio then makes a plan")
    config = BenchConfig(runs=5, seconds=5.0, sizes=(512, 1024))
    measured = measure_plan(path, config, lambda what: report(f"timing {what}"))
    target = session.folder / f"bench_{path.stem}.png"
    draw(target, measured)
    return workspace.publish(target)
