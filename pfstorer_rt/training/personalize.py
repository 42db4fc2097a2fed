"""`personalize`: train one identity on a few photographs, on a frozen base (PFStorer section 3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig
from pfstorer_rt.encryption import passphrase_given
from pfstorer_rt.errors import PFStorerError, SettingError
from pfstorer_rt.faces.dlib import Embedding
from pfstorer_rt.faces.finding import face_embedder
from pfstorer_rt.files import make_folder, sha256_file
from pfstorer_rt.identity import Identity, named_identity, training_files
from pfstorer_rt.imaging.find import find_images, without_results
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.models.reference import reference_features
from pfstorer_rt.plan import DEFAULT_BASE
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.contact_sheet import check_place, save_contact_sheet
from pfstorer_rt.training.data import Batch, center_crop
from pfstorer_rt.training.device import accelerated, kernels_for, to_channels_last, training_device
from pfstorer_rt.training.framing import as_restored, read_references, used_references
from pfstorer_rt.training.image_loss import ImageSpaceLoss, has_image_losses, refusal
from pfstorer_rt.training.loop import Training, run_training
from pfstorer_rt.training.objectives import DreamBoothObjective, PersonalizationObjective, starts_from_prior
from pfstorer_rt.training.optimizers import ParameterGroup
from pfstorer_rt.training.pool import BatchMaker, make_pool
from pfstorer_rt.training.resume import check_finish, resumed_config, training_mark
from pfstorer_rt.training.selection import ENOUGH

TUNING_RATE = 0.1
"""Learning rate of pretrained weights, relative to the rate of new blocks."""

MOST = 100
"""Largest number of photographs: more are a wrong folder, and take hours and gigabytes of memory."""

OnPreview = Callable[[int, Identity], None]
"""on_preview(iteration, identity): the identity as it is after this many iterations."""


def personalize(
    name: str,
    references: str | Path | Sequence[str | Path],
    base: Base | str | Path = DEFAULT_BASE,
    config: PersonalizeConfig | None = None,
    output: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = ignore_progress,
    finish: bool = False,
    contact_sheet: Path | None = None,
    on_preview: OnPreview | None = None,
    preview_every: int = 25,
) -> Identity:
    """Train an identity and write its file.

    name: name of the identity. references: 3-5 photographs of one person, or folders of them. base: a loaded base, a
    shipped name or a directory. config: None selects the base's defaults. output: the file; None is NAME.safetensors in
    the user's data directory. note: called with a line for each unsuitable photograph. With 0 iterations, the identity
    has the blocks of the base's prior.
    finish: make the identity from the checkpoint of an interrupted training, without further training.
    contact_sheet: image file that shows which photographs are used and how they are cropped; it is replaced.
    on_preview: called with the unfinished identity after every `preview_every` iterations. `base` is in training then,
    in another precision: restore with another copy of the base.
    The identity is encrypted if the environment variable PFSTORER_PASSPHRASE is set.
    The same call resumes an interrupted training, also with another number of iterations. Before any training, raises
    `ValueError` for a name that cannot be a file name, `BadFileError` when no photograph can be read or
    the checkpoint cannot, and `MismatchError` when the checkpoint belongs to other settings or photographs.
    """
    named = named_identity(name)
    target = output or named
    base = base if isinstance(base, Base) else load_base(base)
    config = available(config or PersonalizeConfig.for_base(base.config), note)
    training_device(config.train)  # its errors come before the photographs are read
    if not config.train.iterations:
        identity = instant_identity(name, references, base, config, note, contact_sheet)
        identity.save(target, passphrase_given())
        return identity
    checkpoint, crops = training_files(target)
    check_finish(checkpoint, finish)
    paths, photos = choose_references(references, base, config, note, contact_sheet, on_progress)
    mark = training_mark(config, base.fingerprint, paths)
    config, done = resumed_config(config, checkpoint, mark, finish, note)
    with accelerated(config.train, base) as accelerator:
        make_folder(crops, private=True)
        with accelerator.main_process_first():  # the other processes use the samples of the first one
            to_channels_last(base.vae)
            pool = None if done else make_pool(photos, base, config, on_progress, crops, mark, accelerator.autocast)
        face = person_face(photos, base, config)
        objective = make_objective(base, config, accelerator.device, face)

        def show(iteration: int) -> None:
            assert on_preview is not None
            with evaluating(objective), accelerator.autocast():  # the frozen weights are in the training's precision
                unfinished = make_identity(name, objective, base, config, paths, photos)
            on_preview(iteration, unfinished)

        training = Training(
            f"personalize {name}",
            objective,
            BatchMaker(pool, config) if pool else no_batch,
            config.train,
            checkpoint,
            mark,
            parameter_groups(objective, config),
            on_progress=on_progress,
            on_preview=show if on_preview else None,
            preview_every=preview_every,
        )
        run_training(training, accelerator)
        base.set_attention("auto", objective)
        identity = make_identity(name, objective, base, config, paths, photos)
        main = accelerator.is_main_process
    if not all(bool(torch.isfinite(t).all()) for t in identity.tensors.values()):
        raise PFStorerError(f"{name}: training left values that are not finite; use a lower learning rate")
    if main:
        identity.save(target, passphrase_given())
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(crops, ignore_errors=True)  # another process that learned the same person removed them
    return identity


@contextmanager
def evaluating(objective: nn.Module) -> Iterator[None]:
    """Set an objective to evaluation mode inside the block, without a change of the random state."""
    with torch.random.fork_rng(devices=[]):
        objective.eval()
        try:
            yield
        finally:
            objective.train()


def no_batch(iteration: int, _: int) -> Batch:
    """Stand for the batches of a training without further iterations."""
    raise AssertionError(f"batch of iteration {iteration} after the last one")


def instant_identity(
    name: str,
    references: str | Path | Sequence[str | Path],
    base: Base,
    config: PersonalizeConfig | None = None,
    note: Callable[[str], None] = lambda _: None,
    contact_sheet: Path | None = None,
) -> Identity:
    """Return an identity without training: the blocks of the base's prior, and the features of the references.

    contact_sheet: as in `personalize`. Raises `ValueError` for a base without a prior for this, and for settings that
    the prior does not have.
    """
    config = config or PersonalizeConfig.for_base(base.config)
    config = replace(config, train=replace(config.train, iterations=0))
    if not (base.instant and starts_from_prior(base, config)):
        reason = f"base {base.config.name!r} has no prior for learning without training, or none for these settings"
        raise SettingError(f"{reason}; expected at least one iteration", setting="iterations")
    paths, photos = choose_references(references, base, config, note, contact_sheet)
    objective = PersonalizationObjective(base, config, face=person_face(photos, base, config))
    return make_identity(name, objective, base, config, paths, photos)


def choose_references(
    references: str | Path | Sequence[str | Path],
    base: Base,
    config: PersonalizeConfig,
    note: Callable[[str], None] = lambda _: None,
    contact_sheet: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> tuple[list[Path], list[torch.Tensor]]:
    """Return the paths and framed photographs, (3, H, W) in [0, 1], that an identity is learned from.

    references, note, contact_sheet: as in `personalize`. Results of this program and unsuitable photographs are left
    out, with a note for each. Raises `BadFileError` if no photograph is found or none can be read, and `SettingError`
    for more than `MOST`.
    """
    paths = without_results(find_images(references, note), note)
    if len(paths) > MOST:
        raise SettingError(
            f"{len(paths)} photographs of the person: expected at most {MOST}; 3-5 good ones are enough, so put these "
            "in a folder of their own"
        )
    if contact_sheet:
        check_place(contact_sheet, paths)
    found = read_references(paths, config, base.config.tile, note, on_progress=on_progress)
    if contact_sheet:
        save_contact_sheet(contact_sheet, found)
    used = used_references(found)
    if len(used) < ENOUGH:
        note(f"{len(used)} photograph(s); 3-5 photographs give a better likeness")
    return [reference.path for reference in used], [as_restored(reference.photo) for reference in used]


def available(config: PersonalizeConfig, note: Callable[[str], None]) -> PersonalizeConfig:
    """Return `config` without image-space losses where their networks are not installed."""
    if not has_image_losses(config) or not (missing := refusal()):
        return config
    note(f"training on latents alone, without image-space losses: {missing}")
    return replace(config, **WITHOUT_IMAGE_LOSSES)


def make_objective(
    base: Base, config: PersonalizeConfig, device: torch.device, face: torch.Tensor | None = None
) -> nn.Module:
    """Build the objective of `config.method` on a device, with the base's kernels for training.

    face: embedding (128,) of the person, with which the base's prior starts.
    """
    images = ImageSpaceLoss(base, config) if has_image_losses(config) else None
    objective: nn.Module
    if config.method == "dreambooth":
        objective = DreamBoothObjective(base, config, images)
    else:
        objective = PersonalizationObjective(base, config, images, face)
    objective.to(device)
    base.set_attention(kernels_for(config.train, device), objective)
    return objective


def parameter_groups(objective: nn.Module, config: PersonalizeConfig) -> list[ParameterGroup]:
    """Return parameter groups in which gamma and the token have their own learning rate and no weight decay.

    Adam moves a parameter by at most about its learning rate per step. With the blocks' 5e-5, gamma would stay near
    zero for 500 steps. DreamBooth's UNet is pretrained, so its rate is a tenth of the rate of new blocks (DreamBooth
    uses 5e-6 on Stable Diffusion).
    """
    rate = config.train.learning_rate * (TUNING_RATE if config.method == "dreambooth" else 1.0)
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    gammas = [p for n, p in named.items() if n.endswith(".gamma")]
    tokens = [p for n, p in named.items() if n == "token"]
    rest = [p for n, p in named.items() if not n.endswith(".gamma") and n != "token"]
    groups: list[ParameterGroup] = [
        {"params": rest, "lr": rate, "weight_decay": config.train.weight_decay},
        {"params": gammas, "lr": config.gamma_learning_rate, "weight_decay": 0.0},
        {"params": tokens, "lr": config.token_learning_rate, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


@torch.no_grad()
def make_identity(
    name: str,
    objective: nn.Module,
    base: Base,
    config: PersonalizeConfig,
    paths: Sequence[Path],
    photos: Sequence[torch.Tensor],
) -> Identity:
    """Return the trained identity, rounded to fp16, with the cached reference."""
    layers = tuple(config.layers or base.config.layers)
    identity = Identity(
        name,
        base.fingerprint,
        base.config.name,
        config.method,
        () if config.method == "dreambooth" else layers,
        json.loads(json.dumps(asdict(config))),
        tuple(sha256_file(path) for path in paths),
    )
    faces = embed_photos(photos)
    face = mean_face(faces)
    known = {} if face is None else {"face": face}
    if isinstance(objective, DreamBoothObjective):
        identity.tensors = {f"unet.{k}": v.half().cpu() for k, v in objective.unet.state_dict().items()} | known
        return identity
    assert isinstance(objective, PersonalizationObjective)
    tensors = {f"blocks.{k}": v.half().cpu() for k, v in objective.blocks.state_dict().items()} | known
    tensors["token"] = objective.token.half().cpu()
    if config.ref_source != "self":
        chosen = [photos[i] for i in rank_references(faces)[: config.references]]
        tensors |= cache_references(chosen, tensors["token"], base, identity)
    identity.tensors = tensors
    identity.gamma = gamma_summary(tensors, layers)
    return identity


def cache_references(
    photos: Sequence[torch.Tensor], token: torch.Tensor, base: Base, identity: Identity
) -> dict[str, torch.Tensor]:
    """Return `reference.{i}` (S, C) fp16 and `mask.{i}` (S,) of photographs (3, H, W) in [0, 1], side by side."""
    images = torch.stack([center_crop(photo, base.config.tile) * 2 - 1 for photo in photos]).to(base.device)
    latents = torch.cat([base.encode(image[None]) for image in images])
    settings = identity.settings
    found = reference_features(
        base,
        latents,
        token.float().to(base.device),
        settings["subject_prompt"],
        identity.layers,
        settings["reference_timestep"],
    )
    tensors = {}
    for i, layer in enumerate(identity.layers):
        features, mask = (part.flatten(0, 1) for part in found[layer])
        tensors[f"reference.{i}"] = features.half().cpu()
        tensors[f"mask.{i}"] = mask.cpu() if settings["masked"] else torch.ones(len(features), dtype=torch.bool)
    return tensors


def embed_photos(photos: Sequence[torch.Tensor]) -> list[Embedding | None]:
    """Return the embedding of the largest face of each photograph (3, H, W) in [0, 1].

    None for a photograph without a face, and for all without the `metrics` extra.
    """
    embed = face_embedder()
    return [embed(photo.permute(1, 2, 0).numpy()) if embed else None for photo in photos]


def person_face(photos: Sequence[torch.Tensor], base: Base, config: PersonalizeConfig) -> torch.Tensor | None:
    """Return the mean embedding (128,) for a training that starts from the base's prior; None if none is needed.

    Also None for photographs without a face, and without the `metrics` extra.
    """
    needed = base.prior is not None and base.prior.has_shifts and starts_from_prior(base, config)
    return mean_face(embed_photos(photos)) if needed else None


def mean_face(faces: Sequence[Embedding | None]) -> torch.Tensor | None:
    """Return the mean of the embeddings, (128,) fp16; None without any."""
    found = [face for face in faces if face is not None]
    return torch.from_numpy(np.mean(found, 0)).half() if found else None


def rank_references(faces: Sequence[Embedding | None]) -> list[int]:
    """Return the numbers of the photographs, the face most similar to the others first.

    Photographs without a face are last, in their order.
    """
    found = [(i, face) for i, face in enumerate(faces) if face is not None]
    distance = {i: sum(float(np.linalg.norm(face - other)) for _, other in found) for i, face in found}
    return sorted(range(len(faces)), key=lambda i: distance.get(i, np.inf))


def gamma_summary(tensors: dict[str, torch.Tensor], layers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the mean and largest |gamma| of every layer."""
    gammas = {layer: tensors[f"blocks.{i}.gamma"].float().abs() for i, layer in enumerate(layers)}
    return {k: {"mean": round(g.mean().item(), 6), "max": round(g.max().item(), 6)} for k, g in gammas.items()}
