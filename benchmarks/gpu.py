"""Everything that has to be measured on a GPU, in one command of a given length.

    python benchmarks/gpu.py --minutes 10 -o gpu-day [--base portrait] [--large sd21] [--stage steps ...]

The stages run one after the other, each in its own process with its own share of the time; a stage that fails or runs
out of time leaves its rows and does not stop the others. Rows are written as they come to `rows.jsonl`; `table.md` has
all of them, and `report.json` the machine and the state of every stage. Without a GPU the same stages run on the CPU:
use `--base nano --large nano` there, to test the script.

Stages: kernels (the tests of `tests/kernels`, compiled for the GPU), parity (fp16 with graphs against fp32 in PyTorch,
on a photograph, grey, black, white and noise), steps (one step of the denoiser by batch: fp32 eager, fp16, fp16 with
graphs, compiled, Triton), codec (encoder and decoder), images (whole images by size, with reading and writing),
learning (iterations of `personalize`), tensorrt (export, and the same step, where a library is installed).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from common import hwc, line, machine

from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig, RestoreConfig, TileConfig
from pfstorer_rt.device import choose_device
from pfstorer_rt.engine.session import Session
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.models.base import Base, build_base, load_base
from pfstorer_rt.models.components import components, manifest
from pfstorer_rt.runtime.restorer import Restorer

Row = dict[str, Any]
SHARES = {"kernels": 2, "parity": 1, "steps": 4, "codec": 1, "images": 3, "learning": 3, "tensorrt": 2}
"""Stage -> share of the time, in the order of the run."""
WAYS: dict[str, dict[str, Any]] = {
    "fp32, eager": {"precision": "fp32", "graphs": False},
    "fp16, eager": {"precision": "fp16", "graphs": False},
    "fp16, graphs": {"precision": "fp16"},
    "fp16, graphs, triton": {"precision": "fp16", "attention": "triton"},
    "fp16, graphs, compiled": {"precision": "fp16", "compiled": True},
}
"""Ways to run the networks: options of `open_sessions`, and whether to replay graphs."""
LONG = 0.7
"""Seconds after which a single call is measured."""
PHOTO = 512
"""Side of the image of the parity check in pixels."""


@dataclass(frozen=True)
class Setting:
    """The arguments of a stage."""

    base: str
    large: str
    device: torch.device

    @property
    def small(self) -> bool:
        """Whether this run only tests the script."""
        return self.device.type == "cpu"

    def bases(self) -> Iterator[tuple[str, Base]]:
        """Yield the shipped base, and a base of Stable Diffusion's size with random weights."""
        yield Path(self.base).name, open_base(self.base, self.device)
        if self.large != self.base:
            yield Path(self.large).name, open_base(self.large, self.device)


def open_base(name: str, device: torch.device) -> Base:
    """Load a base by name or folder; the sizes `nano` and `sd21` get random weights, which are drawn on the device."""
    if name not in ("nano", "sd21"):
        return load_base(name)
    with device:
        return build_base(name).to("cpu")


def open_way(base: Base, way: str, device: torch.device) -> dict[str, Any]:
    """Open the sessions of a base in one way."""
    options = dict(WAYS[way])
    graphs = options.pop("graphs", True)
    sessions = open_sessions(base, device=device, **options)
    if not graphs:
        for session in sessions.values():
            session.close()  # frees the graphs; the network then runs eagerly
    return sessions


