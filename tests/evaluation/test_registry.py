"""Each metric against a source of its own, and what all of them must do."""

import math
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.evaluation.registry import METRICS, MetricFiles, Sample, describe_version, load_metrics
from pfstorer_rt.faces import dlib as functions
from pfstorer_rt.faces import finding
from pfstorer_rt.imaging import similarity

BEST = {
    "psnr": math.inf,
    "ssim": 1.0,
    "stlpips": 0.0,
    "lmse_dlib": 0.0,
    "id_dlib": 0.0,
    "id_original_dlib": 0.0,
    "verification_dlib": 1.0,
}


def test_psnr_equals_scikit_image(make_image, noisy):
    a = make_image(33, 47)
    b = noisy(a, 0.1)
    assert similarity.psnr(b, a) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-6)
    assert similarity.psnr(a + np.float32(0.1), a) == pytest.approx(20, abs=1e-4)


def test_ssim_equals_the_formula_of_its_paper(make_image, noisy):
    a = make_image(40, 31).astype(np.float64)
    b = noisy(a, 0.1).astype(np.float64)

    def mean(x):  # the window of 11 pixels is 3.5 sigma to each side
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert similarity.ssim(b, a) == pytest.approx(values[5:-5, 5:-5].mean(), abs=1e-6)


def test_identical_images_have_perfect_figures(metrics, face):
    figures = metrics.measure(Sample(face), Sample(face.copy()), [Sample(face.copy())])
    assert {key: figures[key] for key in BEST} == pytest.approx(BEST, abs=1e-6)


def test_more_noise_worsens_every_metric(metrics, face, noisy):
    original, references = Sample(face), [Sample(face)]
    series = [metrics.measure(Sample(noisy(face, s)), original, references) for s in (0.02, 0.06, 0.12)]
    better = {metric.key: metric.better for metric in METRICS}
    for key in ("psnr", "ssim", "stlpips", "lmse_dlib", "id_dlib", "id_original_dlib"):
        values = [figures[key] for figures in series]
        assert values == sorted(values, reverse=better[key] == "up") and len(set(values)) == 3, key


@pytest.mark.parametrize("shift", [2, 4])
@pytest.mark.parametrize("enlarged", [1, 2])
def test_lmse_of_a_shifted_face_is_the_square_of_the_shift_at_512_pixels(face, shift, enlarged):
    lmse = load_metrics(["lmse_dlib"])
    moved, still = (np.kron(p, np.ones((enlarged, enlarged, 1), np.float32)) for p in (np.roll(face, shift, 1), face))
    figure = lmse.measure(Sample(moved), Sample(still))["lmse_dlib"]
    assert figure == pytest.approx((shift * 512 / 256) ** 2, rel=0.25)  # dlib places landmarks to about half a pixel


def test_landmark_error_is_the_mean_squared_distance():
    assert functions.landmark_error(np.array([[3.0, 4.0], [0, 0]]), np.zeros((2, 2))) == 12.5


def test_id_is_the_mean_of_the_distances_to_each_reference(metrics, face, noisy):
    embed = finding.embed_largest
    refs, result = [face, noisy(face, 0.1)], noisy(face, 0.05)
    expected = np.mean([np.sqrt(np.sum((embed(result) - embed(r)) ** 2)) for r in refs])
    figures = metrics.measure(Sample(result), Sample(face), [Sample(r) for r in refs])
    assert figures["id_dlib"] == pytest.approx(expected, abs=1e-9)
    assert figures["id_original_dlib"] == pytest.approx(np.linalg.norm(embed(result) - embed(face)), abs=1e-9)


def test_the_largest_of_several_faces_counts(metrics, face):
    small = face[::2, ::2]
    beside = np.pad(small[:, ::-1], ((64, 64), (0, 0), (0, 0)))
    crowd = np.pad(np.concatenate([beside, face], 1), ((8, 8), (8, 8), (0, 0)))
    figures = metrics.measure(Sample(crowd), Sample(crowd), [Sample(face)])
    assert figures["id_dlib"] < 0.1 and figures["verification_dlib"] == 1.0


