"""Read the files of a base directory (diffusers' layout) without building its networks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import safe_open

from pfstorer_rt.base_config import LARGEST, base_config_from_dict
from pfstorer_rt.checks import read_json
from pfstorer_rt.config import BaseConfig
from pfstorer_rt.errors import BadFileError, one_line
from pfstorer_rt.files import fingerprint_tensors, open_plain, show_path

if TYPE_CHECKING:
    import torch

BUILTIN = Path(__file__).parent / "bases"
"""Folder of the bases in the package, one folder per base."""
NETWORKS = ("unet", "structure_encoder", "vae", "text_encoder", "cfw")
"""Folders of the networks; a base without decoder feature wrapping has no `cfw`."""

PRIOR = Path("personalization") / "model.safetensors"
"""File of the prior of the personalization in a base directory; not every base has one."""


def find_base(path_or_name: str | Path) -> Path:
    """Return the directory of a base, given by path or by the name of a base in the package; raises `BadFileError`."""
    for path in (Path(path_or_name), BUILTIN / str(path_or_name)):
        if (path / "config.json").is_file():
            return path
    found = "not a base directory (no config.json)" if Path(path_or_name).exists() else "no such base"
    names = ", ".join(shipped_bases())
    raise BadFileError(f"{path_or_name}: {found}; expected a base directory or the name of a shipped base ({names})")


def shipped_bases() -> list[str]:
    """Return the sorted names of the bases in the package."""
    return sorted(p.parent.name for p in BUILTIN.glob("*/config.json"))


@contextmanager
def reading_base(path: Path) -> Iterator[None]:
    """Convert errors of the libraries that read a base directory to a `BadFileError` with the path."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each library has its own exception types for damaged files
        reason = one_line(error)
        raise BadFileError(f"{path}: not a usable base directory ({reason}); import or train it again") from error


def read_config(path: Path) -> BaseConfig:
    """Read the configuration of a base directory."""
    with open_plain(path / "config.json") as file:
        return base_config_from_dict(read_json(file.read(LARGEST + 1), LARGEST))


def network_files(folder: Path) -> list[Path]:
    """Return the safetensors files of one network in diffusers' layout: a single file, or its shards.

    A downloaded folder may also contain a variant of the weights (`.fp16.safetensors`). The variant is used only if
    there are no other weights. Raises `BadFileError` if the folder has no safetensors file.
    """
    variants: dict[str, list[Path]] = {}
    for file in sorted(file for file in folder.glob("*.safetensors") if file.is_file()):
        variants.setdefault(re.sub(r"-\d+-of-\d+", "", file.stem), []).append(file)
    if not variants:
        raise BadFileError(f"{show_path(folder)}: no safetensors file; expected a network in diffusers' layout")
    return variants[min(variants, key=lambda name: (name.count("."), name))]


def read_network(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of one network in diffusers' layout."""
    from safetensors.torch import load_file

    return {k: v for file in network_files(folder) for k, v in load_file(file).items()}


def network_folders(path: Path) -> list[Path]:
    """Return the sorted network folders of a base directory."""
    return [path / name for name in sorted(NETWORKS) if name != "cfw" or (path / name).is_dir()]


def count_parameters(path: Path) -> dict[str, int]:
    """Return {network: number of parameters} of a base directory, read from the file headers."""
    counts: dict[str, int] = {}
    for folder in network_folders(path):
        for file in network_files(folder):
            with safe_open(file, "pt") as handle:
                sizes = [math.prod(handle.get_slice(key).get_shape()) for key in handle.keys()]  # noqa: SIM118
            counts[folder.name] = counts.get(folder.name, 0) + sum(sizes)
    return counts


def prior_kind(path: Path) -> Literal["none", "start", "instant"]:
    """Return the kind of the prior in a base directory: `start` of a training, or `instant`, without training."""
    if not (path / PRIOR).is_file():
        return "none"
    with safe_open(path / PRIOR, "pt") as handle:
        return "instant" if is_instant(handle.metadata()) else "start"


def is_instant(metadata: Mapping[str, str] | None) -> bool:
    """Whether the metadata of a prior's file belong to an instant prior, as those of earlier versions all are."""
    return (metadata or {}).get("instant") != str(False)


def fingerprint_directory(path: Path) -> str:
    """Return the fingerprint of a base directory, reading one tensor at a time."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for folder in network_folders(path):
            with ExitStack() as stack:
                files = [stack.enter_context(safe_open(file, "pt")) for file in network_files(folder)]
                holders = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)
                for key in sorted(holders):
                    yield f"{folder.name}.{key}", holders[key].get_tensor(key)

    return fingerprint_tensors(tensors())
