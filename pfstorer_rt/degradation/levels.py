"""Settings of the synthetic degradation, and the two named levels.

The levels "light" and "heavy" are defined by this project, not by the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pfstorer_rt.errors import SettingError

BLUR_KINDS = ("iso", "aniso", "gen-iso", "gen-aniso", "plateau-iso", "plateau-aniso")
"""Kinds of kernels, in the order of `StageConfig.kind_probs`."""

RESIZE_MODES = ("area", "bilinear", "bicubic")
"""Interpolations of a random resize, with equal probabilities."""

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


def level_config(level: DegradationConfig | str) -> DegradationConfig:
    """Return the settings of a named level; settings are returned unchanged. Raises `SettingError` for another name."""
    if isinstance(level, DegradationConfig):
        return level
    if level not in LEVELS:
        raise SettingError(f"level is {level!r}; choose one of {', '.join(LEVELS)} or a DegradationConfig")
    return LEVELS[level]
