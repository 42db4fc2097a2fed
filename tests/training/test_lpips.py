import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.training.lpips import ALEXNET, VGG16, Lpips, normalize


@pytest.fixture(scope="module", params=["vgg16", "alexnet"])
def weights(request, tmp_path_factory):
    """Random weights in the published layout, and their file."""
    generator = np.random.default_rng(0)
    layers = [layer for stage in (VGG16 if request.param == "vgg16" else ALEXNET) for layer in stage]
    tensors = {}
    for i, (entry, width, side, *_) in enumerate(layers):
        tensors[f"conv{i}.weight"] = generator.normal(0, (entry * side**2) ** -0.5, (width, entry, side, side))
        tensors[f"conv{i}.bias"] = generator.normal(0, 0.1, width)
    widths = [stage[-1][1] for stage in (VGG16 if request.param == "vgg16" else ALEXNET)]
    tensors |= {f"lin{i}": generator.uniform(0, 1, (1, width, 1, 1)) for i, width in enumerate(widths)}
    path = tmp_path_factory.mktemp("lpips") / "weights.npz"
    np.savez(path, **{name: value.astype(np.float16) for name, value in tensors.items()})
    return request.param, path


def images(seed=0):
    return torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def published(kind, file, a, b):
    """The paper's equation 1 in float64, with the networks as torchvision lays them out."""
    tensors = {name: torch.from_numpy(file[name].astype(np.float64)) for name in file.files}
    stages = {"vgg16": (2, 2, 3, 3, 3), "alexnet": (1, 1, 1, 1, 1)}[kind]

    def features(image):
        shift = torch.tensor((-0.030, -0.088, -0.188), dtype=torch.float64)[:, None, None]
        scale = torch.tensor((0.458, 0.448, 0.450), dtype=torch.float64)[:, None, None]
        h, number, maps = (image.double() - shift) / scale, 0, []
        for i, count in enumerate(stages):
            if kind == "vgg16" and i:
                h = F.max_pool2d(h, 2, 2)
            if kind == "alexnet" and i in (1, 2):
                h = F.max_pool2d(h, 3, 2)
            for _ in range(count):
                stride, padding = (
                    ((4, 2) if number == 0 else (1, 2 if number == 1 else 1)) if kind == "alexnet" else (1, 1)
                )
                h = F.relu(F.conv2d(h, tensors[f"conv{number}.weight"], tensors[f"conv{number}.bias"], stride, padding))
                number += 1
            maps.append(h / h.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return maps

    pairs = zip(features(a), features(b), strict=True)
    return sum(((x - y) ** 2 * tensors[f"lin{i}"]).sum(1).mean((1, 2)) for i, (x, y) in enumerate(pairs))


def test_the_distance_equals_the_published_formula(weights):
    kind, path = weights
    found = Lpips(path)(images(), images(1))
    torch.testing.assert_close(
        found.double(), published(kind, np.load(path), images(), images(1)), atol=1e-6, rtol=1e-4
    )
    assert Lpips(path)(images(), images()).abs().max() == 0


def test_half_precision_is_close_to_full_precision(weights):
    distance = Lpips(weights[1])
    exact = distance(images(), images(1))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distance(images(), images(1))
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=1e-3)


def test_only_images_have_a_gradient(weights):
    distance, image = Lpips(weights[1]), images().requires_grad_(True)
    distance(image, images(1)).sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())


def test_normalizing_zero_features_gives_zeros():
    assert torch.equal(normalize([torch.zeros(1, 4, 2, 2)])[0], torch.zeros(1, 4, 2, 2))


def test_other_weight_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no weights")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    good = {f"conv{i}.weight": np.zeros((2, 3, 3, 3)) for i in range(5)} | {
        f"conv{i}.bias": np.zeros(2) for i in range(5)
    }
    np.savez(tmp_path / "shapes.npz", **good, **{f"lin{i}": np.zeros((1, 2, 1, 1)) for i in range(5)})
    for name, words in (
        ("text", "not a readable NPZ"),
        ("other", "expected the weights of LPIPS"),
        ("shapes", "conv0"),
    ):
        with pytest.raises(BadFileError, match=words):
            Lpips(tmp_path / f"{name}.npz")