def milliseconds(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Return the median time of a call, after three calls that load, choose and capture kernels.

    Calls of more than `LONG` seconds are measured once.
    """
    times: list[float] = []
    for n in range(runs + 3):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times += [time.perf_counter() - started] if n > 2 else []
        if times and times[0] > LONG:
            break
    return round(1000 * statistics.median(times), 3)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(setting: Setting) -> Iterator[Row]:
    """Run the kernels' own tests, compiled for the GPU, or in Triton's interpreter without one."""
    root = Path(__file__).resolve().parents[1]
    tests = ["tests/kernels/test_names.py"] if setting.small else ["tests/kernels"]
    environment = {**os.environ, "PFSTORER_TEST_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()[-300:]]
    yield {"what": "tests of the kernels", "result": lines[-1], "failed": [x for x in lines if x.startswith("FAILED")]}


def parity(setting: Setting) -> Iterator[Row]:
    """Compare whole images in fp16 with graphs and in fp32."""
    from pfstorer_rt.export.parity import probe_tiles

    for name, base in setting.bases():
        described = manifest(base)
        full = Restorer(described, open_way(base, "fp32, eager", setting.device), "torch")
        half = Restorer(described, open_way(base, "fp16, graphs", setting.device), "torch")
        with full, half:
            for kind, tile in probe_tiles(described.tile if setting.small else PHOTO).items():
                image = hwc((tile[0] + 1) / 2)
                expected = full.restore(image)
                results = [half.restore(image) for _ in range(3)]  # eager, captured, replayed
                worst = max(float(np.abs(result - expected).max()) for result in results)
                yield {"what": "fp16 against fp32", "base": name, "image": kind, "largest difference": round(worst, 5)}


def step_inputs(session: Session, base: Base, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random inputs of a denoiser's session on the device."""
    part = components(base)["denoiser"]
    found = part.random_inputs(batch, base.config.tile, torch.Generator().manual_seed(0))
    return {name: found[name].to(device) for name in session.inputs}


def steps(setting: Setting) -> Iterator[Row]:
    """Time one step of the denoiser."""
    for name, base in setting.bases():
        for way in list(WAYS)[:2] if setting.small else WAYS:
            yield from timed_steps(name, base, way, setting)


def timed_steps(name: str, base: Base, way: str, setting: Setting) -> Iterator[Row]:
    """Time one way at each batch; a way that this machine does not have is one row."""
    try:
        session = open_way(base, way, setting.device)["denoiser"]
    except MissingBackendError as error:
        yield {"what": "denoiser step", "base": name, "way": way, "error": str(error)}
        return
    for batch in (1,) if setting.small else (1, 4, 8, 16):
        inputs = step_inputs(session, base, batch, setting.device)
        started = time.perf_counter()
        session.compute(**inputs)
        first = round(time.perf_counter() - started, 2)
        ms = milliseconds(lambda: session.compute(**inputs), setting.device, 3 if setting.small else 20)  # noqa: B023
        yield {"what": "denoiser step", "base": name, "way": way, "batch": batch, "ms": ms, "first_s": first}
    session.close()


def codec(setting: Setting) -> Iterator[Row]:
    """Time encoder and decoder on one tile."""
    for name, base in setting.bases():
        for way in ("fp32, eager", "fp16, graphs") if not setting.small else ("fp32, eager",):
            sessions = open_way(base, way, setting.device)
            for part in ("encoder", "decoder"):
                found = components(base)[part].example_inputs(1)
                inputs = {key: value.to(setting.device) for key, value in found.items()}
                ms = milliseconds(lambda: sessions[part].compute(**inputs), setting.device, 10)  # noqa: B023
                yield {"what": part, "base": name, "way": way, "side": base.config.tile, "ms": ms}


def images(setting: Setting) -> Iterator[Row]:
    """Time whole images, from the pixels to the pixels."""
    sizes = ((96, 96),) if setting.small else ((512, 512), (2160, 3840))
    for number, (name, base) in enumerate(setting.bases()):
        ways = ("fp16, graphs", "fp32, eager")[: 2 - number]  # the larger base in fp32 would take minutes
        for way in ("fp32, eager",) if setting.small else ways:
            with Restorer(manifest(base), open_way(base, way, setting.device), "torch") as restorer:
                for height, width in sizes:
                    pixels = np.random.default_rng(0).random((height, width, 3), np.float32)
                    for count in (1, 4):
                        config = RestoreConfig(steps=count, coarse="off", tile=TileConfig())
                        ms = milliseconds(lambda: restorer.restore(pixels, config), setting.device, 5)  # noqa: B023
                        size = f"{width}x{height}"
                        yield {"what": "image", "base": name, "way": way, "size": size, "steps": count, "ms": ms}


def learning(setting: Setting) -> Iterator[Row]:
    """Time the training of an identity on random photographs, without the losses on images."""
    from PIL import Image

    from pfstorer_rt.training.personalize import personalize

    side = 128 if setting.small else 640
    with TemporaryDirectory() as folder:
        photos = [Path(folder) / f"{n}.png" for n in range(3)]
        for n, path in enumerate(photos):
            pixels = np.random.default_rng(n).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        for name, base in setting.bases():
            times: dict[int, float] = {}
            for iterations in (1, 2, 6) if setting.small else (2, 20, 120):  # the first is a warm-up
                train = {"iterations": iterations}
                options = {"framing": "none", "keep_all": True, "pool": 8, **WITHOUT_IMAGE_LOSSES}
                config = PersonalizeConfig.for_base(base.config, train, **options)
                started = time.perf_counter()
                personalize("bench", photos, base, config, Path(folder) / f"{name}-{iterations}.safetensors")
                times[iterations] = time.perf_counter() - started
            _, (few, short), (many, long) = times.items()
            seconds = round((long - short) / (many - few), 4)
            yield {"what": "iteration of personalize", "base": name, "batch": config.train.batch, "s": seconds}


def tensorrt(setting: Setting) -> Iterator[Row]:
    """Export the shipped base for each TensorRT library, and time its denoiser."""
    from pfstorer_rt.export import export_plan
    from pfstorer_rt.export.tensorrt import BuildOptions

    base = open_base(setting.base, setting.device)
    for target in ("tensorrt", "tensorrt-rtx"):
        row: Row = {"what": "TensorRT", "base": setting.base, "target": target}
        with TemporaryDirectory() as folder:
            try:
                if setting.small:
                    raise MissingBackendError("no GPU")
                started = time.perf_counter()
                options = BuildOptions(compute_capabilities=("current",))
                plan = export_plan(Path(folder) / "a.plan", base=base, target=target, options=options)
                row["export_s"] = round(time.perf_counter() - started, 1)
                with Restorer.from_plan(plan.path, trust=True) as restorer:
                    session = restorer.sessions["denoiser"]
                    for batch in (1, 8):
                        inputs = step_inputs(session, base, batch, setting.device)
                        ms = milliseconds(lambda: session.compute(**inputs), setting.device, 20)  # noqa: B023
                        yield {**row, "batch": batch, "ms": ms}
            except Exception as error:  # each library has its own types; the other targets go on
                yield {**row, "error": " ".join(str(error).split())[:300]}


STAGES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "kernels": kernels,
    "parity": parity,
    "steps": steps,
    "codec": codec,
    "images": images,
    "learning": learning,
    "tensorrt": tensorrt,
}


