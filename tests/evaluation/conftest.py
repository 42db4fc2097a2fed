import sys

import numpy as np
import pytest

from pfstorer_rt.evaluation.table import load_metrics


@pytest.fixture(scope="session")
def face():
    """A real face, (256, 256, 3) float32 in [0, 1]: scikit-image's astronaut."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[:256, 96:352] / 255).astype(np.float32)


@pytest.fixture(scope="session")
def noisy():
    """Function (pixels, sigma) -> the picture with gaussian noise."""

    def add(pixels, sigma):
        noise = np.random.default_rng(3).normal(0, sigma, pixels.shape)
        return np.clip(pixels + noise, 0, 1).astype(np.float32)

    return add


@pytest.fixture(scope="session")
def metrics():
    """Every metric that this machine can load without files of its own."""
    return load_metrics()


@pytest.fixture(scope="session")
def simple():
    """Two metrics that need nothing, and one that is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyiqa", None)
        return load_metrics(["psnr", "ssim", "musiq"])
