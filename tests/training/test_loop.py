import itertools
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError, MismatchError
from pfstorer_rt.training.data import prefetch
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Interruption, Pending, Training, run_training
from pfstorer_rt.training.schedule import Schedule


class Line(nn.Module):
    """Fits y = a x + b, with a frozen part that no state should hold."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, batch):
        error = self.layer(batch["x"]) * self.frozen - batch["x"].sum(1, keepdim=True)
        return {"loss": error.square().mean()}


def make_batch(iteration, _number=0):
    return {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(iteration))}


def fit(folder, batches=make_batch, mark="m", rate=0.1, groups=None, hooks=None, **settings):
    """Train a line; returns its parameters. hooks: callbacks, `preview_every` and `clock` of `Training`."""
    config = TrainConfig(**{"iterations": 6, "device": "cpu", "precision": "fp32", "learning_rate": rate, **settings})
    folder.mkdir(exist_ok=True)
    with accelerated(config) as accelerator:
        objective = Line()
        wanted = groups(objective) if groups else None
        file = folder / "state.pt"
        run_training(Training("line", objective, batches, config, file, mark, wanted, **hooks or {}), accelerator)
    return [p.detach().clone() for p in objective.layer.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stopping(at, how):
    """Return a batch function that calls `how` at iteration `at`."""

    def batches(iteration, _number):
        if iteration == at:
            how()
        return make_batch(iteration)

    return batches


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


def die():
    raise SystemExit("power cut")


# ---- resuming


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, number, ema):
    settings = {"ema": ema, "warmup": 2, "decay": 0.5, "checkpoint_every": 100}
    whole = fit(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt, match="after iteration 3 of 6"):
        fit(tmp_path / "parts", stopping(2, signalled(number)), **settings)
    asked = []

    def noted(iteration, _number):
        asked.append(iteration)
        return make_batch(iteration)

    assert equal(fit(tmp_path / "parts", noted, **settings), whole)
    assert asked == [3, 4, 5], "iterations that were done are not done again"


def test_progress_is_reported_at_the_start_and_after_every_iteration(tmp_path):
    reports = []
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", stopping(1, signalled(signal.SIGINT)), hooks={"on_progress": reports.append})
    assert [(r.stage, r.done, r.total) for r in reports] == [("line", done, 6) for done in (0, 1, 2)]
    assert math.isnan(reports[0].loss) and all(r.loss > 0 and r.seconds > 0 for r in reports[1:])
    reports.clear()
    fit(tmp_path / "a", hooks={"on_progress": reports.append})
    assert [r.done for r in reports] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("at", [4, 5])
def test_a_killed_training_resumes_from_its_last_checkpoint(tmp_path, at):
    whole = fit(tmp_path / "whole", ema=0.5)
    with pytest.raises(SystemExit):
        fit(tmp_path / "parts", stopping(at, die), ema=0.5, checkpoint_every=2)
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert state["iteration"] == 4 and set(state["parameters"]) == {"layer.weight", "layer.bias"}
    # checkpoint_every is no part of the result
    assert equal(fit(tmp_path / "parts", ema=0.5, checkpoint_every=3), whole)


def test_a_slow_training_is_saved_every_two_minutes(tmp_path):
    seconds = iter(range(0, 10_000, 25))  # each look at the clock takes 25 seconds
    with pytest.raises(SystemExit):
        fit(tmp_path, stopping(5, die), checkpoint_every=100, hooks={"clock": lambda: next(seconds)})
    assert 0 < torch.load(tmp_path / "state.pt", weights_only=True)["iteration"] <= 5


def test_a_finished_training_is_not_trained_further(tmp_path):
    whole = fit(tmp_path / "a")
    assert equal(fit(tmp_path / "a", stopping(0, die)), whole)


def test_the_checkpoint_is_private(tmp_path):
    fit(tmp_path / "a")
    assert (tmp_path / "a" / "state.pt").stat().st_mode & 0o077 == 0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(tmp_path / "a")
    before = (tmp_path / "a" / "state.pt").read_bytes()
    with pytest.raises(MismatchError, match="other settings"):
        fit(tmp_path / "a", mark="another")
    assert (tmp_path / "a" / "state.pt").read_bytes() == before


def cut(data):
    return data[: len(data) // 2]


def foreign(_):
    return b"PK\x03\x04 not torch's"


def other_state(_):
    import io

    buffer = io.BytesIO()
    torch.save({"weights": torch.ones(2)}, buffer)
    return buffer.getvalue()


def without_iterations(data):
    import io

    state = torch.load(io.BytesIO(data), weights_only=True)
    del state["iterations"]
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [cut, foreign, other_state, without_iterations, lambda _: b""])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    fit(tmp_path / "a")
    path = tmp_path / "a" / "state.pt"
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(BadFileError) as refused:
        fit(tmp_path / "a")
    assert str(refused.value) == (
        f"{path}: {len(damaged)} bytes that are no complete training checkpoint; expected the file that the "
        "interrupted training wrote: delete it to start again"
    )


def test_a_second_interruption_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_handlers_are_restored_after_a_failure(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit(tmp_path / "a", stopping(1, die))
    assert signal.getsignal(signal.SIGTERM) is before


# ---- results


def test_a_seed_determines_the_weights(tmp_path):
    first, again, other = (fit(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert equal(first, again) and not equal(first, other)


def test_training_reduces_the_loss(tmp_path):
    losses = []
    log = {"on_log": lambda i, row: losses.append((i, row["loss"]))}
    weight, bias = fit(tmp_path / "a", iterations=200, hooks=log)
    assert (weight - 1).abs().max() < 0.05 and bias.abs().max() < 0.05
    assert [i for i, _ in losses] == [50, 100, 150, 200] and losses[-1][1] < losses[0][1]


def test_the_last_iteration_is_logged(tmp_path):
    rows = []
    fit(tmp_path / "a", iterations=3, hooks={"on_log": lambda i, row: rows.append(i)})
    assert rows == [3]


def test_the_model_ends_with_the_averaged_weights(tmp_path):
    history = []

    def remember(optimizer, *_):
        history.append([p.detach().clone() for p in optimizer.param_groups[0]["params"] if p.requires_grad])

    plain = fit(tmp_path / "plain")
    handle = register_optimizer_step_post_hook(remember)
    averaged = fit(tmp_path / "ema", ema=0.3)
    handle.remove()
    assert equal(history[-1], plain), "the average is beside the training, not in it"
    torch.manual_seed(0)
    expected = [p.detach().clone() for p in Line().layer.parameters()]
    for i, row in enumerate(history):
        decay = min(0.3, (1 + i) / (10 + i))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, row, strict=True)]
    for a, e in zip(averaged, expected, strict=True):
        torch.testing.assert_close(a, e)  # the same sum in another order
    assert not equal(averaged, plain)


def test_a_preview_has_the_averaged_weights_and_changes_nothing(tmp_path):
    models, seen = [], {}
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: models.append(optimizer.param_groups[0]["params"]))

    def preview(iteration):
        seen[iteration] = [p.detach().clone() for p in models[-1] if p.requires_grad]

    hooks = {"on_preview": preview, "preview_every": 2}
    watched = fit(tmp_path / "watched", hooks=hooks, ema=0.3, decay=0)
    handle.remove()
    assert sorted(seen) == [2, 4]
    assert equal(watched, fit(tmp_path / "plain", ema=0.3, decay=0))
    for iteration, weights in seen.items():
        assert equal(weights, fit(tmp_path / f"short {iteration}", ema=0.3, decay=0, iterations=iteration))


def test_large_gradients_are_clipped(tmp_path):
    norms = []

    def measure(optimizer, *_):
        gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    handle = register_optimizer_step_pre_hook(measure)
    fit(tmp_path / "a", clip=0.01)
    assert norms and max(norms) <= 0.01 * 1.001
    fit(tmp_path / "b", clip=1e9)
    handle.remove()
    assert max(norms) > 0.1


def test_learning_rate_warms_up_stays_and_falls():
    config = TrainConfig(iterations=100, warmup=10, decay=0.5)
    factors = [Schedule(config).factor(i) for i in range(100)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert factors[10:51] == [1.0] * 41
    assert all(a > b for a, b in itertools.pairwise(factors[50:])) and 0 < factors[-1] < 0.01
    assert factors[75] == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 2))
    plain = TrainConfig(iterations=7)
    assert [Schedule(plain).factor(i) for i in range(7)] == [1.0] * 7


def test_every_parameter_group_has_its_own_rate(tmp_path):
    """Adam's first step is its rate; the warm-up halves both."""

    def groups(objective):
        rates = ((objective.layer.weight, 0.1), (objective.layer.bias, 0.001))
        return [{"params": [p], "lr": rate, "weight_decay": 0.0} for p, rate in rates]

    torch.manual_seed(0)
    start = [p.detach().clone() for p in Line().layer.parameters()]
    trained = fit(tmp_path / "a", groups=groups, iterations=1, warmup=2)
    moved = [(p - s).abs().max().item() for p, s in zip(trained, start, strict=True)]
    assert moved == pytest.approx([0.05, 0.0005], rel=1e-3)


