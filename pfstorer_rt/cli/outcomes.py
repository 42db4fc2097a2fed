"""Print the outcomes of a batch: what `restore` and `degrade` share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from pfstorer_rt.cli.options import explain
from pfstorer_rt.console import echo
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.runtime.batch import Outcome


def show(outcome: Outcome, as_json: bool, command: click.Command | None = None) -> None:
    """Print one outcome; to stderr when the image itself is on stdout. command: as for `explain`."""
    to_stderr = outcome.job.target is None and outcome.status == "done"
    if as_json:
        explained = outcome.error and PFStorerError(explain(outcome.error, command))
        echo(json.dumps(replace(outcome, error=explained).report()), err=outcome.job.target is None)
    elif outcome.status == "failed" and outcome.error:
        text, source = explain(outcome.error, command), str(outcome.job.source or "-")
        about = "" if text.startswith(source) else f"{source}: "
        echo(f"failed: {about}{text}", err=True)
    else:
        echo(line(outcome), err=to_stderr)


def line(outcome: Outcome) -> str:
    """Return the text of an outcome that is no failure."""
    notes = "".join(f" ({note})" for note in outcome.notes)
    if outcome.status == "skipped":
        return f"{outcome.job.target}: exists, skipped{notes}"
    if outcome.status == "planned":
        d = outcome.details
        return (
            f"{outcome.job.source}: canvas {d['width']}x{d['height']}; tiles: {d['tiles']} in batches of {d['batch']}; "
            f"steps: {d['steps']}; tiles of encoder and decoder: {d['codec_tiles']} each; about "
            f"{d['predicted_peak_mb']} MB of memory and {d['predicted_seconds']:.1f} s{notes}"
        )
    size, seconds = f"{outcome.width}x{outcome.height}", f"{outcome.seconds:.1f} s"
    return f"{outcome.job.target or '-'}: {size}, {seconds}{distances(outcome.details)}{notes}"


def distances(details: Mapping[str, Any]) -> str:
    """Return the identity distances of the input image and of the result, or nothing without references or a face."""
    before, after = details.get("id_distance_input"), details.get("id_distance")
    if after is None:
        return ""
    return f", identity distance {after:.3f}" + ("" if before is None else f" (input {before:.3f})")


def conclude(outcomes: Sequence[Outcome], as_json: bool) -> int:
    """Print how many images have each status, if there are several; return the exit status, 1 if an image failed."""
    if len(outcomes) > 1 and not as_json:
        counts = Counter(outcome.status for outcome in outcomes)
        parts = ", ".join(f"{count} {status}" for status, count in counts.items())
        echo(f"{len(outcomes)} images: {parts}", err=True)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0
