"""Degrade many images like old and bad photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pfstorer_rt.imaging.files import MAX_PIXELS
from pfstorer_rt.imaging.rows import Rows, Spool, read_pixels
from pfstorer_rt.runtime.batch import Details, OnOutcome, OnStep, Outcome, Saving, ignore, run_jobs
from pfstorer_rt.runtime.jobs import Job, Naming, plan_jobs


def degrade_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    level: str = "heavy",
    seed: int = 0,
    saving: Saving | None = None,
    on_outcome: OnOutcome = ignore,
    on_step: OnStep = ignore,
    note: Callable[[str], None] = ignore,
) -> list[Outcome]:
    """Degrade files and folders like old and bad photographs; the size is kept.

    inputs, output: as in `plan_jobs`. level: `light` or `heavy`. seed: seed of the first image; the next has seed + 1.
    """
    saving = replace(saving or Saving(), mark=False)
    jobs = plan_jobs(inputs, output, Naming(suffix="_degraded"), note, saving.overwrite)
    return run_jobs(jobs, _Degrading(level, seed), saving, MAX_PIXELS, on_outcome, on_step)


class _Degrading:
    """Degrades the images of a batch, each with its own seed."""

    def __init__(self, level: str, seed: int) -> None:
        self.level, self.seed = level, seed

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the image."""
        return height, width

    def process(self, number: int, job: Job, rows: Rows, step: Callable[[int, int], None]) -> Rows:
        """Degrade an image."""
        import torch

        from pfstorer_rt.degradation.degrade import degrade

        image = torch.from_numpy(read_pixels(rows, 0, rows.height)).permute(2, 0, 1).contiguous()
        degraded = degrade(image, self.level, self.seed + number)
        return Spool.of((degraded.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy())

    def details(self, job: Job, source: Rows, result: Rows) -> Details:
        """Nothing to add."""
        return Details({}, ())
