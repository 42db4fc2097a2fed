"""The diffusion process: the noise schedule, the algebra of noisy latents, and the samplers.

Samplers are functions over one denoiser: `sample_*(denoiser, x, timesteps, prediction_type, noise, eta)`.

Letters follow DDPM and StableSR: `x` the noisy latent, `x0` the clean one, `eps`/`v` predictions, `abar`
the cumulative product of alphas. All samplers run on fp32 tensors of any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.config import BaseConfig, Weighting
from pfstorer_rt.errors import SettingError
from pfstorer_rt.extras import needed_by

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
"""denoiser(x, t) -> prediction, of the whole canvas."""
Noise = Callable[[], torch.Tensor]
"""Draws fresh standard normal noise of the canvas's shape."""

TRAIN_STEPS = 1000
BETAS = 0.00085, 0.0120
"""The first and the last of the noise variances (Stable Diffusion)."""
LAST = TRAIN_STEPS - 1
"""The timestep at which restoring starts; with few steps nearly all is decided there."""


def betas() -> npt.NDArray[Any]:
    """The 1000 noise variances: linspace of square roots, squared (StableSR section 4, "scaled linear")."""
    roots = np.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_STEPS, dtype=np.float64)
    return np.square(roots)


def alphas_cumprod() -> npt.NDArray[np.float64]:
    """abar_t for t in 0..999."""
    return np.cumprod(1 - betas())


def make_scheduler(config: BaseConfig) -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule (StableSR section 4: 1000 steps, scaled linear)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="scaled_linear",
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def respace(steps: int) -> list[int]:
    """Return `steps` of the 1000 timesteps, ascending, 0 and 999 among them (StableSR's respacing).

    One step is [999], which StableSR itself cannot do. Raises `ValueError` outside 1..1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise SettingError(f"{steps} steps: expected 1 to {TRAIN_STEPS}")
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


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """`sqrt(abar_t) x0 + sqrt(1 - abar_t) noise` for (B, C, h, w) and t (B,) in 0..999 (DDPM eq. 4)."""
    abar = alphas_cumprod[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def noisy_latent(
    x0: torch.Tensor, z_lq: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t of (B, C, h, w); rows at the last timestep begin as restoring does, from their LQ latents.

    There x_t of the clean latent would still show 7 % of it, which no restoring sees.
    """
    start = t == LAST
    return add_noise(torch.where(start[:, None, None, None], z_lq, x0), noise, t, alphas_cumprod)


def x0_from_prediction(
    x: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The clean latent that a prediction of eps, or of `v = sqrt(abar) eps - sqrt(1 - abar) x0`, stands for."""
    abar = alphas_cumprod[t][:, None, None, None]
    if prediction_type == "epsilon":
        return (x - (1 - abar).sqrt() * prediction) / abar.sqrt()
    return abar.sqrt() * x - (1 - abar).sqrt() * prediction


def x0_weight(t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Factor from the squared error of a prediction to that of x0, (B,): `1 - abar` for v, over `abar` for eps.

    Source: x0 solved from `x = sqrt(abar) x0 + sqrt(1 - abar) eps` (Salimans and Ho 2022, section 4 and appendix D).
    """
    abar = alphas_cumprod[t]
    return (1 - abar) / abar if prediction_type == "epsilon" else 1 - abar


def prediction_error(
    prediction: torch.Tensor,
    x: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    weighting: Weighting,
) -> torch.Tensor:
    """Mean squared error of each row, (B,).

    weighting: `prediction` is the error of the prediction itself; `x0` that of the clean latent that it stands for,
    so that the noisy end, where few-step sampling starts, counts most.
    """
    found = x0_from_prediction(x, prediction.float(), t, alphas_cumprod, prediction_type)
    error = (found - x0).square().mean((1, 2, 3))
    return error if weighting == "x0" else error / x0_weight(t, alphas_cumprod, prediction_type)


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
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": BETAS[0],
        "beta_end": BETAS[1],
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
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


def check_sampler(name: str) -> None:
    """Raise `ValueError` for an unknown sampler, and `MissingBackendError` for one of diffusers without diffusers."""
    if name not in SAMPLERS:
        raise SettingError(f"sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    if SAMPLERS[name] in (sample_dpmpp_2m, sample_unipc):
        with needed_by(f"sampler {name}"):
            import diffusers  # noqa: F401
