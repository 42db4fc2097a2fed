"""Measure the GPU memory of personalizing on a base of SD 2.1's size.

    python benchmarks/personalize_memory.py -o benchmarks/results/personalize_memory.json

Runs two iterations of the objective and the optimizer of `personalize` on fake tensors, which have shapes and types but
no values, and sums the storages that are alive at the same time. This is the memory of the tensors on a GPU, without
the allocator's overhead, the CUDA context and the convolutions' workspaces (1-2 GB more).
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pfstorer_rt.config import PRESETS, PersonalizeConfig, TrainConfig
from pfstorer_rt.models.base import Base, assemble
from pfstorer_rt.models.prompt import SUBJECT, PromptEncoder, token_position, tokenize
from pfstorer_rt.models.reference import Positions
from pfstorer_rt.runtime.bench import machine
from pfstorer_rt.training import objectives
from pfstorer_rt.training.memory import frozen_weights_in
from pfstorer_rt.training.optimizers import make_optimizer
from pfstorer_rt.training.personalize import parameter_groups

GB = 1e9


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages in use, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """Subtract a storage that was freed."""
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def measure(preset: str, batch: int, rank: int, recompute: bool) -> dict[str, Any]:
    """Return the memory of one setting in GB."""
    config = PersonalizeConfig(rank=rank, train=TrainConfig(batch=batch, gradient_checkpointing=recompute))
    sizes = PRESETS[preset]
    ids = tokenize(config.subject_prompt.format(SUBJECT), sizes)
    positions = Positions(token_position(ids, -1), token_position(ids, sizes.text["eos_token_id"]))
    width, length = sizes.unet["cross_attention_dim"], ids.shape[1]
    with (
        FakeTensorMode(),
        # These three functions depend on values, which fake tensors do not have; only their shapes matter.
        patch.object(objectives, "subject_ids", lambda *_: (torch.zeros(1, length, dtype=torch.long), positions)),
        patch.object(PromptEncoder, "word_embedding", lambda *_: torch.zeros(width)),
        patch.object(Base, "encode_prompt", lambda *_: torch.zeros(1, length, width)),
    ):
        base = assemble(sizes).freeze()
        objective, meter = objectives.PersonalizationObjective(base, config), Meter()
        if recompute:
            base.unet.enable_gradient_checkpointing()
        with frozen_weights_in(objective, torch.bfloat16):
            optimizer = make_optimizer(parameter_groups(objective, config), config.train)
            for tensor in [*objective.parameters(), *objective.buffers()]:
                meter.add(tensor.data)
            weights = meter.now
            rows = {"hq": batch, "lq": batch, "noise": batch, "reference": 1}
            shape = (sizes.latent_channels, sizes.latent_tile, sizes.latent_tile)
            given: dict[str, Any] = {k: torch.zeros(n, *shape) for k, n in rows.items()}
            given |= {"t": torch.zeros(batch, dtype=torch.long), "self": False}
            with meter:
                for _ in range(2):  # the second iteration has the optimizer's state
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = objective(given)["loss"]
                    loss.backward()
                    del loss
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    return {
        "base": preset,
        "batch": batch,
        "rank": rank,
        "gradient_checkpointing": recompute,
        "trained": trained,
        "weights_gb": round(weights / GB, 2),
        "peak_gb": round(meter.peak / GB, 2),
    }


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="sd21", show_default=True)
def main(output: Path, base: str) -> None:
    settings = [(1, 0, False), (1, 0, True), (4, 0, False), (4, 0, True), (4, 16, False)]
    rows = [measure(base, *setting) for setting in settings]
    for row in rows:
        click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"rows": rows, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
