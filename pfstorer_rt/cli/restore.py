"""`pfstorer-rt restore`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import click
from click.core import ParameterSource

from pfstorer_rt.cli.options import (
    ATTENTION,
    REMOVE_SCRATCHES,
    SEED,
    Number,
    check_plan,
    check_stdout,
    flag,
    note_strength,
    note_weight,
    parse_place,
)
from pfstorer_rt.console import echo, note
from pfstorer_rt.imaging.files import MAX_PIXELS

if TYPE_CHECKING:
    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.faces.references import References
    from pfstorer_rt.runtime.batch import BatchConfig, Outcome
    from pfstorer_rt.runtime.jobs import Job
    from pfstorer_rt.runtime.restorer import Restorer
    from pfstorer_rt.runtime.selection import ApplyTo


class TorchOptions(TypedDict):
    """Options of the PyTorch engine, by the names of the arguments of `Restorer.from_base`."""

    attention: str
    device: str
    precision: str
    compiled: bool


IN_TORCH = TorchOptions(attention="auto", device="auto", precision="auto", compiled=False)
"""The defaults."""
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}


@dataclass(frozen=True)
class Options:
    """The parsed options, under the names of the command's parameters."""

    inputs: tuple[str, ...]
    engines: tuple[str, ...]
    base: str | None
    identity: str | None
    output: str | None
    suffix: str
    kind: str | None
    quality: int
    compare: bool
    preview: bool
    refs: str | None
    watch: str | None
    idle: float | None
    dry_run: bool
    steps: int | None
    sampler: str | None
    seed: int
    strength: float
    apply_to: ApplyTo
    cfw_weight: float | None
    scale: float
    colorize: bool
    remove_scratches: bool
    color_fix: Literal["auto", "adain", "wavelet", "none"]
    coarse: Literal["auto", "on", "off"]
    init: Literal["lq", "noise"]
    eta: float
    tiling: Literal["fast", "parity"]
    overlap: int | None
    tile_batch: int | None
    backend: str
    provider: str | None
    attention: str
    device: str
    precision: str
    compiled: bool
    trust_plan: bool
    max_pixels: int
    overwrite: bool
    no_mark: bool
    as_json: bool

    @property
    def in_torch(self) -> TorchOptions:
        """Options of the PyTorch engine."""
        return TorchOptions(
            attention=self.attention, device=self.device, precision=self.precision, compiled=self.compiled
        )

    @property
    def extension(self) -> str | None:
        """Extension of all results; None keeps the input's."""
        return FORMATS[self.kind] if self.kind else None

    @property
    def labels(self) -> list[str]:
        """Label in the names of every engine's results; empty for a single engine."""
        return [f"_{Path(engine).stem}" for engine in self.engines] if len(self.engines) > 1 else [""]

    def restore_config(self) -> RestoreConfig:
        """Return the settings of every restoration."""
        from pfstorer_rt.config import RestoreConfig, TileConfig

        return RestoreConfig(
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
            strength=self.strength,
            scale=self.scale,
            colorize=self.colorize,
            remove_scratches=self.remove_scratches,
            cfw_weight=self.cfw_weight,
            color_fix=self.color_fix,
            coarse=self.coarse,
            init=self.init,
            eta=self.eta,
            tile=TileConfig(self.tiling, overlap=self.overlap, batch=self.tile_batch),
        )

    def batch_config(self, label: str, references: References | None) -> BatchConfig:
        """Return the settings of one engine's batch."""
        from pfstorer_rt.runtime.batch import BatchConfig, Saving
        from pfstorer_rt.runtime.jobs import Naming

        return BatchConfig(
            self.restore_config(),
            Naming(self.suffix, self.extension, label),
            Saving(self.overwrite, self.quality, self.kind or "png", not self.no_mark),
            self.compare,
            self.preview,
            references,
            self.apply_to,
            self.max_pixels,
        )


