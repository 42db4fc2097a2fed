"""Synthetic degradation: makes a low-quality image (LQ) from a high-quality image (HQ), deterministic for a seed.

The second-order model of Real-ESRGAN with StableSR's settings, plus PFStorer's additions (section 4: ISP noise
after SCUNet, motion blur, median blur). Every draw comes from the numpy generator in the arguments; no global random
state is read or written. The levels "light" and "heavy" are defined by this project, not by the paper.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pfstorer_rt.degradation.blur import gaussian_kernel, generalized_kernel, motion_kernel, sinc_kernel
from pfstorer_rt.errors import SettingError

__all__ = [
    "BLUR_KINDS",
    "LEVELS",
    "RESIZE_MODES",
    "DegradationConfig",
    "StageConfig",
    "add_gaussian_noise",
    "add_poisson_noise",
    "degrade",
    "filter2d",
    "gaussian_kernel",
    "generalized_kernel",
    "isp_noise",
    "jpeg",
    "median_blur",
    "motion_kernel",
    "random_blur_kernel",
    "resize",
    "sinc_kernel",
]

BLUR_KINDS = ("iso", "aniso", "gen-iso", "gen-aniso", "plateau-iso", "plateau-aniso")
"""Kinds of kernels, in the order of `StageConfig.kind_probs`."""

RESIZE_MODES = ("area", "bilinear", "bicubic")
"""Interpolations of a random resize, with equal probabilities."""

_PHOTONS = 256.0  # photons at white for a Poisson scale of 1: the grey levels of an 8-bit image

Range = tuple[float, float]


@dataclass(frozen=True)
class StageConfig:
    """One blur-resize-noise-JPEG stage; the defaults are StableSR's first stage. Ranges are inclusive."""

    blur_prob: float = 1.0
    kernel_size: tuple[int, int] = (7, 21)  # pixels; odd sizes only
    kind_probs: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_prob: float = 0.1
    sigma: Range = (0.2, 1.5)  # pixels
    beta_gen: Range = (0.5, 2.0)
    beta_plateau: Range = (1.0, 1.5)
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize: Range = (0.3, 1.5)
    gaussian_prob: float = 0.5  # else Poisson
    gaussian_sigma: Range = (1.0, 15.0)  # of 255
    poisson_scale: Range = (0.05, 2.0)
    grey_prob: float = 0.4
    jpeg: tuple[int, int] = (60, 95)


def _second() -> StageConfig:
    return StageConfig(
        blur_prob=0.5,
        sigma=(0.2, 1.0),
        resize_probs=(0.3, 0.4, 0.3),
        resize=(0.6, 1.2),
        gaussian_sigma=(1.0, 12.0),
        poisson_scale=(0.05, 1.0),
        jpeg=(60, 100),
    )


@dataclass(frozen=True)
class DegradationConfig:
    """The whole degradation; the defaults are StableSR's settings with PFStorer's additions.

    Training sets `p_hq` (PFStorer section 4: 0.03) with `dataclasses.replace`; the presets keep it at 0, so
    that a test pair is always degraded.
    """

    first: StageConfig = field(default_factory=StageConfig)
    second: StageConfig = field(default_factory=_second)
    sf: float = 4.0  # size of the HQ image divided by the size of the LQ image before it is enlarged
    final_sinc_prob: float = 0.8
    motion_prob: float = 0.2
    motion_length: Range = (3.0, 9.0)  # pixels
    isp_prob: float = 0.2
    isp_shot: Range = (1e-4, 1e-2)  # variance per unit of raw signal, log-uniform
    isp_read: Range = (1e-3, 2e-2)  # standard deviation in raw units, log-uniform
    median_prob: float = 0.1
    median_sizes: tuple[int, ...] = (3, 5)  # pixels
    p_hq: float = 0.0  # probability that the LQ image equals the HQ image


LEVELS: dict[str, DegradationConfig] = {
    "light": DegradationConfig(),
    "heavy": DegradationConfig(
        first=StageConfig(
            sigma=(0.2, 3.0),
            resize=(0.15, 1.5),
            gaussian_sigma=(1.0, 30.0),
            jpeg=(30, 95),
        ),
        second=StageConfig(
            blur_prob=0.5,
            sigma=(0.2, 1.5),
            resize_probs=(0.3, 0.4, 0.3),
            resize=(0.3, 1.2),
            gaussian_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 1.0),
            jpeg=(30, 95),
        ),
        motion_length=(3.0, 15.0),
    ),
}
"""The named levels: "light" has StableSR's ranges, "heavy" wider ones near Real-ESRGAN's."""


