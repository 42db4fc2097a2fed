from dataclasses import replace

import numpy as np
import pytest
import torch

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.diffusion import SAMPLERS, denoise_by, respace, sample_ddpm, start_from_lq
from pfstorer_rt.engine.session import TensorSession
from pfstorer_rt.errors import MismatchError, PFStorerError
from pfstorer_rt.imaging.bands import Canvas, plan_canvas
from pfstorer_rt.imaging.color import adain_color_fix, wavelet_color_fix
from pfstorer_rt.imaging.files import to_tensor
from pfstorer_rt.imaging.rows import Spool, from_pixels, to_pixels
from pfstorer_rt.imaging.tone import SkinToned
from pfstorer_rt.models.base import build_base
from pfstorer_rt.plan import COMPONENTS
from pfstorer_rt.runtime.batch import restore_files
from pfstorer_rt.runtime.restorer import Restorer

CONFIG = RestoreConfig(steps=2, sampler="ddpm")
CHOPPED = TileConfig("parity", chop=128, chop_stride=96)


def tiles(**settings):
    return replace(CONFIG, tile=TileConfig(**settings))


def test_a_seed_determines_the_image(restorer, make_image):
    pixels = make_image(64, 70)
    first, again = restorer.restore(pixels, CONFIG), restorer.restore(pixels.copy(), CONFIG)
    other = restorer.restore(pixels, replace(CONFIG, seed=1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert first.dtype == np.float32
    assert first.shape == pixels.shape


def test_a_grey_image_gives_a_grey_result_unless_colours_are_wanted(restorer, make_image):
    grey = np.repeat(make_image(64, 70)[..., :1], 3, -1)
    plain, coloured = restorer.restore(grey, CONFIG), restorer.restore(grey, replace(CONFIG, colorize=True))
    assert np.ptp(plain, axis=-1).max() == 0 and np.ptp(coloured, axis=-1).max() > 1e-3


def test_the_networks_see_a_grey_image_in_skin_tones(restorer, make_image):
    grey = np.repeat(make_image(64, 70)[..., :1], 3, -1)
    skin = to_pixels(SkinToned(Spool.of(from_pixels(grey))).read(0, 64))
    coloured = restorer.restore(skin, replace(CONFIG, colorize=True))
    luma = coloured @ np.array([0.299, 0.587, 0.114], np.float32)
    assert np.abs(restorer.restore(grey, CONFIG)[..., 0] - luma).max() < 0.02, "clamped colours alone differ"
    sepia = np.stack([grey[..., 0], 0.9 * grey[..., 0], 0.7 * grey[..., 0]], -1)
    toned = restorer.restore(sepia, CONFIG)
    assert (toned[..., 0] + 1e-3 >= toned[..., 1]).all() and (toned[..., 1] + 1e-3 >= toned[..., 2]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pixels: (pixels * 255).astype(np.uint8), "divide levels by 255"),
        (lambda pixels: pixels * 255, "expected 0 to 1"),
        (lambda pixels: pixels * np.nan, "nan"),
        (lambda pixels: pixels[:0], "an RGB image"),
        (lambda pixels: pixels[..., 0], "an RGB image"),
        (lambda pixels: pixels.transpose(2, 0, 1), "an RGB image"),
        (lambda pixels: pixels.tolist(), "NumPy array"),
    ],
)
def test_pixels_of_another_type_shape_or_range_are_refused(restorer, make_image, change, words):
    with pytest.raises(ValueError, match=words):
        restorer.restore(change(make_image(64, 70)), CONFIG)


def test_the_layout_of_the_array_does_not_change_the_image(restorer, make_image):
    pixels = make_image(64, 70)
    expected = restorer.restore(pixels, CONFIG)
    locked = np.asfortranarray(pixels)
    locked.flags.writeable = False
    for given in (locked, pixels[::-1][::-1], pixels.astype(">f4"), pixels.astype(np.float64)):
        assert np.array_equal(restorer.restore(given, CONFIG), expected)


def test_the_global_generator_stays_unchanged(restorer, make_image):
    state, legacy = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    restorer.restore(make_image(64, 64), CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], legacy)


@torch.no_grad()
def untiled(base, pixels, seed, kind, init="lq"):
    """Restore one tile by calling the networks directly."""
    image = to_tensor(pixels)
    generator = np.random.Generator(np.random.Philox(seed))
    z_lq = base.encode(image)

    def noise():
        return torch.from_numpy(generator.standard_normal(z_lq.shape, np.float32))

    first = noise()
    context = base.encode_prompt()

    def denoiser(x, t):
        t = torch.tensor([float(t)])
        return base.unet(x, t, context, base.structure_encoder(z_lq, t))

    x = start_from_lq(z_lq, first, base.schedule) if init == "lq" else first
    denoise = denoise_by(denoiser, base.schedule, "epsilon")
    x = sample_ddpm(denoise, x, respace(2), base.schedule, noise)
    return to_pixels(kind(base.decode(x)[0].numpy(), image[0].numpy()).clip(-1, 1))


