from copy import deepcopy

import pytest
import torch
from pfstorer_rt.export.compose import compose_autoencoder

from pfstorer_rt.models.vae import build_vae


def autoencoder(encoder, decoder, seed=0):
    """A small AutoencoderTiny with random weights, and a copy that is composed."""
    settings = {
        "class": "AutoencoderTiny",
        "latent_channels": 3,
        "encoder_block_out_channels": (6,) * 4,
        "decoder_block_out_channels": (6,) * 4,
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_vae(settings)
        for parameter in vae.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return vae.double(), deepcopy(vae).double()


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 16)], ids=str)
@torch.no_grad()
def test_composed_convolutions_compute_the_same_up_to_the_border(size):
    vae, composed = autoencoder((0, 1, 1, 1), (1, 1, 1, 0))
    compose_autoencoder(composed)
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    latent = vae.encode(image).latents
    torch.testing.assert_close(composed.encode(image).latents, latent, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(composed.decode(latent).sample, vae.decode(latent).sample, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_no_map_of_many_channels_has_the_size_of_the_image():
    _, composed = autoencoder((0, 1, 1, 1), (1, 1, 1, 0))
    compose_autoencoder(composed)
    largest = 0

    def look(_, __, output):
        nonlocal largest
        largest = max(largest, output[0].numel())

    for module in composed.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    composed.decode(composed.encode(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).latents)
    assert largest <= 3 * 4 * 32 * 32  # the image itself, as the pixels of squares


def test_convolutions_with_blocks_between_them_are_not_composed():
    _, composed = autoencoder((1, 1, 1, 1), (1, 1, 1, 1))
    before = str(composed)
    compose_autoencoder(composed)
    assert str(composed) == before