@click.command()
@click.argument("inputs", nargs=-1, metavar="INPUTS...")
@click.option(
    "--engine", "engines", type=click.Path(), multiple=True, help="Plan file; repeat the option for several people."
)
@click.option("--base", help="Run a base in PyTorch: portrait, or a base directory.")
@click.option("--identity", help="With --base: identity, by name or file.")
@click.option(
    "-o", "--output", help="File for one image, folder for several, - for stdout. [default: beside the input]"
)
@click.option(
    "--suffix",
    default="_restored",
    show_default=True,
    help="End of the names of results. Images of a folder with this end are earlier results and are skipped.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(FORMATS)),
    help="File format of all results. [default: the input's; png on standard output]",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Quality of JPEG and WebP results."
)
@click.option("--compare", is_flag=True, help="Also write {result}_compare: input and result side by side.")
@click.option("--preview", is_flag=True, help="First write {result}_preview, restored in one step.")
@click.option(
    "--refs",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of photographs of the person; reports the distance of every result to them. With a --base that can "
    "learn without training (portrait cannot) and without --identity, the person is learned from them.",
)
@click.option(
    "--watch", type=click.Path(exists=True, file_okay=False), help="Restore images as they arrive in this folder."
)
@click.option("--idle", type=Number(0), help="With --watch: stop after this many seconds without a new image.")
@click.option("--dry-run", is_flag=True, help="Print tiles, steps, memory and time; restore nothing.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Number of diffusion steps. [default: the engine's]")
@click.option(
    "--sampler",
    type=click.Choice(["ddpm", "ddim", "dpmpp_2m", "unipc"]),
    help="Diffusion sampler. [default: the engine's]",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Random seed; the same seed gives the same bytes."
)
@click.option(
    "--strength",
    type=Number(),
    default=1.0,
    show_default=True,
    help="Strength of the identity: 0 is the base alone, 1 is as trained.",
)
@click.option(
    "--apply-to",
    callback=parse_place,
    metavar="matching|all|largest|X,Y,W,H",
    default="matching",
    show_default=True,
    help="Where the identity acts in an image with several faces: on the face that resembles the person, everywhere, "
    "on the largest face, or on the face in a rectangle of the input (left, top, width, height in pixels).",
)
@click.option(
    "--cfw-weight", type=Number(), help="How strongly the decoder follows the input, 0-1. [default: the engine's]"
)
@click.option(
    "--scale", type=Number(), default=1.0, show_default=True, help="Size of the result relative to the input."
)
@click.option("--colorize", is_flag=True, help="Let the result of a grey or sepia image have other colours.")
@click.option("--remove-scratches", is_flag=True, help=REMOVE_SCRATCHES)
@click.option(
    "--color-fix",
    type=click.Choice(["auto", "adain", "wavelet", "none"]),
    default="auto",
    show_default=True,
    help="Colour correction towards the input; auto: adain for one tile, wavelet for several.",
)
@click.option(
    "--coarse",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Restore a reduced image first, and then its tiles; auto: if a face is larger than 0.8 of a tile.",
)
@click.option(
    "--init",
    type=click.Choice(["lq", "noise"]),
    default="lq",
    show_default=True,
    help="Start of the sampling: the noised input, or pure noise.",
)
@click.option("--eta", type=Number(0, 1), default=0.0, show_default=True, help="Share of fresh noise in DDIM steps.")
@click.option(
    "--tiling",
    type=click.Choice(["fast", "parity"]),
    default="fast",
    show_default=True,
    help="How an image is divided into tiles; parity: as StableSR does.",
)
@click.option(
    "--overlap",
    type=int,
    help="Overlap of neighbouring tiles in pixels. [default: a quarter of a tile; half with parity]",
)
@click.option(
    "--tile-batch",
    type=click.IntRange(1),
    help="Number of tiles computed at once. [default: 4; 16 in PyTorch on a GPU]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "onnxruntime", "openvino", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Library that runs the engine; auto takes the fastest that is installed.",
)
@click.option("--provider", help="Device of the backend: cpu, cuda; for openvino CPU, CPU:f32, CPU:bf16, GPU.")
@click.option(
    "--attention",
    type=ATTENTION,
    default="auto",
    show_default=True,
    help="Kernels for attention, gates and norms in PyTorch; triton needs an NVIDIA GPU.",
)
@click.option("--device", default="auto", show_default=True, help="Device of PyTorch: auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision in PyTorch; auto: fp16 on a GPU, fp32 on a CPU. A plan has its own precision.",
)
@click.option(
    "--compile", "compiled", is_flag=True, help="Compile the networks in PyTorch: minutes before the first image."
)
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that was built elsewhere.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=MAX_PIXELS,
    show_default=True,
    help="Largest accepted image, in pixels.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing results.")