@pytest.mark.parametrize("init", ["lq", "noise"])
def test_one_tile_equals_the_untiled_pipeline_bit_for_bit(restorer, nano_base, make_image, init):
    pixels = make_image(64, 64)
    found = restorer.restore(pixels, replace(CONFIG, seed=7, init=init, colorize=True))
    assert np.array_equal(found, untiled(nano_base, pixels, 7, adain_color_fix, init))


def test_color_fix_is_adain_for_one_tile_and_wavelet_for_several(restorer, nano_base, make_image):
    pixels = make_image(64, 64)
    for name, fix in (("wavelet", wavelet_color_fix), ("none", lambda content, style: content)):
        found = restorer.restore(pixels, replace(CONFIG, color_fix=name, colorize=True))
        assert np.array_equal(found, untiled(nano_base, pixels, 0, fix))
    for size, chosen in (((64, 64), "adain"), ((64, 96), "wavelet")):
        results = {
            name: restorer.restore(make_image(*size), replace(CONFIG, color_fix=name))
            for name in ("auto", "adain", "wavelet")
        }
        same = {name for name in ("adain", "wavelet") if np.array_equal(results[name], results["auto"])}
        assert same == {chosen}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (200, 70), (64, 64), (65, 64), (97, 131), (5, 7)])
def test_any_size_is_restored(restorer, make_image, height, width):
    pixels = make_image(height, width)
    found = restorer.restore(pixels, CONFIG)
    assert found.shape == (height, width, 3)
    assert np.isfinite(found).all()
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "scale", "size"),
    [(70, 101, 0.5, (35, 50)), (70, 101, 2.0, (140, 202)), (33, 65, 1.5, (50, 98)), (2, 3, 0.1, (1, 1))],
)
def test_scale_sets_the_size(restorer, make_image, height, width, scale, size):
    found = restorer.restore(make_image(height, width), replace(CONFIG, scale=scale))
    assert found.shape == (*size, 3)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 65), (97, 131), (129, 300)])
