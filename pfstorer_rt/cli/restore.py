"""`pfstorer-rt restore`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pfstorer_rt.cli.options import ATTENTION, SEED
from pfstorer_rt.imaging.files import MAX_PIXELS

if TYPE_CHECKING:
    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.runtime.batch import Job, Saving
    from pfstorer_rt.runtime.restorer import Restorer

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}


@click.command()
@click.argument("inputs", nargs=-1, metavar="INPUTS...")
@click.option("--engine", "engines", type=click.Path(), multiple=True, help="Plan file; repeat it for several people.")
@click.option("--base", help="Run a base in PyTorch: tiny, or a base directory.")
@click.option("--identity", help="With --base: an identity, by name or file.")
@click.option("-o", "--output", help="File for one picture, folder for several; - is stdout.")
@click.option(
    "--suffix",
    default="_restored",
    show_default=True,
    help="What results' names end with; in folders, pictures that are named so are left out.",
)
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), help="Of all results. [default: the input's]")
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEG and WebP.")
@click.option("--compare", is_flag=True, help="Write {result}_compare too, input and result side by side.")
@click.option("--preview", is_flag=True, help="Write {result}_preview first, of one step.")
@click.option("--refs", type=click.Path(exists=True, file_okay=False), help="Photographs of the person, to measure by.")
@click.option("--watch", type=click.Path(exists=True, file_okay=False), help="Restore what comes into this folder.")
@click.option("--idle", type=click.FloatRange(0), help="With --watch: end after so many seconds with nothing new.")
@click.option("--dry-run", is_flag=True, help="Say tiles, steps, memory and time; restore nothing.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Diffusion steps. [default: the engine's own]")
@click.option("--sampler", type=click.Choice(["ddpm", "ddim", "dpmpp_2m", "unipc"]), help="[default: the engine's own]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same bytes.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Of the identity: 0 is the base.")
@click.option("--cfw-weight", type=float, help="Of the LQ picture in the decoder. [default: the engine's]")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Size of the result.")
@click.option("--color-fix", type=click.Choice(["auto", "adain", "wavelet", "none"]), default="auto", show_default=True)
@click.option(
    "--init",
    type=click.Choice(["lq", "noise"]),
    default="lq",
    show_default=True,
    help="Where sampling starts.",
)
@click.option("--eta", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Fresh noise in DDIM.")
@click.option(
    "--tiling", type=click.Choice(["fast", "parity"]), default="fast", show_default=True, help="parity: StableSR's."
)
@click.option("--overlap", type=int, help="Pixels shared by tiles. [default: a quarter of a tile, half with parity]")
@click.option("--tile-batch", type=click.IntRange(1), default=4, show_default=True, help="Tiles computed at once.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "onnxruntime", "openvino", "tensorrt"]),
    default="auto",
    show_default=True,
)
@click.option("--provider", help="Where the backend runs: cpu, cuda; with openvino CPU, CPU:f32, CPU:bf16, GPU.")
@click.option(
    "--attention",
    type=ATTENTION,
    default="auto",
    show_default=True,
    help="In PyTorch: what computes attention, gates and norms; triton needs an NVIDIA GPU.",
)
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that others built.")
@click.option("--max-pixels", type=click.IntRange(1), default=MAX_PIXELS, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per picture.")
def command(inputs: tuple[str, ...], engines: tuple[str, ...], **options: Any) -> None:
    """Restore pictures: files, folders (recursive), globs, or - for stdin.

    \b
    Examples:
      pfstorer-rt restore --engine alice.plan old.jpg -o restored.png
      pfstorer-rt restore --engine alice.plan scans/ -o restored/ --json
      pfstorer-rt restore --engine alice.plan huge.tif --dry-run
      pfstorer-rt restore --base tiny old.jpg --steps 4
    """
    check_call(inputs, engines, options)
    from pfstorer_rt.cli.pictures import is_lossy, plan_jobs
    from pfstorer_rt.runtime.batch import Saving

    names = tell_apart(engines) if len(engines) > 1 else [""]
    sources = inputs or (options["watch"],)
    extension = FORMATS.get(options["kind"] or "")
    plans = [plan_jobs(sources, options["output"], options["suffix"], extension, n) for n in names] if inputs else []
    config, saving = read_config(options), Saving(options["overwrite"], options["quality"], options["kind"] or "png")
    named = click.get_current_context().get_parameter_source("quality") is ParameterSource.COMMANDLINE
    if named and plans and not any(is_lossy(job, saving) for jobs in plans for job in jobs):
        click.echo("note: --quality changes nothing: no result is JPEG or WebP", err=True)
    status = 0
    for engine, jobs in zip(engines or (None,), plans or [[]] * len(names), strict=True):
        with open_restorer(engine, options) as restorer:
            restorer.recipe(config)  # refuses settings that do not fit this engine
            for note in without_effect(restorer, config, options["preview"]):
                click.echo(f"note: {note}", err=True)
            click.echo(f"{restorer.backend} on {restorer.provider}", err=True)
            if options["dry_run"]:
                status |= forecast(restorer, jobs, config, options)
            elif options["watch"]:
                status |= watch(restorer, config, saving, options, extension)
            else:
                status |= restore_jobs(restorer, jobs, config, saving, options)
    sys.exit(status)


def check_call(inputs: tuple[str, ...], engines: tuple[str, ...], options: dict[str, Any]) -> None:
    """Raise `click.UsageError` for options that contradict each other."""
    from pfstorer_rt.cli.pictures import check_file, output_file

    if bool(engines) == (options["base"] is not None) and options["backend"] != "torch":
        raise click.UsageError("give either --engine FILE.plan or --base tiny|DIR")
    if not engines and options["base"] is None:
        raise click.UsageError("give --engine FILE.plan or --base tiny|DIR")
    if options["identity"] and engines:
        raise click.UsageError("--identity goes with --base; a plan holds its identity already")
    if bool(inputs) == bool(options["watch"]):
        raise click.UsageError("give INPUTS..., or a folder to --watch")
    if options["watch"] and (len(engines) > 1 or options["dry_run"]):
        raise click.UsageError("--watch goes with one --engine, and not with --dry-run")
    if options["watch"] and (file := output_file(options["output"])):
        check_file(file, FORMATS.get(options["kind"] or ""), single=False)
    if set(options["suffix"]) & set("/\\\0"):
        raise click.UsageError(f"--suffix {options['suffix']!r}: expected the end of a file's name; folders go with -o")
    if options["idle"] is not None and not options["watch"]:
        raise click.UsageError("--idle goes with --watch")
    if not engines and options["backend"] not in ("auto", "torch"):
        raise click.UsageError("--base runs in PyTorch; export a plan to use another backend")
    if options["provider"] and (not engines or options["backend"] == "torch"):
        raise click.UsageError("--provider goes with --engine and a backend that runs it")
    if options["attention"] != "auto" and engines and options["backend"] != "torch":
        raise click.UsageError("--attention is for PyTorch (--base, or --backend torch); a plan has its own attention")


def without_effect(restorer: Restorer, config: RestoreConfig, preview: bool) -> list[str]:
    """Return a line for each setting that changes nothing with this engine."""
    notes = []
    if config.strength != 1.0 and restorer.manifest.identity_name is None:
        notes.append(f"--strength {config.strength:g} changes nothing: this engine holds no identity")
    if config.eta and (sampler := restorer.recipe(config).sampler) != "ddim":
        notes.append(f"--eta {config.eta:g} changes nothing: it is of the sampler ddim, this is {sampler}")
    if preview and restorer.recipe(config).steps == 1:
        notes.append("--preview changes nothing: the result itself takes one step")
    return notes


def tell_apart(engines: tuple[str, ...]) -> list[str]:
    """Return what the names of each engine's results have in them."""
    names = [f"_{Path(engine).stem}" for engine in engines]
    if len(set(names)) < len(names):
        raise click.UsageError("several --engine files of one name: their results would be too; rename one")
    return names


