"""L_face, the distance between the feature maps of two faces, and its weight in the image-space losses."""

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.transform import resize

from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training.image_loss import ImageSpaceLoss, face_distances, face_maps, feature_distances


@pytest.fixture(scope="module")
def images():
    return ImageSpaceLoss(build_base("nano"), config())


def config(**weights):
    return PersonalizeConfig(first_step=1.0, **WITHOUT_IMAGE_LOSSES | weights)


@pytest.fixture(scope="module")
def face():
    """A real face (1, 3, 128, 128) in [-1, 1], and its position (1, 2, 3)."""
    pixels = resize(astronaut()[:256, 96:352] / 255, (128, 128), anti_aliasing=True).astype(np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] * 2 - 1, torch.from_numpy(face_maps([pixels]))


def test_the_distance_of_maps_follows_the_angle_between_their_vectors():
    generator = torch.Generator().manual_seed(0)
    found, wanted = ([torch.randn(2, c, n, n, generator=generator) for c, n in ((5, 4), (7, 2))] for _ in range(2))
    cosines = [torch.cosine_similarity(a, b, 1).mean((1, 2)) for a, b in zip(found, wanted, strict=True)]
    torch.testing.assert_close(feature_distances(found, wanted), 2 - cosines[0] - cosines[1])
    assert feature_distances(found, [3 * m for m in found]).abs().max() < 1e-6, "a brighter map shows the same"


def test_the_weight_of_the_feature_maps_multiplies_their_distance(images, face):
    (image, position), blurred = face, torch.nn.functional.avg_pool2d(face[0], 9, 1, 4)
    identity, maps = face_distances(images.recognizer, blurred, image, position)
    same = face_distances(images.recognizer, image, image, position)
    assert identity.item() > 0.01 and maps.item() > 0.01 and max(float(d) for d in same) < 1e-8

    def losses(**weights):
        images.config = config(**weights)
        latent = images.base.encode(blurred)
        return images(latent, None, image, position, torch.zeros(2, dtype=torch.long))

    assert losses(lambda_pixel=1.0)["face"].item() > 0
    alone, with_identity = losses(lambda_face=3.0), losses(lambda_face=3.0, lambda_id=2.0)
    assert alone["image"].item() == pytest.approx(3 * alone["face"].item())
    assert with_identity["image"].item() == pytest.approx(3 * alone["face"].item() + 2 * alone["id"].item())


def test_the_weight_of_the_colours_multiplies_their_error(images, face):
    image, position = face
    images.config = config(lambda_color=3.0)
    found = images(images.base.encode(image), None, image, position, torch.zeros(2, dtype=torch.long))
    assert found["color"].item() > 0.001
    assert found["image"].item() == pytest.approx(3 * found["color"].item())


def test_images_without_a_face_have_no_distance_of_maps(images, face):
    image, position = face
    images.config = config(lambda_face=1.0)
    latent = images.base.encode(image)
    none = torch.full((1, 2, 3), float("nan"))
    assert images(latent, None, image, none, torch.zeros(2, dtype=torch.long))["image"].item() == 0
    both = images(
        latent.repeat(2, 1, 1, 1),
        None,
        image.repeat(2, 1, 1, 1),
        torch.cat([position, none]),
        torch.zeros(2, dtype=torch.long),
    )
    alone = images(latent, None, image, position, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(both["face"], alone["face"], rtol=1e-4, atol=1e-6)


def test_gradient_descent_on_the_maps_restores_the_parts_of_a_face(images, face):
    """The distance of the maps alone brings a blurred mouth nearer to the sharp one."""
    (image, position), blurred = face, torch.nn.functional.avg_pool2d(face[0], 9, 1, 4).requires_grad_()
    mouth = (slice(None), slice(None), slice(62, 78), slice(50, 80))
    before = (blurred - image)[mouth].square().mean().item()
    for _ in range(40):
        distance = face_distances(images.recognizer, blurred, image, position)[1].sum()
        (gradient,) = torch.autograd.grad(distance, blurred)
        blurred = (blurred - 0.5 * gradient / gradient.norm()).detach().requires_grad_()
    assert (blurred - image)[mouth].square().mean().item() < 0.95 * before
