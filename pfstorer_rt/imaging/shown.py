"""What the networks see of an image: full contrast for dark and faded images, skin tones for images without colours.

The bases are trained on photographs with black, white and colours. The result gets the contrast and the hue of the
image again.
"""

from __future__ import annotations

from pfstorer_rt.imaging.rows import Band, Rows, bands
from pfstorer_rt.imaging.tone import Shown, in_skin_tones, luma_of, reduced

FLAT = 0.55
"""An image whose luma spans less than this share of black to white gets full contrast. 350 photographs and their
heavily degraded versions span at least 0.56."""
LEAST = 0.05
"""An image of a smaller span, such as a blank page, is shown as it is: contrast would be noise."""
ROOM = 0.15
"""How far the span may exceed that of the reduced image: noise has extreme values too."""


class Levels:
    """An image with other black and white: values v become `gain` * v + `offset`."""

    def __init__(self, source: Rows, gain: float, offset: float) -> None:
        self.source, self.gain, self.offset, self.height, self.width = source, gain, offset, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        band: Band = (self.source.read(start, stop) * self.gain + self.offset).clip(-1, 1)
        return band.astype("float32")


def shown_to_networks(source: Rows) -> Shown:
    """Return a flat image with full contrast, an image without colours in skin tones, and any other image as it is."""
    small = reduced(source)
    low, high = luma_span(source, small)
    if not 2 * LEAST < high - low < 2 * FLAT:
        return in_skin_tones(source, small)
    gain = 2 / (high - low)
    offset = -1 - gain * low
    inner = in_skin_tones(Levels(source, gain, offset), Levels(small, gain, offset))

    def back(rows: Rows) -> Rows:
        return Levels(inner.back(rows), 1 / gain, -offset / gain)

    return Shown(inner.rows, back, inner.again)


def luma_span(source: Rows, small: Rows) -> tuple[float, float]:
    """Return the lowest and highest luma of an image in [-1, 1], without the outliers of noise.

    small: `reduced(source)`. If its span is not flat, it is the result, and the image is not read.
    """
    low, high = _span(small)
    if small is source or high - low >= 2 * FLAT:
        return low, high
    darkest, brightest = _span(source)
    return max(darkest, low - 2 * ROOM), min(brightest, high + 2 * ROOM)


def _span(source: Rows) -> tuple[float, float]:
    low, high = 1.0, -1.0
    for span in bands(source.height, source.width):
        luma = luma_of(source.read(*span))
        low, high = min(low, float(luma.min())), max(high, float(luma.max()))
    return low, high
