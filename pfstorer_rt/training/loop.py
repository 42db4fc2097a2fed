"""The one training loop: accelerate underneath, resumable at any iteration, the same weights for a seed."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError, MismatchError, MissingBackendError, PFStorerError
from pfstorer_rt.files import atomic_write
from pfstorer_rt.training.data import Batch, prefetch
from pfstorer_rt.training.schedule import Schedule

LINES = 10
"""How often progress is told where there is no terminal to draw a bar on."""

Losses = dict[str, torch.Tensor]


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate for this device and precision.

    Raises `MissingBackendError` when the machine cannot do it, such as fp16 training on a CPU.
    """
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingBackendError(f"device {config.device}: no CUDA device is visible to torch; use --device cpu")
    if cpu and config.precision == "fp16":
        raise MissingBackendError("fp16 training needs a GPU; on a CPU use --precision bf16 or fp32")
    wanted: str = config.precision
    if wanted == "auto":
        wanted = "bf16" if has_native_bf16(cpu) else "fp32"
    precision = "no" if wanted == "fp32" else wanted
    AcceleratorState._reset_state()  # else the first call's precision would bind the whole process
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    set_seed(config.seed)
    return accelerator


def has_native_bf16(cpu: bool) -> bool:
    """Whether bf16 is fast here: on a CPU that takes AVX512-BF16 or AMX, on a GPU compute capability 8."""
    if not cpu:
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Interruption:
    """Takes Ctrl-C and SIGTERM between iterations, where weights, optimizer and count agree.

    A second Ctrl-C is not held back. Outside the main thread signals are left alone.
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
    """What has to be kept to go on: trainable weights, their average, optimizer and iteration."""

    def __init__(self, objective: nn.Module, optimizer: Any, accelerator: Accelerator, config: TrainConfig) -> None:
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.optimizer, self.accelerator, self.config = optimizer, accelerator, config
        self.seconds = 0.0
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema else {}

    @torch.no_grad()
    def update_average(self, iteration: int) -> None:
        """Move the averaged weights; the decay starts low so that early weights are forgotten."""
        decay = min(self.config.ema, (1 + iteration) / (10 + iteration))
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    def save(self, path: Path, iteration: int, signature: str, seconds: float = 0.0) -> None:
        """Write everything to one file, atomically; `seconds` is how long the training took so far."""
        scaler = self.accelerator.scaler
        state = {
            "iteration": iteration,
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
        """Take up the state in `path` and return its iteration.

        Raises `BadFileError` for a damaged file, `MismatchError` for one made with other settings.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["signature"]
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise BadFileError(
                f"{path}: not a readable training checkpoint ({error}); delete it to start anew"
            ) from error
        if found != signature:
            raise MismatchError(
                f"{path}: begun with other settings or photographs; repeat the command it was begun with, or "
                "delete it (`pfstorer-rt identities rm NAME` does) to start anew"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            if self.average:
                self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.seconds = float(state.get("seconds", 0.0))
        return int(state["iteration"])


def _progress(accelerator: Accelerator) -> Progress:
    from pfstorer_rt.console import stderr

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} it/s"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr(), disable=not accelerator.is_local_main_process, refresh_per_second=2)


def train(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_batch: Callable[[int], Batch],
    config: TrainConfig,
    accelerator: Accelerator,
    checkpoint: Path,
    signature: str,
    title: str,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Minimise `objective(batch)["loss"]` over `make_batch(0) ... make_batch(iterations - 1)`, or for `config.minutes`.

    The state is saved every `checkpoint_every` iterations and when interrupted (Ctrl-C, which raises
    `KeyboardInterrupt` after the iteration); a call with the same arguments goes on from `checkpoint`
    and ends with the same weights as one uninterrupted call on the same device. At the end the averaged
    weights, where kept, are put into the model. `on_log(iteration, losses)` is called every 50
    iterations and after the last.
    """
    state = TrainState(objective, optimizer, accelerator, config)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    objective, optimizer = accelerator.prepare(objective, optimizer)
    state.optimizer = optimizer
    start = state.load(checkpoint, signature) if checkpoint.exists() else 0
    trainable = list(state.parameters.values())
    done = start
    objective.train()
    schedule = Schedule(config, state.seconds)
    total = sys.maxsize if config.minutes else config.iterations
    told = math.floor(LINES * schedule.share(start))
    with _progress(accelerator) as progress, Interruption() as interruption:
        if start and accelerator.is_main_process:
            progress.console.print(f"{title}: goes on after iteration {start}")
        bar = progress.add_task(title, total=1.0, loss=math.nan, rate=0.0)
        progress.update(bar, completed=schedule.share(start))
        for batch in prefetch(make_batch, start, total, config.workers):
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * schedule.factor(done)
            losses = objective({k: v.to(accelerator.device) for k, v in batch.items()})
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(trainable, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update_average(done)
            done += 1
            loss = losses["loss"].item()
            speed = (done - start) / max(progress.tasks[bar].elapsed or 0.0, 1e-9)
            share = schedule.share(done)
            progress.update(bar, completed=share, loss=loss, rate=speed)
            if not math.isfinite(loss):
                raise PFStorerError(f"{title}: the loss is not finite after {done} iterations; train more slowly")
            last = share >= 1 or interruption.requested
            if accelerator.is_main_process:
                if not progress.console.is_terminal and math.floor(LINES * share) > told:
                    told = math.floor(LINES * share)
                    progress.console.print(f"{title}: {share:.0%}, iteration {done}, loss {loss:.4f}")
                if on_log and (done % 50 == 0 or last):
                    on_log(done, {k: v.item() for k, v in losses.items()})
                if done % config.checkpoint_every == 0 or last:
                    state.save(checkpoint, done, signature, schedule.seconds)
            if interruption.requested:
                of = f", {share:.0%} of the time" if config.minutes else f" of {config.iterations}"
                raise KeyboardInterrupt(f"stopped after iteration {done}{of}")
            if last:
                break
    accelerator.wait_for_everyone()
    state.use_average()