def degrade(
    image: torch.Tensor,
    level: DegradationConfig | str = "heavy",
    seed: int | np.random.Generator = 0,
) -> torch.Tensor:
    """Degrade one image at random, and enlarge the result to the size of the input.

    image: (3, H, W) float32 in [0, 1], RGB, of any size from 1 x 1. level: a name in `LEVELS` or a config. seed: a
    number, or a generator, which is advanced. Returns a new tensor of the same shape, dtype, and device, in [0, 1].
    With probability `p_hq` the result is a copy of the image.
    Raises `ValueError` for another shape, dtype, or range, and for an unknown level.
    Source: PFStorer section 4; StableSR's released settings for the ranges and the order of steps.
    """
    config = _checked_config(level)
    _check_image(image)
    rng = np.random.default_rng(seed)
    hq = image.detach()
    if rng.random() < config.p_hq:
        return hq.clone()
    height, width = hq.shape[-2:]
    small = (max(1, round(height / config.sf)), max(1, round(width / config.sf)))
    x = _camera(hq, config, rng)
    x = _blur_resize_noise(x, config.second, small, rng)
    x = _finish(x, config, small, rng)
    return resize(x, (height, width), "bicubic").clamp(0, 1)


def _camera(hq: torch.Tensor, config: DegradationConfig, rng: np.random.Generator) -> torch.Tensor:
    # The order of a real capture: motion, lens blur, sensor noise, smoothing (median) and compression.
    x = hq
    if rng.random() < config.motion_prob:
        x = filter2d(x, motion_kernel(rng.uniform(*config.motion_length), rng.uniform(0, math.pi)))
    x = _blur_resize_noise(x, config.first, (hq.shape[-2], hq.shape[-1]), rng)
    if rng.random() < config.isp_prob:
        x = isp_noise(x, rng, _log_uniform(rng, config.isp_shot), _log_uniform(rng, config.isp_read))
    if rng.random() < config.median_prob:
        x = median_blur(x, int(rng.choice(config.median_sizes)))
    return jpeg(x, _quality(config.first, rng))


