import pytest
import torch

from pfstorer_rt.training.losses import color_loss, repeated_error


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


def test_the_colour_loss_compares_means_of_squares():
    generator = torch.Generator().manual_seed(0)
    image, other = torch.rand(2, 2, 3, 40, 56, generator=generator)
    steps = [[slice(top, top + 16) for top in range(0, size - 15, 8)] for size in (40, 56)]
    expected = [(other - image)[..., rows, columns].mean((-2, -1)).abs() for rows in steps[0] for columns in steps[1]]
    assert color_loss(other, image).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    dots = torch.ones(40, 56)
    dots[::2] = -1
    assert color_loss(image + dots, image).item() < 1e-6, "detail inside the squares"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (15, 16)])
def test_the_colour_loss_of_a_small_image_is_the_difference_of_its_colours(size):
    image = torch.zeros(1, 3, *size)
    assert color_loss(image + 0.25, image).item() == pytest.approx(0.25)
