"""What a restoration will take, said before it begins: tiles, steps, memory and time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.imaging.color import WAVELET_REACH
from pfstorer_rt.imaging.rows import IN_MEMORY, TALL, Spool
from pfstorer_rt.runtime.restorer import Restorer, Work

CODEC_BYTES = 4
"""Bytes a pixel that Pillow holds while it decodes or encodes a picture."""
SLACK = 1.15
"""Allocators keep more than is asked of them."""
LATENT_COPIES = 8
"""Canvases of latents alive at once: the LQ latent, the noisy one, the blender's sums, the sampler's terms."""


@dataclass(frozen=True)
class Forecast:
    """A prediction; compare with what `--json` reports afterwards."""

    work: Work
    seconds: float
    peak_bytes: int

    def facts(self) -> dict[str, Any]:
        """Return the entries of a report."""
        return {
            **asdict(self.work),
            "predicted_seconds": round(self.seconds, 3),
            "predicted_peak_mb": round(self.peak_bytes / 1e6),
        }


class Forecaster:
    """Predicts from one tile that goes through every network, timed after a warm-up."""

    def __init__(self, restorer: Restorer, config: RestoreConfig) -> None:
        """Restore a picture of one batch of tiles, which is also what makes the engine take its memory."""
        self.restorer, self.config = restorer, config
        tile = restorer.manifest.tile
        stride = tile - restorer.overlap(config)
        wide = Spool.of(np.full((tile, tile + (config.tile.batch - 1) * stride, 3), 0.5, np.float32))
        restorer.restore_rows(wide, config)
        self._moments = [time.perf_counter()]
        restorer.restore_rows(wide, config, lambda done, total: self._moments.append(time.perf_counter()))
        self._calibrated = restorer.plan(wide.height, wide.width, config)
        self._resident = psutil.Process().memory_info().rss

    def predict(self, height: int, width: int) -> Forecast:
        """Predict the restoration of a picture of that size."""
        work, known = self.restorer.plan(height, width, self.config), self._calibrated
        took = np.diff(self._moments)
        pixels = known.height * known.width / known.codec_tiles
        side = min(work.height * work.width, self.codec_pixels(work))
        codec = (took[0] + took[-1]) * side / pixels
        denoise = took[1:-1].sum() / (known.tiles * known.steps)
        seconds = float(work.codec_tiles * codec + work.tiles * work.steps * denoise)
        return Forecast(work, seconds, self.peak(work, height * width, side / pixels))

    def codec_pixels(self, work: Work) -> int:
        """Return the pixels of one tile of the encoder and decoder."""
        tiles = self.restorer._codec_tiles(work.height, work.width, self.config)
        return tiles.sides[0] * tiles.sides[1] * self.restorer.manifest.factor**2

    def peak(self, work: Work, pixels: int, codec_scale: float) -> int:
        """Bytes: the process as it is, larger tiles of the decoder, latents, bands, and one picture in Pillow."""
        m, canvas = self.restorer.manifest, work.height * work.width
        activations = 3 * 64 * 4 * self.codec_pixels(work) * max(0.0, 1 - 1 / codec_scale)
        latents = LATENT_COPIES * 4 * m.latent_channels * canvas // m.factor**2
        rows = 3 * 4 * 12 * work.width * (TALL + 2 * WAVELET_REACH)
        spooled = min(3 * IN_MEMORY, 2 * 12 * canvas)
        codec = CODEC_BYTES * max(pixels, canvas)
        return int(SLACK * (self._resident + activations + latents + spooled + max(rows, codec)))
