import pytest
import torch

from pfstorer_rt.training.losses import repeated_error


@pytest.mark.parametrize("size", [(64, 96), (70, 100), (16, 24)])  # also no multiple of the cells, and fewer cells
def test_the_repeated_error_of_a_grid_of_dots_is_its_deviation_from_its_mean(size):
    image = torch.rand(2, 3, *size)
    dots = torch.zeros(1, 1, *size)
    dots[..., ::8, ::8] = 0.64  # in one of 64 pixels of a cell
    expected = (0.63 + 63 * 0.01) / 64
    assert repeated_error(image + dots, image, 8).item() == pytest.approx(expected, rel=1e-4)


def test_other_errors_do_not_repeat():
    image = torch.rand(2, 3, 64, 96)
    assert repeated_error(image + 0.3, image, 8).item() < 1e-6  # another brightness
    noise = torch.randn(2, 3, 64, 96)
    assert repeated_error(image + noise, image, 8).item() < 0.3 * noise.abs().mean()
    wave = torch.sin(2 * torch.pi * torch.arange(96) * 3 / 32)  # three periods in four cells
    assert repeated_error(image + wave, image, 8).item() < 1e-6
