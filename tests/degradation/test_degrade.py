import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pfstorer_rt.degradation import degrade as d

MIDDLE = 10  # the centre of a 21 x 21 kernel


def rng(seed=0):
    return np.random.default_rng(seed)


def psnr(a, b):
    return -10 * math.log10(float(((a - b) ** 2).mean()))


def flat(value, size=256):
    return torch.full((3, size, size), value)


def moments(kernel):
    """The variance along columns, along rows, and the covariance, in pixels squared."""
    axis = torch.arange(kernel.shape[0], dtype=torch.float64) - kernel.shape[0] // 2
    k = kernel.double()
    return [float(x) for x in ((k.sum(0) @ axis**2), (k.sum(1) @ axis**2), axis @ k @ axis)]


# --- the whole degradation ---


@pytest.mark.parametrize("level", ["light", "heavy"])
def test_a_seed_determines_the_result(face, level):
    first = d.degrade(face, level, 7)
    assert torch.equal(first, d.degrade(face, level, np.random.default_rng(7)))
    assert not torch.equal(first, d.degrade(face, level, 8))


def test_a_generator_is_advanced(face):
    generator = rng(7)
    assert not torch.equal(d.degrade(face, "light", generator), d.degrade(face, "light", generator))


def test_image_and_global_random_state_stay_unchanged(face):
    before = face.clone()
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    always = replace(d.LEVELS["heavy"], motion_prob=1.0, isp_prob=1.0, median_prob=1.0)
    for seed in range(4):
        d.degrade(face, always, seed)
    assert torch.equal(face, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.random.get_state()[2] == numpy_state[2]


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (2, 2), (192, 192), (191, 193)])
def test_shape_dtype_and_range_are_kept(size):
    always = replace(d.LEVELS["heavy"], motion_prob=1.0, isp_prob=1.0, median_prob=1.0)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    for level in ("light", "heavy", always):
        result = d.degrade(image, level, 3)
        assert result.shape == image.shape and result.dtype == torch.float32
        assert result.min() >= 0 and result.max() <= 1


def test_overshoot_of_the_last_enlargement_is_cut():
    # Bicubic interpolation overshoots next to a step between black and white.
    step = torch.zeros(3, 64, 64)
    step[:, :, 32:] = 1
    for seed in range(5):
        result = d.degrade(step, "light", seed)
        assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("stage", ["first", "second"])
def test_heavy_ranges_contain_the_light_ranges(stage):
    light, heavy = (getattr(d.LEVELS[level], stage) for level in ("light", "heavy"))
    for name in ("sigma", "resize", "gaussian_sigma", "poisson_scale", "kernel_size"):
        narrow, wide = getattr(light, name), getattr(heavy, name)
        assert wide[0] <= narrow[0] and narrow[1] <= wide[1], name
    for name in ("sigma", "resize", "gaussian_sigma", "jpeg"):
        narrow, wide = getattr(light, name), getattr(heavy, name)
        assert wide[0] < narrow[0] or narrow[1] < wide[1], name
    assert heavy.jpeg[0] < light.jpeg[0]


def test_heavy_is_worse_than_light_and_both_degrade(face):
    light, heavy = (
        float(np.mean([psnr(face, d.degrade(face, level, seed)) for seed in range(40)])) for level in ("light", "heavy")
    )
    assert heavy < light - 0.5  # dB
    assert heavy > 15 and light < 30


@pytest.mark.parametrize("field", ["motion_prob", "isp_prob", "median_prob", "final_sinc_prob"])
def test_each_probability_switches_its_step(face, field):
    quiet = replace(d.LEVELS["light"], motion_prob=0.0, isp_prob=0.0, median_prob=0.0, final_sinc_prob=0.0)
    off, on = (d.degrade(face, replace(quiet, **{field: p}), 5) for p in (0.0, 1.0))
    assert not torch.equal(off, on)