def read_config(options: dict[str, Any]) -> RestoreConfig:
    """Collect the options that say how to restore."""
    from pfstorer_rt.config import RestoreConfig, TileConfig

    fields = ("steps", "sampler", "seed", "strength", "cfw_weight", "scale", "color_fix", "init", "eta")
    tile = TileConfig(options["tiling"], overlap=options["overlap"], batch=options["tile_batch"])
    return RestoreConfig(tile=tile, **{name: options[name] for name in fields})


def open_restorer(engine: str | None, options: dict[str, Any]) -> Restorer:
    """Open a plan, or a base in PyTorch."""
    from pfstorer_rt.runtime.restorer import Restorer

    if engine is None:
        return Restorer.from_base(options["base"], options["identity"], attention=options["attention"])
    return Restorer.from_plan(
        engine, options["backend"], options["base"], options["trust_plan"], options["provider"], options["attention"]
    )


def restore_jobs(
    restorer: Restorer, jobs: Sequence[Job], config: RestoreConfig, saving: Saving, options: dict[str, Any]
) -> int:
    """Restore all pictures with one engine; returns the exit status."""
    from pfstorer_rt.cli.pictures import show
    from pfstorer_rt.faces.references import References
    from pfstorer_rt.imaging.files import save_image
    from pfstorer_rt.imaging.rows import Rows
    from pfstorer_rt.imaging.sidebyside import SideBySide
    from pfstorer_rt.runtime.batch import run_jobs

    references = References(options["refs"]) if options["refs"] else None
    for note in references.notes if references else ():
        click.echo(f"note: {note}", err=True)
    fixed = {
        "seed": config.seed,
        "steps": restorer.recipe(config).steps,
        "sampler": restorer.recipe(config).sampler,
        "strength": config.strength,
        "backend": restorer.backend,
        "provider": restorer.provider,
    }

    kept: dict[Job, list[str]] = {}

    def beside(job: Job, word: str, rows: Rows) -> dict[str, str]:
        if job.target is None:
            return {}
        path = job.target.with_name(f"{job.target.stem}_{word}{job.target.suffix}")
        if path.exists() and not saving.overwrite:
            kept.setdefault(job, []).append(f"{path} exists already and was left as it is")
            return {}
        save_image(path, rows, overwrite=saving.overwrite, quality=saving.quality)
        return {word: str(path)}

    def work(number: int, rows: Rows, step: Any) -> Rows:
        if options["preview"] and restorer.recipe(config).steps > 1:
            beside(jobs[number], "preview", restorer.restore_rows(rows, replace(config, steps=1)))
        return restorer.restore_rows(rows, config, step)

    def facts(job: Job, source: Rows, result: Rows) -> dict[str, Any]:
        more = beside(job, "compare", SideBySide(source, result)) if options["compare"] else {}
        measured = references.facts(source, result) if references else {}
        notes = [*measured.pop("notes", ()), *kept.pop(job, ())]
        tiles = restorer.layout(source.height, source.width, config).denoiser_tiles
        return {**fixed, "tiles": tiles, **more, **measured, "notes": notes}

    return run_jobs(
        jobs,
        work,
        saving=saving,
        show=partial(show, as_json=options["as_json"]),
        title="restore",
        max_pixels=options["max_pixels"],
        facts=facts,
    )


