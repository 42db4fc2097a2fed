"""Measure how much another busy process slows down restoring and learning.

    python benchmarks/busy.py -o benchmarks/results/busy.csv [--base NAME] [--rounds 5] [--runs 3]

Each round times every task alone, and then beside a process that keeps one core busy. One row per task: `alone_s` and
`busy_s` are medians of seconds, `ratio` is the median over the rounds of busy / alone. `personalize` is one iteration
of learning. The other tasks restore one image of the base's tile size. `spin_count` is the environment variable
GOMP_SPINCOUNT, which the package sets when it is unset; `default` leaves OpenMP's own value. OMP_NUM_THREADS sets the
threads of PyTorch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

TASKS = ("personalize", "torch", "onnxruntime", "openvino")


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="portrait", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Runs of a task in each half of a round.")
@click.option("--task", "tasks", multiple=True, default=TASKS, type=click.Choice(TASKS))
@click.option("--spin-count", "counts", multiple=True, default=("5000", "default"), show_default=True)
@click.option("--plan", type=click.Path(exists=True), help="An ONNX plan; by default the base is exported.")
@click.option("--worker", hidden=True)
def main(
    output: Path,
    base: str,
    rounds: int,
    runs: int,
    tasks: tuple[str, ...],
    counts: tuple[str, ...],
    plan: str | None,
    worker: str | None,
) -> None:
    if worker:
        print(json.dumps(measure(worker, base, plan, rounds, runs)))
        return
    from common import machine, write

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = plan or export(base, Path(folder) / "base.plan")
        for task in tasks:
            for count in counts:
                options = [
                    "--worker",
                    task,
                    "--base",
                    base,
                    "--rounds",
                    str(rounds),
                    "--runs",
                    str(runs),
                    "--plan",
                    plan,
                ]
                found = run_worker(options, count)
                rows.append({"task": task, "spin_count": count, "base": Path(base).name, **found, **machine()})
                click.echo(f"{task:<12} spin count {count:<8} {found}")
                write(output, rows)


def export(base: str, output: Path) -> str:
    """Export a base without an identity."""
    from pfstorer_rt.export import export_plan

    return str(export_plan(output, None, base).path)


def run_worker(options: list[str], count: str) -> dict[str, float]:
    """Measure one task in a process of its own, because OpenMP reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS" or not k.startswith(("OMP_", "GOMP_"))}
    if count != "default":
        environment["GOMP_SPINCOUNT"] = count
    else:
        environment["OMP_WAIT_POLICY"] = ""  # an empty value keeps OpenMP's default, and the package's setting out
    command = [sys.executable, __file__, "-o", os.devnull, *options]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(task: str, base: str, plan: str | None, rounds: int, runs: int) -> dict[str, float]:
    """Return the medians of a task alone and beside the load."""
    run = learning(base) if task == "personalize" else restoring(task, base, plan)
    run()
    alone, busy = [], []
    for _ in range(rounds):
        alone.append(statistics.median(seconds(run) for _ in range(runs)))
        with load():
            busy.append(statistics.median(seconds(run) for _ in range(runs)))
    return {
        "alone_s": round(statistics.median(alone), 4),
        "busy_s": round(statistics.median(busy), 4),
        "ratio": round(statistics.median(b / a for a, b in zip(alone, busy, strict=True)), 2),
    }


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def load() -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def learning(base: str) -> Callable[[], object]:
    """Return a function that computes one iteration of `personalize`, on noise in place of photographs."""
    import torch

    from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.personalize import make_objective
    from pfstorer_rt.training.pool import BatchMaker, make_pool

    loaded = load_base(base)
    config = PersonalizeConfig.for_base(loaded.config, {"iterations": 2}, pool=2, **WITHOUT_IMAGE_LOSSES)
    photos = [torch.rand(3, loaded.config.tile, loaded.config.tile) for _ in range(2)]
    objective = make_objective(loaded, config, torch.device("cpu"))
    batches = BatchMaker(make_pool(photos, loaded, config), config)

    def iteration() -> None:
        objective(batches(0, 0))["loss"].backward()
        objective.zero_grad()

    return iteration


def restoring(engine: str, base: str, plan: str | None) -> Callable[[], object]:
    """Return a function that restores one image of noise, of the base's tile size."""
    import numpy as np

    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.runtime.restorer import Restorer

    if engine == "torch":
        restorer = Restorer.from_base(load_base(base))
    else:
        assert plan is not None
        restorer = Restorer.from_plan(plan, engine)
    side = restorer.manifest.tile
    image = np.random.default_rng(0).random((side, side, 3), np.float32)
    return lambda: restorer.restore(image)


if __name__ == "__main__":
    main()
