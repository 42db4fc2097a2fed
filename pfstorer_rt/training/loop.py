"""The training loop, based on accelerate: it can be resumed at any iteration and is deterministic for a seed."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError, MismatchError, PFStorerError
from pfstorer_rt.files import atomic_write, show_path
from pfstorer_rt.progress import CancelledError, OnProgress, StageProgress, ignore_progress
from pfstorer_rt.training.capture import RecordedStep, Recorder
from pfstorer_rt.training.data import Batch, prefetch
from pfstorer_rt.training.device import to_channels_last
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.memory import saving_memory
from pfstorer_rt.training.optimizers import ParameterGroup, make_optimizer
from pfstorer_rt.training.schedule import Schedule

CHECKPOINT_SECONDS = 120.0
"""Longest time between two checkpoints: on a slow machine, `checkpoint_every` iterations take many minutes."""
LOG_EVERY = 50
"""Iterations between two calls of `Training.on_log`."""

MakeBatch = Callable[[int, int], Batch]
"""make_batch(iteration, number): `number` counts the batches of all processes, so each process has its own samples."""


@dataclass(frozen=True)
class Training:
    """One training: its objective, batches, settings and checkpoint file."""

    title: str
    objective: nn.Module
    """Maps a batch to losses by name; `loss` is minimised."""
    make_batch: MakeBatch
    """A pure function, so that a training can be resumed."""
    settings: TrainConfig
    checkpoint: Path
    mark: str
    """Identifies settings and data: a checkpoint with another mark is refused."""
    groups: Sequence[ParameterGroup] | None = None
    """Parameter groups of the optimizer; None is all parameters of the objective that require a gradient."""
    channels_last: bool = True
    recorder: Recorder | None = None
    """Records the iterations, such as `capture.CudaGraphs`; None does each of them anew."""
    on_log: Callable[[int, dict[str, float]], None] | None = None
    """on_log(iteration, losses): called every 50 iterations and after the last one."""
    on_progress: OnProgress = ignore_progress
    on_preview: Callable[[int], None] | None = None
    """on_preview(iteration): called with the averaged weights in the objective, before the last iteration."""
    preview_every: int = 25
    clock: Callable[[], float] = time.monotonic
    """The time in seconds, for `settings.minutes` and for reports."""


def signature(settings: Any, paths: list[Path]) -> str:
    """Return a hash of settings (JSON values) and of the names and sizes of photographs."""
    names = [(p.name, p.stat().st_size) for p in paths]
    text = json.dumps([settings, names], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def log_to(path: Path) -> Callable[[int, dict[str, float]], None]:
    """Return a function that appends (iteration, losses) to a CSV file."""

    def log(iteration: int, losses: dict[str, float]) -> None:
        new = not path.exists()
        with path.open("a") as file:
            if new:
                file.write("iteration," + ",".join(losses) + "\n")
            file.write(f"{iteration}," + ",".join(f"{v:.6f}" for v in losses.values()) + "\n")

    return log


class Interruption:
    """Delays Ctrl-C and SIGTERM to the end of an iteration, where weights, optimizer and iteration count agree.

    A second signal acts at once. Outside the main thread, signals are not handled.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class TrainState:
    """The state of a training: trainable weights, their average, optimizer state and iteration."""

    def __init__(self, objective: nn.Module, optimizer: Any, accelerator: Accelerator, config: TrainConfig) -> None:
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.optimizer, self.accelerator, self.config = optimizer, accelerator, config
        self.seconds = 0.0
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema else {}

    def step(self, objective: nn.Module, batch: Batch) -> Losses:
        """Do one optimizer step and return the losses by name."""
        losses: Losses = objective(batch)
        self.accelerator.backward(losses["loss"])
        groups = [group for group in self.optimizer.param_groups if group.get("clip", True)]
        self.accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update_average(self, iteration: int) -> None:
        """Update the averaged weights; the decay starts low, so that the initial weights soon lose influence."""
        decay = min(self.config.ema, (1 + iteration) / (10 + iteration))
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Copy the averaged weights into the model."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model inside the block."""
        trained = {name: self.parameters[name].detach().clone() for name in self.average}
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in trained.items():
                    self.parameters[name].copy_(value)

    def save(self, path: Path, iteration: int, signature: str, seconds: float) -> None:
        """Write everything to one file, atomically; `seconds` is the duration of the training so far."""
        scaler = self.accelerator.scaler
        state = {
            "iteration": iteration,
            "iterations": self.config.iterations,
            "signature": signature,
            "seconds": seconds,
            "parameters": {n: p.detach().cpu() for n, p in self.parameters.items()},
            "average": {n: p.cpu() for n, p in self.average.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }
        with atomic_write(path, mode=0o600) as file:
            torch.save(state, file)

    @torch.no_grad()
    def load(self, path: Path, signature: str) -> int:
        """Load the state in `path` and return its iteration; raises the errors of `read_checkpoint`."""
        state = read_checkpoint(path, signature)
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            if self.average:
                self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.seconds = float(state.get("seconds", 0.0))
        return int(state["iteration"])


def read_checkpoint(path: Path, signature: str) -> dict[str, Any]:
    """Read the state that `TrainState.save` wrote.

    Raises `BadFileError` for a damaged file, `MismatchError` for a checkpoint of other settings.
    """
    state = read_state(path)
    if state["signature"] != signature:
        raise MismatchError(
            f"{show_path(path)}: made with other settings or photographs; repeat the original call to resume it, or "
            "delete the file to start again"
        )
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of any training; raises `BadFileError` for a damaged file."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not {"iteration", "iterations", "signature", "parameters", "average", "optimizer", "scaler"} <= state.keys():
            raise ValueError("parts are missing")
    except PermissionError as error:
        raise BadFileError(f"{show_path(path)}: cannot be read (permission denied); check its permissions") from error
    except Exception as error:  # torch.load raises many error types for a damaged file
        raise BadFileError(
            f"{show_path(path)}: {path.stat().st_size} bytes that are no complete training checkpoint; expected the "
            "file that the interrupted training wrote: delete it to start again"
        ) from error
    return state


class Pending:
    """Reads the loss; of recorded iterations, the loss of the iteration before.

    A recorded iteration needs no host. While the device does it, the host prepares the next batch instead of waiting.
    """

    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded
        self.before: torch.Tensor | None = None

    def __call__(self, loss: torch.Tensor, last: bool) -> float:
        """Return the loss of this iteration, or of the iteration before; last: no iteration follows."""
        if not self.recorded or last:
            return loss.item()
        ready = loss.clone() if self.before is None else self.before
        self.before = loss.clone()
        return ready.item()


def run_training(training: Training, accelerator: Accelerator) -> None:
    """Minimise the loss over the batches of iterations 0 ... `iterations` - 1, or for `minutes`, in place.

    accelerator: from `accelerated`. The state is saved every `settings.checkpoint_every` iterations, every two minutes,
    and when interrupted: Ctrl-C raises `KeyboardInterrupt` after the iteration, and `CancelledError` in `on_progress`
    is raised again. The same call then resumes from the checkpoint and ends with the same weights as one uninterrupted
    call on the same device. At the end, the averaged weights replace the model's weights if `settings.ema` is above 0.
    """
    objective, settings = training.objective, training.settings
    nn.Module.to(objective, accelerator.device)
    if training.channels_last:
        to_channels_last(objective)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainable if training.groups is None else list(training.groups), settings)
    with saving_memory(objective, settings, accelerator):
        state = TrainState(objective, optimizer, accelerator, settings)
        prepared, state.optimizer = accelerator.prepare(objective, optimizer)
        prepared.train()
        _iterate(training, prepared, state, accelerator)
        accelerator.wait_for_everyone()
        state.use_average()


