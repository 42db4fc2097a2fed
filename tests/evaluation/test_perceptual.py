"""LPIPS and ST-LPIPS against numpy and the authors' package; MUSIQ's way to pyiqa."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.evaluation import perceptual
from pfstorer_rt.evaluation.registry import MetricFiles, Sample, load_metrics

SHAPES = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
PLACES = [0, 3, 6, 8, 10]  # of the convolutions among torchvision's AlexNet layers


@pytest.fixture
def alexnet(tmp_path):
    """A file like torchvision's AlexNet, with random weights."""
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for place, shape in zip(PLACES, SHAPES, strict=True):
        state[f"features.{place}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * shape[2] ** 2) ** 0.5
        state[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) / 10
    torch.save(state, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


@pytest.fixture
def lpips_package(tmp_path, monkeypatch):
    """A package `lpips` with random linear weights, which fails when it is imported, as without torchvision."""
    folder = tmp_path / "site" / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "lpips" / "__init__.py").write_text("raise ImportError('no torchvision')")
    generator = torch.Generator().manual_seed(1)
    weights = {f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1, generator=generator) for i, s in enumerate(SHAPES)}
    torch.save(weights, folder / "alex.pth")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return [w.numpy().ravel() for w in weights.values()]


def numpy_lpips(a, b, state, linear):
    """Equation 1 of Zhang 2018 with torchvision's AlexNet, in numpy."""

    def convolve(x, place, stride, padding):
        weight, bias = (state[f"features.{place}.{kind}"].numpy().astype(np.float64) for kind in ("weight", "bias"))
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = sliding_window_view(padded, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
        return np.maximum(np.tensordot(weight, windows, ((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)

    def pool(x):
        return sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))

    def features(pixels):
        x = pixels.astype(np.float64).transpose(2, 0, 1) * 2 - 1
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = (x - shift[:, None, None]) / scale[:, None, None]
        first = convolve(x, 0, 4, 2)
        second = convolve(pool(first), 3, 1, 2)
        third = convolve(pool(second), 6, 1, 1)
        fourth = convolve(third, 8, 1, 1)
        found = [first, second, third, fourth, convolve(fourth, 10, 1, 1)]
        return [f / (np.linalg.norm(f, axis=0) + 1e-10) for f in found]

    pairs = zip(features(a), features(b), linear, strict=True)
    return sum(np.mean(np.tensordot(w, (x - y) ** 2, (0, 0))) for x, y, w in pairs)


def test_lpips_equals_the_formula_of_its_paper(alexnet, lpips_package, make_image, noisy):
    a = make_image(40, 53)
    b = noisy(a, 0.2)
    expected = numpy_lpips(a, b, torch.load(alexnet), lpips_package)
    assert expected > 0.01
    loaded = load_metrics(["lpips"], MetricFiles(alexnet=alexnet))
    assert loaded.refused == {}
    assert loaded.measure(Sample(b), Sample(a))["lpips"] == pytest.approx(expected, rel=1e-4)


def test_missing_lpips_packages_are_named(alexnet, lpips_package, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    reason = load_metrics(["lpips"]).refused["lpips"]
    assert reason.startswith("not measured: ") and "AlexNet weights, alexnet-owt-7be5be79.pth" in reason
    for name in ("lpips", "stlpips_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    reasons = load_metrics(["lpips", "stlpips"], MetricFiles(alexnet=alexnet)).refused
    assert "lpips is not installed" in reasons["lpips"] and "pfstorer-rt[metrics]" in reasons["stlpips"]


def test_files_without_alexnet_are_refused(alexnet, lpips_package, tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("vgg.pth", "text.pth", "absent.pth"):
        with pytest.raises(BadFileError, match=name):
            load_metrics(["lpips"], MetricFiles(alexnet=tmp_path / name))


def test_pickled_code_is_not_run(lpips_package, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadFileError, match=r"evil\.pth"):
        load_metrics(["lpips"], MetricFiles(alexnet=tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [(32, 32), (45, 64)])
def test_stlpips_equals_its_package(monkeypatch, make_image, noisy, size):
    for name in ("torchvision", "IPython", "torchsummary"):  # the package imports them without using them here
        module = ModuleType(name)
        module.models = module.embed = module.summary = None
        monkeypatch.setitem(sys.modules, name, module)
    from stlpips_pytorch.stlpips import LPIPS

    network = LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    a = make_image(*size)
    b = noisy(a, 0.2)
    with torch.no_grad():
        expected = network(perceptual.to_planes(b), perceptual.to_planes(a)).item()
    figure = load_metrics(["stlpips"]).measure(Sample(b), Sample(a))["stlpips"]
    assert expected > 0.01 and figure == pytest.approx(expected, rel=1e-5)


class FakeMusiq(ModuleType):
    """A replacement of pyiqa whose metric is 100 x the mean of the image."""

    def __init__(self, error=None):
        super().__init__("pyiqa")
        self.error, self.asked, self.shapes = error, [], []

    def create_metric(self, name, device, **options):
        self.asked.append((name, device, options))
        if self.error:
            raise self.error

        def network(planes):
            self.shapes.append(tuple(planes.shape))
            return 100 * planes.mean()

        return network


def test_musiq_is_computed_by_pyiqa(monkeypatch, tmp_path):
    fake = FakeMusiq()
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    quarter, black = (Sample(np.full((20, 30, 3), v, np.float32)) for v in (0.25, 0))
    (tmp_path / "w.pth").write_bytes(b"weights")
    loaded = load_metrics(["musiq"], MetricFiles(musiq=tmp_path / "w.pth"))
    assert loaded.measure(quarter, black)["musiq"] == pytest.approx(25)
    assert fake.asked == [("musiq", "cpu", {"pretrained_model_path": str(tmp_path / "w.pth")})]
    assert fake.shapes == [(1, 3, 20, 30)]


def test_musiq_names_missing_weights_and_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", FakeMusiq(OSError("no network")))
    assert "give the file of its weights (no network)" in load_metrics(["musiq"]).refused["musiq"]
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(MissingBackendError, match="pip install pyiqa"):
        perceptual.load_musiq(MetricFiles())
