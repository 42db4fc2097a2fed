"""The diffusion process: the noise schedule, the algebra of noisy latents, and the samplers.

A sampler calls `denoise(x, t) -> (x0, eps)`. `denoise_by` makes this function from a network of either prediction type.
Symbols follow DDPM and StableSR: `x` is the noisy latent, `x0` the clean latent, `eps` and `v` the predictions, `abar`
the cumulative product of the alphas. All samplers run on numpy arrays and on tensors of any device, in their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.arrays import Array
from pfstorer_rt.config import Weighting
from pfstorer_rt.errors import SettingError
from pfstorer_rt.extras import needed_by

if TYPE_CHECKING:
    import torch

TRAIN_STEPS = 1000
LAST = TRAIN_STEPS - 1
"""The timestep at which restoration starts. With few steps, it determines most of the result."""


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a base; the default is the schedule of Stable Diffusion (StableSR section 4)."""

    kind: str = "scaled_linear"
    """`scaled_linear`: the square roots of the betas are evenly spaced."""
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    steps: int = TRAIN_STEPS

    def __post_init__(self) -> None:
        """Raise `ValueError` for an unsupported schedule."""
        if self.kind != "scaled_linear" or self.steps != TRAIN_STEPS:
            raise ValueError(
                f"noise schedule {self.kind!r} of {self.steps!r} steps: expected 'scaled_linear' of {TRAIN_STEPS}"
            )
        if not 0 < self.beta_start < self.beta_end < 1:
            raise ValueError(
                f"noise schedule with betas {self.beta_start!r} to {self.beta_end!r}: expected rising ones in 0 to 1"
            )

    def betas(self) -> npt.NDArray[Any]:
        """Return the noise variances for t in 0..999."""
        return np.square(np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=np.float64))

    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """Return abar_t for t in 0..999."""
        return np.cumprod(1 - self.betas(), dtype=np.float64)

    def alphas_cumprod_tensor(self) -> torch.Tensor:
        """Return abar_t for t in 0..999 as an fp32 tensor."""
        import torch

        return torch.from_numpy(self.alphas_cumprod()).float()

    def to_diffusers(self, prediction_type: str) -> dict[str, Any]:
        """Return the content of `scheduler_config.json` for diffusers' DDPMScheduler."""
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.steps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.kind,
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
            "prediction_type": prediction_type,
            "clip_sample": False,
            "timestep_spacing": "trailing",
        }

    @classmethod
    def from_diffusers(cls, data: Mapping[str, Any], prediction_type: str) -> Schedule:
        """Read a `scheduler_config.json`; raises `ValueError` for an unsupported schedule.

        prediction_type: prediction type of the base; the file must have the same type.
        """
        expected = {"prediction_type": prediction_type, "trained_betas": None, "rescale_betas_zero_snr": False}
        for name, value in expected.items():
            if data.get(name, value) != value:
                raise ValueError(f"noise schedule with {name} {str(data[name])[:40]!r}: expected {value!r}")
        names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        if absent := [name for name in names if name not in data]:
            raise ValueError(f"noise schedule without {', '.join(absent)}")
        return cls(*(data[name] for name in names))


Denoise = Callable[[Array, int], tuple[Array, Array]]
"""denoise(x, t) -> (x0, eps), for the whole canvas."""
Noise = Callable[[], Array]
"""noise() -> new standard normal noise with the shape of the canvas."""
Sampler = Callable[[Denoise, Array, Sequence[int], Schedule, Noise, float], Array]
"""sampler(denoise, x, timesteps, schedule, noise, eta) -> x0, with ascending timesteps."""


