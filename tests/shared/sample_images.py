"""Small images for the tests of image files."""

import io

import numpy as np
import torch


def sample(height=6, width=9, channels=3, seed=0):
    """Return random 8-bit pixels (H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width, seed=0):
    """Return a smooth image (1, 3, H, W) in [-1, 1]."""
    coarse = torch.tensor(np.random.default_rng(seed).random((1, 3, 4, 5)), dtype=torch.float32) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def stream(image, kind, **options):
    """Return a stream of a Pillow image in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def levels(pixels):
    """Return pixels in [0, 1] as 8-bit levels."""
    assert pixels.dtype == np.float32 and pixels.min() >= 0 and pixels.max() <= 1
    return np.rint(pixels * 255).astype(np.uint8)


def one_line(raised, *words):
    """Check that an exception has one line of text with these words."""
    text = str(raised.value)
    assert "\n" not in text and len(text) < 400
    assert all(word in text for word in words), text
