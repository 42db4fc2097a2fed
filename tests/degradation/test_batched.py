from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pfstorer_rt.degradation.batched import degrade_batch
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.degradation.levels import LEVELS

ALWAYS = replace(LEVELS["heavy"], motion_prob=1.0, isp_prob=1.0, median_prob=1.0)
QUIET = replace(LEVELS["light"], motion_prob=0.0, isp_prob=0.0, median_prob=0.0, final_sinc_prob=0.0)

_OFF = {
    "blur_prob": 0.0,
    "sinc_prob": 0.0,
    "resize_probs": (0.0, 0.0, 1.0),
    "gaussian_prob": 1.0,
    "gaussian_sigma": (0.0, 0.0),
    "jpeg": (100, 100),
}
PLAIN = replace(QUIET, first=replace(QUIET.first, **_OFF), second=replace(QUIET.second, **_OFF), sf=1.0)
"""No step changes an image, except for JPEG at quality 100."""


@pytest.fixture(scope="module")
def tiles():
    """120 tiles of 96 pixels from scikit-image's astronaut, (120, 3, 96, 96) in [0, 1]."""
    from skimage.data import astronaut

    image = torch.from_numpy(astronaut().copy()).permute(2, 0, 1).float() / 255
    corners = np.random.default_rng(0).integers(0, 512 - 96, (120, 2))
    return torch.stack([image[:, y : y + 96, x : x + 96] for y, x in corners])


def rng(seed=0):
    return np.random.default_rng(seed)


def psnr(a, b):
    return -10 * ((a - b) ** 2).flatten(1).mean(1).log10()


def gradient(images):
    return images.diff(dim=-1).abs().flatten(1).mean(1) + images.diff(dim=-2).abs().flatten(1).mean(1)


# --- equal to the degradation of one image ---


@pytest.mark.parametrize("level", ["light", "heavy"])
def test_the_distribution_is_that_of_single_images(tiles, level):
    single = torch.stack([degrade(tile, level, seed) for seed, tile in enumerate(tiles)])
    # One tile per group: tiles of a group have the same sizes, so their results would scatter together.
    batch = degrade_batch(tiles, [level] * len(tiles), rng(), group=1)
    for measure in (lambda images: psnr(images, tiles), gradient):
        expected, result = measure(single), measure(batch)
        assert float(result.mean()) == pytest.approx(float(expected.mean()), rel=0.05)
        assert float(result.std()) == pytest.approx(float(expected.std()), rel=0.25)


@pytest.mark.parametrize("median", [0.0, 1.0])
def test_with_fixed_parameters_the_result_equals_that_of_single_images(tiles, median):
    """Without random sizes and noise, only the two JPEG codecs differ."""
    round_kernel = {"blur_prob": 1.0, "kernel_size": (9, 9), "kind_probs": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}
    first = replace(PLAIN.first, sigma=(1.2, 1.2), jpeg=(60, 60), **round_kernel)
    second = replace(PLAIN.second, sigma=(0.8, 0.8), jpeg=(90, 90), **round_kernel)
    config = replace(PLAIN, first=first, second=second, median_prob=median, median_sizes=(3,))
    single = torch.stack([degrade(tile, config) for tile in tiles[:4]])
    assert float(psnr(degrade_batch(tiles[:4], [config] * 4, rng()), single).min()) > 43  # dB


@pytest.mark.parametrize("field", ["motion_prob", "isp_prob", "median_prob", "final_sinc_prob"])
def test_each_probability_switches_its_step_by_tile(tiles, field):
    """All other steps keep a grey image nearly unchanged: PSNR 55 dB."""
    images = tiles[:64].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    config = replace(PLAIN, motion_length=(9.0, 9.0), isp_read=(0.1, 0.1))
    kept = []
    for probability in (0.0, 0.5, 1.0):
        result = degrade_batch(images, [replace(config, **{field: probability})] * 64, rng())
        kept.append(int((psnr(result, images) > 50).sum()))
    assert kept[0] == 64 and kept[2] == 0
    assert 16 <= kept[1] <= 48  # 32 +- 4 standard deviations of a binomial


# --- random state, groups, and levels ---


def test_the_generator_determines_the_result(tiles):
    generator = rng(7)
    first = degrade_batch(tiles[:6], ["heavy"] * 6, generator)
    assert torch.equal(first, degrade_batch(tiles[:6], ["heavy"] * 6, rng(7)))
    assert not torch.equal(first, degrade_batch(tiles[:6], ["heavy"] * 6, generator))


