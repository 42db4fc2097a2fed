"""Identity by a recognizer given as ONNX: alignment, input, and refusals."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from skimage.transform import resize

from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.evaluation.registry import MetricFiles, Sample, load_metrics
from pfstorer_rt.faces import arcface
from pfstorer_rt.faces.finding import at_landmark_side, find_largest, landmarks_at_side


@pytest.fixture
def recognizer(tmp_path):
    """Function (input shape) -> ONNX file of a network with random weights: mean over 16 x 16 places, then linear."""

    def make(shape=("batch", 3, 112, 112), features=147, name="face.onnx"):
        weight = np.random.default_rng(0).normal(size=(features, 32)).astype(np.float32)
        nodes = [
            helper.make_node("AveragePool", ["data"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
        ]
        graph = helper.make_graph(
            nodes,
            "face",
            [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ("batch", 32))],
            [numpy_helper.from_array(weight, "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return make


def test_alignment_puts_the_five_points_where_the_recognizer_expects_them():
    angle, scale, shift = np.deg2rad(20), 2.3, np.array([40.0, 15.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = arcface.TEMPLATE @ turn.T + shift
    points -= points.min(0) - 30
    y, x = np.mgrid[0:300, 0:300]
    spots = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18) for px, py in points)
    aligned = arcface.align(np.repeat(spots[..., None], 3, 2).astype(np.float32), points)
    assert aligned.shape == (112, 112, 3)
    for px, py in arcface.TEMPLATE:
        window = aligned[round(py) - 6 : round(py) + 7, round(px) - 6 : round(px) + 7, 0]
        row, column = np.unravel_index(window.argmax(), window.shape)
        assert abs(row - 6) <= 1 and abs(column - 6) <= 1


def test_the_five_points_are_the_eyes_the_nose_and_the_corners_of_the_mouth(face):
    points = landmarks_at_side(face, find_largest(face))
    left, right, nose, mouth_left, mouth_right = arcface.five_points(points)
    assert left[0] < nose[0] < right[0] and mouth_left[0] < mouth_right[0]
    assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])


def test_arcface_is_100_times_the_mean_cosine(face, noisy, recognizer):
    path = recognizer()
    loaded = load_metrics(["id_arcface"], MetricFiles(arcface=path))
    result, refs = noisy(face, 0.1), [face, face[:, ::-1].copy()]

    def embed(pixels):
        points = arcface.five_points(landmarks_at_side(pixels, find_largest(pixels)))
        planes = arcface.align(at_landmark_side(pixels), points).transpose(2, 0, 1)[None] * 255
        return ReferenceEvaluator(str(path)).run(None, {"data": ((planes - 127.5) / 127.5).astype(np.float32)})[0][0]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = 100 * np.mean([cosine(embed(result), embed(r)) for r in refs])
    figures = loaded.measure(Sample(result), Sample(face), [Sample(r) for r in refs])
    assert figures["id_arcface"] == pytest.approx(expected, abs=1e-2) and expected < 99
    same = loaded.measure(Sample(face), Sample(face), [Sample(face)])
    assert same["id_arcface"] == pytest.approx(100, abs=1e-4)


@pytest.mark.parametrize("side", [256, 140])
def test_the_identity_to_the_original_uses_the_face_of_the_original(face, make_image, recognizer, side):
    path = recognizer()
    loaded = load_metrics(["id_original_arcface"], MetricFiles(arcface=path, arcface_range="0..255"))
    original = np.asarray(resize(face, (side, side), order=1, anti_aliasing=True), np.float32)
    result = make_image(side, side)  # shows no face
    points = arcface.five_points(landmarks_at_side(original, find_largest(original)))

    def embed(pixels):
        planes = arcface.align(resize(pixels, (512, 512), order=1), points).transpose(2, 0, 1)[None] * 255
        return ReferenceEvaluator(str(path)).run(None, {"data": planes.astype(np.float32)})[0][0]

    a, b = embed(result), embed(original)
    expected = 100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert loaded.measure(Sample(result), Sample(original))["id_original_arcface"] == pytest.approx(expected, abs=0.01)
    nobody = Sample(make_image(64, 64))
    assert loaded.measure(nobody, nobody)["id_original_arcface"] is None


def test_a_range_with_which_all_images_are_alike_is_refused(recognizer):
    path = recognizer()
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.full(32, 1e6, np.float32), "offset"))
    model.graph.node[-1].output[0] = "sum"
    model.graph.node.append(helper.make_node("Add", ["sum", "offset"], ["embedding"]))
    onnx.save(model, path)
    with pytest.raises(SettingError, match=r"nearly the same embedding \(cosine 1\.000\)") as caught:
        load_metrics(["id_arcface"], MetricFiles(arcface=path))
    assert caught.value.setting == "arcface_range"


def test_images_without_a_face_have_no_figure(recognizer, make_image, face):
    loaded = load_metrics(["id_arcface"], MetricFiles(arcface=recognizer()))
    nobody, person = Sample(make_image(64, 64)), Sample(face)
    assert loaded.measure(nobody, nobody, [person])["id_arcface"] is None
    assert loaded.measure(person, person, [nobody])["id_arcface"] is None


def test_files_without_a_recognizer_are_refused(recognizer, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    recognizer(("batch", 3, 224, 224), 588, "other.onnx")
    for name in ("text.onnx", "other.onnx", "absent.onnx"):
        with pytest.raises(BadFileError, match=name):
            load_metrics(["id_arcface"], MetricFiles(arcface=tmp_path / name))
