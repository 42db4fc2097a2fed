"""`pfstorer-rt export`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--identity", help="Identity to fuse in, by name or file.")
@click.option("--base", help="tiny or a base directory. [default: the identity's own]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The plan file to write.")
@click.option("--target", type=click.Choice(["auto", "onnx"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["fp32"]), default="fp32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a plan that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest's figures as JSON.")
def command(
    identity: str | None,
    base: str | None,
    output: Path,
    target: str,
    precision: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fuse a base and an identity into one plan file, checked against PyTorch before it is written.

    \b
    Examples:
      pfstorer-rt export --identity alice -o alice.plan
      pfstorer-rt export --base tiny -o base.plan
    """
    if identity is None and base is None:
        raise click.UsageError("give --identity NAME|FILE, or --base tiny|DIR for a plan without one")
    from pfstorer_rt.errors import PFStorerError

    if output.exists() and not overwrite:
        raise PFStorerError(f"{output}: exists already; choose another name or pass --overwrite")
    if not output.resolve().parent.is_dir():
        raise PFStorerError(f"{output}: its folder does not exist; create it first")
    from pfstorer_rt.console import stderr
    from pfstorer_rt.export import export_plan

    with stderr().status("export") as status:
        plan = export_plan(
            output, identity, base, "onnx" if target == "auto" else target, precision, progress=status.update
        )
    parity = {name: payload.parity["relative"] for name, payload in plan.manifest.payloads.items()}
    if as_json:
        click.echo(json.dumps({"plan": str(output), "target": plan.manifest.target, "parity": parity}))
        return
    worst = max(parity.values())
    size = output.stat().st_size / 1e6
    click.echo(
        f"{output}: {plan.manifest.target} {precision}, {size:.1f} MB, "
        f"differs from PyTorch by {worst:.1e} of the output's deviation"
    )