@pytest.mark.parametrize("color_fix", ["none", "auto"])
def test_perfect_networks_return_the_input(perfect, make_image, height, width, color_fix):
    # Cutting, padding, tiling, blending and cropping must all undo each other.
    pixels = make_image(height, width)
    for tile in (TileConfig(), TileConfig("parity"), TileConfig(overlap=0, batch=3), CHOPPED):
        found = perfect.restore(pixels, replace(CONFIG, tile=tile, color_fix=color_fix))
        # x0 is recovered through a division by sqrt(abar) = 0.07 in fp32.
        assert np.allclose(found, pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(96, 120), (40, 52), (30, 90)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_perfect_networks_only_resize(perfect, make_image, height, width, scale):
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([y / height, x / width, np.sin(x / 9) * np.cos(y / 11) / 3 + 0.5], -1).astype(np.float32)
    found = perfect.restore(pixels, replace(CONFIG, scale=scale, color_fix="none"))
    size = (round(width * scale), round(height * scale))
    planes = [np.asarray(Image.fromarray(pixels[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(3)]
    # Going up to a tile and down again, and Pillow's other cubic: 1 % on a smooth image, a little more at the border.
    difference = np.abs(found - np.clip(np.stack(planes, -1), 0, 1))
    assert difference.mean() < 0.01
    assert difference.max() < 0.05


def test_canvas_sizes_of_known_images():
    assert plan_canvas(64, 64, 64, 1.0) == Canvas(64, 64, 0, 0, 64, 64)
    assert plan_canvas(32, 48, 64, 1.0) == Canvas(64, 96, 0, 0, 32, 48)  # enlarged to a tile
    assert plan_canvas(100, 70, 64, 1.0) == Canvas(100, 70, 28, 26, 100, 70)  # padded to 32
    assert plan_canvas(100, 70, 64, 2.0) == Canvas(200, 140, 24, 20, 200, 140)
    assert plan_canvas(100, 80, 64, 0.5) == Canvas(80, 64, 16, 0, 50, 40)  # never under a tile
    assert plan_canvas(1, 1, 64, 1.0) == Canvas(8, 8, 56, 56, 1, 1)  # no more than eight times
    assert plan_canvas(3, 100, 64, 1.0) == Canvas(24, 800, 40, 0, 3, 100)
    assert plan_canvas(3, 500, 64, 1.0) == Canvas(6, 1024, 58, 0, 3, 500)  # a long side of no more than 16 tiles
    assert plan_canvas(3, 2000, 64, 1.0) == Canvas(3, 2000, 61, 16, 3, 2000)
    for scale in (0.0, -1.0, 17.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            plan_canvas(64, 64, 64, scale)


def test_settings_default_to_the_settings_of_the_engine(restorer):
    recipe = restorer.recipe()
    assert (recipe.steps, recipe.sampler, recipe.overlap, recipe.chop) == (4, "ddpm", 16, 1280)
    assert restorer.recipe(RestoreConfig(tile=TileConfig("parity"))).overlap == 32
    assert restorer.recipe(RestoreConfig(tile=TileConfig("parity", chop=32))).chop == 64  # never below a tile
    recipe = restorer.recipe(RestoreConfig(steps=9, sampler="ddim", tile=TileConfig(overlap=8)))
    assert (recipe.steps, recipe.sampler, recipe.overlap) == (9, "ddim", 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RestoreConfig(steps=0), "0 steps: expected 1 to 1000"),
        (RestoreConfig(steps=1001), "1001 steps: expected 1 to 1000"),
        (RestoreConfig(sampler="euler"), "sampler 'euler': expected one of ddpm"),
        (RestoreConfig(strength=float("nan")), "strength nan"),
        (RestoreConfig(strength=float("inf")), "strength inf"),
        (RestoreConfig(scale=0), "scale 0"),
        (RestoreConfig(scale=float("nan")), "scale nan"),
        (RestoreConfig(tile=TileConfig(overlap=64)), "overlap 64: expected 0 to 56"),
        (RestoreConfig(tile=TileConfig(overlap=12)), "overlap 12"),
        (RestoreConfig(tile=TileConfig(overlap=-8)), "overlap -8"),
        (RestoreConfig(tile=TileConfig(batch=0)), "tile batch 0"),
        (RestoreConfig(tile=TileConfig(chop=100)), "chop 100: expected a multiple of 32"),
        (RestoreConfig(tile=TileConfig(chop=0)), "chop 0"),
        (RestoreConfig(tile=TileConfig(chop_stride=0)), "chop_stride 0"),
        (RestoreConfig(eta=1.5), "eta 1.5: expected 0 to 1"),
        (RestoreConfig(eta=float("nan")), "eta nan"),
        (RestoreConfig(cfw_weight=0.5), "cfw_weight 0.5: this engine has no controllable feature wrapping"),
        (RestoreConfig(cfw_weight=float("nan")), "cfw_weight nan"),
    ],
)
def test_invalid_settings_are_refused_before_any_network_runs(counted, make_image, config, message):
    restorer, sessions = counted
    with pytest.raises(ValueError, match=message):
        restorer.restore(make_image(64, 64), config)
    assert not sessions["encoder"].calls


def test_strength_scales_the_effect_of_the_identity(personal, restorer, make_image):
    pixels = make_image(64, 64)
    base = restorer.restore(pixels, CONFIG)
    results = {s: personal.restore(pixels, replace(CONFIG, strength=s)) for s in (0.0, 0.5, 1.0)}
    # Two plans: their folded constants may differ in the last bit, as BLAS picks kernels by memory alignment.
    # Bit for bit is tested where both are the same modules, in models/test_personalization.py.
    np.testing.assert_allclose(results[0.0], base, atol=1e-5)
    distance = {s: np.abs(r - base).mean() for s, r in results.items()}
    assert 0 < distance[0.5] < distance[1.0]


def test_strength_reaches_the_engine_as_a_float(personal, counting, make_image):
    denoiser = counting(personal.sessions["denoiser"])
    with Restorer(personal.manifest, {**personal.sessions, "denoiser": denoiser}, "torch") as made:
        made.restore(make_image(64, 64), replace(CONFIG, strength=1))
    for name, shape in (("strength", (1,)), ("t", (1,))):
        assert {(call[name].dtype, call[name].shape) for call in denoiser.calls} == {(np.dtype(np.float32), shape)}


class Elsewhere(TensorSession):
    """A network that computes only shapes, except the encoder. It accepts tensors only from its own device."""

    inputs, outputs, provider = ("x", "t", "z_lq", "strength"), ("mean", "std"), "elsewhere"

    def __init__(self, component):
        self.component, self.device = component, torch.device("cpu" if component == "encoder" else "meta")
        self.fetched = 0

    def fetch(self, array):
        assert array.device == self.device
        self.fetched += 1
        return np.zeros(tuple(array.shape), np.float32)

    def compute(self, **tensors):
        assert {tensor.device for tensor in tensors.values()} == {self.device}
        if self.component == "denoiser":
            return {"prediction": torch.empty_like(tensors["x"])}
        if self.component == "decoder":
            sides = (8 * side for side in tensors["latent"].shape[-2:])
            return {"image": torch.empty(1, 3, *sides, device=self.device)}
        mean = torch.empty(1, 4, *(side // 8 for side in tensors["image"].shape[-2:]), device=self.device)
        return {"mean": mean, "std": mean}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("init", ["lq", "noise"])
def test_latents_stay_on_the_device_of_the_denoiser(restorer, make_image, sampler, init):
    sessions = {component: Elsewhere(component) for component in COMPONENTS}
    made = Restorer(replace(restorer.manifest, latent_channels=4, factor=8, tile=64), sessions, "elsewhere")
    config = RestoreConfig(steps=3, sampler=sampler, init=init, tile=TileConfig(batch=4))
    assert made.restore(make_image(96, 130), config).shape == (96, 130, 3)
    assert sessions["denoiser"].fetched == 1, "only the last latent is copied to the host"


def test_strength_has_no_effect_without_an_identity(restorer, make_image):
    pixels = make_image(64, 64)
    assert np.array_equal(restorer.restore(pixels, replace(CONFIG, strength=0.3)), restorer.restore(pixels, CONFIG))


def test_dreambooth_has_no_strength(nano_base, make_nano_identity, make_image):
    pixels = make_image(64, 64)
    with Restorer.from_base(nano_base, make_nano_identity(method="dreambooth"), device="cpu") as tuned:
        assert np.isfinite(tuned.restore(pixels, CONFIG)).all()
        with pytest.raises(ValueError, match="no gated blocks to scale"):
            tuned.restore(pixels, replace(CONFIG, strength=0.5))


def test_an_identity_of_another_base_is_refused(nano_identity):
    with pytest.raises(MismatchError, match="was learned on base"):
        Restorer.from_base(build_base("nano", seed=4), nano_identity, device="cpu")


def test_values_that_are_not_finite_are_an_error(restorer, counting, make_image):
    class Broken(counting):
        def compute(self, **arrays):
            return {name: array * np.float32("nan") for name, array in self.session.run(**arrays).items()}

    for component in ("encoder", "denoiser", "decoder"):
        sessions = dict(restorer.sessions)
        sessions[component] = Broken(sessions[component])
        with pytest.raises(PFStorerError, match="not finite"):
            Restorer(restorer.manifest, sessions, "torch").restore(make_image(64, 64), CONFIG)


def test_sampler_and_eta_change_the_result(restorer, make_image):
    pixels = make_image(64, 64)
    ddim = replace(CONFIG, sampler="ddim", steps=3)
    one, other = (restorer.restore(pixels, replace(ddim, eta=eta)) for eta in (0.0, 1.0))
    assert np.abs(one - other).max() > 1e-3
    ddpm = restorer.restore(pixels, replace(CONFIG, steps=3))
    assert np.allclose(other, ddpm, rtol=0, atol=1e-3)  # eta = 1 is DDPM


def test_a_closed_restorer_is_refused_before_any_work(nano_base, make_image, tmp_path):
    with Restorer.from_base(nano_base, device="cpu") as restorer:
        pass
    for use in (restorer.restore, lambda pixels: restorer.recipe(), lambda pixels: restorer.layout(64, 64)):
        with pytest.raises(ValueError, match="this restorer is closed"):
            use(make_image(64, 64))
    second = Restorer.from_base(nano_base, device="cpu")
    second.close()
    with pytest.raises(PFStorerError, match="this restorer is closed; open the plan or the base again"):
        second.recipe()
    with pytest.raises(PFStorerError, match="this restorer is closed"):
        restore_files(restorer, tmp_path / "missing.png", tmp_path / "out.png")


def test_restorers_on_one_base_share_its_weights_and_no_kernels(nano_base):
    own, device = nano_base.unet.kernels, nano_base.device
    with (
        Restorer.from_base(nano_base, attention="math", device="cpu") as one,
        Restorer.from_base(nano_base, attention="sdpa", device="cpu") as other,
    ):
        unets = [restorer.sessions["denoiser"].module.unet for restorer in (one, other)]
        assert unets[0].kernels.attention is not unets[1].kernels.attention
        assert nano_base.unet.kernels is own and nano_base.device == device
        weights = [next(unet.parameters()).data_ptr() for unet in (*unets, nano_base.unet)]
        assert len(set(weights)) == 1
