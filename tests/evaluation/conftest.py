import sys

import pytest

from pfstorer_rt.evaluation.registry import load_metrics


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