@click.option("--no-mark", is_flag=True, help="Leave out the metadata that mark a result as made with AI.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
def command(**parameters: Any) -> None:
    """Restore images: files, folders (recursive), glob patterns, or - for stdin.

    \b
    Examples:
      pfstorer-rt restore --engine alice.plan old.jpg -o restored.png
      pfstorer-rt restore --engine alice.plan scans/ -o restored/ --json
      pfstorer-rt restore --engine alice.plan huge.tif --dry-run
      pfstorer-rt restore --base portrait old.jpg --steps 4
    """
    options = Options(**parameters)
    check_options(options)
    from pfstorer_rt.cli.outcomes import conclude, show
    from pfstorer_rt.runtime.batch import all_existing
    from pfstorer_rt.runtime.jobs import check_file, is_lossy, output_file, plan_jobs

    if options.watch and (file := output_file(options.output)):
        check_file(file, options.extension, single=False)
    references = open_references(options.refs)
    batches = [options.batch_config(label, references) for label in options.labels]
    once = cache(note)  # every engine has the same inputs
    plans = [
        plan_jobs(options.inputs, options.output, b.naming, once, options.overwrite) if options.inputs else []
        for b in batches
    ]
    quality_given = click.get_current_context().get_parameter_source("quality") is ParameterSource.COMMANDLINE
    jobs = [job for plan in plans for job in plan]
    if quality_given and jobs and not any(is_lossy(job, options.kind or "png") for job in jobs):
        note("--quality changes nothing: no result is JPEG or WebP")
    if any(job.target is None for job in jobs):
        for name in ("compare", "preview"):
            if getattr(options, name):
                note(f"--{name} changes nothing for a result on standard output: there is no place beside it")
    failed = 0
    for engine, batch, plan in zip(options.engines or (None,), batches, plans, strict=True):
        named = any(job.explicit for job in plan)
        if not (options.dry_run and named) and (done := all_existing(plan, batch.saving)):  # opening takes seconds
            for outcome in done:
                show(outcome, options.as_json)
            failed |= conclude(done, options.as_json)
            continue
        with open_restorer(engine, options) as restorer:
            failed |= run(restorer, batch, plan, options)
    sys.exit(failed)


def check_options(options: Options) -> None:
    """Raise `click.UsageError` for options that contradict each other."""
    from pfstorer_rt.runtime.jobs import STREAM

    engines, watch = options.engines, options.watch
    both, neither = bool(engines and options.base), not engines and options.base is None
    if neither or (both and options.backend != "torch"):  # with backend torch, a plan may name its base's folder
        raise click.UsageError("give either --engine FILE.plan or --base portrait|DIR")
    for engine in engines:
        check_plan(engine)
    if options.identity and engines:
        raise click.UsageError("--identity goes with --base; a plan already contains its identity")
    if len(set(options.labels)) < len(engines):
        raise click.UsageError("several --engine files have one name, and so would their results; rename one")
    if bool(options.inputs) == bool(watch):
        raise click.UsageError("give INPUTS..., or a folder to --watch")
    if STREAM in options.inputs and len(engines) > 1:
        raise click.UsageError("- goes with one --engine: standard input can be read only once")
    if STREAM in options.inputs and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("standard input is a terminal, expected an image: write `< old.jpg` or name a file")
    if not options.dry_run:
        check_stdout(options.inputs, options.output)
    if watch and (len(engines) > 1 or options.dry_run):
        raise click.UsageError("--watch goes with one --engine, and not with --dry-run")
    if options.idle is not None and not watch:
        raise click.UsageError("--idle goes with --watch")
    if not engines and options.backend not in ("auto", "torch"):
        raise click.UsageError("--base runs in PyTorch; export a plan to use another backend")
    if options.provider and (not engines or options.backend == "torch"):
        raise click.UsageError("--provider goes with --engine and a backend that runs it")
    if options.in_torch != IN_TORCH and engines and options.backend != "torch":
        raise click.UsageError(
            "--attention, --device, --precision and --compile are for PyTorch (--base, or --backend torch); a plan has "
            "its own attention and precision, and --provider selects its device"
        )


def open_references(folder: str | None) -> References | None:
    """Open the reference photographs, with a note for every photograph that cannot be used."""
    if folder is None:
        return None
    from pfstorer_rt.faces.references import References

    references = References.read(folder)
    for text in references.notes:
        note(text)
    return references


def open_restorer(engine: str | None, options: Options) -> Restorer:
    """Open a plan, or a base in PyTorch."""
    from pfstorer_rt.runtime.restorer import Restorer

    if engine is None:
        assert options.base is not None
        if options.refs is None or options.identity:
            return Restorer.from_base(options.base, options.identity, **options.in_torch)
        from pfstorer_rt.fix import identity_of
        from pfstorer_rt.models.base import load_base

        base = load_base(options.base)
        identity = identity_of(Path(options.refs), base, note) if base.instant else None
        return Restorer.from_base(base, identity, **options.in_torch)
    return Restorer.from_plan(
        engine, options.backend, options.base, options.trust_plan, options.provider, **options.in_torch
    )


def run(restorer: Restorer, batch: BatchConfig, jobs: Sequence[Job], options: Options) -> int:
    """Restore, watch or forecast with one engine; returns the exit status."""
    from pfstorer_rt.cli.outcomes import conclude, show
    from pfstorer_rt.runtime.batch import engine_notes, forecast_jobs, without_effect

    note_strength(options.strength)
    note_weight(options.cfw_weight)
    restorer.recipe(batch.restore)  # refuses settings that do not fit this engine
    for setting, value, reason in without_effect(restorer, batch):
        note(f"{flag(setting)}{'' if value is True else f' {value:g}'} changes nothing: {reason}")
    if options.apply_to != "matching" and restorer.manifest.identity_name is None:
        note("--apply-to changes nothing: this engine contains no identity")
    for text in engine_notes(restorer, batch):
        note(text)
    echo(f"engine: {restorer.backend} ({restorer.provider})", err=True)
    report = partial(show, as_json=options.as_json)
    if options.dry_run:
        return conclude(forecast_jobs(restorer, jobs, batch, report), options.as_json)
    return conclude(restore(restorer, batch, jobs, options, report), options.as_json)


def restore(
    restorer: Restorer, batch: BatchConfig, jobs: Sequence[Job], options: Options, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Restore the jobs, or the images that arrive in the watched folder."""
    from pfstorer_rt.cli.progress import batch_bars
    from pfstorer_rt.runtime.batch import check_beside, restore_jobs
    from pfstorer_rt.runtime.watch import watch_folder

    if options.watch:
        echo(f"watching {options.watch}; press Ctrl-C to stop", err=True)
        with batch_bars("restore") as progress:
            return watch_folder(restorer, options.watch, options.output, batch, options.idle, report, progress, note)
    check_beside(jobs, batch)
    with batch_bars("restore", len(jobs)) as progress:
        return restore_jobs(restorer, jobs, batch, report, progress)
