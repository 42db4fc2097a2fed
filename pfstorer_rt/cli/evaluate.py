"""`pfstorer-rt evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.option("--refs", required=True, type=click.Path(path_type=Path), help="Folder of reference photographs.")
@click.option("--hq", required=True, type=click.Path(path_type=Path), help="Folder of originals.")
@click.option("--outputs", required=True, type=click.Path(path_type=Path), help="Folder of restored pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per picture, then the means.")
def command(refs: Path, hq: Path, outputs: Path, as_json: bool) -> None:
    """Measure restored pictures, by any method, against their originals: PSNR, SSIM, identity.

    \b
    Example:
      pfstorer-rt evaluate --refs photos/alice --hq clean/ --outputs restored/
    """
    from pfstorer_rt.evaluation.report import evaluate

    report = evaluate(refs, hq, outputs)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        for row in report.rows:
            click.echo(json.dumps(asdict(row)))
        click.echo(json.dumps({"mean": report.summary()}))
        return
    click.echo(f"{'picture':<24} {'PSNR':>6} {'SSIM':>6} {'ID':>6}  same person")
    for row in report.rows:
        same = {None: "-", True: "yes", False: "no"}[row.same_person]
        click.echo(f"{row.name:<24} {row.psnr:6.2f} {row.ssim:6.3f} {number(row.id_distance)}  {same}")
    means = report.summary()
    share = means["verification"]
    click.echo(
        f"{'mean':<24} {means['psnr']:6.2f} {means['ssim']:6.3f} {number(means['id_distance'])}  "
        + ("-" if share is None else f"{share:.0%}")
    )


def number(value: float | None) -> str:
    """Format a figure in six columns, a dash where there is none."""
    return f"{value:6.3f}" if value is not None else f"{'-':>6}"