def test_verification_counts_matching_faces(metrics, face, make_image):
    nobody, person = Sample(make_image(96, 96)), Sample(face)

    def verified(result, original, *refs):
        figures = metrics.measure(result, original, refs)
        return figures["verification_dlib"], figures["id_dlib"]

    assert verified(nobody, nobody, person) == (0.0, None)  # an image without a face is not accepted
    assert verified(person, person, nobody) == (None, None)  # no reference with a face
    assert verified(person, person) == (None, None)
    assert verified(person, person, nobody, person) == (1.0, pytest.approx(0, abs=1e-6))


class Known(Sample):
    """An image whose face has a known embedding."""

    def __init__(self, embedding):
        super().__init__(np.zeros((16, 16, 3), np.float32))
        self.embedding = embedding

    def once(self, function):
        return self.embedding


@pytest.mark.parametrize(("distance", "accepted"), [(0.5999, 1.0), (0.6001, 0.0)])
def test_verification_uses_dlibs_threshold(distance, accepted):
    reference, result = Known(np.zeros(128)), Known(np.eye(128)[0] * distance)
    figures = load_metrics(["verification_dlib"]).measure(result, reference, [reference])
    assert figures["verification_dlib"] == accepted


def test_a_missing_result_counts_as_not_verified_and_nothing_else(metrics, face):
    figures = metrics.of_failure(Sample(face), [Sample(face)])
    assert {key: value for key, value in figures.items() if value is not None} == {"verification_dlib": 0.0}


@pytest.mark.parametrize(
    ("side", "absent"), [(1, {"ssim", "stlpips"}), (10, {"ssim", "stlpips"}), (31, {"stlpips"}), (32, set())]
)
def test_small_images_have_no_undefined_figures(metrics, make_image, side, absent):
    a = Sample(make_image(side, 50))
    figures = metrics.measure(a, a)
    assert {key for key in ("psnr", "ssim", "stlpips") if figures[key] is None} == absent


def test_images_of_different_sizes_are_refused(simple, make_image):
    with pytest.raises(ValueError, match=r"40x30.*20x30"):
        simple.measure(Sample(make_image(30, 40)), Sample(make_image(30, 20)))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 4), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.float32),
        np.full((4, 4, 3), np.nan, np.float32),
        np.full((4, 4, 3), np.inf),
    ],
)
def test_invalid_pixels_are_refused(pixels):
    with pytest.raises(ValueError, match="expected"):
        Sample(pixels)


def test_a_sample_caches_its_results():
    sample, calls = Sample(np.zeros((4, 4, 3), np.float32)), []

    def count(pixels):
        calls.append(pixels)
        return None

    assert sample.once(count) is None and sample.once(count) is None and len(calls) == 1


def test_a_missing_metric_is_a_column_with_the_reason(without_dlib, make_image):
    keys = ["psnr", "lmse_dlib", "id_dlib", "verification_dlib", "id_arcface"]
    loaded = load_metrics(keys)
    assert [column.key for column in loaded.columns] == keys and set(loaded.refused) == set(keys[1:])
    assert "pip install 'pfstorer-rt[metrics]'" in loaded.refused["id_dlib"]
    assert "as an ONNX file" in loaded.refused["id_arcface"]
    a = Sample(make_image(16, 16))
    assert loaded.measure(a, a) == dict.fromkeys(keys) | {"psnr": math.inf}


def test_the_table_of_metrics_is_complete():
    assert len({m.key for m in METRICS}) == len({m.title for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.meaning and metric.licence and metric.packages and metric.better in ("up", "down")
        assert ("dlib" in metric.packages[0]) == ("(dlib)" in metric.title)


def test_versions_name_packages_and_files(tmp_path):
    (tmp_path / "face.onnx").write_bytes(b"no model")
    with pytest.raises(BadFileError, match=r"face\.onnx"):
        load_metrics(["id_arcface"], MetricFiles(arcface=tmp_path / "face.onnx"))
    named = {m.key: describe_version(m, MetricFiles(arcface=tmp_path / "face.onnx")) for m in METRICS}
    assert named["ssim"] == f"scikit-image {version('scikit-image')}"
    assert named["id_arcface"].endswith(f"face.onnx sha256 {sha256(b'no model').hexdigest()[:12]}")


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"no metric lpisp.*lpips"):
        load_metrics(["psnr", "lpisp"])


def test_the_evaluation_page_names_every_metric_and_its_licence():
    lines = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [(r[0], r[1], r[2].split(",")[0], r[4]) for r in rows[2:]] == [
        (m.title, f"`{m.key}`", {"up": "higher", "down": "lower"}[m.better], m.licence) for m in METRICS
    ]
