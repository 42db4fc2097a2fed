"""The training objectives: modules that map a batch to its losses."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import BaseConfig, PersonalizeConfig, Weighting
from pfstorer_rt.diffusion import add_noise, noisy_latent, prediction_error, x0_from_prediction
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.personalization import build_blocks
from pfstorer_rt.models.prompt import tokenize
from pfstorer_rt.models.reference import LayerReference, reference_pass, subject_ids
from pfstorer_rt.models.unet import Tap
from pfstorer_rt.models.vae import Autoencoder, decode, encode_moments
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.losses import Losses, attention_loss, gradient_loss, moment_loss


class AutoencoderObjective(nn.Module):
    """Reconstruction through a noisy latent: L1 + gradient L1 + unit moments.

    The noise makes the decoder robust to the small errors of a latent from a diffusion model.
    """

    def __init__(self, vae: Autoencoder, noise: float = 0.05, moments: float = 0.02) -> None:
        super().__init__()
        self.vae, self.noise, self.moments = vae, noise, moments

    def forward(self, batch: Batch) -> Losses:
        """Take `image` (B, 3, H, W) in [-1, 1] and `noise` (B, C, h, w)."""
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        latent, std = encode_moments(self.vae, image)
        deviation = self.noise if std is None else std + self.noise
        output = decode(self.vae, latent + deviation * batch["noise"]).float()
        reconstruction = F.l1_loss(output, batch["image"])
        moments = moment_loss(latent.float())
        loss = reconstruction + gradient_loss(output, batch["image"]) + self.moments * moments
        return {"loss": loss, "l1": reconstruction, "moments": moments}


class RestorerObjective(nn.Module):
    """L_diff on latent pairs: MSE of the prediction at a uniform t (StableSR section 3.1)."""

    alphas_cumprod: torch.Tensor

    def __init__(self, base: Base, weighting: Weighting = "prediction") -> None:
        super().__init__()
        self.weighting = weighting
        self.unet, self.structure_encoder = base.unet, base.structure_encoder
        self.text_encoder, self.prediction_type = base.text_encoder, base.config.prediction_type
        self.register_buffer("alphas_cumprod", base.schedule.alphas_cumprod_tensor(), persistent=False)
        self.register_buffer("ids", tokenize(base.config.prompt, base.config), persistent=False)

    def forward(self, batch: Batch) -> Losses:
        """Take latents `hq` and `lq` (B, C, h, w), `noise` of the same shape, `t` (B,)."""
        x0, t = batch["hq"], batch["t"]
        context = self.text_encoder(self.ids).expand(len(x0), -1, -1)
        x = noisy_latent(x0, batch["lq"], batch["noise"], t, self.alphas_cumprod)
        prediction = self.unet(x, t, context, self.structure_encoder(batch["lq"], t))
        error = prediction_error(prediction, x, x0, t, self.alphas_cumprod, self.prediction_type, self.weighting)
        return {"loss": error.mean()}

    def restore(
        self,
        x0: torch.Tensor,
        z_lq: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        taps: Mapping[str, Tap] | None = None,
    ) -> torch.Tensor:
        """Return the network's estimate (B, C, h, w) of the clean latents, from noisy latents of timestep t.

        taps: changes of the features after spatial transformers of the UNet.
        """
        x = noisy_latent(x0, z_lq, noise, t, self.alphas_cumprod)
        context = self.text_encoder(self.ids).expand(len(x), -1, -1)
        prediction = self.unet(x, t, context, self.structure_encoder(z_lq, t), taps).float()
        return x0_from_prediction(x, prediction, t, self.alphas_cumprod, self.prediction_type)


class ImageLoss(Protocol):
    """A loss on decoded images, such as `ImageSpaceLoss`."""

    def of_batch(self, restored: torch.Tensor, batch: Batch) -> Losses:
        """Return the weighted sum `image` and its terms for clean latents (B, C, h, w)."""


class ImageObjective(nn.Module):
    """An objective with an optional loss on the decoded images."""

    alphas_cumprod: torch.Tensor
    image_loss: ImageLoss | None
    base_config: BaseConfig

    def image_losses(self, x: torch.Tensor, prediction: torch.Tensor, batch: Batch) -> Losses:
        """Return `image` and its terms for the restored samples (B, C, h, w); empty without a loss on images."""
        if self.image_loss is None:
            return {}
        restored = x0_from_prediction(
            x, prediction.float(), batch["t"], self.alphas_cumprod, self.base_config.prediction_type
        )
        return self.image_loss.of_batch(restored, batch)


class PersonalizationObjective(ImageObjective):
    """`L_diff + lambda_gen L_gen + lambda_pers L_pers` (PFStorer section 3.3).

    The frozen base runs on the reference, then on LQ-conditioned and null-conditioned rows. L_gen is the mean over
    `gen_rows` samples of the batch. Samples are independent, so this estimates the same mean with less work.
    """

    alphas_cumprod: torch.Tensor
    ids: torch.Tensor
    base_context: torch.Tensor

    def __init__(
        self,
        base: Base,
        config: PersonalizeConfig,
        image_loss: ImageLoss | None = None,
        face: torch.Tensor | None = None,
    ) -> None:
        """Build the blocks; face: embedding (128,) of the person, with which the prior starts, if it is known."""
        super().__init__()
        self.config, self.base_config, self.image_loss = config, base.config, image_loss
        self.unet, self.structure_encoder, self.text_encoder = base.unet, base.structure_encoder, base.text_encoder
        layers = config.layers or base.config.layers
        self.blocks = build_blocks(base.unet, layers, base.config.head_size, config.rank)
        ids, self.positions = subject_ids(base, config.subject_prompt)
        self.token = nn.Parameter(self.text_encoder.word_embedding(tokenize(config.init_word, base.config)))
        if starts_from_prior(base, config):
            assert base.prior is not None
            base.prior.copy_to(self.blocks, face)
            self.token.data.copy_(base.prior.token)
        elif config.start != "closed":
            for block in self.blocks:
                block.open()
        self.token.requires_grad_(config.token_learning_rate > 0)
        self.known: dict[int, dict[str, LayerReference]] = {}
        for block in self.blocks if config.method == "vico" else ():
            block.gamma.requires_grad_(False).fill_(1.0)
        self.register_buffer("ids", ids, persistent=False)
        with torch.no_grad():
            self.register_buffer("base_context", base.encode_prompt(), persistent=False)
        self.register_buffer("alphas_cumprod", base.schedule.alphas_cumprod_tensor(), persistent=False)

    def forward(self, batch: Batch) -> Losses:
        """Take scaled latents `hq lq noise` (B, C, h, w), `reference` (R, C, h, w), `t` (B,), `self` bool ().

        The blocks attend to the features of all R references side by side. `photos` (R,): numbers of the references,
        each of which stands for the same latent in every batch.
        """
        x0, z_lq, t, noise, n = batch["hq"], batch["lq"], batch["t"], batch["noise"], len(batch["hq"])
        k = min(self.config.gen_rows, n) if self.config.lambda_gen else 0
        # The paper puts the reference into the batch of the restored rows. A separate pass gives the same result, and
        # the restored rows need no gradients before the first personalized layer.
        reference = self.see(batch["reference"]) if self.token.requires_grad else self.recall(batch)
        rows = torch.cat([torch.arange(n), torch.arange(k)]).to(x0.device)
        x = torch.cat(
            [noisy_latent(x0, z_lq, noise, t, self.alphas_cumprod), add_noise(x0, noise, t, self.alphas_cumprod)[:k]]
        )
        structure = self.structure_encoder(torch.cat([z_lq, torch.zeros_like(z_lq[:k])]), t[rows])
        prediction = self.unet(
            x,
            t[rows],
            self.base_context.expand(n + k, -1, -1),
            structure,
            self.taps(None if batch["self"] else reference),
        )
        error = prediction_error(
            prediction,
            x,
            x0[rows],
            t[rows],
            self.alphas_cumprod,
            self.base_config.prediction_type,
            self.config.weighting,
        )
        diff, gen = error[:n].mean(), error[n:].sum() / max(1, k)
        pers = diff.new_zeros(())
        for seen in reference.values():
            pers = pers + attention_loss(seen.probabilities, *self.positions)
        loss = diff + self.config.lambda_gen * gen + self.config.lambda_pers * pers
        images = self.image_losses(x[:n], prediction[:n], batch)
        return {"loss": loss + images.pop("image", 0), "diff": diff, "gen": gen, "pers": pers, **images}

    def see(self, references: torch.Tensor) -> dict[str, LayerReference]:
        """Run references (R, C, h, w) through the base with the subject prompt; returns their features by layer."""
        subject = self.text_encoder(self.ids, self.token)
        return reference_pass(
            self.unet,
            self.structure_encoder,
            references,
            subject.expand(len(references), -1, -1),
            self.blocks.layers,
            self.config.reference_timestep,
            self.alphas_cumprod,
        )

    @torch.no_grad()
    def recall(self, batch: Batch) -> dict[str, LayerReference]:
        """Return the features of a batch's references, which stay the same if the token is not trained."""
        numbers = batch["photos"].tolist()
        for number, latent in zip(numbers, batch["reference"], strict=True):
            if number not in self.known:
                self.known[number] = self.see(latent[None])
        parts = [self.known[number] for number in numbers]
        return {
            layer: LayerReference(*(torch.cat(tensors) for tensors in zip(*(p[layer] for p in parts), strict=True)))
            for layer in self.blocks.layers
        }

    def taps(self, reference: Mapping[str, LayerReference] | None) -> dict[str, Tap]:
        """Return the UNet's taps: the blocks on a reference, or without a reference on their own input."""
        if reference is None:
            return {block.layer: block for block in self.blocks}
        subject = self.positions.subject
        seen = {layer: side_by_side(r, subject if self.config.masked else None) for layer, r in reference.items()}
        return {block.layer: partial(block, reference=seen[block.layer]) for block in self.blocks}