def forecast(restorer: Restorer, jobs: Sequence[Job], config: RestoreConfig, options: dict[str, Any]) -> int:
    """Print what each picture will take; returns 1 where one cannot be looked at."""
    from pfstorer_rt.cli.pictures import show
    from pfstorer_rt.errors import PFStorerError
    from pfstorer_rt.imaging.files import image_size
    from pfstorer_rt.runtime.batch import names
    from pfstorer_rt.runtime.forecast import Forecaster

    forecaster, failed = Forecaster(restorer, config), 0
    for job in jobs:
        if job.source is None:
            raise click.UsageError("--dry-run cannot look at stdin without taking it; name a file")
        if job.target is not None and job.target.exists() and not job.explicit and not options["overwrite"]:
            show({**names(job), "status": "skipped"}, options["as_json"])
            continue
        try:
            predicted = forecaster.predict(*image_size(job.source, options["max_pixels"]))
        except PFStorerError as error:
            failed = 1
            click.echo(f"failed: {error}", err=True)
            continue
        facts = predicted.facts()
        if options["as_json"]:
            click.echo(json.dumps({"input": str(job.source), "output": str(job.target), "status": "planned", **facts}))
            continue
        click.echo(
            f"{job.source}: canvas {facts['width']}x{facts['height']}, {facts['tiles']} tiles in batches of "
            f"{facts['batch']}, {facts['steps']} steps, {facts['codec_tiles']} tiles of encoder and decoder; about "
            f"{facts['predicted_peak_mb']} MB of memory and {facts['predicted_seconds']:.0f} s"
        )
    return failed


def watch(
    restorer: Restorer, config: RestoreConfig, saving: Saving, options: dict[str, Any], extension: str | None
) -> int:
    """Restore what comes into a folder until interrupted; a file is taken once its size has stayed for a second."""
    from pfstorer_rt.cli.pictures import plan_jobs
    from pfstorer_rt.runtime.batch import NoImagesError

    folder, status, done = options["watch"], 0, set[Path | None]()
    sizes: dict[Path, int] = {}
    latest, waiting = time.monotonic(), False
    click.echo(f"watching {folder}; end with Ctrl-C", err=True)
    while options["idle"] is None or waiting or time.monotonic() - latest < options["idle"]:
        ready: list[Job] = []
        waiting = False
        try:
            found = plan_jobs((folder,), options["output"], options["suffix"], extension)
        except NoImagesError:
            found = []
        for job in found:
            assert job.source is not None
            size = job.source.stat().st_size if job.source.exists() else -1
            settled = sizes.get(job.source) == size
            if job.source not in done and size > 0 and settled:
                ready.append(job)
            waiting |= not settled  # is still being written, or was not there before
            sizes[job.source] = size
        if ready:
            done |= {job.source for job in ready}
            status |= restore_jobs(restorer, ready, config, saving, options)
            latest = time.monotonic()
        time.sleep(1)
    return status