@pytest.mark.parametrize("sf", [2, 4])
def test_the_degraded_image_is_reduced_by_sf(face, sf):
    """The result is an enlarged image of 1/sf: bicubic enlargement of a smaller image reproduces it."""
    result = d.degrade(face, replace(d.LEVELS["light"], sf=float(sf)), 0)

    def difference(side):
        """Distance of the result to the nearest bicubic enlargement of an image of `side` pixels."""
        basis = d.resize(torch.eye(side)[None], (192, side), "bicubic")[0].double()
        onto = basis @ torch.linalg.pinv(basis)
        return float((onto @ result.double() @ onto.T - result).abs().mean())

    assert difference(192 // sf) < 1e-3 < difference(96 // sf)


@pytest.mark.parametrize("stage", ["first", "second"])
def test_both_stages_compress_with_jpeg(face, stage):
    def error(quality):
        coarse = replace(getattr(quiet, stage), jpeg=(quality, quality))
        return float(
            np.mean([psnr(face, d.degrade(face, replace(quiet, **{stage: coarse}), seed)) for seed in range(6)])
        )

    light = d.LEVELS["light"]
    clean = {name: replace(getattr(light, name), jpeg=(95, 95)) for name in ("first", "second")}
    quiet = replace(light, sf=1.0, **clean)
    assert error(5) < error(95) - 1


def test_the_last_jpeg_comes_before_or_after_the_last_reduction():
    """Without a later enlargement, an image that was compressed last has whole levels of 8 bits."""
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = [255 * d.degrade(image, replace(d.LEVELS["light"], sf=1.0), seed) for seed in range(20)]
    whole = sum(bool((result - result.round()).abs().max() < 1e-3) for result in results)
    assert 4 <= whole <= 16


@pytest.mark.parametrize("level", ["light", "heavy"])
def test_the_small_image_is_enlarged_at_the_end(face, level):
    small = d.degrade_small(face, level, 7)
    assert small.shape == (3, round(face.shape[1] / 4), round(face.shape[2] / 4))
    enlarged = torch.nn.functional.interpolate(small[None], face.shape[1:], mode="bicubic", align_corners=False)[0]
    assert torch.equal(enlarged.clamp(0, 1), d.degrade(face, level, 7))


def test_p_hq_1_returns_a_copy_of_the_image(face):
    same = d.degrade(face, replace(d.LEVELS["heavy"], p_hq=1.0), 0)
    assert torch.equal(same, face)
    assert same.data_ptr() != face.data_ptr()


def test_p_hq_is_a_probability():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    often = replace(d.LEVELS["light"], p_hq=0.3)
    hits = sum(torch.equal(d.degrade(image, often, seed), image) for seed in range(200))
    assert 35 <= hits <= 85  # 60 +- 4 standard deviations of a binomial
    assert all(config.p_hq == 0 for config in d.LEVELS.values())


@pytest.mark.parametrize(
    ("image", "level", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "light", r"shape \(1, 3, 8, 8\); expected \(3, H, W\)"),
        (torch.zeros(8, 8, 3), "light", r"shape \(8, 8, 3\)"),
        (torch.zeros(3, 0, 8), "light", r"shape \(3, 0, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.float64), "light", "torch.float64; expected torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "light", "torch.uint8; expected torch.float32"),
        (torch.full((3, 8, 8), -0.5), "light", r"\[-0.5, -0.5\]; expected \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), "light", r"expected \[0, 1\]"),
        (torch.zeros(3, 8, 8), "medium", "'medium'; choose one of light, heavy"),
    ],
)
def test_invalid_arguments_are_refused(image, level, message):
    with pytest.raises(ValueError, match=message):
        d.degrade(image, level)


# --- kernels ---


def test_every_drawn_kernel_sums_to_one_and_is_point_symmetric():
    sizes = set()
    for seed in range(150):
        kernel = d.random_blur_kernel(d.LEVELS["heavy"].first, rng(seed))
        sizes.add(kernel.shape[0])
        assert kernel.shape[0] == kernel.shape[1]
        assert float(kernel.double().sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)
    assert sizes == {7, 9, 11, 13, 15, 17, 19, 21}


def test_round_kernels_have_the_symmetry_of_a_square():
    heavy_tails = d.generalized_kernel(21, 2.0, beta=0.6)
    for kernel in (d.gaussian_kernel(21, 2.0), d.sinc_kernel(21, 1.3), heavy_tails):
        assert torch.allclose(kernel, kernel.T, atol=1e-7)
        assert torch.allclose(kernel, kernel.flip(0), atol=1e-7)


def test_a_gaussian_has_the_requested_variances():
    # 31 pixels hold more than 5 sigma, and sampling a gaussian this wide changes its variance by < 1e-6.
    assert moments(d.gaussian_kernel(31, 3.0, 1.5)) == pytest.approx([9.0, 2.25, 0.0], abs=1e-3)
    quarter_turn = moments(d.gaussian_kernel(31, 3.0, 1.5, math.pi / 2))
    assert quarter_turn == pytest.approx([2.25, 9.0, 0.0], abs=1e-3)
    # Turned by t, the covariance is (a - b) sin(t) cos(t).
    assert moments(d.gaussian_kernel(31, 3.0, 1.5, math.pi / 4))[2] == pytest.approx(6.75 / 2, abs=1e-3)


def test_generalized_kernels_follow_their_formula():
    # Along the first axis q = (x / 2)^2, relative to the centre.
    for x in range(1, 8):
        bell = d.generalized_kernel(21, 2.0, 5.0, beta=0.7)
        flat_top = d.generalized_kernel(21, 2.0, 5.0, beta=1.4, plateau=True)
        ratio = bell[MIDDLE, MIDDLE + x] / bell[MIDDLE, MIDDLE]
        assert float(ratio) == pytest.approx(math.exp(-0.5 * (x / 2) ** 1.4), rel=1e-4)
        ratio = flat_top[MIDDLE, MIDDLE + x] / flat_top[MIDDLE, MIDDLE]
        assert float(ratio) == pytest.approx(1 / (1 + (x / 2) ** 2.8), rel=1e-4)


def test_sinc_passes_low_frequencies_and_stops_high_ones():
    kernel = d.sinc_kernel(41, math.pi / 2).double()
    axis = torch.arange(41, dtype=torch.float64) - 20
    for turn in (0.0, 0.6):
        along = axis[None] * math.cos(turn) + axis[:, None] * math.sin(turn)

        def gain(frequency, along=along):
            return float((kernel * torch.cos(frequency * along)).sum())

        assert gain(0.25 * math.pi) == pytest.approx(1, abs=0.1)  # ripple of the cut kernel
        assert gain(0.5 * math.pi) == pytest.approx(0.5, abs=0.15)
        assert gain(0.75 * math.pi) == pytest.approx(0, abs=0.1)


def test_sinc_follows_its_formula():
    cutoff = 0.4
    kernel = d.sinc_kernel(21, cutoff)
    for x in range(8):
        # The power series of 2 J1(p) / p, which is 1 at the centre.
        half = (cutoff * x / 2) ** 2
        series = sum((-half) ** n / (math.factorial(n) * math.factorial(n + 1)) for n in range(20))
        assert float(kernel[MIDDLE, MIDDLE + x] / kernel[MIDDLE, MIDDLE]) == pytest.approx(series, abs=1e-5)


@pytest.mark.parametrize("length", [1, 3, 9, 15])
def test_a_motion_kernel_has_its_length(length):
    level = d.motion_kernel(length, 0.0, 21)
    row = torch.zeros(21)
    row[MIDDLE - length // 2 : MIDDLE + length // 2 + 1] = 1 / length
    assert torch.allclose(level[MIDDLE], row, atol=1e-6)
    assert int((level > 1e-6).sum()) == length
    assert torch.allclose(d.motion_kernel(length, math.pi / 2, 21), level.T, atol=1e-6)


def test_a_slanted_motion_kernel_has_the_same_length_and_width():
    angle, length = 0.5, 13.0
    horizontal, vertical, both = moments(d.motion_kernel(length, angle))
    c, s = math.cos(angle), math.sin(angle)
    along = c * c * horizontal + s * s * vertical + 2 * c * s * both
    across = s * s * horizontal + c * c * vertical - 2 * c * s * both
    assert math.sqrt(12 * along) == pytest.approx(length, rel=0.05)  # an even line has variance length^2 / 12
    assert across < 0.25  # a line of one pixel with soft sides: 1 / 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.gaussian_kernel(20, 1.0), "size is 20; give an odd"),
        (lambda: d.gaussian_kernel(21, 0.0), "above 0"),
        (lambda: d.sinc_kernel(21, 4.0), "cutoff is 4.0"),
        (lambda: d.motion_kernel(0.5, 0.0), "length 0.5"),
        (lambda: d.motion_kernel(15.0, 0.0, 9), "size >= 15"),
        (lambda: d.filter2d(torch.zeros(3, 9, 9), torch.ones(4, 4)), r"shape \(4, 4\)"),
        (lambda: d.median_blur(torch.zeros(3, 9, 9), 4), "size is 4"),
        (lambda: d.resize(torch.zeros(3, 9, 9), (3, 3), "nearest"), "'nearest'; choose one of area"),
    ],
)
def test_an_invalid_kernel_or_mode_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- single steps ---


