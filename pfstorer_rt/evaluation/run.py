"""One evaluation from settings to report: degrade the inputs if asked, measure all folders, and write the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pfstorer_rt.degradation.folder import degrade_folder
from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.evaluation.folders import Seconds, evaluate
from pfstorer_rt.evaluation.registry import MetricFiles, load_metrics
from pfstorer_rt.evaluation.report import INPUT, TABLE, Report
from pfstorer_rt.files import show_path, work_folder


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation. Raises `ValueError` for settings that contradict each other."""

    refs: Path
    """Folder of photographs of the person, or of a sub-folder for each person."""
    hq: Path
    """Folder of originals."""
    outputs: Mapping[str, Path] = field(default_factory=dict)
    """Name of a method -> folder of its results."""
    inputs: Path | None = None
    """Folder of the degraded images, measured as the method `input`."""
    level: Literal["light", "heavy"] | None = None
    """Degrade the originals with this strength, in place of `inputs`."""
    seed: int = 0
    """Random seed of the degradation of the first image; the next image uses seed + 1."""
    save_inputs: Path | None = None
    """Folder for the degraded images of `level`; None deletes them afterwards."""
    seconds: Mapping[str, float | Path] = field(default_factory=dict)
    """Name of a method -> seconds per image, or a file for `read_seconds`."""
    metrics: tuple[str, ...] | None = None
    """Keys of `registry.METRICS`; None measures all."""
    files: MetricFiles = field(default_factory=MetricFiles)
    report: Path | None = None
    """Folder of the report; None writes no files."""
    overwrite: bool = False
    """Replace existing files of `report` and `save_inputs`."""

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        if self.inputs and self.level:
            raise SettingError("inputs and a level are given; give one of them, not both", setting="level")
        if not (self.outputs or self.inputs or self.level):
            raise SettingError("nothing to measure; give results, inputs or a level", setting="outputs")
        if self.save_inputs and not self.level:
            raise SettingError("save_inputs without a level: there is nothing to save; give a level", setting="level")
        for method, seconds in self.seconds.items():
            check_seconds(method, seconds, [*self.outputs, INPUT])


def check_seconds(method: str, seconds: float | Path, known: list[str]) -> None:
    """Raise `ValueError` for the time of an unknown method, and for a time that is negative or not finite."""
    if method not in known:
        raise SettingError(f"seconds of {method!r}: expected a method, {' or '.join(known)}", setting="seconds")
    if not isinstance(seconds, Path) and not 0 <= seconds < math.inf:
        raise SettingError(f"seconds of {method!r} {seconds}: expected a number, 0 or more", setting="seconds")


def run_evaluation(config: EvaluateConfig, progress: Callable[[int, int], None] | None = None) -> Report:
    """Measure folders of results, and write the report to `config.report`.

    progress: called with (done, total) images. Raises as `evaluate` and `load_metrics` do, `ValueError` when a report
    exists, and `PFStorerError` when a degraded image exists; both only without `overwrite`.
    """
    if config.report and (config.report / TABLE).exists() and not config.overwrite:
        raise SettingError(
            f"{config.report}: contains a report already; choose another folder or allow overwriting",
            setting="overwrite",
        )
    seconds = {name: read_seconds(s) if isinstance(s, Path) else s for name, s in config.seconds.items()}
    metrics = load_metrics(config.metrics, config.files)
    with degraded_inputs(config) as inputs:
        report = evaluate(
            config.refs, config.hq, config.outputs, inputs, seconds=seconds, metrics=metrics, progress=progress
        )
    if config.level:
        kept = str(config.save_inputs or "not kept")
        settings = {f"folder of {INPUT}": kept, "level": config.level, "seed": config.seed}
        report = replace(report, settings={**report.settings, **settings})
    if config.report:
        report.write(config.report)
    return report


@contextmanager
def degraded_inputs(config: EvaluateConfig) -> Iterator[Path | None]:
    """Yield the folder of inputs: the given one, or the originals degraded with `config.level`."""
    if config.level is None:
        yield config.inputs
    elif config.save_inputs:
        degrade_folder(config.hq, config.save_inputs, config.level, config.seed, config.overwrite)
        yield config.save_inputs
    else:
        with work_folder() as folder:
            degrade_folder(config.hq, folder, config.level, config.seed)
            yield folder


def read_seconds(path: Path) -> Seconds:
    """Read the time of each image from JSON lines with `input` and `seconds`, as `restore --json` prints them.

    Returns path of an input without suffix -> seconds. Raises `BadFileError` for any other file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        times = {Path(line["input"]).with_suffix("").as_posix(): line.get("seconds") for line in lines}
        return {name: float(seconds) for name, seconds in times.items() if seconds is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(
            f"{show_path(path)}: neither a number nor a file of JSON lines with input and seconds ({error})",
            setting="seconds",
        ) from error
