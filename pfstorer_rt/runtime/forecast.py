"""A forecast of a restoration before it begins: tiles, steps, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.imaging.color import WAVELET_REACH
from pfstorer_rt.imaging.rows import IN_MEMORY, TALL, THREADS, Spool
from pfstorer_rt.runtime.coarse import Passes
from pfstorer_rt.runtime.layout import Layout
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.runtime.tiled_networks import are_kept, run, wanted_features

PILLOW_BYTES = 4
"""Bytes per pixel that Pillow keeps while it decodes or encodes an image."""
SLACK = 1.15
"""Factor for memory that allocators keep beyond the requested bytes."""
LATENT_COPIES = 8
"""Canvases of latents in memory at once: LQ latent, noisy latent, the blender's sums, the sampler's terms."""


@dataclass(frozen=True)
class Forecast:
    """A prediction with the same entries as the report of the finished restoration."""

    passes: Passes
    seconds: float
    peak_bytes: int

    def facts(self) -> dict[str, Any]:
        """Return the entries of a report."""
        return {
            **self.passes.facts(),
            "predicted_seconds": round(self.seconds, 3),
            "predicted_peak_mb": round(self.peak_bytes / 1e6),
        }


class Forecaster:
    """Predicts from the measured time of one batch of tiles through every network, after a warm-up."""

    def __init__(self, restorer: Restorer, config: RestoreConfig) -> None:
        """Restore one batch of tiles twice in one step; the engine allocates its memory in the first run."""
        self.restorer, self.config = restorer, config
        short = replace(config, scale=1.0, steps=1, coarse="off")
        tile, recipe = restorer.manifest.tile, restorer.recipe(short)
        wide = Spool.of(np.zeros((3, tile, tile + (recipe.batch - 1) * (tile - recipe.overlap)), np.float32))
        restorer.restore_rows(wide, short)
        self._moments = [time.perf_counter()]
        restorer.restore_rows(wide, short, lambda done, total: self._moments.append(time.perf_counter()))
        self._calibrated = restorer.layout(wide.height, wide.width, short)
        encoded = run(restorer.sessions["encoder"], {"image": np.zeros((1, 3, tile, tile), np.float32)})
        wanted = wanted_features(restorer.sessions["decoder"])
        self._feature_bytes = sum(encoded[name].nbytes for name in wanted) / tile**2  # per pixel of a tile
        self._resident = psutil.Process().memory_info().rss

    def predict(self, height: int, width: int, passes: Passes | None = None) -> Forecast:
        """Predict the restoration of an image of height x width pixels; passes: default is one pass of tiles."""
        passes = passes or Passes(self.restorer.layout(height, width, self.config))
        layouts = passes.layouts()
        peak = max(self._peak(layout, height * width) for layout in layouts)
        return Forecast(passes, sum(self._seconds(layout) for layout in layouts), peak)

    def _seconds(self, layout: Layout) -> float:
        """Return the time of one pass."""
        known = self._calibrated
        took = np.diff(self._moments)
        codec_scale = self._codec_pixels(layout) / self._codec_pixels(known)
        again = not are_kept(layout.codec, self._features(layout))  # the decoder's pass encodes every tile again
        codec = ((1 + again) * took[0] + took[-1]) * codec_scale
        denoise = took[1:-1].sum() / (known.denoiser_tiles * known.recipe.steps)
        return float(layout.codec_tiles * codec + layout.denoiser_tiles * layout.recipe.steps * denoise)

    def _features(self, layout: Layout) -> float:
        """Return the bytes of the features of all tiles."""
        return self._feature_bytes * self._codec_pixels(layout) * len(layout.codec)

    def _codec_pixels(self, layout: Layout) -> int:
        """Return the pixels of one tile of the encoder and decoder."""
        height, width = layout.codec.sides
        return height * width * self.restorer.manifest.factor**2

    def _peak(self, layout: Layout, pixels: int) -> int:
        """Return bytes: the process now, larger tiles of the decoder, latents, features, bands, one image in Pillow."""
        m, (height, width) = self.restorer.manifest, layout.canvas.padded
        canvas, codec_scale = height * width, self._codec_pixels(layout) / self._codec_pixels(self._calibrated)
        activations = 3 * 64 * 4 * self._codec_pixels(layout) * max(0.0, 1 - 1 / codec_scale)
        latents = LATENT_COPIES * 4 * m.latent_channels * canvas // m.factor**2
        features = self._features(layout)
        kept = features if are_kept(layout.codec, features) and not layout.codec.whole else 0
        rows = 3 * 4 * 6 * THREADS * width * (TALL + 2 * WAVELET_REACH)
        spooled = min(3 * IN_MEMORY, 2 * 12 * canvas)
        pillow = PILLOW_BYTES * max(pixels, canvas)
        return int(SLACK * (self._resident + activations + latents + kept + spooled + max(rows, pillow)))
