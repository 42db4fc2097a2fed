"""`pfstorer-rt doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from pfstorer_rt.console import echo


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine can run, and which packages add more.

    \b
    Example:
      pfstorer-rt doctor
    """
    from pfstorer_rt.runtime.doctor import diagnose

    report = asdict(diagnose())
    if as_json:
        echo(json.dumps(report))
        return
    machine = report["machine"]
    echo(
        f"machine   {machine['system']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"Python {machine['python']}"
    )
    echo(f"gpu       {machine['gpu'] or 'none visible to torch'}")
    for key in ("extras", "engines", "builders", "attention", "metrics"):
        for name, refusal in report[key].items():
            title = key.removesuffix("s") if key != "metrics" else key
            echo(f"{title:<9} {name}: {'ready' if refusal is None else refusal}")
    echo(f"bases     {', '.join(report['bases']) or 'none shipped'}")
    home = f"{report['home']} (identities: {report['identities']})"
    echo(f"home      {report['home_refusal'] or home}")
    echo("packages  " + ", ".join(f"{k} {v}" for k, v in report["packages"].items() if v))