def test_workers_make_the_same_batches():
    alone = [b["x"] for b in prefetch(make_batch, 2, 7, 0)]
    helped = [b["x"] for b in prefetch(make_batch, 2, 7, 2)]
    assert len(alone) == 5 and equal(alone, helped) and torch.equal(alone[0], make_batch(2)["x"])


def test_bf16_training_on_a_cpu_is_close_to_fp32(tmp_path):
    full, half = fit(tmp_path / "a"), fit(tmp_path / "b", precision="bf16")
    assert not equal(full, half)
    for a, b in zip(full, half, strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.1  # six steps of 0.1, 8 bits of mantissa


def test_a_training_limited_by_time_ends_in_time_and_can_be_resumed(tmp_path):
    """Each reading of the clock takes a second; the time of earlier runs counts."""
    times, reports = itertools.count(0.0), []
    hooks = {"clock": lambda: next(times), "on_progress": reports.append}
    with pytest.raises(KeyboardInterrupt, match="of the time"):
        fit(tmp_path, stopping(2, signalled(signal.SIGTERM)), hooks=hooks, minutes=0.5, decay=0.5)
    before = torch.load(tmp_path / "state.pt", weights_only=True)
    reports.clear()
    fit(tmp_path, hooks=hooks, minutes=0.5, decay=0.5)
    after = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < before["seconds"] < 30 <= after["seconds"] < 40
    assert after["iteration"] > before["iteration"]
    assert reports[0].total is None and 0 < reports[0].share < reports[1].share < reports[-1].share == 1


def test_the_loss_of_a_recorded_iteration_is_read_one_iteration_later():
    """The device then does an iteration while the host prepares the next batch."""
    losses = [torch.tensor(float(i)) for i in range(4)]
    recorded, anew = Pending(recorded=True), Pending(recorded=False)
    assert [recorded(loss, last=i == 3) for i, loss in enumerate(losses)] == [0, 0, 1, 3]
    assert [anew(loss, last=False) for loss in losses] == [0, 1, 2, 3]
