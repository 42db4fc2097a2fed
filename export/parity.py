"""Parity: an exported component has to compute the outputs of its PyTorch original.

Both are compared on a photograph, and on flat and noisy tiles, where fp16 fails.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from skimage import data
from torch import nn

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.session import Session
from pfstorer_rt.errors import ParityError
from pfstorer_rt.imaging.files import resize_bicubic
from pfstorer_rt.models.components import Component, Inputs

TIMESTEPS = {"photo": (999.0, 250.0, 0.0), "noise": (999.0,), "white": (250.0,), "grey": (0.0,), "black": (0.0,)}
"""Timesteps of the denoiser for each tile: pure noise, halfway, and an almost clean latent."""


def portrait() -> npt.NDArray[np.uint8]:
    """Return the face of scikit-image's public-domain astronaut, (256, 256, 3)."""
    return data.astronaut()[:256, 96:352]


def photograph(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Convert (H, W, 3) to (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (1, 3, H, W) to a square, with antialiasing."""
    return resize_bicubic(image, (side, side), antialias=side < image.shape[-1])


def probe_tiles(tile: int) -> dict[str, torch.Tensor]:
    """Return tiles (1, 3, tile, tile) in [-1, 1] by name: photo, grey, black, white, noise.

    The photograph is scikit-image's public-domain portrait.
    """
    photo = photograph(portrait())
    flat = {name: torch.full((1, 3, tile, tile), value) for name, value in (("grey", 0.0), ("black", -1.0))}
    noise = torch.rand((1, 3, tile, tile), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"photo": resize(photo, tile).clamp(-1, 1), **flat, "white": torch.ones(1, 3, tile, tile), "noise": noise}


def probe_inputs(component: Component, names: Collection[str] = tuple(TIMESTEPS)) -> dict[str, Inputs]:
    """Return a component's inputs for some of `probe_tiles`, by the tile's name.

    Encoder and decoder take images of any size, and get small images for uniform tiles.
    """
    tiles = probe_tiles(component.config.tile)
    if not component.every_step:
        tiles |= {name: image for name, image in probe_tiles(component.config.tile // 4).items() if name != "photo"}
    generator = torch.Generator().manual_seed(1)
    return {
        name: component.inputs_of(image, image, torch.tensor(TIMESTEPS[name]), generator)
        for name, image in tiles.items()
        if name in names
    }


LIMIT = {"fp32": 3e-4, "fp16": 5e-2, "int8": 0.3}
"""Allowed difference in units of the output's standard deviation: the largest one, for int8 the root mean square.

In fp32 a full-size decoder differs by 2e-4 at its worst pixel, because libraries sum in different orders. A small
network with an error of 1 % in one of its constants differs by 4e-4. int8 differs at single pixels, and the network is
trained to tolerate noise, so its limit is on the root mean square.
"""
MEASURE = {"fp32": "largest error", "fp16": "largest error", "int8": "root mean square error"}
"""Precision -> name of the difference from PyTorch that `judged` returns, in standard deviations of the output."""
LARGEST_HALF = 65504.0
HEADROOM = 4.0
"""fp16 is used for a component if its largest value times this factor fits."""


@torch.no_grad()
def outputs_of(original: nn.Module, inputs: dict[str, torch.Tensor]) -> list[HostArray]:
    """Return the original's outputs for ordered inputs, as fp64 arrays."""
    result = original(*inputs.values())
    return [tensor.double().numpy() for tensor in (result if isinstance(result, tuple) else (result,))]


def measure(
    expected: list[HostArray], session: Session, inputs: dict[str, torch.Tensor], spread: float = 0.0
) -> dict[str, float]:
    """Compare a session with its original's outputs for the same inputs.

    spread: the output's standard deviation on ordinary inputs, for flat inputs. Returns `max_abs` (largest
    absolute difference), `std` (of the original's output, at least `spread`), `relative` (their ratio) and `rms` (root
    mean square of the difference by `std`); the worst output counts. A value that is not finite makes both infinite.
    """
    found = session.run(**{name: inputs[name].numpy() for name in session.inputs})
    worst = {"max_abs": 0.0, "std": 0.0, "relative": 0.0, "rms": 0.0}
    for name, reference in zip(session.outputs, expected, strict=True):
        apart = found[name].astype(np.float64) - reference
        difference = float(np.abs(apart).max())
        std = max(float(reference.std()), spread)
        relative = rms = float("inf")
        if np.isfinite(difference):
            relative, rms = (value / max(std, 1e-12) for value in (difference, float(np.square(apart).mean() ** 0.5)))
        if relative >= worst["relative"]:
            worst = {"max_abs": difference, "std": std, "relative": relative, "rms": rms}
    return worst


def judged(figures: dict[str, float], precision: str) -> float:
    """Return the figure of `measure` with a limit in this precision."""
    return figures["rms" if precision == "int8" else "relative"]


def within(figures: dict[str, float], precision: str) -> bool:
    """Whether `measure`'s figures are within the precision's limit; False for values that are not finite."""
    return judged(figures, precision) <= LIMIT[precision]


def describe(figures: dict[str, float], precision: str) -> str:
    """Describe the difference of a graph from its original."""
    return (
        f"the {MEASURE[precision]} of the exported graph against PyTorch is {judged(figures, precision):.2e} standard "
        f"deviations of the output; at most {LIMIT[precision]:.0e} is allowed in {precision}"
    )


def check(component: str, figures: dict[str, float], precision: str) -> None:
    """Raise `ParityError` when `measure`'s figures are over the precision's limit."""
    if not within(figures, precision):
        raise ParityError(f"{component}: {describe(figures, precision)}; no plan was written")


def outputs_and_largest(original: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[list[HostArray], float]:
    """Return `outputs_of`, and the largest magnitude in the output of any submodule, for `fits_halves`."""
    largest = 0.0

    def look(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal largest
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = max(largest, float(tensor.abs().amax()))

    handles = [module.register_forward_hook(look) for module in original.modules()]
    try:
        return outputs_of(original, inputs), largest
    finally:
        for handle in handles:
            handle.remove()


def fits_halves(largest: float) -> bool:
    """Whether fp16 can represent the values of a component with this largest magnitude."""
    return largest * HEADROOM <= LARGEST_HALF
