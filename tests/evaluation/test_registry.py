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
from pfstorer_rt.evaluation.loaders import RANGES
from pfstorer_rt.evaluation.registry import METRICS, MetricFiles, Sample, describe_version, load_metrics
from pfstorer_rt.faces import arcface, finding
from pfstorer_rt.faces import dlib as functions
from pfstorer_rt.faces.arcface import arcface_embedder
from pfstorer_rt.faces.landmarks import landmark_network
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
    assert named["id_arcface"].endswith(f"face.onnx sha256 {sha256(b'no model').hexdigest()[:12]}, input -1..1")


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"unknown metric lpisp.*lpips"):
        load_metrics(["psnr", "lpisp"])


def test_the_evaluation_page_names_every_metric_and_its_licence():
    lines = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [(r[0], r[1], r[2].split(",")[0], r[4]) for r in rows[2:]] == [
        (m.title, f"`{m.key}`", {"up": "higher", "down": "lower"}[m.better], m.licence) for m in METRICS
    ]


def save_graph(path, nodes, inputs, output):
    """Write an ONNX file of float inputs {name: shape} and one output (name, shape)."""
    from onnx import TensorProto, helper, save

    def values(shapes):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    constants = [node for node in nodes if node.op_type == "Constant"]
    others = [node for node in nodes if node.op_type != "Constant"]
    graph = helper.make_graph([*constants, *others], "g", values(inputs), values(output))
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def lpips_file(tmp_path):
    """A distance: the mean of |a - b|."""
    from onnx import helper

    nodes = [
        helper.make_node("Sub", ["a", "b"], ["d"]),
        helper.make_node("Abs", ["d"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["o"], keepdims=0),
    ]
    image = [1, 3, "h", "w"]
    return save_graph(tmp_path / "lpips.onnx", nodes, {"a": image, "b": image}, {"o": []})


@pytest.fixture
def landmark_file(tmp_path):
    """98 points that are all at the mean of the image, (m, m) for pixels of value 2 m - 1."""
    from onnx import helper

    nodes = [
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 196]),
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "half"], ["n"]),
        helper.make_node("Add", ["n", "half"], ["p"]),
        helper.make_node("Expand", ["p", "shape"], ["o"]),
    ]
    return save_graph(tmp_path / "points.onnx", nodes, {"x": [1, 3, 112, 112]}, {"o": [1, 196]})


def test_lpips_by_a_file(lpips_file, make_image):
    a, b = Sample(make_image(40, 64)), Sample(make_image(40, 64, seed=1))
    found = load_metrics(["lpips"], MetricFiles(lpips=lpips_file)).measure(a, b)["lpips"]
    assert found == pytest.approx(2 * np.abs(a.pixels - b.pixels).mean(), rel=1e-4)
    small = Sample(make_image(16, 64))
    assert load_metrics(["lpips"], MetricFiles(lpips=lpips_file)).measure(small, small)["lpips"] is None


def test_files_of_another_network_are_refused(lpips_file, landmark_file):
    with pytest.raises(BadFileError, match=r"points\.onnx"):
        load_metrics(["lpips"], MetricFiles(lpips=landmark_file))
    with pytest.raises(BadFileError, match=r"lpips\.onnx"):
        load_metrics(["lmse_98"], MetricFiles(landmarks=lpips_file))


def test_landmarks_use_the_square_around_the_face(landmark_file):
    """The network's points follow the brightness, so a brighter square moves them along its diagonal."""
    find = landmark_network(landmark_file)
    face = np.array([[20.0, 30.0], [60.0, 50.0]])  # the square has a side of 42 pixels, from (19, 19)
    image = np.zeros((100, 100, 3), np.float32)
    np.testing.assert_allclose(find(image, face), np.full((98, 2), 19), atol=1e-3)
    image[18:63, 18:63] = 1
    np.testing.assert_allclose(find(image, face), np.full((98, 2), 61), atol=0.5)
    image[63:] = image[:, 63:] = 0.3
    np.testing.assert_allclose(find(image, face), np.full((98, 2), 61), atol=0.5)


def test_sharpness_is_the_ratio_of_the_gradients(make_image):
    image = make_image(40, 40)
    loaded = load_metrics(["sharpness"])
    half = 0.5 + (image - 0.5) / 2
    assert loaded.measure(Sample(half), Sample(image))["sharpness"] == pytest.approx(0.5, rel=1e-4)
    flat = Sample(np.zeros((40, 40, 3), np.float32))
    assert loaded.measure(Sample(image), flat)["sharpness"] is None


def test_a_recognizer_gets_its_range(tmp_path, face, monkeypatch):
    """Its embedding is (mean of the input, 1), so its direction tells the range."""
    from onnx import helper

    nodes = [
        helper.make_node("Constant", [], ["one"], value_floats=[1.0]),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 2]),
        helper.make_node("Constant", [], ["line"], value_ints=[1]),
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["m", "line"], ["n"]),
        helper.make_node("Concat", ["n", "one"], ["c"], axis=0),
        helper.make_node("Reshape", ["c", "shape"], ["o"]),
    ]
    path = save_graph(tmp_path / "face.onnx", nodes, {"x": [1, 3, 112, 112]}, {"o": [1, 2]})
    monkeypatch.setattr(arcface, "ALIKE", 1.1)  # for this recognizer, images of one mean are alike
    means = {}
    for name, scaling in RANGES.items():
        first, second = arcface_embedder(path, scaling)(face)
        means[name] = first / second
    assert means["0..255"] == pytest.approx(255 * means["0..1"], rel=1e-3)
    assert means["-1..1"] == pytest.approx(2 * means["0..1"] - 1, abs=1e-3)
