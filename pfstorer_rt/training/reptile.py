"""The prior as the start of the training of identities, by Reptile (Nichol et al. 2018).

Each iteration learns one person for a short time, and moves the prior towards the learned weights. What the people have
in common adds up, and what belongs to one person averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.files import atomic_write, make_folder
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.prior import Prior
from pfstorer_rt.models.prompt import tokenize
from pfstorer_rt.progress import OnProgress, StageProgress, ignore_progress
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.loop import Training, read_checkpoint, run_training, signature
from pfstorer_rt.training.personalize import available, make_objective, parameter_groups
from pfstorer_rt.training.pool import BatchMaker, make_pool
from pfstorer_rt.training.schedule import Schedule

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ReptileConfig:
    """Settings of the stage `reptile`."""

    people: int = 130
    """Iterations; each learns one person."""
    minutes: float = 0.0
    """Duration of the training; 0 ends it after `people` instead."""
    seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` that replace the defaults of the base for learning a person; None keeps a default."""
    steps: int = 60
    """Iterations of the training of one person."""
    crops: int = 16
    """Degraded crops of one person."""
    average: float = 0.95
    """Decay of the moving average of the weights of one person."""
    rate: float = 0.1
    """How far the prior moves towards the weights of a person, 1 is all the way; the first people of a new prior count
    equally."""
    last_rate: float = 0.03
    """The same at the end: the prior becomes an average over the last people."""
    decay: float = 0.2
    """Final share of the training over which the rate falls."""
    reduced: float = 0.7
    """Share of the people whose photographs are reduced to a random size: photographs of users often are small."""
    smallest: float = 0.5
    """Smallest side of the reduced photographs, as a share of the tile."""


def people_of(folders: Sequence[Path]) -> list[list[Path]]:
    """Return the photographs of every person: a folder in `folders` is one person, and so is an image in `folders`.

    An image among `folders` is a person too. Raises `BadFileError` for a folder without images.
    """
    people = []
    for folder in folders:
        images = set(find_images([folder]))
        entries = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        people += [find_images([path]) for path in entries if path.is_dir() or path in images]
    return people


def add_prior(
    folders: Sequence[Path],
    base: Base,
    out: Path,
    config: ReptileConfig,
    work: Path,
    on_progress: OnProgress = ignore_progress,
    note: Callable[[str], None] = lambda _: None,
) -> Base:
    """Train the prior of a base and write the base to `out` in fp16; resumes from `work/reptile.pt`.

    folders: see `people_of`. base: its prior is trained further, and a base without one gets it; its networks stay as
    they are. note: called with a line if the losses on images are not available. Raises `BadFileError` without
    photographs, and the errors of `read_checkpoint`.
    """
    people = people_of(folders)
    learning = available(person_settings(base, config), note)
    make_folder(work, private=True)
    new = base.prior is None
    prior = base.prior = base.prior or untrained_prior(base, config.seed)
    settings = asdict(config)
    del settings["people"], settings["minutes"]
    paths = [path for photos in people for path in photos]
    mark = signature([settings, base.fingerprint, [len(photos) for photos in people]], paths)
    checkpoint, person = work / "reptile.pt", work / "person.pt"
    done, before = load_state(checkpoint, mark, prior) if checkpoint.exists() else (0, 0.0)
    schedule = Schedule(TrainConfig(iterations=config.people, minutes=config.minutes), before)
    total = None if config.minutes else config.people
    on_progress(StageProgress("reptile", done, total, time_share=schedule.share(done)))
    while schedule.share(done) < 1:
        photos = draw_person(people, base.config.tile, config, np.random.default_rng([config.seed, 51, done]))
        seed = int(np.random.default_rng([config.seed, 52, done]).integers(1 << 31))
        learned, loss = learn(
            photos, base, person, replace(learning, train=replace(learning.train, seed=seed)), f"person {done}"
        )
        move(prior, learned, max(rate_at(schedule.share(done), config), 1 / (done + 1) if new else 0.0))
        done += 1
        save_state(checkpoint, mark, prior, done, config, schedule.seconds)
        person.unlink()
        on_progress(StageProgress("reptile", done, total, loss, schedule.seconds - before, schedule.share(done)))
    base.save(out, torch.float16)
    return base


