import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from pfstorer_rt.diffusion import (
    SAMPLERS,
    Schedule,
    denoise_by,
    posterior,
    respace,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    split_prediction,
    start_from_lq,
)
from pfstorer_rt.errors import MissingBackendError

STANDARD = Schedule()
SHAPE = (1, 4, 6, 5)
KINDS = ("epsilon", "v_prediction")
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def abar_by_hand(t):
    """Product of 1 - beta up to t, each beta from the two square roots, in Python floats."""
    a, b = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (a + (b - a) * k / 999) ** 2 for k in range(t + 1))


class NoiseTape:
    """Normal noise that can be drawn twice in the same order."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0

    def __call__(self):
        self.drawn += 1
        return torch.randn(SHAPE, generator=self.generator)


def toy_network(x, t):
    """Any smooth function of x and t will do for comparing samplers."""
    return 0.9 * torch.tanh(x) + 0.1 * math.cos(t / 100)


def oracle(x0, kind):
    """A perfect denoiser, which predicts from the clean latent."""

    def denoiser(x, t):
        abar = abar_by_hand(t)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        return eps if kind == "epsilon" else math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0

    return denoiser


def start(seed=3):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_default_schedule_equals_stable_diffusions():
    abar = STANDARD.alphas_cumprod()
    assert abar.dtype == np.float64
    assert abar.shape == STANDARD.betas().shape == (1000,)
    assert abar[0] == pytest.approx(0.99915, abs=1e-12)
    assert abar[499] == pytest.approx(0.27766965, abs=5e-9)
    assert abar[999] == pytest.approx(0.004660098513, abs=5e-13)
    for t in (0, 1, 250, 998, 999):
        assert abar[t] == pytest.approx(abar_by_hand(t), rel=1e-12)
    # diffusers computes it in fp32.
    assert np.allclose(abar, DDPMScheduler(**SCHEDULE).alphas_cumprod.numpy(), rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("steps", "first", "last"),
    [
        (4, [0, 333, 666, 999], [0, 333, 666, 999]),
        (20, [0, 53, 105, 158, 210, 263, 315, 368, 421, 473], [894, 946, 999]),
        (50, [0, 20, 41, 61, 82, 102, 122, 143], [979, 999]),
        (100, [0, 10, 20, 30, 40, 50, 61, 71], [989, 999]),
        (200, [0, 5, 10], [994, 999]),
    ],
)
def test_respacing_gives_the_published_timesteps(steps, first, last):
    timesteps = respace(steps)
    assert len(timesteps) == steps
    assert timesteps[: len(first)] == first
    assert timesteps[-len(last) :] == last


def test_respacing_stays_next_to_the_exact_spacing():
    assert respace(200)[100] == 502
    assert respace(1000) == list(range(1000))
    assert respace(1) == [999]
    assert respace(2) == [0, 999]
    for steps in range(2, 1001, 37):
        timesteps = respace(steps)
        assert len(timesteps) == steps
        worst = max(abs(t - Fraction(999 * k, steps - 1)) for k, t in enumerate(timesteps))
        assert worst <= Fraction(1, 2) + Fraction(1, 10**9)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="expected 1 to 1000"):
        respace(steps)


def test_posterior_has_the_published_numbers():
    q = posterior(respace(200), STANDARD)
    published = {
        1: (0.00431329, 0.000710590, 0.8356110, 0.1643886),
        100: (0.02384418, 0.02362473, 0.01738204, 0.97891285),
        199: (0.05840939, 0.05839243, 0.004128362, 0.97007410),
    }
    for i, (beta, variance, c1, c2) in published.items():
        # Published from fp32 buffers: 1 - abar / abar_prev is good to 2e-7, which c1 and c2 divide by 5e-3 at i = 1.
        assert q.beta[i] == pytest.approx(beta, abs=2e-7)
        assert q.variance[i] == pytest.approx(variance, abs=2e-7)
        assert q.c1[i] == pytest.approx(c1, abs=6e-6)
        assert q.c2[i] == pytest.approx(c2, abs=6e-6)
    assert (q.variance[0], q.c1[0], q.c2[0]) == (0, pytest.approx(1, abs=1e-12), 0)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_posterior_keeps_the_marginals(steps):
    # x_t ~ N(sqrt(abar) x0, 1 - abar) must become x_prev ~ N(sqrt(abar_prev) x0, 1 - abar_prev).
    timesteps = respace(steps)
    q, abar = posterior(timesteps, STANDARD), STANDARD.alphas_cumprod()[timesteps]
    previous = np.concatenate([[1.0], abar[:-1]])
    assert np.allclose(q.c1 + q.c2 * np.sqrt(abar), np.sqrt(previous), rtol=1e-10)
    assert np.allclose(q.c2**2 * (1 - abar) + q.variance, 1 - previous, rtol=1e-10, atol=1e-14)


def test_start_state_uses_the_last_timestep_of_the_schedule():
    z, noise = start(1), start(2)
    expected = 0.0682649 * z.double() + 0.9976672 * noise.double()
    # The published factors have 7 digits.
    assert torch.allclose(start_from_lq(z, noise, STANDARD).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_split_into_what_it_was_mixed_from(kind):
    x0, eps = start(1).double(), start(2).double()
    for t in (0, 500, 999):
        abar = abar_by_hand(t)
        x = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
        v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
        found = split_prediction(x, eps if kind == "epsilon" else v, abar, kind)
        assert torch.allclose(found[0], x0, rtol=0, atol=1e-12)
        assert torch.allclose(found[1], eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_ddpm_equals_diffusers_ddpm_on_the_same_timesteps(kind, steps):
    timesteps = respace(steps)
    generator, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=kind, variance_type="fixed_small")
    scheduler.set_timesteps(timesteps=timesteps[::-1])
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(toy_network(x, int(t)), t, x, generator=generator).prev_sample
    noise = lambda: torch.randn(x.shape, generator=own)  # noqa: E731
    found = sample_ddpm(denoise_by(toy_network, STANDARD, kind), start(), timesteps, STANDARD, noise)
    assert torch.equal(own.get_state(), generator.get_state())  # as many draws: none at the last step
    # diffusers keeps abar in fp32 and divides by it where it is 5e-3: about 1e-5 a step.
    assert torch.allclose(found, x, rtol=0, atol=1e-3)
    assert found.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_without_noise_equals_diffusers_ddim(kind):
    # diffusers' spacings do not give these four timesteps, so they are set directly.
    timesteps = [0, 333, 666, 999]
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=kind, set_alpha_to_one=True)
    scheduler.num_inference_steps = 3  # its previous timestep is t - 1000 // 3
    x = start()
    for t in reversed(timesteps):
        x = scheduler.step(toy_network(x, t), t, x, eta=0.0).prev_sample
    tape = NoiseTape()
    found = sample_ddim(denoise_by(toy_network, STANDARD, kind), start(), respace(4), STANDARD, tape, eta=0.0)
    assert tape.drawn == 0
    assert torch.allclose(found, x, rtol=0, atol=1e-3)  # fp32 abar in diffusers, as above


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_dpmpp_2m_equals_diffusers_on_the_same_timesteps(steps):
    settings = {name: value for name, value in SCHEDULE.items() if name != "clip_sample"}
    solver = DPMSolverMultistepScheduler(**settings, solver_order=2, final_sigmas_type="zero")
    solver.set_timesteps(timesteps=respace(steps)[::-1])
    x = start()
    for t in solver.timesteps:
        x = solver.step(toy_network(x, int(t)), t, x).prev_sample
    found = sample_dpmpp_2m(denoise_by(toy_network, STANDARD, "epsilon"), start(), respace(steps), STANDARD)
    # diffusers keeps its sigmas in fp32; the first step divides by sqrt(abar) = 0.07.
    assert torch.allclose(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_give_arrays_the_values_of_tensors(name):
    def denoise(x, t):
        return 0.9 * x + 0.1 * math.cos(t / 100), 0.2 * x

    as_tensor = SAMPLERS[name](denoise, start(), respace(5), STANDARD, NoiseTape(), 0.5)
    tape = NoiseTape()
    as_array = SAMPLERS[name](denoise, start().numpy(), respace(5), STANDARD, lambda: tape().numpy(), 0.5)
    assert isinstance(as_array, np.ndarray) and as_array.dtype == np.float32
    np.testing.assert_allclose(as_array, as_tensor.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_full_noise_equals_ddpm(kind):
    # Song 2021, section 4.1: eta = 1 has the posterior's mean and variance.
    timesteps = respace(9)
    denoise = denoise_by(toy_network, STANDARD, kind)
    found = sample_ddim(denoise, start(), timesteps, STANDARD, NoiseTape(), eta=1.0)
    expected = sample_ddpm(denoise, start(), timesteps, STANDARD, NoiseTape())
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_ddim_noise_grows_with_eta():
    def spread(eta):
        x = torch.zeros(1, 1, 100, 100)
        generator = torch.Generator().manual_seed(0)
        noise = lambda: torch.randn(x.shape, generator=generator)  # noqa: E731
        denoise = denoise_by(lambda x, t: torch.zeros_like(x), STANDARD, "v_prediction")
        return sample_ddim(denoise, x, [0, 500], STANDARD, noise, eta).std().item()

    abar, previous = abar_by_hand(500), abar_by_hand(0)
    sigma = math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
    assert spread(0.0) == 0
    # v = 0 and x = 0 leave sigma * noise, which the last step scales by sqrt(abar_0); 10,000 samples: 1 %.
    assert spread(1.0) == pytest.approx(sigma * math.sqrt(previous), rel=0.03)
    assert spread(0.5) == pytest.approx(0.5 * sigma * math.sqrt(previous), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 8, 25])
def test_samplers_reproduce_an_exact_denoiser(name, kind, steps):
    x0 = start(11).double()
    denoise = denoise_by(oracle(x0, kind), STANDARD, kind)
    found = SAMPLERS[name](denoise, start().double(), respace(steps), STANDARD, NoiseTape(), 0.0)
    assert found.shape == x0.shape
    # The solvers of diffusers end at sigma(0) = 0.029 or at a last sigma of 0; all within 2e-3.
    assert torch.allclose(found.double(), x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_eps_and_v_predictions_give_the_same_latent(name):
    def as_v(x, t):
        abar = abar_by_hand(t)
        eps = toy_network(x, t)
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0

    def sample(network, kind):
        denoise = denoise_by(network, STANDARD, kind)
        return SAMPLERS[name](denoise, start().double(), respace(6), STANDARD, NoiseTape(), 0.0)

    eps, v = sample(toy_network, "epsilon"), sample(as_v, "v_prediction")
    assert torch.allclose(eps.double(), v.double(), rtol=0, atol=1e-4 * eps.abs().max().item())


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_ask_for_timesteps_from_999_down(name):
    asked = []

    def denoiser(x, t):
        asked.append(t)
        return torch.zeros_like(x)

    SAMPLERS[name](denoise_by(denoiser, STANDARD, "v_prediction"), start(), respace(5), STANDARD, NoiseTape(), 0.0)
    assert len(asked) == 5
    assert asked[0] == 999
    assert asked == sorted(set(asked), reverse=True)
    assert all(isinstance(t, int) and 0 <= t <= 999 for t in asked)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_follow_the_schedule_that_they_are_given(name):
    other, x0 = Schedule(beta_end=0.02), start(11).double()

    def oracle_eps(x, t):
        abar = other.alphas_cumprod()[t]
        return (x - abar**0.5 * x0) / (1 - abar) ** 0.5

    def sample(network, schedule):
        denoise = denoise_by(network, schedule, "epsilon")
        return SAMPLERS[name](denoise, start().double(), respace(8), schedule, NoiseTape(), 0.0).double()

    assert torch.allclose(sample(oracle_eps, other), x0, rtol=0, atol=2e-3)
    assert (sample(toy_network, other) - sample(toy_network, STANDARD)).abs().max() > 0.01


def test_unipc_without_diffusers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingBackendError, match=r"sampler unipc needs the train extra: pip install"):
        SAMPLERS["unipc"](lambda x, t: (x, x), start(), respace(2), STANDARD, NoiseTape(), 0.0)


def test_a_schedule_is_read_and_written_as_diffusers_does():
    schedule = Schedule(beta_start=0.001, beta_end=0.02)
    written = schedule.to_diffusers("v_prediction")
    scheduler = DDPMScheduler.from_config(written)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), schedule.alphas_cumprod(), rtol=2e-5)
    assert scheduler.config.prediction_type == "v_prediction"
    assert Schedule.from_diffusers(dict(scheduler.config), "v_prediction") == schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2' of 1000 steps: expected 'scaled_linear'"),
        ({"num_train_timesteps": 500}, "of 500 steps"),
        ({"beta_end": 0.0001}, "expected rising ones"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction': expected 'epsilon'"),
    ],
)
def test_unknown_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_diffusers({**STANDARD.to_diffusers("epsilon"), **changes}, "epsilon")
