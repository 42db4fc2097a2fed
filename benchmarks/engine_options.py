"""Find the fastest settings of ONNX Runtime and OpenVINO on this CPU.

    python benchmarks/engine_options.py --engine portrait.plan -o benchmarks/results/engine_options.csv [--runs 9]

Times every component of a plan at the given batch sizes with every setting. The settings alternate in rounds, so that
other load on the machine affects all of them. `p50` and `best` are milliseconds. `ratio` is the median over the rounds
of the time of ONNX Runtime's usual setting divided by the time of this setting: above 1 is faster. `open_s` is the time
from the payload to the first result. In the usual setting, ONNX Runtime's threads spin during a run and sleep after it.
With `ort spinning on`, its default, they would take processor time from the other settings. With `ort sleeping` they
never spin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from common import machine, write

from pfstorer_rt.engine.openvino import OpenVinoSession
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.plan import COMPONENTS, Plan

Run = Callable[[dict[str, Any]], Any]
Levels = onnxruntime.GraphOptimizationLevel


@click.command()
@click.option("--engine", required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--runs", default=9, show_default=True)
@click.option(
    "--batch", "batches", multiple=True, type=int, default=(1, 4), show_default=True, help="Batch size of the denoiser."
)
@click.option("--only", multiple=True, help="Settings to measure.")
def main(engine: str, output: Path, runs: int, batches: tuple[int, ...], only: tuple[str, ...]) -> None:
    plan, rows = Plan.open(engine), []
    for component in COMPONENTS:
        payload = plan.read(component)
        for batch in batches if component == "denoiser" else (1,):
            arrays = inputs(plan, component, batch)
            opened: dict[str, tuple[Run, float]] = {}
            for name, make in settings(payload).items():
                if only and name not in only:
                    continue
                started = time.perf_counter()
                try:
                    run = make()
                except MissingBackendError as error:  # some processors do not support bf16
                    click.echo(f"{name}: left out: {error}", err=True)
                    continue
                run(arrays)
                opened[name] = run, time.perf_counter() - started
            times: dict[str, list[float]] = {name: [] for name in opened}
            for _ in range(runs):
                for name, (run, _) in opened.items():
                    started = time.perf_counter()
                    run(arrays)
                    times[name].append((time.perf_counter() - started) * 1e3)
            usual = times["ort"]
            for name, (_, open_s) in opened.items():
                rows.append(
                    {
                        "component": component,
                        "batch": batch,
                        "setting": name,
                        "p50": round(float(np.median(times[name])), 1),
                        "best": round(min(times[name]), 1),
                        "ratio": round(float(np.median([a / b for a, b in zip(usual, times[name], strict=True)])), 2),
                        "open_s": round(open_s, 2),
                        "runs": runs,
                        "load": round(os.getloadavg()[0], 1),
                        **machine(),
                    }
                )
                click.echo("  ".join(f"{k} {v}" for k, v in list(rows[-1].items())[:7]))
    write(output, rows)


def settings(payload: bytes) -> dict[str, Callable[[], Run]]:
    """Return setting -> function that opens the payload; `ort` is the usual setting."""
    ort = partial(onnx_runtime, payload)
    return {
        "ort": ort,
        "ort spinning on": partial(ort, spin="on"),
        "ort sleeping": partial(ort, spin="never"),
        "ort 1 thread": partial(ort, intra_op_num_threads=1),
        "ort no arena": partial(ort, enable_cpu_mem_arena=False),
        "ort no pattern": partial(ort, enable_mem_pattern=False),
        "ort extended": partial(ort, graph_optimization_level=Levels.ORT_ENABLE_EXTENDED),
        "ort basic": partial(ort, graph_optimization_level=Levels.ORT_ENABLE_BASIC),
        "ort binding": partial(ort, bind=True),
        "openvino f32": partial(openvino, payload, "CPU:f32"),
        "openvino bf16": partial(openvino, payload, "CPU:bf16"),
    }


def onnx_runtime(payload: bytes, bind: bool = False, spin: str = "in runs", **values: Any) -> Run:
    """Open in ONNX Runtime, with or without bound outputs; waiting threads spin "on", "in runs" or "never"."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin != "never")))
    options.add_session_config_entry("session.force_spinning_stop", str(int(spin == "in runs")))
    for name, value in values.items():
        setattr(options, name, value)
    session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    if not bind:
        return lambda arrays: session.run(None, arrays)

    def bound(arrays: dict[str, Any]) -> Any:
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for port in session.get_outputs():
            binding.bind_output(port.name)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    return bound


def openvino(payload: bytes, provider: str) -> Run:
    """Open a payload in OpenVINO without a cache."""
    session = OpenVinoSession(payload, provider)
    return lambda arrays: session.run(**arrays)


def inputs(plan: Plan, component: str, batch: int) -> dict[str, Any]:
    """Return one batch of tiles."""
    m, rng = plan.manifest, np.random.default_rng(0)
    latent = rng.standard_normal((batch, m.latent_channels, m.tile // m.factor, m.tile // m.factor), np.float32)
    every = {
        "image": rng.standard_normal((batch, 3, m.tile, m.tile), np.float32),
        "latent": latent,
        "x": latent,
        "z_lq": latent,
        "t": np.full(batch, 500, np.float32),
        "strength": np.ones(1, np.float32),
        "cfw_weight": np.ones(1, np.float32),
    }
    for name, port in m.payloads[component].inputs.items():
        if name.startswith("features_"):
            side = m.tile >> int(name.removeprefix("features_"))
            every[name] = rng.standard_normal((batch, port["shape"][1], side, side), np.float32)
    return {name: every[name] for name in m.payloads[component].inputs}


if __name__ == "__main__":
    main()