def person_settings(base: Base, config: ReptileConfig) -> PersonalizeConfig:
    """Return the settings of the training of one person; each person has another seed."""
    given = {name: value for name, value in config.train.items() if value is not None}
    train = {**given, "iterations": config.steps, "ema": config.average}
    return replace(PersonalizeConfig.for_base(base.config, train=train), start="prior", pool=config.crops)


def untrained_prior(base: Base, seed: int) -> Prior:
    """Return a random prior whose blocks change nothing: gamma = 1 and zeros in their last layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(base.unet, base.config, instant=False)
    word = tokenize(PersonalizeConfig.for_base(base.config).init_word, base.config)
    with torch.no_grad():
        for block in prior.blocks:
            block.open()
        prior.token.copy_(base.text_encoder.word_embedding(word).reshape(-1))
    return prior


def draw_person(
    people: Sequence[Sequence[Path]], tile: int, config: ReptileConfig, rng: np.random.Generator
) -> list[torch.Tensor]:
    """Draw a person, and read the photographs as squares (3, S, S) in [0, 1] of at most `tile` pixels."""
    paths = people[int(rng.integers(len(people)))]
    photos = [read_photo(path) for path in paths]
    share = rng.uniform(config.smallest, 1) if rng.random() < config.reduced else 1.0
    return [center_crop(photo, min(round(share * tile), *photo.shape[-2:])) for photo in photos]


def learn(
    photos: Sequence[torch.Tensor], base: Base, checkpoint: Path, settings: PersonalizeConfig, mark: str
) -> tuple[Weights, float]:
    """Learn a person from the prior of the base; returns the weights of the blocks, and the last loss.

    checkpoint: file of an interrupted call, which is resumed; it remains until the caller removes it. mark: identifies
    the person in this file.
    """
    losses: list[float] = []
    with accelerated(settings.train, base) as accelerator:
        to_channels_last(base.vae)
        pool = make_pool(photos, base, settings, autocast=accelerator.autocast)
        objective = make_objective(base, settings, accelerator.device)
        training = Training(
            "person",
            objective,
            BatchMaker(pool, settings),
            settings.train,
            checkpoint,
            mark,
            parameter_groups(objective, settings),
            on_progress=lambda progress: losses.append(progress.loss),
        )
        run_training(training, accelerator)
        blocks = objective.get_submodule("blocks")
        return {name: value.detach().float().cpu() for name, value in blocks.state_dict().items()}, losses[-1]


def rate_at(share: float, config: ReptileConfig) -> float:
    """Return the rate after a share of the training: constant, then falling linearly to `last_rate`."""
    left = min(1.0, (1 - share) / config.decay) if config.decay else 1.0
    return config.last_rate + left * (config.rate - config.last_rate)


@torch.no_grad()
def move(prior: Prior, learned: Weights, rate: float) -> None:
    """Move the blocks of the prior towards learned weights; rate: 0 leaves them, 1 replaces them."""
    for name, value in prior.blocks.state_dict().items():
        value.lerp_(learned[name].to(value), rate)


def save_state(path: Path, mark: str, prior: Prior, done: int, config: ReptileConfig, seconds: float) -> None:
    """Write the blocks of the prior to a checkpoint with the fields of every training, atomically."""
    state = {
        "iteration": done,
        "iterations": config.people,
        "signature": mark,
        "seconds": seconds,
        "parameters": prior.blocks.state_dict(),
        **{name: {} for name in ("average", "optimizer", "scaler")},
    }
    with atomic_write(path, mode=0o600) as file:
        torch.save(state, file)


def load_state(path: Path, mark: str, prior: Prior) -> tuple[int, float]:
    """Read what `save_state` wrote into the prior; returns the number of people and the seconds so far.

    Raises the errors of `read_checkpoint`.
    """
    state = read_checkpoint(path, mark)
    prior.blocks.load_state_dict(state["parameters"])
    return int(state["iteration"]), float(state["seconds"])
