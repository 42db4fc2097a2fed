"""Does the base improve its input, and does an identity improve the base? People that no training has seen.

    python benchmarks/quality.py PEOPLE -o quality.csv

PEOPLE holds a folder of photographs for each person. The first five by name are the references, of the
others `--tests` are degraded and restored: without an identity, and with the person's own. One row for
each picture; the identity distance is the mean of dlib's distances to the references.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from pfstorer_rt.export import export_plan

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.faces.dlib import face_embedder, mean_distance
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import psnr, ssim
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.bench import processor
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.personalize import personalize


@click.command()
@click.argument("people", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="tiny", show_default=True)
@click.option("--tests", default=6, show_default=True, help="Test pictures of each person.")
@click.option("--limit", default=3, show_default=True, help="People.")
@click.option("--iterations", default=500, show_default=True)
@click.option("--level", type=click.Choice(["light", "heavy"]), default="heavy", show_default=True)
def main(people: Path, output: Path, base: str, tests: int, limit: int, iterations: int, level: str) -> None:
    folders = sorted(p for p in people.iterdir() if p.is_dir())[:limit]
    rows: list[dict[str, Any]] = []
    for person in folders:
        photos = find_images([person])
        rows += measure(person.name, photos[:5], photos[5 : 5 + tests], base, iterations, level)
        write(output, rows)
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        known = [row["id_distance"] for row in chosen if row["id_distance"] != ""]
        click.echo(
            f"{method:<10} PSNR {np.mean([r['psnr'] for r in chosen]):.2f}  "
            f"SSIM {np.mean([r['ssim'] for r in chosen]):.3f}  "
            f"ID {np.mean(known):.3f}  same person {np.mean([d < 0.6 for d in known]):.0%}  "
            f"faces {len(known)}/{len(chosen)}"
        )


def measure(
    name: str, refs: list[Path], tests: list[Path], base: str, iterations: int, level: str
) -> list[dict[str, Any]]:
    """Personalize on one person and measure every method on the test pictures."""
    loaded, embed = load_base(base), face_embedder()
    assert embed is not None, "install the metrics extra"
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        config = PersonalizeConfig.for_base(loaded.config, {"iterations": iterations})
        identity = personalize(name, refs, loaded, config, Path(folder) / "one.safetensors")
        seconds = time.perf_counter() - started
        export_plan(Path(folder) / "one.plan", identity, loaded)
        known = [e for p in refs if (e := embed(hwc(center_crop(read_photo(p), 192)))) is not None]
        rows = []
        with Restorer.from_plan(Path(folder) / "one.plan") as restorer:
            for i, path in enumerate(tests):
                hq = center_crop(read_photo(path), 192)
                lq, truth = hwc(degrade(hq, level, i)), hwc(hq)
                results = {
                    "input": lq,
                    "base": restorer.restore(lq, RestoreConfig(strength=0.0)),
                    "pfstorer": restorer.restore(lq),
                    "original": truth,
                }
                for method, pixels in results.items():
                    distance = mean_distance(embed(pixels), known)
                    rows.append({
                        "person": name, "picture": i, "level": level, "method": method,
                        "psnr": 99.0 if method == "original" else round(psnr(pixels, truth), 3),
                        "ssim": round(ssim(pixels, truth), 4),
                        "id_distance": "" if distance is None else round(distance, 4),
                        "iterations": iterations, "personalize_s": round(seconds, 1), **machine(),
                    })  # fmt: skip
    return rows


def hwc(image: torch.Tensor) -> Pixels:
    """(3, H, W) -> (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def machine() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "processor": processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "onnxruntime": version("onnxruntime"), "commit": commit.strip(),
    }  # fmt: skip


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