def test_images_and_global_random_state_stay_unchanged(tiles):
    before = tiles.clone()
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    degrade_batch(tiles[:8], [ALWAYS] * 8, rng())
    assert torch.equal(tiles, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert np.random.get_state()[2] == numpy_state[2]


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, motion_prob=1.0),
        replace(PLAIN, isp_prob=1.0, isp_shot=(1e-9, 1e-9), isp_read=(1e-9, 1e-9)),
        replace(PLAIN, median_prob=1.0),
        replace(PLAIN, final_sinc_prob=1.0),
        replace(PLAIN, first=replace(PLAIN.first, blur_prob=1.0)),
        replace(PLAIN, first=replace(PLAIN.first, jpeg=(30, 95))),
        replace(PLAIN, second=replace(PLAIN.second, jpeg=(30, 95))),
        replace(PLAIN, second=replace(PLAIN.second, gaussian_sigma=(1.0, 15.0), grey_prob=0.0)),
        replace(PLAIN, second=replace(PLAIN.second, gaussian_prob=0.0, grey_prob=0.0)),
    ],
    ids=["motion", "isp", "median", "sinc", "blur", "first-jpeg", "second-jpeg", "gaussian", "poisson"],
)
def test_equal_tiles_of_a_group_get_different_parameters(tiles, config):
    results = degrade_batch(tiles[:1].expand(16, -1, -1, -1), [config] * 16, rng(), group=16)
    # Pixel noise of the same strength changes the PSNR of a tile by less than 0.1 dB.
    assert float(psnr(results, tiles[:1]).std()) > 0.15


def test_pixel_noise_differs_between_calls(tiles):
    noisy = replace(PLAIN, second=replace(PLAIN.second, gaussian_sigma=(10.0, 10.0), grey_prob=1.0))
    generator = rng()
    first, second = (degrade_batch(tiles[:1], [noisy], generator) for _ in range(2))
    assert float((first - second).std()) * 255 > 10


def test_every_tile_has_its_own_level(tiles):
    clean, strong = replace(LEVELS["light"], p_hq=1.0), replace(LEVELS["heavy"], sf=96.0)
    levels = [clean, "light", strong, "light", clean, strong]
    images = tiles[1].expand(6, -1, -1, -1)
    results = degrade_batch(images, levels, rng(), group=2)
    assert [torch.equal(result, tiles[1]) for result in results] == [level == clean for level in levels]
    assert gradient(results)[[2, 5]].max() < 1e-6  # one pixel, enlarged
    assert gradient(results)[[1, 3]].min() > 1e-3


def test_p_hq_is_a_probability_of_each_tile():
    images = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = degrade_batch(images, [replace(LEVELS["light"], p_hq=0.3)] * 200, rng())
    unchanged = sum(torch.equal(result, image) for result, image in zip(results, images, strict=True))
    assert 35 <= unchanged <= 85  # 60 +- 4 standard deviations of a binomial


def test_the_result_is_a_new_tensor(tiles):
    same = degrade_batch(tiles[:2], [replace(LEVELS["light"], p_hq=1.0)] * 2, rng())
    assert torch.equal(same, tiles[:2]) and same.data_ptr() != tiles.data_ptr()


# --- shapes and devices ---


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (2, 2), (95, 97)])
def test_shape_dtype_and_range_are_kept(size):
    images = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    result = degrade_batch(images, ["light", "heavy", ALWAYS, ALWAYS, "light"], rng())
    assert result.shape == images.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1


def test_overshoot_of_the_last_enlargement_is_cut():
    """Bicubic interpolation overshoots next to a step between black and white."""
    step = torch.zeros(8, 3, 64, 64)
    step[:, :, :, 32:] = 1
    result = degrade_batch(step, ["light"] * 8, rng())
    assert result.min() >= 0 and result.max() <= 1


def test_autocast_does_not_change_the_result(tiles):
    expected = degrade_batch(tiles[:4], [ALWAYS] * 4, rng())
    with torch.autocast("cpu", torch.bfloat16):
        result = degrade_batch(tiles[:4], [ALWAYS] * 4, rng())
    assert torch.equal(result, expected)


def test_no_gradient_is_recorded(tiles):
    assert not degrade_batch(tiles[:2].clone().requires_grad_(), ["heavy"] * 2, rng()).requires_grad


class Recorder(TorchDispatchMode):
    """Records the names of the tensor operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_operation_waits_for_the_device(tiles):
    """These operations give the host a value, or a size, that depends on the pixels."""
    with Recorder() as recorder:
        degrade_batch(tiles[:8], [ALWAYS] * 4 + ["light"] * 4, rng())
    assert "poisson" in recorder.names  # the operations were recorded
    assert not recorder.names & {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim"}


@pytest.mark.parametrize(
    ("images", "levels", "group", "message"),
    [
        (torch.zeros(3, 8, 8), ["light"], 8, r"shape \(3, 8, 8\); expected \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), ["light"], 8, r"shape \(1, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), [], 8, r"shape \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float16), ["light"], 8, "torch.float16; expected torch.float32"),
        (torch.zeros(2, 3, 8, 8), ["light"], 8, "give a sequence of 2, one per image"),
        (torch.zeros(5, 3, 8, 8), "light", 8, "levels are 'light'; give a sequence of 5"),
        (torch.zeros(1, 3, 8, 8), ["medium"], 8, "'medium'; choose one of light, heavy"),
        (torch.zeros(1, 3, 8, 8), ["light"], 0, "group is 0; give .* at least 1"),
    ],
)
def test_invalid_arguments_are_refused(images, levels, group, message):
    with pytest.raises(ValueError, match=message):
        degrade_batch(images, levels, rng(), group)
