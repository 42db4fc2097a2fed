from dataclasses import replace

import numpy as np
import pytest
import torch
from pfstorer_rt.export import export_plan
from pfstorer_rt.export.tensorrt import BuildOptions, plan_profiles

from pfstorer_rt.config import PRESETS, RestoreConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.components import decoder
from pfstorer_rt.runtime.restorer import Restorer

KL = {**PRESETS["sd21"].vae, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "sample_size": 64}
KL["layers_per_block"] = 1
CONFIG = replace(PRESETS["nano"], vae=KL, cfw={"widths": (16, 16), "growth": 4, "norm_groups": 4})
TINY = replace(PRESETS["nano"], cfw={"widths": (8, 8), "growth": 4}, cfw_weight=1.0)
PATCH = replace(
    PRESETS["nano"],
    tile=128,
    factor=16,
    vae={**PRESETS["portrait"].vae, "widths": (8, 8, 8), "latent_channels": 4},
    cfw={"levels": (2, 3), "widths": (8, 8), "growth": 4, "patch": 4},
    cfw_weight=1.0,
)


@pytest.fixture(
    scope="module", params=[CONFIG, TINY, PATCH], ids=["AutoencoderKL", "AutoencoderTiny", "PatchAutoencoder"]
)
def wrapped(request):
    base = build_base(request.param, seed=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.cfw.named_parameters():
        if "widen" in name:  # begins at zero
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.fixture(scope="module")
def plan(wrapped, tmp_path_factory):
    return export_plan(tmp_path_factory.mktemp("cfw") / "a.plan", None, wrapped)


def test_the_encoder_outputs_the_decoders_features(plan, wrapped):
    moments, channels = ({"mean", "std"}, 16) if wrapped.config == CONFIG else ({"mean"}, 4)
    features = {"features_2", "features_3"} if wrapped.config == PATCH else {"features_1", "features_2"}
    assert plan.manifest.cfw
    encoder, decoder = (plan.manifest.payloads[name] for name in ("encoder", "decoder"))
    assert set(encoder.outputs) == moments | features
    assert set(decoder.inputs) == {"latent", *features, "cfw_weight"}
    assert decoder.inputs["features_2"]["shape"][1] == channels


def test_a_plan_with_feature_wrapping_agrees_with_pytorch(plan, wrapped, make_image):
    pixels = make_image(70, 200)
    results = {}
    torch_restorer = Restorer.from_base(wrapped, device="cpu")
    with Restorer.from_plan(plan.path, "onnxruntime") as ours, torch_restorer:
        for weight in (0.0, 1.0):
            config = RestoreConfig(cfw_weight=weight, steps=2)
            results[weight] = ours.restore(pixels, config)
            np.testing.assert_allclose(results[weight], torch_restorer.restore(pixels, config), atol=2e-3)
        usual = ours.restore(pixels, RestoreConfig(steps=2))
        assert np.array_equal(usual, results[wrapped.config.cfw_weight])
    plain_base = replace(wrapped, cfw=None)
    with Restorer.from_base(plain_base, device="cpu") as plain:
        np.testing.assert_allclose(results[0.0], plain.restore(pixels, RestoreConfig(steps=2)), atol=2e-3)
        with pytest.raises(ValueError, match="no controllable feature"):
            plain.restore(pixels, RestoreConfig(steps=2, cfw_weight=0.5))
    assert np.abs(results[0.0] - results[1.0]).max() > 2e-2


def test_an_engine_without_feature_wrapping_refuses_a_weight(base_plan, make_image):
    with Restorer.from_plan(base_plan.path) as restorer, pytest.raises(ValueError, match="no controllable feature"):
        restorer.restore(make_image(64, 64), RestoreConfig(cfw_weight=0.5))


def test_profiles_have_the_scale_of_each_feature_map():
    inputs = {"latent": [-1, 4, -1, -1], "features_1": [-1, 16, -1, -1], "features_2": [-1, 16, -1, -1]}
    scales = decoder(build_base(CONFIG)).scales
    (profile,) = plan_profiles({**inputs, "cfw_weight": [1]}, CONFIG.tile, scales, BuildOptions(largest_side=128))
    assert profile == {
        "latent": [[1, 4, 8, 8], [1, 4, 8, 8], [1, 4, 16, 16]],
        "features_1": [[1, 16, 32, 32], [1, 16, 32, 32], [1, 16, 64, 64]],
        "features_2": [[1, 16, 16, 16], [1, 16, 16, 16], [1, 16, 32, 32]],
    }
