import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.training.lpips import VGG16


@pytest.fixture(scope="session")
def random_lpips(tmp_path_factory):
    """Random weights of VGG16 in the published layout."""
    generator, tensors = np.random.default_rng(0), {}
    for i, (entry, width, side, *_) in enumerate(layer for stage in VGG16 for layer in stage):
        tensors[f"conv{i}.weight"] = generator.normal(0, (2 / entry / side**2) ** 0.5, (width, entry, side, side))
        tensors[f"conv{i}.bias"] = np.zeros(width)
    tensors |= {f"lin{i}": np.ones((1, stage[-1][1], 1, 1)) for i, stage in enumerate(VGG16)}
    path = tmp_path_factory.mktemp("lpips") / "vgg.npz"
    np.savez(path, **{name: value.astype(np.float16) for name, value in tensors.items()})
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray((make_image(80, 72, seed=i) * 255).astype(np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())