def _blur_resize_noise(
    x: torch.Tensor, stage: StageConfig, base: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    """Run a stage without its JPEG compression; `base` is the (H, W) that the random scale multiplies."""
    if rng.random() < stage.blur_prob:
        x = filter2d(x, random_blur_kernel(stage, rng))
    scale = _random_scale(stage, rng)
    target = (max(1, round(base[0] * scale)), max(1, round(base[1] * scale)))
    x = resize(x, target, _mode(rng)).clamp(0, 1)
    grey = bool(rng.random() < stage.grey_prob)
    if rng.random() < stage.gaussian_prob:
        return add_gaussian_noise(x, rng.uniform(*stage.gaussian_sigma), rng, grey)
    return add_poisson_noise(x, rng.uniform(*stage.poisson_scale), rng, grey)


def _finish(
    x: torch.Tensor, config: DegradationConfig, small: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    # Both orders occur in images from the web: sharpening before the last save, or afterwards in the viewer.
    kernel = None
    if rng.random() < config.final_sinc_prob:
        kernel = sinc_kernel(_odd(rng, config.second.kernel_size), rng.uniform(math.pi / 3, math.pi))
    mode, quality = _mode(rng), _quality(config.second, rng)
    jpeg_last = bool(rng.random() < 0.5)
    x = x if jpeg_last else jpeg(x, quality)
    x = resize(x, small, mode)
    x = x if kernel is None else filter2d(x, kernel)
    return jpeg(x, quality) if jpeg_last else x.clamp(0, 1)


def random_blur_kernel(stage: StageConfig, rng: np.random.Generator) -> torch.Tensor:
    """Draw a blur kernel of a stage: a circular low-pass filter, or one of the six `BLUR_KINDS`.

    Returns (k, k) float32 that sums to 1, with odd k in the stage's `kernel_size`.
    """
    size = _odd(rng, stage.kernel_size)
    if rng.random() < stage.sinc_prob:
        # A small kernel cannot represent low frequencies, so its smallest cutoff is higher.
        return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    kind = BLUR_KINDS[_pick(rng, stage.kind_probs)]
    sigma_x = rng.uniform(*stage.sigma)
    sigma_y, theta = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, theta = rng.uniform(*stage.sigma), rng.uniform(-math.pi, math.pi)
    plateau = kind.startswith("plateau")
    beta = 1.0
    if plateau or kind.startswith("gen"):
        beta = _either_side_of_one(rng, stage.beta_plateau if plateau else stage.beta_gen)
    return generalized_kernel(size, sigma_x, sigma_y, theta, beta, plateau)


def filter2d(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolve every channel with one kernel, keeping the size; the image is mirrored at its borders.

    image is (C, H, W) float; kernel is (k, k), k odd. In an image that is not larger than half the kernel, the border
    pixels are repeated instead. Returns (C, H, W), not clamped.
    """
    k = kernel.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != k or k % 2 == 0:
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}; give a square of odd size")
    height, width = image.shape[-2:]
    mode = "reflect" if k // 2 < min(height, width) else "replicate"
    padded = F.pad(image[None], (k // 2,) * 4, mode=mode)[0]
    # Fourier transforms are 2 to 4 times faster than conv2d at 21 x 21. Sizes are rounded up to multiples of 32
    # because a large prime factor makes the transform slow. The wrap-around affects only discarded pixels.
    full = tuple(-(-(n + k - 1) // 32) * 32 for n in (height, width))
    product = torch.fft.rfft2(padded, s=full) * torch.fft.rfft2(kernel.to(padded), s=full)
    result: torch.Tensor = torch.fft.irfft2(product, s=full)
    return result[..., k - 1 : k - 1 + height, k - 1 : k - 1 + width]


def resize(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize (C, H, W) to (C, *size) with "area", "bilinear", or "bicubic"; "bicubic" may overshoot.

    "bilinear" and "bicubic" have no antialiasing when they reduce an image, as in simple software.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize mode is {mode!r}; choose one of {', '.join(RESIZE_MODES)}")
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    align = None if mode == "area" else False
    return F.interpolate(image[None], size=size, mode=mode, align_corners=align)[0]


def add_gaussian_noise(image: torch.Tensor, sigma: float, rng: np.random.Generator, grey: bool = False) -> torch.Tensor:
    """Add white noise of standard deviation sigma (in 0..255) to (C, H, W) in [0, 1].

    grey: use the same noise for all channels. Returns the same shape, clamped to [0, 1].
    """
    shape = (1 if grey else image.shape[0], *image.shape[1:])
    return (image + _normal(shape, rng, image) * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(image: torch.Tensor, scale: float, rng: np.random.Generator, grey: bool = False) -> torch.Tensor:
    """Add photon noise to (C, H, W) in [0, 1]: 256 photons at white, standard deviation multiplied by scale.

    The variance at a value v is scale^2 * v / 256. grey: use the noise of the channels' mean for all channels.
    Returns the same shape, clamped to [0, 1].
    """
    signal = image.mean(0, keepdim=True) if grey else image
    signal = signal.clamp_min(0)
    counts = torch.from_numpy(rng.poisson((signal * _PHOTONS).cpu().numpy())).to(image)
    return (image + scale * (counts / _PHOTONS - signal)).clamp(0, 1)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress and decompress (3, H, W) in [0, 1] as a JPEG of quality 1 to 100 (4:2:0 colour)."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    decoded = np.array(Image.open(buffer))
    return torch.from_numpy(decoded).permute(2, 0, 1).to(image) / 255


def median_blur(image: torch.Tensor, size: int) -> torch.Tensor:
    """Replace every pixel of (C, H, W) by the median of its size x size neighbours, channel by channel."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"median size is {size}; give an odd number")
    channels, height, width = image.shape
    padded = F.pad(image[None], (size // 2,) * 4, mode="replicate")[0]
    windows = F.unfold(padded[:, None], size).transpose(1, 2)  # (C, H * W, size^2)
    middle = size * size // 2
    # numpy's partial sort of contiguous rows is four times faster than torch.median here.
    ordered = np.partition(windows.cpu().contiguous().numpy(), middle, axis=-1)
    return torch.from_numpy(ordered[..., middle].copy()).to(image).view(channels, height, width)


def isp_noise(image: torch.Tensor, rng: np.random.Generator, shot: float, read: float) -> torch.Tensor:
    """Convert the image to a camera's raw mosaic, add sensor noise there, and convert it back.

    image is (3, H, W) in [0, 1]. The noise has variance shot * raw + read^2. The camera (tone, colour matrix, white
    balance) is drawn at random and is the same in both conversions, so a uniform image without noise is unchanged.
    Unlike white noise, the result is coarse and coloured, and brighter regions are noisier. Returns the same shape in
    [0, 1]. Source: PFStorer section 4 names SCUNet's ISP model; this simplified model is ours.
    """
    gamma = rng.uniform(2.0, 2.4)
    to_screen = _colour_matrix(rng).to(image)
    gains = torch.tensor([rng.uniform(1.5, 2.5), 1.0, rng.uniform(1.3, 2.2)]).to(image)[:, None, None]
    linear = _inverse_tone(image.clamp(0, 1)) ** gamma
    raw = torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_screen), linear) / gains
    developed = _sensor(raw.clamp_min(0), rng, shot, read) * gains
    back = torch.einsum("ij,jhw->ihw", to_screen, developed.clamp(0, 1))
    return _tone(back.clamp(0, 1) ** (1 / gamma))


def _sensor(raw: torch.Tensor, rng: np.random.Generator, shot: float, read: float) -> torch.Tensor:
    """Sample (3, H, W) through an RGGB mosaic with noise, and interpolate the missing colours."""
    padded = F.pad(raw[None], (1, 1, 1, 1), mode="replicate")  # every pixel then has all neighbours
    _, _, height, width = padded.shape
    mask = torch.zeros_like(padded)
    mask[:, 0, 0::2, 0::2] = 1
    mask[:, 1, 0::2, 1::2] = 1
    mask[:, 1, 1::2, 0::2] = 1
    mask[:, 2, 1::2, 1::2] = 1
    noise = _normal((1, 1, height, width), rng, padded) * (shot * padded + read**2).sqrt()
    corner = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])  # red and blue: one pixel in four
    cross = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]])  # green: one pixel in two
    weight = torch.stack([corner, cross, corner])[:, None].to(raw) / 4
    return F.conv2d((padded + noise) * mask, weight, groups=3)[0]