def run_stage(name: str, setting: Setting, output: Path) -> None:
    """Run one stage in this process; every row is on the disk before the next one is measured."""
    with (output / "rows.jsonl").open("a") as file:
        for row in STAGES[name](setting):
            text = json.dumps({"stage": name, **row})
            file.write(text + "\n")
            file.flush()
            click.echo(text)


def markdown(rows: list[Row]) -> str:
    """Return one table for each stage."""
    parts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        names = list(dict.fromkeys(key for row in mine for key in row if key not in ("stage", "what")))
        table = [line(["", *names]), line(["---"] * (len(names) + 1))]
        table += [line([row.get("what", ""), *(str(row.get(name, "")) for name in names)]) for row in mine]
        parts.append(f"## {stage}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def limits(stages: tuple[str, ...], seconds: float) -> dict[str, float]:
    """Divide the time among the stages by their shares."""
    total = sum(SHARES[name] for name in stages)
    return {name: seconds * SHARES[name] / total for name in stages}


@click.command()
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Time for all stages.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--base", default="portrait", show_default=True, help="Base to measure.")
@click.option("--large", default="sd21", show_default=True, help="A larger base; random weights for sd21.")
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="Only these stages.")
@click.option("--device", default="auto", show_default=True, help="Device of PyTorch.")
@click.option("--here", is_flag=True, hidden=True, help="Run the single stage in this process.")
def main(minutes: float, output: Path, base: str, large: str, stages: tuple[str, ...], device: str, here: bool) -> None:
    """Run the stages, each in its own process."""
    output.mkdir(parents=True, exist_ok=True)
    if here:
        run_stage(stages[0], Setting(base, large, choose_device(device).device), output)
        return
    (output / "rows.jsonl").unlink(missing_ok=True)
    shares, states, spare = limits(stages or tuple(STAGES), 60 * minutes), {}, 0.0
    for name, share in shares.items():
        limit, started = share + spare, time.monotonic()  # the time that earlier stages did not use
        command = [sys.executable, __file__, "--here", "--stage", name, "-o", str(output)]
        command += ["--base", base, "--large", large, "--device", device]
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
            states[name] = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            states[name] = f"ended after {limit:.0f} s"
        spare = max(0.0, limit - (time.monotonic() - started))
        click.echo(f"{name}: {states[name]}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {"machine": machine(), "gpu": gpu, "cuda": torch.version.cuda, "stages": states}
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    file = output / "rows.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    (output / "table.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
