from dataclasses import replace

import numpy as np
import pytest
import torch

from pfstorer_rt import restore as runtime
from pfstorer_rt.canvas import Canvas, plan_canvas
from pfstorer_rt.color import adain_color_fix, wavelet_color_fix
from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.engine.session import HostSession
from pfstorer_rt.errors import MismatchError, PFStorerError
from pfstorer_rt.image import from_tensor, to_tensor
from pfstorer_rt.models.base import build_base
from pfstorer_rt.plan import COMPONENTS
from pfstorer_rt.restore import Restorer
from pfstorer_rt.sampling import SAMPLERS, alphas_cumprod, respace, sample_ddpm, start_from_lq
from pfstorer_rt.spool import Spool

CONFIG = RestoreConfig(steps=2, sampler="ddpm")
CHOPPED = TileConfig("parity", chop=128, chop_stride=96)


@pytest.fixture(scope="module")
def restorer(nano_base):
    with Restorer.from_base(nano_base, device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def personal(nano_base, nano_identity):
    with Restorer.from_base(nano_base, nano_identity, device="cpu") as made:
        yield made


def tiles(**settings):
    return replace(CONFIG, tile=TileConfig(**settings))


class Counting(HostSession):
    """A session that writes down what goes through it."""

    def __init__(self, session):
        self.session, self.calls = session, []
        self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider

    def run(self, **arrays):
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        return self.session.run(**arrays)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def counted(restorer):
    """The restorer with counting sessions, by component."""
    sessions = {name: Counting(session) for name, session in restorer._sessions.items()}
    return Restorer(restorer.manifest, sessions, "torch"), sessions


def test_a_seed_is_one_picture(restorer, make_picture):
    pixels = make_picture(64, 70)
    first, again = restorer.restore(pixels, CONFIG), restorer.restore(pixels.copy(), CONFIG)
    other = restorer.restore(pixels, replace(CONFIG, seed=1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert first.dtype == np.float32
    assert first.shape == pixels.shape


def test_the_global_generator_is_left_alone(restorer, make_picture):
    state = torch.random.get_rng_state()
    restorer.restore(make_picture(64, 64), CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)


@torch.no_grad()
def untiled(base, pixels, seed, kind, init="lq"):
    """The pipeline of one tile, from the networks alone."""
    image = to_tensor(pixels)
    generator = torch.Generator().manual_seed(seed)
    z_lq = base.encode(image)
    first = torch.randn(z_lq.shape, generator=generator)
    context = base.encode_prompt()

    def denoiser(x, t):
        t = torch.tensor([float(t)])
        return base.unet(x, t, context, base.structure_encoder(z_lq, t))

    x = start_from_lq(z_lq, first) if init == "lq" else first
    x = sample_ddpm(denoiser, x, respace(2), "epsilon", lambda: torch.randn(z_lq.shape, generator=generator))
    return from_tensor(kind(base.decode(x), image).clamp(-1, 1))


@pytest.mark.parametrize("init", ["lq", "noise"])
def test_one_tile_is_untiled_bit_for_bit(restorer, nano_base, make_picture, init):
    pixels = make_picture(64, 64)
    found = restorer.restore(pixels, replace(CONFIG, seed=7, init=init))
    assert np.array_equal(found, untiled(nano_base, pixels, 7, adain_color_fix, init))


def test_color_fix(restorer, nano_base, make_picture, monkeypatch):
    pixels = make_picture(64, 64)
    for name, fix in (("wavelet", wavelet_color_fix), ("none", lambda content, style: content)):
        found = restorer.restore(pixels, replace(CONFIG, color_fix=name))
        assert np.array_equal(found, untiled(nano_base, pixels, 0, fix))
    taken = []
    monkeypatch.setattr("pfstorer_rt.restore.ColorFixed", lambda c, s, kind: taken.append(kind) or c)
    restorer.restore(pixels, CONFIG)
    restorer.restore(make_picture(64, 96), CONFIG)
    restorer.restore(make_picture(64, 96), replace(CONFIG, color_fix="adain"))
    assert taken == ["adain", "wavelet", "adain"]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (200, 70), (64, 64), (65, 64), (97, 131), (5, 7)])
def test_any_size_is_restored(restorer, make_picture, height, width):
    pixels = make_picture(height, width)
    found = restorer.restore(pixels, CONFIG)
    assert found.shape == (height, width, 3)
    assert np.isfinite(found).all()
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "scale", "size"),
    [(70, 101, 0.5, (35, 50)), (70, 101, 2.0, (140, 202)), (33, 65, 1.5, (50, 98)), (2, 3, 0.1, (1, 1))],
)
def test_scale_sets_the_size(restorer, make_picture, height, width, scale, size):
    found = restorer.restore(make_picture(height, width), replace(CONFIG, scale=scale))
    assert found.shape == (*size, 3)
    assert np.isfinite(found).all()