def respace(steps: int) -> list[int]:
    """Return `steps` of the 1000 timesteps, ascending, including 0 and 999 (StableSR's respacing).

    One step gives [999]; StableSR requires at least two. Raises `ValueError` outside 1..1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise SettingError(f"{steps} steps: expected 1 to {TRAIN_STEPS}", setting="steps")
    if steps == 1:
        return [TRAIN_STEPS - 1]
    stride, position, chosen = (TRAIN_STEPS - 1) / (steps - 1), 0.0, set()
    for _ in range(steps):
        chosen.add(round(position))  # round half to even, as in StableSR
        position += stride
    return sorted(chosen)


@dataclass(frozen=True)
class Posterior:
    """Posterior q(x_{t-1} | x_t, x0) of the respaced chain: mean c1 x0 + c2 x, and variance (DDPM eq. 6-7)."""

    beta: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    c1: npt.NDArray[np.float64]
    c2: npt.NDArray[np.float64]


def posterior(timesteps: Sequence[int], schedule: Schedule) -> Posterior:
    """Return the posterior of every step of a respaced chain, in the order of `timesteps` (ascending)."""
    abar = schedule.alphas_cumprod()[list(timesteps)]
    previous = np.concatenate([[1.0], abar[:-1]])
    beta = 1 - abar / previous
    variance = beta * (1 - previous) / (1 - abar)
    c1 = beta * np.sqrt(previous) / (1 - abar)
    c2 = (1 - previous) * np.sqrt(1 - beta) / (1 - abar)
    return Posterior(beta, variance, c1, c2)


def start_from_lq(z_lq: Array, noise: Array, schedule: Schedule) -> Array:
    """Return x_T = sqrt(abar_999) z_lq + sqrt(1 - abar_999) noise, for any respacing (StableSR section 4)."""
    abar = float(schedule.alphas_cumprod()[-1])
    return abar**0.5 * z_lq + (1 - abar) ** 0.5 * noise


def split_prediction(x: Array, prediction: Array, abar: float, prediction_type: str) -> tuple[Array, Array]:
    """Return (x0, eps) from a prediction of eps or of v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    a, s = abar**0.5, (1 - abar) ** 0.5
    if prediction_type == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    return (x - s * prediction) / a, prediction


def denoise_by(predict: Callable[[Array, int], Array], schedule: Schedule, prediction_type: str) -> Denoise:
    """Return the `denoise` function of samplers for a network `predict(x, t)` that predicts eps or v."""
    abar = schedule.alphas_cumprod()
    return lambda x, t: split_prediction(x, predict(x, t), float(abar[t]), prediction_type)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return `sqrt(abar_t) x0 + sqrt(1 - abar_t) noise` for (B, C, h, w) and t (B,) in 0..999 (DDPM eq. 4)."""
    abar = alphas_cumprod[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def noisy_latent(
    x0: torch.Tensor, z_lq: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return x_t (B, C, h, w). Rows at the last timestep use the LQ latent, as restoration does.

    At the last timestep, x_t of the clean latent still contains 7 % of it. Restoration has no such signal.
    """
    import torch

    start = t == LAST
    return add_noise(torch.where(start[:, None, None, None], z_lq, x0), noise, t, alphas_cumprod)