@pytest.mark.parametrize("size", [(40, 33), (31, 97), (11, 11)])
def test_filter2d_is_a_mirrored_convolution(size):
    generator = torch.Generator().manual_seed(0)
    image, kernel = torch.rand(3, *size, generator=generator), torch.rand(21, 21, generator=generator) / 220
    padded = torch.nn.functional.pad(image[None], (10,) * 4, mode="reflect")
    # conv2d correlates, so the kernel is turned; 1e-5: float32 over 441 terms
    expected = torch.nn.functional.conv2d(padded, kernel.flip(0, 1).expand(3, 1, 21, 21), groups=3)[0]
    assert torch.allclose(d.filter2d(image, kernel), expected, atol=1e-5)


def test_filter2d_keeps_a_uniform_image_smaller_than_the_kernel():
    for size in ((1, 1), (3, 50), (10, 10)):
        image = torch.full((3, *size), 0.3)
        assert torch.allclose(d.filter2d(image, d.gaussian_kernel(21, 3.0)), image, atol=1e-6)


def test_area_resize_averages():
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = image.view(3, 4, 2, 6, 2).mean((2, 4))
    assert torch.allclose(d.resize(image, (4, 6), "area"), expected, atol=1e-6)


@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_the_requested_deviation(grey):
    noise = d.add_gaussian_noise(flat(0.5), 20.0, rng(), grey) - 0.5
    # 65,536 samples give the deviation to 0.3 %; 2 % is six of those.
    assert float(noise.std()) * 255 == pytest.approx(20.0, rel=0.02)
    assert abs(float(noise.mean())) * 255 < 0.5
    assert torch.equal(noise[0], noise[1]) == grey


