import dlib
import numpy as np
import pytest
import torch
from skimage.data import astronaut

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.dlib import RECOGNIZER, face_models, load_dlib, to_uint8
from pfstorer_rt.faces.finding import dlib_shape, find_largest
from pfstorer_rt.faces.recognizer import FaceRecognizer, cut_faces, face_map


@pytest.fixture(scope="module")
def network():
    return FaceRecognizer(face_models() / RECOGNIZER)


def portrait(size=192, angle=0.0):
    """A real face, (size, size, 3) float32 in [0, 1], turned by some degrees."""
    from skimage.transform import resize, rotate

    face = rotate(astronaut()[:256, 96:352] / 255, angle, mode="reflect")
    return resize(face, (size, size), anti_aliasing=True).astype(np.float32)


def landmarks(pixels):
    return to_uint8(pixels), dlib_shape(pixels, find_largest(pixels))


@pytest.mark.parametrize("angle", [0, 15])
def test_the_network_agrees_with_dlib(network, angle):
    chip = dlib.get_face_chip(*landmarks(portrait(angle=angle)), 150, 0.25)
    expected = load_dlib()[2](chip)
    found = network(torch.from_numpy(chip).permute(2, 0, 1)[None] / 255)[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "angle"), [(192, 0), (160, -20), (240, 25)])
def test_faces_are_cropped_as_by_dlib(network, size, angle):
    pixels = portrait(size, angle)
    expected = load_dlib()[2](*landmarks(pixels))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    face = cut_faces(image, torch.from_numpy(face_map(pixels))[None])
    assert face.shape == (1, 3, 150, 150)
    assert np.linalg.norm(network(face)[0].numpy() - expected) < 0.03, "another person begins at 0.6"


def test_images_without_a_face_have_no_map():
    assert face_map(np.zeros((96, 96, 3), np.float32)) is None


def test_gradient_descent_reduces_the_identity_distance(network):
    """A few steps down the gradient bring a blurred face nearer to the sharp one."""
    pixels = portrait()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    maps = torch.from_numpy(face_map(pixels))[None]
    target = network(cut_faces(image, maps))
    blurred = torch.nn.functional.avg_pool2d(image, 17, 1, 8).requires_grad_()
    distances = []
    for _ in range(12):
        distance = (network(cut_faces(blurred, maps)) - target).square().sum()
        distances.append(float(distance.detach()))
        (gradient,) = torch.autograd.grad(distance, blurred)
        blurred = (blurred - 0.5 * gradient / gradient.norm()).detach().requires_grad_()
    assert distances[-1] < 0.5 * distances[0]


def test_feature_maps_show_where_faces_differ(network):
    """Each map has places; a change of the mouth moves the lower half of the map of the finest stage most."""
    face = torch.from_numpy(np.stack([portrait(150).transpose(2, 0, 1)] * 2))
    face[1, :, 100:135, 45:105] = 0.5
    embedding, maps = network.embed(face)
    assert torch.equal(embedding, network(face))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 17, 17), (128, 8, 8), (256, 4, 4)]
    moved = (maps[0][0] - maps[0][1]).square().sum(0)
    assert moved[9:].sum() > 4 * moved[:8].sum()


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_file_without_the_network_is_refused(tmp_path, damage):
    whole = (face_models() / RECOGNIZER).read_bytes()
    (tmp_path / "net.dat").write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"not a network")
    with pytest.raises(BadFileError, match="does not hold dlib's face recognizer"):
        FaceRecognizer(tmp_path / "net.dat")
