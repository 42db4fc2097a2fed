"""Restore for a given time with several plans in turn, and check memory, handles and bytes.

Every round opens a plan, restores images of several sizes through the batch, and closes the plan. Plans of two
identities and of the base alone follow each other, so that a result that depends on an earlier identity is found.
Exit status 1 if a result differs from the first result of its plan, if memory grows, or if handles are left open.

    python benchmarks/soak.py --minutes 5 --output benchmarks/results/soak.json
    python benchmarks/soak.py --output benchmarks/results/soak.json --page docs/reliability.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import line, machine, replace_table, write_report

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.models.base import build_base
from pfstorer_rt.runtime.batch import BatchConfig, Saving, restore_files
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.objectives import PersonalizationObjective
from pfstorer_rt.training.personalize import make_identity

SIZES = ((64, 64), (130, 150), (64, 200))
"""Height and width of the images in pixels: one tile, and several tiles."""
WARM_UP = 0.2
"""Share of the rounds that is not part of the slope: allocators fill their pools."""
KILOBYTES_PER_IMAGE = 40.0
"""Largest growth of the memory. The pixels of one result of 130 x 150 pixels in fp32 have 234 KB."""


def make_plans(folder: Path) -> dict[str, Path]:
    """Export plans of the base `nano` with two random identities and without one; existing plans are kept."""
    from pfstorer_rt.export import export_plan

    base, plans = build_base("nano", seed=0), {name: folder / f"{name}.plan" for name in ("a", "b", "base")}
    photo = torch.rand(3, 80, 72, generator=torch.Generator().manual_seed(0))
    save_image(folder / "reference.png", photo.permute(1, 2, 0).numpy(), overwrite=True)
    for seed, (name, path) in enumerate(plans.items()):
        if path.exists():
            continue
        torch.manual_seed(seed)
        config = PersonalizeConfig()
        objective = PersonalizationObjective(base, config)
        with torch.no_grad():
            for block in objective.blocks:
                block.gamma.copy_(torch.randn(block.gamma.shape))
        identity = make_identity(name, objective, base, config, [folder / "reference.png"], [photo])
        export_plan(path, None if name == "base" else identity, base)
    return plans


def make_images(folder: Path) -> Path:
    """Write the images to restore."""
    folder.mkdir(exist_ok=True)
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).random((height, width, 3), np.float32)
        save_image(folder / f"{number}.png", pixels, overwrite=True)
    return folder


def restore(plan: Path, images: Path, results: Path) -> str:
    """Restore all images with a plan; returns the SHA-256 of all results."""
    settings = BatchConfig(RestoreConfig(steps=2), saving=Saving(overwrite=True))
    with Restorer.from_plan(plan, "onnxruntime") as engine:
        outcomes = restore_files(engine, [images], results, settings)
    digest = hashlib.sha256()
    for outcome in outcomes:
        assert outcome.status == "done" and outcome.job.target is not None, outcome.report()
        digest.update(outcome.job.target.read_bytes())
    return digest.hexdigest()


def soak(plans: dict[str, Path], images: Path, results: Path, minutes: float) -> dict[str, Any]:
    """Restore in turn with all plans; returns the report."""
    process, begin = psutil.Process(), time.monotonic()
    first: dict[str, str] = {}
    images_done, memory, handles, different, rounds = [], [], [], 0, 0
    while time.monotonic() - begin < 60 * minutes:
        for name in (*plans, *reversed(plans)):
            digest = restore(plans[name], images, results / name)
            different += digest != first.setdefault(name, digest)
            rounds += 1
        images_done.append(rounds * len(SIZES))
        memory.append(process.memory_info().rss / 1e6)
        handles.append(process.num_fds() if hasattr(process, "num_fds") else process.num_handles())
    start = int(WARM_UP * len(memory))
    slope = float(np.polyfit(images_done[start:], memory[start:], 1)[0])
    return {
        "minutes": minutes,
        "plans_opened": rounds,
        "images": rounds * len(SIZES),
        "different_results": different,
        "distinct_plans": len(set(first.values())),
        "memory_mb": {"after_warm_up": round(memory[start], 1), "end": round(memory[-1], 1)},
        "memory_kb_per_image": round(1000 * slope, 2),
        "handles": {"after_warm_up": handles[start], "end": handles[-1]},
        "threads": process.num_threads(),
    }


def failures(report: dict[str, Any]) -> list[str]:
    """Return what is wrong in a report."""
    wrong = []
    if report["different_results"]:
        wrong.append(f"{report['different_results']} results differ from the first result of their plan")
    if report["distinct_plans"] != 3:
        wrong.append("plans of different identities give the same results")
    if report["memory_kb_per_image"] > KILOBYTES_PER_IMAGE:
        wrong.append(f"the memory grows by {report['memory_kb_per_image']} KB per image")
    if report["handles"]["end"] > report["handles"]["after_warm_up"]:
        wrong.append("files or other handles stay open")
    return wrong


def table(report: dict[str, Any]) -> str:
    """Return the table of a report."""
    memory, handles = report["memory_mb"], report["handles"]
    rows = [
        ("quantity", "value"),
        ("---", "---"),
        ("time", f"{report['minutes']:g} minutes"),
        ("plans opened and closed", f"{report['plans_opened']:,}"),
        ("images restored", f"{report['images']:,}"),
        ("results that differ from the first result of their plan", str(report["different_results"])),
        ("memory after the warm-up, at the end", f"{memory['after_warm_up']:.0f} MB, {memory['end']:.0f} MB"),
        ("slope of the memory", f"{report['memory_kb_per_image']:.1f} KB per image"),
        ("open handles after the warm-up, at the end", f"{handles['after_warm_up']}, {handles['end']}"),
    ]
    return "".join(line(row) + "\n" for row in rows)


def main() -> int:
    """Run, print the report, and return 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--folder", type=Path, help="folder of the plans, which are kept for the next run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="page whose table to replace")
    arguments = parser.parse_args()
    if arguments.page:
        replace_table(arguments.page, "soak.py", table(json.loads(arguments.output.read_text())))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        plans, images = make_plans(folder), make_images(folder / "images")
        report = soak(plans, images, Path(temporary) / "results", arguments.minutes) if arguments.minutes else {}
    if not report:
        return 0
    wrong = failures(report)
    report |= {"failures": wrong, "machine": machine()}
    write_report(report, arguments.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
