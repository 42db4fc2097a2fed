import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.degradation import steps
from pfstorer_rt.degradation.blur import gaussian_kernel
from pfstorer_rt.degradation.degrade import isp_noise
from pfstorer_rt.degradation.draws import random_camera


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(*values, size=128):
    """Uniform grey images, one per value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, size, size)


def test_every_image_is_filtered_with_its_own_kernel():
    images = torch.rand(3, 3, 40, 33, generator=generator())
    kernels = [torch.rand(k, k, generator=generator(k)) / k**2 for k in (3, 21, 9)]
    result = steps.filter_batch(images, kernels)
    for image, kernel, filtered in zip(images, kernels, result, strict=True):
        k = kernel.shape[0]
        padded = F.pad(image[None], (k // 2,) * 4, mode="reflect")
        # conv2d correlates, so the kernel is turned; 1e-5: float32 over 441 terms
        expected = F.conv2d(padded, kernel.flip(0, 1).expand(3, 1, k, k), groups=3)[0]
        assert torch.allclose(filtered, expected, atol=1e-5)


def test_uniform_images_smaller_than_the_largest_kernel_are_kept():
    images = flat(0.3, 0.8, size=7)
    assert torch.allclose(steps.filter_batch(images, [gaussian_kernel(k, 2.0) for k in (7, 21)]), images, atol=1e-6)


def test_resize_interpolates_every_image():
    images = torch.rand(2, 3, 8, 12, generator=generator())
    halved = images.view(2, 3, 4, 2, 6, 2).mean((3, 5))
    # Linear interpolation at half the size takes the mean of two neighbours per axis.
    for mode in ("area", "bilinear"):
        assert torch.allclose(steps.resize_batch(images, (4, 6), mode), halved, atol=1e-6)


def test_gaussian_noise_has_the_deviation_of_its_image():
    noise = steps.gaussian_noise_batch(flat(0.5, 0.5, 0.5), [20.0, 5.0, 10.0], [False, True, False], generator()) - 0.5
    # 16,384 samples per channel give the deviation to 0.6 %; 3 % is five of these.
    assert (noise.std((2, 3)) * 255).flatten().tolist() == pytest.approx([20] * 3 + [5] * 3 + [10] * 3, rel=0.03)
    assert [torch.equal(image[0], image[1]) for image in noise] == [False, True, False]
    assert abs(float((noise[0] * noise[2]).mean())) < 0.05 * float(noise[0].std() * noise[2].std())


def test_poisson_noise_has_the_variance_of_its_image():
    values, strengths, grey = [0.1, 0.5, 0.5, 0.1], [0.7, 0.7, 1.4, 0.7], [False, False, True, True]
    noise = steps.poisson_noise_batch(flat(*values), strengths, grey, generator()) - flat(*values)
    expected = [strength**2 * value / 256 for value, strength in zip(values, strengths, strict=True)]
    assert noise[:, 0].var((1, 2)).tolist() == pytest.approx(expected, rel=0.06)
    assert float(noise.mean((1, 2, 3)).abs().max()) < 2e-3
    assert [torch.equal(image[0], image[1]) for image in noise] == grey


def test_poisson_noise_of_a_grey_image_follows_the_mean_of_its_channels():
    image = torch.tensor([0.1, 0.2, 0.6])[None, :, None, None].expand(1, 3, 128, 128)
    noise = steps.poisson_noise_batch(image, [0.7], [True], generator()) - image
    assert noise.var((0, 2, 3)).tolist() == pytest.approx([0.7**2 * 0.3 / 256] * 3, rel=0.06)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_median_equals_numpys(size):
    images = torch.rand(2, 3, 9, 11, generator=generator())
    margin = size // 2
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    assert np.array_equal(steps.median_batch(images, size).numpy(), np.median(windows, axis=(-2, -1)))


def test_isp_without_noise_keeps_uniform_images():
    cameras = [random_camera(np.random.default_rng(seed)) for seed in range(3)]
    colours = torch.tensor([[0.9, 0.3, 0.15], [0.2, 0.5, 0.4], [0.6, 0.6, 0.6]])[:, :, None, None].expand(3, 3, 12, 13)
    result = steps.isp_batch(colours, cameras, [0.0] * 3, [0.0] * 3, torch.randn(3, 1, 14, 15, generator=generator()))
    assert torch.allclose(result, colours, atol=1e-4)  # the tone curve and its inverse in float32


def test_every_image_has_its_own_camera_and_noise():
    images = torch.rand(2, 3, 16, 18, generator=generator())
    shots, reads, cameras, noise = [0.01, 0.0001], [0.001, 0.02], [], []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        cameras.append(random_camera(rng))
        noise.append(torch.from_numpy(rng.standard_normal((1, 18, 20), dtype=np.float32)))
    result = steps.isp_batch(images, cameras, shots, reads, torch.stack(noise))
    for number in (0, 1):
        single = isp_noise(images[number], np.random.default_rng(number), shots[number], reads[number])
        assert torch.allclose(result[number], single, atol=1e-5)