def _colour_matrix(rng: np.random.Generator) -> torch.Tensor:
    # Rows sum to 1, so grey stays grey. Off-diagonal values are <= 0, so the inverse keeps values in [0, 1].
    leak = torch.from_numpy(rng.uniform(0.05, 0.35, (3, 3)))
    leak.fill_diagonal_(0)
    return torch.eye(3, dtype=torch.float64) + torch.diag(leak.sum(1)) - leak


def _tone(x: torch.Tensor) -> torch.Tensor:
    return x * x * (3 - 2 * x)  # S-shaped tone curve


def _inverse_tone(y: torch.Tensor) -> torch.Tensor:
    return 0.5 - torch.sin(torch.asin(1 - 2 * y) / 3)


def _normal(shape: Sequence[int], rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32)).to(like)


def _random_scale(stage: StageConfig, rng: np.random.Generator) -> float:
    low, high = ((1.0, stage.resize[1]), (stage.resize[0], 1.0), (1.0, 1.0))[_pick(rng, stage.resize_probs)]
    return float(rng.uniform(low, high))


def _either_side_of_one(rng: np.random.Generator, bounds: Range) -> float:
    # Half of the draws are below 1 and half above; a uniform draw from a wide range would give mostly flat tops.
    low, high = (bounds[0], 1.0) if rng.random() < 0.5 else (1.0, bounds[1])
    return float(rng.uniform(low, high))


def _pick(rng: np.random.Generator, probabilities: Sequence[float]) -> int:
    return int(rng.choice(len(probabilities), p=probabilities))


def _odd(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0] // 2, (bounds[1] - 1) // 2, endpoint=True)) * 2 + 1


def _mode(rng: np.random.Generator) -> str:
    return RESIZE_MODES[int(rng.integers(len(RESIZE_MODES)))]


def _quality(stage: StageConfig, rng: np.random.Generator) -> int:
    return int(rng.integers(*stage.jpeg, endpoint=True))


def _log_uniform(rng: np.random.Generator, bounds: Range) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def _checked_config(level: DegradationConfig | str) -> DegradationConfig:
    if isinstance(level, DegradationConfig):
        return level
    if level not in LEVELS:
        raise SettingError(f"level is {level!r}; choose one of {', '.join(LEVELS)} or a DegradationConfig")
    return LEVELS[level]


def _check_image(image: torch.Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected (3, H, W): one RGB image")
    if image.dtype != torch.float32:
        raise ValueError(f"image has dtype {image.dtype}; expected torch.float32: use .float() / 255")
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # written so that NaN fails as well
        raise ValueError(f"image has values in [{low:.4g}, {high:.4g}]; expected [0, 1]: rescale or clamp it")