class Perfect(HostSession):
    """Networks that lose nothing: pixels are shuffled into channels, and the denoiser knows the clean latent."""

    def __init__(self, component):
        self.component, self.provider = component, "test"
        self.inputs = {"encoder": ("image",), "denoiser": ("x", "t", "z_lq"), "decoder": ("latent",)}[component]
        self.outputs = {"encoder": ("mean",), "denoiser": ("prediction",), "decoder": ("image",)}[component]

    def run(self, **arrays):
        a = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.component == "encoder":
            return {"mean": torch.nn.functional.pixel_unshuffle(a["image"], 8).numpy()}
        if self.component == "decoder":
            return {"image": torch.nn.functional.pixel_shuffle(a["latent"], 8).numpy()}
        abar = torch.from_numpy(alphas_cumprod())[a["t"].long()][:, None, None, None]
        return {"prediction": ((a["x"] - abar.sqrt() * a["z_lq"]) / (1 - abar).sqrt()).float().numpy()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def perfect(restorer):
    return Restorer(restorer.manifest, {name: Perfect(name) for name in COMPONENTS}, "torch")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 65), (97, 131), (129, 300)])
@pytest.mark.parametrize("color_fix", ["none", "auto"])
def test_perfect_networks_give_the_picture_back(perfect, make_picture, height, width, color_fix):
    # Cutting, padding, tiling, blending and cropping must all undo each other.
    pixels = make_picture(height, width)
    for tile in (TileConfig(), TileConfig("parity"), TileConfig(overlap=0, batch=3), CHOPPED):
        found = perfect.restore(pixels, replace(CONFIG, tile=tile, color_fix=color_fix))
        # x0 is recovered through a division by sqrt(abar) = 0.07 in fp32.
        assert np.allclose(found, pixels, rtol=0, atol=1e-4)


def test_rows_are_what_the_whole_is(restorer, make_picture, monkeypatch):
    pixels, config = make_picture(150, 170), replace(CONFIG, scale=1.3)
    whole = restorer.restore(pixels, config)
    monkeypatch.setattr("pfstorer_rt.spool.IN_MEMORY", 0)  # all of it in files
    result = restorer.restore_rows(Spool.of(pixels), config)
    assert (result.height, result.width) == whole.shape[:2]
    rows = np.concatenate([result.read(y, min(195, y + 20)) for y in range(0, 195, 20)])
    # Bands of the colour fix round differently.
    np.testing.assert_allclose(rows, whole, atol=1e-5)


@pytest.mark.parametrize("size", [(160, 256), (96, 200)])
def test_tiles_of_the_autoencoder_are_the_untiled_autoencoder(nano_base, counted, make_picture, monkeypatch, size):
    restorer, sessions = counted
    pixels = make_picture(*size)
    untiled = restorer.restore(pixels, CONFIG)
    monkeypatch.setitem(runtime.CODEC_TILE, False, 128)
    for component in COMPONENTS:
        sessions[component].calls.clear()
    tiled = restorer.restore(pixels, CONFIG)
    work = restorer.plan(*size, CONFIG)
    assert len(sessions["encoder"].calls) == len(sessions["decoder"].calls) == work.codec_tiles > 1
    error = np.mean((tiled.astype(np.float64) - untiled) ** 2)
    assert -10 * np.log10(error) >= 45