def x0_from_prediction(
    x: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """Return the clean latent x0 from a prediction of eps, or of `v = sqrt(abar) eps - sqrt(1 - abar) x0`."""
    abar = alphas_cumprod[t][:, None, None, None]
    if prediction_type == "epsilon":
        return (x - (1 - abar).sqrt() * prediction) / abar.sqrt()
    return abar.sqrt() * x - (1 - abar).sqrt() * prediction


def x0_weight(t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return squared error of x0 / squared error of the prediction, (B,): `1 - abar` (v) or `(1 - abar) / abar` (eps).

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
    """Return the mean squared error of each row, (B,).

    weighting: `prediction` uses the error of eps or v; `x0` uses the error of the clean latent. `x0` gives the largest
    weight to the noisy timesteps, where few-step sampling starts.
    """
    found = x0_from_prediction(x, prediction.float(), t, alphas_cumprod, prediction_type)
    error = (found - x0).square().mean((1, 2, 3))
    return error if weighting == "x0" else error / x0_weight(t, alphas_cumprod, prediction_type)


def sample_ddpm(denoise: Denoise, x: Array, timesteps: Sequence[int], schedule: Schedule, noise: Noise) -> Array:
    """Respaced DDPM: posterior mean plus standard deviation times noise, no noise at the end (StableSR section 4)."""
    q = posterior(timesteps, schedule)
    for i in reversed(range(len(timesteps))):
        x0, _ = denoise(x, timesteps[i])
        x = float(q.c1[i]) * x0 + float(q.c2[i]) * x
        if i > 0:
            x = x + float(q.variance[i]) ** 0.5 * noise()
    return x


def sample_ddim(
    denoise: Denoise, x: Array, timesteps: Sequence[int], schedule: Schedule, noise: Noise, eta: float = 0.0
) -> Array:
    """DDIM (Song 2021, eq. 12) on the respaced timesteps; eta 0 is deterministic, eta 1 has the variance of DDPM."""
    abar = schedule.alphas_cumprod()
    for i in reversed(range(len(timesteps))):
        a, previous = float(abar[timesteps[i]]), float(abar[timesteps[i - 1]]) if i > 0 else 1.0
        x0, eps = denoise(x, timesteps[i])
        sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)) ** 0.5
        x = previous**0.5 * x0 + max(0.0, 1 - previous - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


def sample_dpmpp_2m(denoise: Denoise, x: Array, timesteps: Sequence[int], schedule: Schedule) -> Array:
    """DPM-Solver++ (2M) (Lu 2022, algorithm 2); deterministic. The last step returns the predicted x0."""
    abar = schedule.alphas_cumprod()[list(timesteps)]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    lam = np.log(alpha / sigma)
    x0, _ = denoise(x, timesteps[-1])
    mean = x0
    for i in reversed(range(len(timesteps) - 1)):
        h = lam[i] - lam[i + 1]
        x = float(sigma[i] / sigma[i + 1]) * x - float(alpha[i] * np.expm1(-h)) * mean
        previous, (x0, _) = x0, denoise(x, timesteps[i])
        share = float((lam[i - 1] - lam[i]) / h) / 2 if i > 0 else 0.0  # 1 / (2 r)
        mean = x0 + share * (x0 - previous)
    return x0


def sample_unipc(denoise: Denoise, x: Array, timesteps: Sequence[int], schedule: Schedule) -> Array:
    """UniPC (Zhao 2023) through diffusers; deterministic. It uses only the number of timesteps, with its own spacing.

    Raises `MissingBackendError` without diffusers.
    """
    with needed_by("sampler unipc", "train"):
        import torch
        from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.kind,
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    solver.set_timesteps(len(timesteps))
    for t in solver.timesteps:
        x0, _ = denoise(x, int(t))
        step = solver.step(torch.as_tensor(x0), t, torch.as_tensor(x)).prev_sample
        x = step.numpy() if isinstance(x, np.ndarray) else step
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": lambda denoise, x, timesteps, schedule, noise, eta: sample_ddpm(denoise, x, timesteps, schedule, noise),
    "ddim": sample_ddim,
    "dpmpp_2m": lambda denoise, x, timesteps, schedule, noise, eta: sample_dpmpp_2m(denoise, x, timesteps, schedule),
    "unipc": lambda denoise, x, timesteps, schedule, noise, eta: sample_unipc(denoise, x, timesteps, schedule),
}
"""Name -> sampler; all samplers have the same signature."""


def check_sampler(name: str) -> None:
    """Raise `ValueError` for an unknown sampler, `MissingBackendError` if the sampler needs diffusers and lacks it."""
    if name not in SAMPLERS:
        raise SettingError(f"sampler {name!r}: expected one of {', '.join(SAMPLERS)}", setting="sampler")
    if name == "unipc":
        with needed_by("sampler unipc", "train"):
            import diffusers  # noqa: F401
