"""`pfstorer-rt export`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import NewFile, check_output
from pfstorer_rt.console import echo

if TYPE_CHECKING:
    from pfstorer_rt.export.build import Progress
    from pfstorer_rt.plan import Plan

Row = dict[str, Any]


@click.command()
@click.option("--identity", help="Identity to include, by name or file.")
@click.option("--base", help="Base: portrait, or the base directory of the identity. [default: portrait]")
@click.option("-o", "--output", required=True, type=NewFile(), help="The plan file to write.")
@click.option(
    "--target",
    type=click.Choice(["auto", "onnx", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
    help="Engine format. onnx runs anywhere; tensorrt-rtx runs on NVIDIA GPUs and is built without one; tensorrt is "
    "built for this GPU. auto: a TensorRT library that runs on the GPU of this machine, else onnx.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="Precision of the networks. auto: fp32 for onnx, fp16 for TensorRT. int8: 8-bit convolutions for onnx.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    help="GPU to build for, such as 8.9, or current; repeat it for several. [default: the library's portable set]",
)
@click.option("--workspace", type=click.IntRange(1), metavar="MB", help="Largest scratch memory of a TensorRT layer.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="File of kernel timings for --target tensorrt. [default: in the user's cache directory]",
)
@click.option("--verbose-engine", is_flag=True, help="Print the number of layers of each type in the engine.")
@click.option("--check", is_flag=True, help="Compare the finished plan with PyTorch on five types of tiles.")
@click.option("--overwrite", is_flag=True, help="Replace an existing plan.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    identity: str | None,
    base: str | None,
    output: Path,
    target: str,
    precision: str,
    capabilities: tuple[str, ...],
    workspace: int | None,
    timing_cache: Path | None,
    verbose_engine: bool,
    check: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compile a base and an identity into one plan file. The plan is compared with PyTorch before it is written.

    \b
    Examples:
      pfstorer-rt export --identity alice -o alice.plan
      pfstorer-rt export --identity alice --target tensorrt-rtx -o alice.plan
      pfstorer-rt export --base portrait -o base.plan
    """
    if identity is None and base is None:
        raise click.UsageError("give --identity NAME|FILE, or --base portrait|DIR for a plan without one")
    check_output(output, overwrite)
    check_inputs(identity, base)
    target = resolve_target(target, precision)
    if target == "onnx" and (capabilities or workspace or timing_cache or verbose_engine):
        raise click.UsageError(
            "--compute-capability, --workspace, --timing-cache and --verbose-engine go with --target "
            "tensorrt or tensorrt-rtx"
        )
    if timing_cache and target == "tensorrt-rtx":
        raise click.UsageError(
            "--timing-cache goes with --target tensorrt; TensorRT-RTX times no kernels when it builds"
        )
    if precision == "int8" and target != "onnx":
        raise click.UsageError("--precision int8 is for ONNX plans on CPUs; use fp16 for TensorRT")
    with fast_imports():
        from pfstorer_rt.export import export_plan
        from pfstorer_rt.export.tensorrt import BuildOptions

    options = BuildOptions(
        compute_capabilities=capabilities,
        workspace=workspace and workspace << 20,
        timing_cache=timing_cache,
    )
    rows: list[Row] = []

    def compare(plan: Plan) -> None:
        rows.extend(compare_with_torch(plan, identity, base))

    with shown_progress() as progress:
        plan = export_plan(output, identity, base, target, precision, options, progress, compare if check else None)
    report(plan, rows if check else None, verbose_engine, as_json)


def check_inputs(identity: str | None, base: str | None) -> None:
    """Refuse a missing identity or base before the imports of an export, which take seconds."""
    from pfstorer_rt.base_files import find_base
    from pfstorer_rt.identity import Identity, identity_path

    if identity is not None:
        Identity.load(identity_path(identity), tensors=False)
    if base is not None:
        find_base(base)


def resolve_target(target: str, precision: str) -> str:
    """Resolve `auto`: a TensorRT library that runs on the GPU of this machine, else ONNX."""
    if target != "auto" or precision == "int8":
        return "onnx" if target == "auto" else target
    from pfstorer_rt.errors import MissingBackendError

    with fast_imports():
        from pfstorer_rt.engine.tensorrt import usable_target

    try:
        return usable_target()
    except MissingBackendError:
        return "onnx"


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show the stages of an export on one bar; without a terminal, print a line for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from pfstorer_rt.console import stderr
    from pfstorer_rt.export.build import Progress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr()
    if not console.is_terminal:
        yield Progress(line=console.print)
        return
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("export", total=None)
        yield Progress(
            line=lambda line: bar.update(task, description=line, total=None, completed=0),
            phase=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )


def compare_with_torch(plan: Plan, identity: str | None, base: str | None) -> list[Row]:
    """Compare a plan with PyTorch on every backend that can run it here; raises `ParityError` where they differ."""
    from pfstorer_rt.errors import ParityError
    from pfstorer_rt.export.compare import check_rows, compare_plan

    rows = compare_plan(plan, identity, base)
    try:
        check_rows(rows, plan.manifest.precision)
    except ParityError as error:
        raise ParityError(f"{error}; no plan was written") from error
    return rows


def report(plan: Plan, comparison: list[Row] | None, verbose_engine: bool, as_json: bool) -> None:
    """Print what was written."""
    from pfstorer_rt.export.build import not_run
    from pfstorer_rt.export.parity import MEASURE, judged

    manifest = plan.manifest
    parity = {name: judged(payload.parity, payload.precision) for name, payload in manifest.payloads.items()}
    precisions = {name: payload.precision for name, payload in manifest.payloads.items()}
    layers = {name: payload.layers for name, payload in manifest.payloads.items()} if verbose_engine else {}
    unchecked = not_run(manifest.target) if comparison is not None else None
    if as_json:
        facts = {
            "plan": str(plan.path),
            "target": manifest.target,
            "precision": precisions,
            "parity": parity,
            "compute_capabilities": manifest.compute_capabilities,
        }
        extra: dict[str, Any] = {"layers": layers} if layers else {}
        if comparison is not None:
            extra |= {"comparison": comparison, "engine_not_run": unchecked}
        echo(json.dumps({**facts, **extra}))
        return
    mixed = [f"{name} in {kind}" for name, kind in precisions.items() if kind != manifest.precision]
    built_for = f" for {', '.join(manifest.compute_capabilities)}" if manifest.compute_capabilities else ""
    worst = max(parity, key=lambda name: parity[name])
    echo(
        f"{plan.path}: {manifest.target}{built_for}, {manifest.precision}{''.join(f' ({m})' for m in mixed)}, "
        f"{plan.path.stat().st_size / 1e6:.1f} MB; {MEASURE[precisions[worst]]} against PyTorch: "
        f"{parity[worst]:.1e} standard deviations of the output ({worst})"
    )
    for name, kinds in layers.items():
        echo(f"{name}: {sum(kinds.values())} layers: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if unchecked:
        echo(f"the engines themselves were not run here ({unchecked}); comparison of their graphs:")
    for row in comparison or ():
        echo("  ".join(f"{key} {value}" for key, value in row.items()))