def test_tiles_of_one_picture_see_one_field_of_noise(counted, make_picture):
    restorer, sessions = counted
    restorer.restore(make_picture(64, 96), replace(CONFIG, init="noise"))
    x = sessions["denoiser"].calls[0]["x"]
    assert len(x) == 2  # at latent columns 0 and 4
    assert np.array_equal(x[0][..., 4:], x[1][..., :4])


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_out_of_memory_halves_the_batch_and_goes_on(restorer, make_picture, allowed):
    class Small(Counting):
        def run(self, **arrays):
            if len(arrays["x"]) > allowed:
                raise RuntimeError("[ONNXRuntimeError] : 6 : std::bad_alloc")
            return super().run(**arrays)

    pixels = make_picture(130, 200)
    small = Small(restorer._sessions["denoiser"])
    made = Restorer(restorer.manifest, {**restorer._sessions, "denoiser": small}, "torch")
    found = made.restore(pixels, tiles(batch=8))
    np.testing.assert_allclose(found, restorer.restore(pixels, tiles(batch=8)), atol=1e-4)
    assert max(len(call["x"]) for call in small.calls) == 1 << (allowed.bit_length() - 1)
    allowed = 0
    with pytest.raises(PFStorerError, match="too little memory for a single tile"):
        made.restore(pixels, tiles(batch=8))


def test_other_failures_are_not_taken_for_want_of_memory(restorer, make_picture):
    class Broken(Counting):
        def run(self, **arrays):
            raise RuntimeError("no kernel")

    made = Restorer(restorer.manifest, {**restorer._sessions, "denoiser": Broken(restorer._sessions["denoiser"])}, "x")
    with pytest.raises(RuntimeError, match="no kernel"):
        made.restore(make_picture(64, 64), CONFIG)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (130, 97), (300, 64), (20, 20)])
@pytest.mark.parametrize("tile", [TileConfig(batch=3), CHOPPED])
def test_the_plan_is_what_is_done(counted, make_picture, height, width, tile):
    restorer, sessions = counted
    config = replace(CONFIG, tile=tile, steps=3)
    work = restorer.plan(height, width, config)
    restorer.restore(make_picture(height, width), config)
    assert sum(len(call["x"]) for call in sessions["denoiser"].calls) == 3 * work.tiles
    assert len(sessions["encoder"].calls) == work.codec_tiles
    assert max(len(call["x"]) for call in sessions["denoiser"].calls) == work.batch


