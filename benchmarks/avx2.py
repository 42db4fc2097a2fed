"""Measure a restoration with the instructions of a processor with AVX2 only, emulated on one with AVX-512.

    python benchmarks/avx2.py -o benchmarks/results/avx2.csv --engine alice.plan

Needs Linux on x86-64, gcc and objdump. ONNX Runtime chooses its kernels with the instruction `cpuid`. A copy of its
library has the instruction `ud2` in place of every `cpuid`, and `avx2.c` answers it without AVX-512, VNNI, BF16 and
AMX. OpenVINO reads the environment variable OV_CPU_MAX_ISA.

Clock, caches and memory are those of the machine, and NumPy, Pillow and the C library use all its instructions. One row
per backend and set of instructions: medians of runs in turn. `wall_s` is a new process that restores one image of the
plan's tile size, `restore_s` one more image in a running process.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
from common import machine, read, write
from PIL import Image
from startup import WARM, number, start

from pfstorer_rt.plan import Plan

CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--engine", required=True, type=click.Path(exists=True, path_type=Path), help="An ONNX plan.")
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(output: Path, engine: Path, backends: tuple[str, ...], runs: int) -> None:
    manifest, rows, own = Plan.open(engine).manifest, read(output), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "old.png"
        noise = np.random.default_rng(0).integers(0, 256, (manifest.tile, manifest.tile, 3), np.uint8)
        Image.fromarray(noise).save(image)
        sets = {"all": {"PFSTORER_HOME": f"{folder}/all"}, "AVX2, emulated": masked(Path(folder) / "avx2")}
        for backend in backends:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
            for i in range(runs + 1):
                for name, settings in sets.items():
                    os.environ.update(settings)
                    one = measure(engine.resolve(), backend, image)
                    click.echo(f"{backend}, {name}: {one}")
                    if i:  # the first run fills the caches of files and of compiled networks
                        found[name].append(one)
                    os.environ.clear()
                    os.environ.update(own)
            for name, measured in found.items():
                medians = {key: round(statistics.median(one[key] for one in measured), 3) for key in measured[0]}
                about = {"instructions": name, "backend": backend, "precision": manifest.precision}
                rows.append(
                    {
                        **about,
                        "base": manifest.base_name,
                        "tile": manifest.tile,
                        **medians,
                        "runs": runs,
                        "openvino": version("openvino"),
                        **machine(),
                    }
                )
    write(output, rows)


def measure(plan: Path, backend: str, image: Path) -> dict[str, float]:
    """Restore an image in a new process, and several in another one."""
    folder = f"{image.parent}"
    call = [sys.executable, "-m", "pfstorer_rt", "restore", "--engine", f"{plan}", "--backend", backend]
    whole = start([*call, f"{image}", "-o", f"{folder}/new.png", "--overwrite"], folder)
    again = number(folder, sys.executable, "-c", WARM, f"{plan}", backend)
    return {"wall_s": whole["wall_s"], "cpu_s": whole["cpu_s"], "restore_s": again}


def masked(folder: Path) -> dict[str, str]:
    """Write a copy of ONNX Runtime without `cpuid` and the library that answers; returns environment variables."""
    package = Path(str(find_spec("onnxruntime").origin)).parent  # type: ignore[union-attr]
    copy = folder / "onnxruntime"
    shutil.copytree(package, copy)
    for library in copy.glob("capi/onnxruntime_pybind11_state*.so"):
        click.echo(f"{library.name}: {replace_cpuid(library)} cpuid instructions")
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-o", f"{folder}/avx2.so", f"{Path(__file__).with_suffix('.c')}"], check=True
    )
    return {
        "PFSTORER_HOME": f"{folder}/home",  # compiled networks of OpenVINO
        "PYTHONPATH": f"{folder}",
        "LD_PRELOAD": f"{folder}/avx2.so",
        "OV_CPU_MAX_ISA": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }


def replace_cpuid(library: Path) -> int:
    """Replace each `cpuid` of a library by `ud2`; returns their number.

    The addresses come from a disassembly, because the same bytes occur inside other instructions.
    """
    sections = objdump("-h", library)
    name, _, address, _, offset = re.findall(r"\d+ (\.text) +(\w+) +(\w+) +(\w+) +(\w+)", sections)[0]
    listed = objdump("-d", library, "--section", name, "--no-show-raw-insn")
    places = [int(place, 16) - int(address, 16) + int(offset, 16) for place in re.findall(r"(\w+):\s+cpuid", listed)]
    content = bytearray(library.read_bytes())
    for place in places:
        assert content[place : place + 2] == CPUID, "the disassembly and the file differ"
        content[place : place + 2] = UD2
    library.write_bytes(content)
    return len(places)


def objdump(option: str, library: Path, *more: str) -> str:
    """Return what objdump prints about a library."""
    return subprocess.run(["objdump", option, f"{library}", *more], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
