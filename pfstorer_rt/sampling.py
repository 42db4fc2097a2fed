"""Schedules, and samplers as functions over one denoiser: `sample_*(denoiser, x, timesteps, schedule, noise)`.

Letters follow DDPM and StableSR: `x` the noisy latent, `x0` the clean one, `eps`/`v` predictions, `abar`
the cumulative product of alphas. All samplers run on fp32 tensors of any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
"""denoiser(x, t) -> prediction, of the whole canvas."""
Noise = Callable[[], torch.Tensor]
"""Draws fresh standard normal noise of the canvas's shape."""

TRAIN_STEPS = 1000


def betas() -> npt.NDArray[Any]:
    """The 1000 noise variances: linspace of square roots, squared (StableSR section 4, "scaled linear")."""
    roots = np.linspace(0.00085**0.5, 0.0120**0.5, TRAIN_STEPS, dtype=np.float64)
    return np.square(roots)


def alphas_cumprod() -> npt.NDArray[np.float64]:
    """abar_t for t in 0..999."""
    return np.cumprod(1 - betas())


def respace(steps: int) -> list[int]:
    """Return `steps` of the 1000 timesteps, ascending, 0 and 999 among them (StableSR's respacing).

    One step is [999], which StableSR itself cannot do. Raises `ValueError` outside 1..1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"{steps} steps: expected 1 to {TRAIN_STEPS}")
    if steps == 1:
        return [TRAIN_STEPS - 1]
    stride, position, chosen = (TRAIN_STEPS - 1) / (steps - 1), 0.0, set()
    for _ in range(steps):
        chosen.add(round(position))  # Python rounds halves to even, as the reference does
        position += stride
    return sorted(chosen)


@dataclass(frozen=True)
class Posterior:
    """The respaced chain's posterior q(x_{t-1} | x_t, x0): mean = c1 x0 + c2 x, variance (DDPM eq. 6-7)."""

    beta: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    c1: npt.NDArray[np.float64]
    c2: npt.NDArray[np.float64]


def posterior(timesteps: Sequence[int]) -> Posterior:
    """Return the posterior of every step of a respaced chain, in the order of `timesteps` (ascending)."""
    abar = alphas_cumprod()[list(timesteps)]
    previous = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / previous
    variance = beta * (1 - previous) / (1 - abar)
    c1 = beta * np.sqrt(previous) / (1 - abar)
    c2 = (1 - previous) * np.sqrt(1 - beta) / (1 - abar)
    return Posterior(beta, variance, c1, c2)


def start_from_lq(z_lq: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_T = sqrt(abar_999) z_lq + sqrt(1 - abar_999) noise, whatever the respacing (StableSR section 4)."""
    abar = float(alphas_cumprod()[-1])
    return abar**0.5 * z_lq + (1 - abar) ** 0.5 * noise


def split_prediction(
    x: torch.Tensor, prediction: torch.Tensor, abar: float, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x0, eps) from a prediction of eps or of v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    a, s = abar**0.5, (1 - abar) ** 0.5
    if prediction_type == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    return (x - s * prediction) / a, prediction


def sample_ddpm(
    denoiser: Denoise,
    x: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    noise: Noise,
    eta: float = 1.0,
) -> torch.Tensor:
    """Respaced DDPM: posterior mean plus its deviation times noise, none at the last step (StableSR section 4)."""
    abar, q = alphas_cumprod(), posterior(timesteps)
    for i in reversed(range(len(timesteps))):
        t = timesteps[i]
        x0, _ = split_prediction(x, denoiser(x, t), float(abar[t]), prediction_type)
        x = float(q.c1[i]) * x0 + float(q.c2[i]) * x
        if i > 0:
            x = x + float(q.variance[i]) ** 0.5 * noise()
    return x


def sample_ddim(
    denoiser: Denoise,
    x: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    noise: Noise,
    eta: float = 0.0,
) -> torch.Tensor:
    """DDIM (Song 2021, eq. 12) over the respaced timesteps; eta 0 is deterministic, 1 has DDPM's variance."""
    abar = alphas_cumprod()
    for i in reversed(range(len(timesteps))):
        t = timesteps[i]
        a, previous = float(abar[t]), float(abar[timesteps[i - 1]]) if i > 0 else 1.0
        x0, eps = split_prediction(x, denoiser(x, t), a, prediction_type)
        sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)) ** 0.5
        x = previous**0.5 * x0 + max(0.0, 1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


def _diffusers_scheduler(name: str, timesteps: Sequence[int], prediction_type: str) -> Any:
    """Return a diffusers scheduler of this noise schedule, set to the timesteps where it takes them."""
    import diffusers

    settings = {
        "num_train_timesteps": TRAIN_STEPS, "beta_start": 0.00085, "beta_end": 0.0120,
        "beta_schedule": "scaled_linear", "prediction_type": prediction_type,
    }  # fmt: skip
    if name == "dpmpp_2m":
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **settings)
        scheduler.set_timesteps(timesteps=list(reversed(timesteps)))
    else:
        # UniPC takes a number of steps only; trailing spacing starts at 999 as ours does.
        scheduler = diffusers.UniPCMultistepScheduler(timestep_spacing="trailing", **settings)
        scheduler.set_timesteps(len(timesteps))
    return scheduler


def _sample_diffusers(
    name: str, denoiser: Denoise, x: torch.Tensor, timesteps: Sequence[int], kind: str
) -> torch.Tensor:
    scheduler = _diffusers_scheduler(name, timesteps, kind)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, int(t)), t, x).prev_sample
    return x


def sample_dpmpp_2m(
    denoiser: Denoise,
    x: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    noise: Noise,
    eta: float = 0.0,
) -> torch.Tensor:
    """DPM-Solver++ (2M) (Lu 2022, algorithm 2) by diffusers; deterministic."""
    return _sample_diffusers("dpmpp_2m", denoiser, x, timesteps, prediction_type)


def sample_unipc(
    denoiser: Denoise,
    x: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    noise: Noise,
    eta: float = 0.0,
) -> torch.Tensor:
    """UniPC (Zhao 2023) by diffusers, with its own trailing timesteps; deterministic."""
    return _sample_diffusers("unipc", denoiser, x, timesteps, prediction_type)


SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
}
