"""Training of the network that removes scratches, on tiles with synthetic damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.degradation.scratches import VISIBLE, Scan, draw_damage
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.scratches import ScratchNetwork
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.autoencoder import cut
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Training, log_to, read_state, run_training, signature
from pfstorer_rt.training.losses import Losses


@dataclass(frozen=True)
class ScratchConfig:
    """Settings of the training."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=6000, batch=4, learning_rate=1e-3, warmup=100, decay=0.5, ema=0.995, weight_decay=0.0
        )
    )
    crop: int = 256
    """Side in pixels of the crops of the tiles."""
    undamaged: float = 0.25
    """Share of the crops without damage."""
    damaged_weight: float = 2.0
    """Weight of a damaged pixel in the cross-entropy; that of another pixel is 1."""
    lambda_result: float = 10.0
    """Weight of L1 between the repaired and the undamaged image."""
    lambda_fill: float = 1.0
    """Weight of the mean L1 of the filled image over the damaged pixels."""


class ScratchObjective(nn.Module):
    """Cross-entropy of the damaged pixels + L1 of the repaired image + L1 of the fill where the image is damaged."""

    def __init__(self, network: ScratchNetwork, config: ScratchConfig) -> None:
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch: Batch) -> Losses:
        """Take `damaged` and `image` (B, 3, H, W) in [-1, 1], and `mask` (B, 1, H, W), 1 where they differ."""
        c = self.config
        damaged = batch["damaged"].contiguous(memory_format=torch.channels_last)
        logit, fill = (output.float() for output in self.network(damaged))
        image, mask = batch["image"], batch["mask"]
        weights = 1 + (c.damaged_weight - 1) * mask
        detection = (F.binary_cross_entropy_with_logits(logit, mask, reduction="none") * weights).mean()
        result = F.l1_loss(torch.lerp(damaged, fill, logit.sigmoid()), image)
        filling = ((fill - image).abs() * mask).sum() / (3 * mask.sum() + 1)
        return {
            "loss": detection + c.lambda_result * result + c.lambda_fill * filling,
            "detection": detection,
            "result": result,
            "fill": filling,
        }


def train_scratches(
    pools: Sequence[npt.NDArray[np.uint8]],
    work: Path,
    config: ScratchConfig,
    start: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> ScratchNetwork:
    """Train the network on crops of tiles (N, S, S, 3); resumes from `work/scratches.pt`.

    pools: undamaged tiles, sharp and degraded ones. A crop is drawn from each array with probability proportional to
    its length. start: checkpoint of another training, whose averaged weights are the initial weights.
    """
    make_folder(work)
    settings = config.train
    ends = np.cumsum([len(pool) for pool in pools])

    def make_batch(_: int, number: int) -> Batch:
        rng = np.random.default_rng([settings.seed, 41, number])
        samples = []
        for _ in range(settings.batch):
            tile = int(rng.integers(ends[-1]))
            which = int(np.searchsorted(ends, tile, "right"))
            samples.append(make_sample(cut(pools[which][tile - ends[which]], config.crop, rng), config, rng))
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}

    with accelerated(settings) as accelerator:
        torch.manual_seed(settings.seed)
        objective = ScratchObjective(ScratchNetwork(), config)
        if start is not None:
            objective.load_state_dict(read_state(start)["average"])
        training = Training(
            "scratches",
            objective,
            make_batch,
            settings,
            work / "scratches.pt",
            signature([asdict(config), [pool.shape for pool in pools]], [start] if start else []),
            on_log=log_to(work / "scratches.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    return objective.network.eval().requires_grad_(False)


def make_sample(
    tile: npt.NDArray[np.uint8], config: ScratchConfig, rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """Return `damaged`, `image` (3, S, S) in [-1, 1] and `mask` (1, S, S) of a tile (S, S, 3)."""
    turned = np.rot90(tile, int(rng.integers(4)))
    image = np.ascontiguousarray(turned, np.float32) / np.float32(255)
    height, width = image.shape[:2]
    damaged, mask = image, np.zeros((height, width), np.float32)
    if rng.random() >= config.undamaged:
        damage = draw_damage(height, width, rng)
        damaged, mask = damage.on(image), (damage.opacity > VISIBLE).astype(np.float32)
    scan = Scan.random(height, width, rng)
    scans = {"damaged": scan.of(damaged), "image": scan.of(image)}
    return {**{name: pixels.transpose(2, 0, 1) * 2 - 1 for name, pixels in scans.items()}, "mask": mask[None]}
