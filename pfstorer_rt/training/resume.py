"""Resuming the training of an identity: the checkpoint is checked before any crops are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import show_path
from pfstorer_rt.training.loop import read_checkpoint, signature
from pfstorer_rt.training.pool import pool_size
from pfstorer_rt.training.schedule import Schedule


def training_mark(config: PersonalizeConfig, fingerprint: str, paths: Sequence[Path]) -> str:
    """Return a hash of settings, base and photographs: everything that the weights depend on but the iterations."""
    settings = asdict(config)
    del settings["train"]["iterations"], settings["keep_all"]  # `paths` are the photographs that are used
    return signature([settings, fingerprint], list(paths))


def check_finish(checkpoint: Path, finish: bool) -> None:
    """Raise `ValueError` if a training is to be finished that has no checkpoint; a check before long work."""
    if finish and not checkpoint.exists():
        raise SettingError(
            f"{show_path(checkpoint)}: no checkpoint of an interrupted training, so there is nothing to finish; train "
            "without this setting",
            setting="finish",
        )


def resumed_config(
    config: PersonalizeConfig, checkpoint: Path, mark: str, finish: bool, note: Callable[[str], None]
) -> tuple[PersonalizeConfig, bool]:
    """Check the checkpoint of an interrupted training.

    Returns the settings with which it continues, and whether all their iterations are done. finish: end at the
    checkpoint. A checkpoint with at least as many iterations as `config` also ends there. Raises the errors of
    `read_checkpoint`.
    """
    if not checkpoint.exists():
        return config, False
    state = read_checkpoint(checkpoint, mark)
    done, planned, wanted = int(state["iteration"]), int(state["iterations"]), config.train.iterations
    before = replace(config, train=replace(config.train, iterations=planned))
    if finish or wanted <= done:
        if done < planned or wanted < done:
            note(f"{done} iterations are done: the identity is made from them without further training")
        return replace(config, train=replace(config.train, iterations=done)), True
    if pool_size(before) != pool_size(config) or not same_rates(before.train, config.train, done):
        note(
            f"the interrupted training was planned for {planned} iterations; its result after {wanted} iterations "
            "differs from the result of an uninterrupted training"
        )
    return config, False


def same_rates(one: TrainConfig, other: TrainConfig, iterations: int) -> bool:
    """Whether two trainings have the same learning rate in each of the first iterations."""
    first, second = Schedule(one), Schedule(other)
    return all(first.factor(i) == second.factor(i) for i in range(iterations))