@pytest.mark.parametrize("value", [0.1, 0.5])
@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_grows_with_the_signal(value, grey):
    noise = d.add_poisson_noise(flat(value), 0.7, rng(), grey) - value
    assert float(noise.var()) == pytest.approx(0.7**2 * value / 256, rel=0.04)
    assert abs(float(noise.mean())) < 1e-3
    assert torch.equal(noise[0], noise[1]) == grey


def test_jpeg_is_better_at_a_higher_quality(face):
    levels = [psnr(face, d.jpeg(face, quality)) for quality in (10, 30, 60, 90, 100)]
    assert levels == sorted(levels)
    assert levels[-1] > levels[0] + 5  # dB
    # At quality 100 a uniform grey is only rounded to 8 bits.
    assert torch.allclose(d.jpeg(flat(0.5, 16), 100), flat(0.5, 16), atol=1 / 255)


def test_median_removes_salt_and_pepper():
    ramp = torch.linspace(0.2, 0.8, 64).expand(3, 64, 64)
    spoilt = ramp.clone()
    spoilt[:, 4::8, 4::8] = 1.0
    spoilt[:, 8::8, 8::8] = 0.0
    step = 0.6 / 63
    for size in (3, 5):
        assert float((d.median_blur(spoilt, size) - ramp).abs().max()) < 1.5 * step


def test_median_equals_the_median_of_the_neighbours():
    image = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(0))
    result = d.median_blur(image, 3)
    assert result[1, 3, 4] == image[1, 2:5, 3:6].flatten().sort().values[4]
    assert result[2, 5, 1] == image[2, 4:7, 0:3].flatten().sort().values[4]


def test_isp_noise_without_noise_keeps_a_uniform_image():
    for seed in range(5):
        colour = torch.tensor([0.9, 0.3, 0.15])[:, None, None].expand(3, 12, 13)
        # 1e-4: the tone curve and its inverse in float32
        assert torch.allclose(d.isp_noise(colour, rng(seed), 0.0, 0.0), colour, atol=1e-4)


def test_isp_noise_has_shot_and_read_parts_and_is_coarse():
    quiet = (d.isp_noise(flat(0.5), rng(1), 0.0, 0.005) - 0.5).std()
    assert (d.isp_noise(flat(0.5), rng(1), 0.0, 0.01) - 0.5).std() > 1.7 * quiet
    assert (d.isp_noise(flat(0.5), rng(1), 0.003, 0.005) - 0.5).std() > 1.5 * quiet
    noise = d.isp_noise(flat(0.5), rng(1), 0.001, 0.005) - 0.5
    neighbours = float((noise[0, :, 1:] * noise[0, :, :-1]).mean() / noise[0].var())
    assert neighbours > 0.2  # white noise has 0 +- 0.004 here


def test_isp_noise_keeps_a_photograph_recognizable(face):
    assert psnr(face, d.isp_noise(face, rng(), 0.0, 0.0)) > 28  # dB; only the mosaic is lost
