from dataclasses import replace

import numpy as np
import pytest
import torch

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.models.scratches import ScratchGraph, ScratchNetwork
from pfstorer_rt.training.scratches import ScratchConfig, ScratchObjective, make_sample, train_scratches

CONFIG = ScratchConfig(TrainConfig(iterations=4, batch=2, learning_rate=1e-3, precision="fp32"), crop=64)


@pytest.fixture(scope="module")
def tiles():
    ramp = np.arange(96, dtype=np.uint8)[:, None, None] + np.arange(96, dtype=np.uint8)[None, :, None]
    return [np.stack([ramp.repeat(3, 2)] * 3), np.full((2, 96, 96, 3), 90, np.uint8)]


def test_an_untrained_network_returns_its_input():
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        opacity, fill = ScratchGraph(ScratchNetwork())(image)
    assert opacity.shape == (2, 1, 32, 48) and torch.allclose(fill, image, atol=0.2)


def test_every_level_of_the_network_reaches_the_result():
    network = ScratchNetwork()
    torch.nn.init.normal_(network.decoder.conv_out.weight)
    network(torch.rand(1, 3, 32, 32))[1].square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # the last convolution of a residual block starts at 0, so its first one has no gradient yet
    assert [name for name in silent if "conv1" not in name] == []


def test_a_sample_differs_from_its_image_where_the_mask_says(tiles):
    config = replace(CONFIG, undamaged=0.0)
    shares = []
    for seed in range(12):
        sample = make_sample(tiles[0][0], config, np.random.default_rng(seed))
        assert {name: array.shape for name, array in sample.items()} == {
            "damaged": (3, 96, 96), "image": (3, 96, 96), "mask": (1, 96, 96)
        }  # fmt: skip
        difference = np.abs(sample["damaged"] - sample["image"]).mean(0)
        inside = sample["mask"][0] > 0
        if inside.mean() > 0.01:
            shares.append(difference[inside].mean() / difference[~inside].mean())
    assert len(shares) > 4 and min(shares) > 3


def test_some_samples_are_undamaged(tiles):
    samples = [make_sample(tiles[0][0], replace(CONFIG, undamaged=1.0), np.random.default_rng(s)) for s in range(3)]
    assert all(np.array_equal(s["damaged"], s["image"]) and not s["mask"].any() for s in samples)


def test_the_objective_is_smallest_for_the_undamaged_image():
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32)
    mask[..., 8:12, :] = 1
    damaged = torch.where(mask > 0, torch.ones(()), image)

    class Answer(torch.nn.Module):
        def __init__(self, logit, fill):
            super().__init__()
            self.logit, self.fill = logit, fill

        def forward(self, _):
            return self.logit, self.fill

    def loss(logit, fill):
        batch = {"damaged": damaged, "image": image, "mask": mask}
        return {k: float(v) for k, v in ScratchObjective(Answer(logit, fill), CONFIG)(batch).items()}

    right = 40 * mask - 20
    best = loss(right, image)
    assert best["loss"] < 1e-4
    assert loss(-right, image)["detection"] > 10 and loss(right, damaged)["fill"] > 0.3
    assert loss(torch.full_like(mask, -20.0), image)["result"] == pytest.approx(
        float((damaged - image).abs().mean()), rel=1e-3
    )


def test_an_interrupted_training_continues_and_a_finished_one_is_read(tiles, tmp_path):
    whole = train_scratches(tiles, tmp_path / "whole", CONFIG).state_dict()
    seen = 0

    def stop(progress):
        nonlocal seen
        seen = progress.done
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        every = replace(CONFIG, train=replace(CONFIG.train, checkpoint_every=1))
        train_scratches(tiles, tmp_path / "parts", every, on_progress=stop)
    assert seen == 2
    resumed = train_scratches(tiles, tmp_path / "parts", every).state_dict()
    again = train_scratches(tiles, tmp_path / "whole", CONFIG).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)
    start = ScratchNetwork().state_dict()
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_a_training_can_start_from_the_weights_of_another(tiles, tmp_path):
    averaged = replace(CONFIG, train=replace(CONFIG.train, ema=0.9))
    first = train_scratches(tiles, tmp_path / "first", averaged).state_dict()
    still = replace(CONFIG, train=replace(CONFIG.train, learning_rate=1e-12, iterations=1))
    second = train_scratches(tiles, tmp_path / "second", still, tmp_path / "first" / "scratches.pt").state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