def _iterate(training: Training, objective: nn.Module, state: TrainState, accelerator: Accelerator) -> None:
    settings, title = training.settings, training.title
    total = None if settings.minutes else settings.iterations
    rates = [float(group["lr"]) for group in state.optimizer.param_groups]
    done = state.load(training.checkpoint, training.mark) if training.checkpoint.exists() else 0
    rank, processes, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    schedule, started = Schedule(settings, state.seconds, training.clock), training.clock()
    step: Callable[[Batch], Losses] = partial(state.step, objective)
    if training.recorder is not None:
        training.recorder.prepare(state.optimizer, accelerator.device)
        step = RecordedStep(step, training.recorder)
    if main:
        training.on_progress(StageProgress(title, done, total, time_share=schedule.share(done)))
    pending, saved = Pending(training.recorder is not None), started
    batches = prefetch(
        lambda i: training.make_batch(i, i * processes + rank), done, total or sys.maxsize, settings.workers
    )
    with Interruption() as interruption:
        for batch in batches:
            set_rates(state.optimizer, rates, schedule.factor(done))
            losses = step({k: v.to(accelerator.device) for k, v in batch.items()})
            state.update_average(done)
            done += 1
            share = schedule.share(done)
            loss = pending(losses["loss"], share >= 1)
            if not math.isfinite(loss):
                raise PFStorerError(f"{title}: the loss is not finite after {done} iterations; use a lower rate")
            seconds = training.clock() - started
            cancelled = main and _is_cancelled(training, state, StageProgress(title, done, total, loss, seconds, share))
            stop = interruption.requested or cancelled  # read once: a stopped training ends with a checkpoint
            last = share >= 1 or stop
            if main and training.on_log and (done % LOG_EVERY == 0 or last):
                training.on_log(done, {k: v.item() for k, v in losses.items()})
            late = training.clock() - saved >= CHECKPOINT_SECONDS
            if main and (done % settings.checkpoint_every == 0 or late or last):
                state.save(training.checkpoint, done, training.mark, schedule.seconds)
                saved = training.clock()
            if stop:
                of = f" of {total}" if total else f", {share:.0%} of the time"
                raise (CancelledError if cancelled else KeyboardInterrupt)(f"stopped after iteration {done}{of}")
            if last:
                break


def set_rates(optimizer: Any, rates: Sequence[float], factor: float) -> None:
    """Set the learning rate of each group; a rate on the device keeps its memory."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate * factor)
        else:
            group["lr"] = rate * factor


def _is_cancelled(training: Training, state: TrainState, progress: StageProgress) -> bool:
    """Report the progress, with a preview if one is due; returns whether a callback cancelled the training."""
    try:
        training.on_progress(progress)
        if training.on_preview and progress.done % training.preview_every == 0 and progress.share < 1:
            with state.averaged():
                training.on_preview(progress.done)
    except CancelledError:
        return True
    return False
