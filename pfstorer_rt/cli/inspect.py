"""`pfstorer-rt inspect`."""

from __future__ import annotations

import json
from typing import Any

import click

from pfstorer_rt.console import echo


@click.command()
@click.argument("path", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: str, as_json: bool) -> None:
    """Show the contents of a base directory, an identity file or a plan, and check that it is complete.

    \b
    Examples:
      pfstorer-rt inspect alice.plan
      pfstorer-rt inspect portrait --json
    """
    from pfstorer_rt.runtime.describe import describe

    print_report(describe(path), as_json)


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print a description as JSON, or as indented text without long lists."""
    if as_json:
        echo(json.dumps(report))
        return
    _print_level({k: v for k, v in report.items() if k not in ("tensors", "settings", "config")}, "")
    if "tensors" in report:
        echo(f"tensors: {len(report['tensors'])} (--json lists them and the settings)")


def _print_level(values: dict[str, Any], indent: str) -> None:
    for key, value in values.items():
        if key == "layers" and isinstance(value, dict) and value:
            kinds = ", ".join(f"{n} {k}" for k, n in value.items())
            echo(f"{indent}layers: {sum(value.values())}: {kinds}")
        elif isinstance(value, dict):
            echo(f"{indent}{key}:")
            _print_level(value, indent + "  ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            echo(f"{indent}{key}: {text}")