@pytest.mark.parametrize(("height", "width"), [(96, 120), (40, 52), (30, 90)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_perfect_networks_only_resize(perfect, make_picture, height, width, scale):
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([y / height, x / width, np.sin(x / 9) * np.cos(y / 11) / 3 + 0.5], -1).astype(np.float32)
    found = perfect.restore(pixels, replace(CONFIG, scale=scale, color_fix="none"))
    size = (round(width * scale), round(height * scale))
    planes = [np.asarray(Image.fromarray(pixels[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(3)]
    # Going up to a tile and down again, and Pillow's other cubic: 1 % on a smooth picture, a little more at the border.
    difference = np.abs(found - np.clip(np.stack(planes, -1), 0, 1))
    assert difference.mean() < 0.01
    assert difference.max() < 0.05


def test_canvas_by_hand():
    assert plan_canvas(64, 64, 64, 1.0) == Canvas(64, 64, 0, 0, 64, 64)
    assert plan_canvas(32, 48, 64, 1.0) == Canvas(64, 96, 0, 0, 32, 48)  # enlarged to a tile
    assert plan_canvas(100, 70, 64, 1.0) == Canvas(100, 70, 28, 26, 100, 70)  # padded to 32
    assert plan_canvas(100, 70, 64, 2.0) == Canvas(200, 140, 24, 20, 200, 140)
    assert plan_canvas(100, 80, 64, 0.5) == Canvas(80, 64, 16, 0, 50, 40)  # never under a tile
    assert plan_canvas(1, 1, 64, 1.0) == Canvas(4, 4, 60, 60, 1, 1)  # no more than four times
    assert plan_canvas(3, 500, 64, 1.0) == Canvas(12, 2000, 52, 16, 3, 500)
    for scale in (0.0, -1.0, 17.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            plan_canvas(64, 64, 64, scale)


@pytest.mark.parametrize(("height", "width"), [(64, 160), (130, 97)])
@pytest.mark.parametrize(("mode", "stride"), [("parity", 32), ("fast", 48)])
def test_tiles_cover_a_larger_picture(counted, make_picture, height, width, mode, stride):
    restorer, sessions = counted
    found = restorer.restore(make_picture(height, width), tiles(mode=mode))
    assert found.shape == (height, width, 3)
    assert np.isfinite(found).all()
    rows, columns = (-(-(-(-side // 32) * 32 - 64) // stride) + 1 for side in (height, width))
    denoised = sum(len(call["x"]) for call in sessions["denoiser"].calls)
    assert denoised == 2 * rows * columns  # 2 steps
    assert all(call["x"].shape[1:] == (4, 8, 8) == call["z_lq"].shape[1:] for call in sessions["denoiser"].calls)
    assert len(sessions["encoder"].calls) == len(sessions["decoder"].calls) == 1


def raised_cosine(side, overlap):
    """(1 - cos) / 2 from both ends inwards."""
    d = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    return np.where(d < overlap, (1 - np.cos(np.pi * d / overlap)) / 2, 1)


@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_tiled_prediction_is_the_weighted_mean_of_the_tiles(counted, make_picture, mode):
    from pfstorer_rt.tiling import gaussian_weights

    restorer, sessions = counted
    pixels = make_picture(64, 96)
    restorer.restore(pixels, replace(tiles(mode=mode, overlap=32), steps=1, color_fix="none"))
    (call,) = sessions["denoiser"].calls
    assert call["x"].shape[0] == 2
    outputs = sessions["denoiser"].session.run(**call)["prediction"].astype(np.float64)
    weights = gaussian_weights(8, 8) if mode == "parity" else np.outer(np.ones(8), raised_cosine(8, 4))
    total, mass = np.zeros((4, 8, 12)), np.zeros((8, 12))
    for tile, left in zip(outputs, (0, 4), strict=True):
        total[:, :, left : left + 8] += tile * weights
        mass[:, left : left + 8] += weights
    blended = total / mass
    x = np.concatenate([call["x"][0][:, :, :4], call["x"][1]], axis=-1).astype(np.float64)
    abar = 0.004660098513  # the published value at t = 999
    clean = (x - np.sqrt(1 - abar) * blended) / np.sqrt(abar)
    decoded = sessions["decoder"].calls[0]["latent"][0]
    # One step of DDPM returns its estimate; dividing by sqrt(abar) = 0.07 scales fp32 rounding up.
    assert np.allclose(decoded, clean, rtol=0, atol=1e-4)


def test_the_tile_batch_changes_nothing(restorer, make_picture):
    pixels = make_picture(96, 128)
    one, many = (restorer.restore(pixels, tiles(batch=batch)) for batch in (1, 16))
    assert np.allclose(one, many, rtol=0, atol=1e-4)


def test_overlap_changes_the_tiles(counted, make_picture):
    restorer, sessions = counted
    restorer.restore(make_picture(64, 128), tiles(overlap=0))
    assert sum(len(call["x"]) for call in sessions["denoiser"].calls) == 2 * 2


def test_a_large_picture_is_restored_in_squares(counted, make_picture):
    restorer, sessions = counted
    chopped = replace(CONFIG, tile=CHOPPED)
    pixels = make_picture(128, 224)
    found = restorer.restore(pixels, chopped)
    assert found.shape == pixels.shape
    assert np.isfinite(found).all()
    encoded = [call["image"] for call in sessions["encoder"].calls]
    assert [e.shape[-2:] for e in encoded] == [(128, 128), (128, 128)]  # at columns 0 and 96
    planes = to_tensor(pixels).numpy()
    assert np.array_equal(encoded[0], planes[..., :128])
    assert np.array_equal(encoded[1], planes[..., 96:])
    # Outside the other square's reach each square is what it is alone, from the same seed.
    alone = restorer.restore(pixels[:, :128], chopped)
    assert np.allclose(found[:, :90], alone[:, :90], rtol=0, atol=1e-5)
    alone = restorer.restore(np.ascontiguousarray(pixels[:, 96:]), chopped)
    assert np.allclose(found[:, 134:], alone[:, 38:], rtol=0, atol=1e-5)


def test_one_long_side_is_chopped_too(restorer, make_picture):
    found = restorer.restore(make_picture(64, 300), replace(CONFIG, tile=CHOPPED))
    assert found.shape == (64, 300, 3)
    assert np.isfinite(found).all()


def test_progress_counts_every_step_once(restorer, make_picture):
    def steps(height, width, config):
        seen = []
        restorer.restore(make_picture(height, width), config, lambda done, total: seen.append((done, total)))
        return seen

    # One tile through encoder and decoder, and once a step through the denoiser.
    assert steps(64, 64, replace(CONFIG, steps=3)) == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert steps(64, 160, CONFIG) == [(1, 8), (4, 8), (7, 8), (8, 8)]  # three tiles go through at once
    for config in (tiles(batch=2), replace(CONFIG, tile=CHOPPED)):
        done = [d for d, _ in steps(128, 224, config)]
        assert done == sorted(set(done)) and done[-1] == restorer.plan(128, 224, config).total


def test_settings_default_to_the_engines(restorer):
    config = RestoreConfig()
    assert (restorer.steps(config), restorer.sampler(config), restorer.overlap(config)) == (4, "ddpm", 16)
    assert restorer.overlap(RestoreConfig(tile=TileConfig("parity"))) == 32
    chosen = RestoreConfig(steps=9, sampler="ddim", tile=TileConfig(overlap=8))
    assert (restorer.steps(chosen), restorer.sampler(chosen), restorer.overlap(chosen)) == (9, "ddim", 8)


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
        (RestoreConfig(color_fix="magic"), "colour fix 'magic'"),
        (RestoreConfig(tile=TileConfig(overlap=64)), "overlap 64: expected 0 to 56"),
        (RestoreConfig(tile=TileConfig(overlap=12)), "overlap 12"),
        (RestoreConfig(tile=TileConfig(overlap=-8)), "overlap -8"),
        (RestoreConfig(tile=TileConfig(batch=0)), "tile batch 0"),
        (RestoreConfig(tile=TileConfig("slow")), "tiling 'slow': expected one of parity, fast"),
        (RestoreConfig(tile=TileConfig(chop=100)), "chop 100: expected a multiple of 32"),
        (RestoreConfig(tile=TileConfig(chop=0)), "chop 0"),
        (RestoreConfig(tile=TileConfig(chop_stride=0)), "chop_stride 0"),
        (RestoreConfig(init="zero"), "init 'zero': expected lq or noise"),
        (RestoreConfig(eta=1.5), "eta 1.5: expected 0 to 1"),
        (RestoreConfig(eta=float("nan")), "eta nan"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(counted, make_picture, config, message):
    restorer, sessions = counted
    with pytest.raises(ValueError, match=message):
        restorer.restore(make_picture(64, 64), config)
    assert not sessions["encoder"].calls


def test_strength_turns_the_person_up_and_down(personal, restorer, make_picture):
    pixels = make_picture(64, 64)
    base = restorer.restore(pixels, CONFIG)
    results = {s: personal.restore(pixels, replace(CONFIG, strength=s)) for s in (0.0, 0.5, 1.0)}
    # Two plans: their folded constants may differ in the last bit, as BLAS picks kernels by memory alignment.
    # Bit for bit is tested where both are the same modules, in models/test_personalization.py.
    np.testing.assert_allclose(results[0.0], base, atol=1e-5)
    distance = {s: np.abs(r - base).mean() for s, r in results.items()}
    assert 0 < distance[0.5] < distance[1.0]


def test_strength_reaches_the_engine_as_a_float(personal, make_picture):
    denoiser = Counting(personal._sessions["denoiser"])
    with Restorer(personal.manifest, {**personal._sessions, "denoiser": denoiser}, "torch") as made:
        made.restore(make_picture(64, 64), replace(CONFIG, strength=1))
    for name, shape in (("strength", (1,)), ("t", (1,))):
        assert {(call[name].dtype, call[name].shape) for call in denoiser.calls} == {(np.dtype(np.float32), shape)}


class Elsewhere:
    """A network that computes shapes alone, the encoder on the host; what comes from another device is refused."""

    inputs, outputs, provider = ("x", "t", "z_lq", "strength"), ("mean", "std"), "elsewhere"

    def __init__(self, component):
        self.component, self.device = component, torch.device("cpu" if component == "encoder" else "meta")

    def run_tensors(self, **tensors):
        assert {tensor.device for tensor in tensors.values()} == {self.device}
        if self.component == "denoiser":
            return {"prediction": torch.empty_like(tensors["x"])}
        if self.component == "decoder":
            return {"image": torch.zeros(1, 3, *(8 * side for side in tensors["latent"].shape[-2:]))}
        mean = torch.empty(1, 4, *(side // 8 for side in tensors["image"].shape[-2:]), device=self.device)
        return {"mean": mean, "std": mean}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("init", ["lq", "noise"])
def test_latents_stay_where_the_denoiser_is(restorer, make_picture, sampler, init):
    sessions = {component: Elsewhere(component) for component in COMPONENTS}
    made = Restorer(replace(restorer.manifest, latent_channels=4, factor=8, tile=64), sessions, "elsewhere")
    config = RestoreConfig(steps=3, sampler=sampler, init=init, tile=TileConfig(batch=4))
    assert made.restore(make_picture(96, 130), config).shape == (96, 130, 3)


def test_strength_does_nothing_without_a_person(restorer, make_picture):
    pixels = make_picture(64, 64)
    assert np.array_equal(restorer.restore(pixels, replace(CONFIG, strength=0.3)), restorer.restore(pixels, CONFIG))


def test_dreambooth_has_no_strength(nano_base, make_nano_identity, make_picture):
    pixels = make_picture(64, 64)
    with Restorer.from_base(nano_base, make_nano_identity(method="dreambooth"), device="cpu") as tuned:
        assert np.isfinite(tuned.restore(pixels, CONFIG)).all()
        with pytest.raises(ValueError, match="no gated blocks to scale"):
            tuned.restore(pixels, replace(CONFIG, strength=0.5))


def test_an_identity_of_another_base_is_refused(nano_identity):
    with pytest.raises(MismatchError, match="was learned on base"):
        Restorer.from_base(build_base("nano", seed=4), nano_identity, device="cpu")


def test_values_that_are_not_finite_are_an_error(restorer, make_picture):
    class Broken(Counting):
        def run(self, **arrays):
            return {name: array * np.float32("nan") for name, array in self.session.run(**arrays).items()}

    for component in ("encoder", "denoiser", "decoder"):
        sessions = dict(restorer._sessions)
        sessions[component] = Broken(sessions[component])
        with pytest.raises(PFStorerError, match="not finite"):
            Restorer(restorer.manifest, sessions, "torch").restore(make_picture(64, 64), CONFIG)


def test_the_engines_own_sampler_and_eta(restorer, make_picture):
    pixels = make_picture(64, 64)
    ddim = replace(CONFIG, sampler="ddim", steps=3)
    one, other = (restorer.restore(pixels, replace(ddim, eta=eta)) for eta in (0.0, 1.0))
    assert np.abs(one - other).max() > 1e-3
    ddpm = restorer.restore(pixels, replace(CONFIG, steps=3))
    assert np.allclose(other, ddpm, rtol=0, atol=1e-3)  # eta = 1 is DDPM
