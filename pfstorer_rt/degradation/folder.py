"""Degrade the images of a folder to files, so that any method can be run on the same inputs."""

from __future__ import annotations

from pathlib import Path

import torch

from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.files import load_image, save_image
from pfstorer_rt.imaging.find import by_name


def degrade_folder(source: Path, target: Path, level: str, seed: int = 0, overwrite: bool = False) -> list[Path]:
    """Degrade every image of a folder and its sub-folders to PNG files of the same names; returns these files.

    level: "light" or "heavy". The first image by name is degraded with `seed`, the next with seed + 1, so the results
    depend only on the folder's images, the level and the seed.
    Raises `BadFileError` for a missing or empty folder, `PFStorerError` when a file exists without `overwrite`.
    """
    written = []
    for number, (name, path) in enumerate(by_name(source).items()):
        image = torch.from_numpy(load_image(path).pixels).permute(2, 0, 1).contiguous()
        file = target / f"{name}.png"
        make_folder(file.parent)
        save_image(file, degrade(image, level, seed + number).permute(1, 2, 0).numpy(), overwrite=overwrite)
        written.append(file)
    return written
