import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.models.cfw_patch import PatchFeatureWrapping
from pfstorer_rt.models.patch_autoencoder import PatchAutoencoder
from pfstorer_rt.models.vae import decode, encode_moments

SETTINGS = {"patch": 4, "widths": (8, 12, 16), "encoder_blocks": (1, 0, 2), "decoder_blocks": (1, 1, 0)}


@pytest.fixture
def vae():
    """An autoencoder of factor 16 whose residual blocks do something."""
    return randomized(PatchAutoencoder(**SETTINGS, latent_channels=6))


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def images(height=64, width=96, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def conv(layer, x, **more):
    return F.conv2d(x, layer.weight, layer.bias, **more)


def residual(block, x):
    return x + conv(block.conv2, F.relu(conv(block.conv1, x, padding=1)), padding=1)


def test_encoder_and_decoder_compute_their_formulas(vae):
    e, d = vae.encoder, vae.decoder
    h = residual(e.levels[0][0], conv(e.conv_in, F.pixel_unshuffle(images(), 4), padding=1))
    h = conv(e.downsamplers[0], h, stride=2, padding=1)
    h = conv(e.downsamplers[1], h, stride=2, padding=1)
    z = conv(e.conv_out, residual(e.levels[2][1], residual(e.levels[2][0], h)), padding=1)
    latent, std = encode_moments(vae, images())
    assert std is None and latent.shape == (2, 6, 4, 6)
    torch.testing.assert_close(latent, z)
    h = F.pixel_shuffle(conv(d.upsamplers[1][0], conv(d.conv_in, z, padding=1)), 2)
    h = F.pixel_shuffle(conv(d.upsamplers[0][0], residual(d.levels[1][0], h)), 2)
    image = F.pixel_shuffle(conv(d.conv_out, residual(d.levels[0][0], h), padding=1), 4)
    torch.testing.assert_close(decode(vae, z), image)


def test_a_tile_agrees_with_the_whole_away_from_its_edges(vae):
    whole, latent = images(512, 512), encode_moments(vae, images(512, 512))[0]
    part = encode_moments(vae, whole[..., 96:416, 96:416])[0]
    torch.testing.assert_close(part[..., 9:11, 9:11], latent[..., 15:17, 15:17])


def test_untrained_residual_blocks_are_the_identity():
    fresh = PatchAutoencoder(**SETTINGS)
    x = torch.randn(1, 8, 5, 7)
    assert torch.equal(fresh.encoder.levels[0](x), x)


def test_the_latent_is_scaled_both_ways(vae):
    scaled = randomized(PatchAutoencoder(**SETTINGS, latent_channels=6, scaling_factor=0.5))
    torch.testing.assert_close(encode_moments(scaled, images())[0], encode_moments(vae, images())[0] / 2)
    torch.testing.assert_close(decode(scaled, torch.ones(1, 6, 2, 2)), decode(vae, torch.full((1, 6, 2, 2), 2.0)))


def test_the_autoencoder_is_saved_in_diffusers_layout(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(encode_moments(again, images())[0], encode_moments(vae, images())[0])


# ---- feature wrapping


def test_untrained_wrapping_equals_the_plain_decoder(vae):
    wrapping = PatchFeatureWrapping(levels=(2, 3), widths=(8, 12), growth=4)
    features = wrapping.features(vae, images())
    latent = encode_moments(vae, images(seed=1))[0]
    assert {level: tuple(f.shape[1:]) for level, f in features.items()} == {2: (4, 16, 24), 3: (4, 8, 12)}
    assert torch.equal(wrapping(vae, latent, features, 1.0), decode(vae, latent))


def test_wrapping_adds_to_the_inputs_of_the_blocks_of_its_levels(vae):
    wrapping = randomized(PatchFeatureWrapping(levels=(3,), widths=(12,), growth=4), seed=1)
    latent = encode_moments(vae, images(seed=1))[0]
    features = wrapping.features(vae, images())
    d, fusion = vae.decoder, wrapping.layer(3)
    h = F.pixel_shuffle(conv(d.upsamplers[1][0], conv(d.conv_in, latent, padding=1)), 2)
    h = residual(d.levels[1][0], h + 0.7 * fusion(features[3], h))
    h = F.pixel_shuffle(conv(d.upsamplers[0][0], h), 2)
    expected = F.pixel_shuffle(conv(d.conv_out, residual(d.levels[0][0], h), padding=1), 4)
    torch.testing.assert_close(wrapping(vae, latent, features, 0.7), expected)
    assert (expected - decode(vae, latent)).abs().max() > 1e-2
    assert torch.equal(wrapping(vae, latent, features, 0.0), decode(vae, latent))


def test_wrapping_above_the_finest_level_adds_to_patches_of_the_image(vae):
    wrapping = randomized(PatchFeatureWrapping(levels=(1, 2), widths=(12, 8), growth=4), seed=1)
    image, latent = images(), encode_moments(vae, images(seed=1))[0]
    features, fusion = wrapping.features(vae, image), wrapping.layer(1)
    torch.testing.assert_close(features[1], conv(fusion.narrow_encoded, F.pixel_unshuffle(image, 2)))
    coarse = PatchFeatureWrapping(levels=(2,), widths=(8,), growth=4)
    coarse.fusion_layer_2 = wrapping.layer(2)
    before = coarse(vae, latent, features, 0.7)
    added = fusion(features[1], F.pixel_unshuffle(before, 2))
    torch.testing.assert_close(wrapping(vae, latent, features, 0.7), before + 0.7 * F.pixel_shuffle(added, 2))
    assert added.abs().max() > 1e-2
    assert torch.equal(wrapping(vae, latent, features, 0.0), decode(vae, latent))
