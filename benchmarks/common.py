"""Functions that the benchmarks share: description of the machine, images as arrays, CSV files."""

from __future__ import annotations

import csv
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.runtime.bench import processor


def hwc(image: torch.Tensor) -> Pixels:
    """Return (3, H, W) as (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def machine() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "commit": commit.strip(),
    }


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