def side_by_side(reference: LayerReference, subject: int | None) -> torch.Tensor:
    """Return the features of R references as one, (1, S, C).

    subject: position of the subject token; the features of tokens outside its mask are left out. None keeps all.
    """
    features = reference.features.flatten(0, 1)
    return (features if subject is None else features[reference.mask(subject).flatten()])[None]


def starts_from_prior(base: Base, config: PersonalizeConfig) -> bool:
    """Whether a training starts with the base's prior. The prior has full matrices at the base's own layers."""
    fits = config.rank == 0 and config.layers in ((), base.config.layers) and config.method == "pfstorer"
    return config.start == "prior" and base.prior is not None and fits


class DreamBoothObjective(ImageObjective):
    """DreamBooth on the restorer: the UNet itself is tuned, with prior preservation (the paper's ablation row).

    The prior is preserved on the null-conditioned rows, where the tuned UNet has to match the predictions of the frozen
    UNet. These predictions replace the generated class images of DreamBooth.
    """

    alphas_cumprod: torch.Tensor
    base_context: torch.Tensor

    def __init__(self, base: Base, config: PersonalizeConfig, image_loss: ImageLoss | None = None) -> None:
        super().__init__()
        self.config, self.base_config, self.image_loss = config, base.config, image_loss
        self.structure_encoder, self.frozen = base.structure_encoder, base.unet
        self.unet = deepcopy(base.unet).requires_grad_(True)
        with torch.no_grad():
            self.register_buffer("base_context", base.encode_prompt(), persistent=False)
        self.register_buffer("alphas_cumprod", base.schedule.alphas_cumprod_tensor(), persistent=False)

    def forward(self, batch: Batch) -> Losses:
        """Take the same batch as `PersonalizationObjective`; the reference is not used."""
        x0, z_lq, noise, n = batch["hq"], batch["lq"], batch["noise"], len(batch["hq"])
        k = min(self.config.gen_rows, n)
        rows = torch.cat([torch.arange(n), torch.arange(k)]).to(x0.device)
        t = batch["t"][rows]
        x = torch.cat(
            [
                noisy_latent(x0, z_lq, noise, batch["t"], self.alphas_cumprod),
                add_noise(x0[:k], noise[:k], t[n:], self.alphas_cumprod),
            ]
        )
        structure = self.structure_encoder(torch.cat([z_lq, torch.zeros_like(z_lq[:k])]), t)
        context = self.base_context.expand(n + k, -1, -1)
        prediction = self.unet(x, t, context, structure).float()
        with torch.no_grad():
            prior = self.frozen(x[n:], t[n:], context[n:], {w: m[n:] for w, m in structure.items()}).float()
        diff = prediction_error(
            prediction[:n],
            x[:n],
            x0,
            batch["t"],
            self.alphas_cumprod,
            self.base_config.prediction_type,
            self.config.weighting,
        ).mean()
        keep = F.mse_loss(prediction[n:], prior)
        images = self.image_losses(x[:n], prediction[:n], batch)
        return {"loss": diff + keep + images.pop("image", 0), "diff": diff, "prior": keep, **images}
