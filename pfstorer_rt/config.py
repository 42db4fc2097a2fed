"""All settings: frozen dataclasses of plain types, and the table of model presets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from pfstorer_rt.settings import Range, check_settings, known_fields, number, whole

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Optimizer = Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"]
Weighting = Literal["prediction", "x0"]
Attention = Literal["auto", "sdpa", "triton", "xformers", "math", "reference"]
"""Backends of `pfstorer_rt.ops`; `auto` selects the first that this device supports."""
Method = Literal["pfstorer", "vico", "dreambooth"]
Counts = tuple[int, ...]
ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class StructureConfig:
    """Sizes of the time-aware structure encoder (StableSR's `EncoderUNetModelWT`)."""

    width: int
    multipliers: tuple[int, ...]
    heads: int
    """Number of attention heads; the head size is the width divided by it."""
    out_channels: int
    """Channels of each structure map, the input of every SPADE."""
    res_blocks: int = 2
    norm_groups: int = 32


@dataclass(frozen=True)
class BaseConfig:
    """The configuration of a base's networks; `config.json` of a base directory."""

    name: str
    tile: int
    """Side in pixels of the square images for training."""
    unet: dict[str, Any]
    """Keyword arguments of diffusers' UNet2DConditionModel."""
    structure: StructureConfig
    vae: dict[str, Any]
    """`class`: AutoencoderTiny, PatchAutoencoder or AutoencoderKL, and its keyword arguments."""
    text: dict[str, Any]
    """Keyword arguments of transformers' CLIPTextConfig."""
    layers: tuple[str, ...]
    """Modules of the UNet that a personalization block follows, in execution order."""
    cfw: dict[str, Any] | None = None
    """Keyword arguments of the feature wrapping that fits the class of the VAE; None has no feature wrapping."""
    cfw_weight: float = 0.0
    """Default weight of the LQ image's features in the decoder."""
    head_size: int = 64
    """Head size of the personalization blocks."""
    personalize: dict[str, Any] = field(default_factory=dict)
    """Values of `PersonalizeConfig` fields, and of its `train`, that replace the defaults on this base."""
    spade_hidden: int = 128
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    factor: int = 8
    """Pixels per latent pixel."""
    prompt: str = ""
    tokenizer: Literal["bytes", "clip"] = "bytes"
    sampler: str = "ddpm"
    steps: int = 200
    licence: str = "unknown"

    @property
    def latent_tile(self) -> int:
        """Side of a tile in latent pixels."""
        return self.tile // self.factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.unet["in_channels"])


def _unet(channels: int, widths: tuple[int, ...], heads: tuple[int, ...], context: int, **more: Any) -> dict[str, Any]:
    """SD 2.1's block order at other widths: attention at every level except the deepest of four."""
    plain = (False,) * (len(widths) - 1) + (len(widths) == 4,)
    down = tuple("DownBlock2D" if p else "CrossAttnDownBlock2D" for p in plain)
    up = tuple("UpBlock2D" if p else "CrossAttnUpBlock2D" for p in reversed(plain))
    return {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "attention_head_dim": heads,
        "cross_attention_dim": context,
        "down_block_types": down,
        "up_block_types": up,
        "use_linear_projection": True,
        "layers_per_block": 2,
        **more,
    }


def _tiny_vae(width: int, encoder: Counts, decoder: Counts, channels: int) -> dict[str, Any]:
    return {
        "class": "AutoencoderTiny",
        "latent_channels": channels,
        "encoder_block_out_channels": (width,) * 4,
        "decoder_block_out_channels": (width,) * 4,
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


def _patch_vae(widths: Counts, encoder: Counts, decoder: Counts, channels: int) -> dict[str, Any]:
    return {
        "class": "PatchAutoencoder",
        "patch": 4,
        "widths": widths,
        "encoder_blocks": encoder,
        "decoder_blocks": decoder,
        "latent_channels": channels,
    }


def _byte_text(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 260,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": width // 32,
        "max_position_embeddings": 24,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


_SD21_LAYERS = tuple(f"up_blocks.{block}.attentions.{layer}" for block, layer in ((1, 1), (2, 0), (2, 2), (3, 1)))
_SD21_VAE = {
    "class": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
    "sample_size": 512,
}
_SD21_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}

# Settings of `personalize` for bases of a few million parameters, chosen on `tiny`.
_SMALL_BASE_TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "batch": 2,
    "decay": 0.5,
    "gamma_learning_rate": 5e-2,
    "lambda_gen": 0.0,
    "iterations": 1000,
    "first_step": 0.5,
    "lambda_pixel": 0.5,
    "lambda_perceptual": 0.05,
    "lambda_id": 0.02,
}

PRESETS: dict[str, BaseConfig] = {
    # For tests: SD 2.1's levels at the smallest widths that norms and heads allow, with half of the layers.
    "nano": BaseConfig(
        name="nano",
        tile=64,
        layers=tuple(f"up_blocks.{block}.attentions.{layer}" for block, layer in ((1, 1), (2, 0), (2, 1), (3, 1))),
        head_size=8,
        spade_hidden=8,
        unet=_unet(4, (8, 16, 16, 16), (1, 2, 2, 2), 32, norm_num_groups=4, layers_per_block=1),
        structure=StructureConfig(
            width=8, multipliers=(1, 1, 2, 2), heads=1, out_channels=8, res_blocks=1, norm_groups=4
        ),
        vae=_tiny_vae(8, (1, 1, 1, 1), (1, 1, 1, 1), 4),
        text=_byte_text(32),
        steps=4,
        licence="none",
    ),
    # For training on crops of small photographs: three levels; all weights take less than 24 MB in fp16.
    "tiny": BaseConfig(
        name="tiny",
        tile=192,
        head_size=32,
        spade_hidden=32,
        prediction_type="v_prediction",
        layers=tuple(f"up_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)),
        unet=_unet(8, (64, 128, 160), (2, 4, 5), 64, layers_per_block=1),
        structure=StructureConfig(
            width=32, multipliers=(1, 2, 2), heads=1, out_channels=48, res_blocks=1, norm_groups=16
        ),
        vae=_tiny_vae(64, (0, 1, 2, 3), (3, 2, 1, 0), 8),
        text=_byte_text(64),
        personalize=_SMALL_BASE_TRAINING,
        cfw={"widths": (64, 64), "growth": 16},
        cfw_weight=1.0,
        sampler="ddim",
        steps=1,
        licence="research, non-commercial",
    ),
    # The shipped base, for images of 512 pixels: an autoencoder of factor 16 gives 32x32 latents. Size: 38 MB in fp16
    # without its prior.
    # The encoder's first level has no attention: on 1024 tokens it takes more time than all convolutions of the level.
    "portrait": BaseConfig(
        name="portrait",
        tile=512,
        head_size=32,
        spade_hidden=32,
        prediction_type="v_prediction",
        factor=16,
        layers=tuple(f"up_blocks.{block}.attentions.{layer}" for block in range(3) for layer in range(2)),
        unet=_unet(
            32,
            (96, 128, 160),
            (3, 4, 5),
            64,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ),
        structure=StructureConfig(
            width=48, multipliers=(1, 2, 2), heads=1, out_channels=64, res_blocks=1, norm_groups=16
        ),
        vae=_patch_vae((64, 128, 256), (1, 1, 2), (2, 2, 2), 32),
        text=_byte_text(64),
        personalize={
            **_SMALL_BASE_TRAINING,
            **{"iterations": 110, "batch": 1, "optimizer": "muon", "ema": 0.98, "first_step": 0.9, "pool": 64},
            **{"learning_rate": 1e-3, "gamma_learning_rate": 0.02, "token_learning_rate": 0.0},
            **{"lambda_pixel": 5.0, "lambda_color": 100.0, "lambda_perceptual": 3.0},
            **{"lambda_id": 5.0, "lambda_face": 40.0},
            **{"start": "prior", "weighting": "x0", "largest_sf": 11.0},
        },
        cfw={"levels": (1, 2, 3), "widths": (12, 64, 128), "growth": 32, "patch": 4},
        cfw_weight=1.0,
        sampler="ddim",
        steps=1,
        licence="research, non-commercial",
    ),
    # StableSR on SD 2.1-base at 512 pixels (method: StableSR sections 2.1-2.5).
    "sd21": BaseConfig(
        name="sd21",
        tile=512,
        layers=_SD21_LAYERS,
        unet=_unet(4, (320, 640, 1280, 1280), (5, 10, 20, 20), 1024),
        structure=StructureConfig(width=256, multipliers=(1, 1, 2, 2), heads=4, out_channels=256),
        vae=_SD21_VAE,
        text=_SD21_TEXT,
        tokenizer="clip",
        licence="NTU S-Lab 1.0 (non-commercial)",
    ),
}


TRAIN_RANGES: dict[str, Range] = {
    **dict.fromkeys(("iterations", "warmup", "seed", "workers"), whole(0)),
    **dict.fromkeys(("batch", "checkpoint_every"), whole(1)),
    **dict.fromkeys(("weight_decay", "ema"), number(lambda v: 0 <= v < 1, "0 or more and below 1")),
    "minutes": number(lambda v: v >= 0, "0 or more"),
    "learning_rate": number(lambda v: 0 < v < 1, "above 0 and below 1"),
    "decay": number(lambda v: 0 <= v <= 1, "a share from 0 to 1"),
    "clip": number(lambda v: v > 0, "above 0"),
    "device": (lambda v: re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", str(v)) is not None, "auto, cpu, cuda or cuda:N"),
}
"""Valid values of the fields of `TrainConfig` that are narrower than their types."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings that every training shares."""

    iterations: int = 500
    minutes: float = 0.0
    """Duration of the training; 0 ends it after `iterations` instead."""
    batch: int = 4
    """Samples in one iteration of one process."""
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: int = 0
    """Iterations of linear warm-up."""
    decay: float = 0.0
    """Final share of the iterations over which the learning rate falls to zero along a cosine."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.0
    """Decay of the moving average of the weights; 0 uses the last weights."""
    precision: Precision = "auto"
    """`auto` is bf16 if the device computes it natively, else fp32."""
    device: str = "auto"
    attention: Attention = "auto"
    """Backend of attention, gates and norms; `auto` selects the fastest for training on the device."""
    optimizer: Optimizer = "adamw"
    """AdamW; Muon for matrices and AdamW for the rest; or bitsandbytes' 8-bit AdamW (paged: state in host memory)."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass instead of storing them."""
    seed: int = 0
    workers: int = 0
    """Processes that prepare batches in advance."""
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Raise `SettingError` for the first field with a value of another type, or out of range."""
        check_settings(self, TRAIN_RANGES)


_SHARE = number(lambda v: 0 <= v <= 1, "a share from 0 to 1")
_WEIGHT = number(lambda v: v >= 0, "0 or more")
_RATE = number(lambda v: 0 <= v < 1, "0 or more and below 1")

IMAGE_LOSSES = ("lambda_pixel", "lambda_color", "lambda_perceptual", "lambda_id", "lambda_face")
"""Weights of the losses on decoded images."""
WITHOUT_IMAGE_LOSSES: dict[str, Any] = dict.fromkeys(IMAGE_LOSSES, 0.0)
"""Weights of a training on latents alone."""

PERSONALIZE_RANGES: dict[str, Range] = {
    **dict.fromkeys(("first_step", "p_self", "p_hq"), _SHARE),
    **dict.fromkeys(("lambda_gen", "lambda_pers", *IMAGE_LOSSES), _WEIGHT),
    **dict.fromkeys(("gamma_learning_rate", "token_learning_rate"), _RATE),
    **dict.fromkeys(("gen_rows", "pool"), whole(1)),
    "largest_sf": number(lambda v: 4 <= v <= 16, "a reduction by 4 to 16"),
    "references": whole(1, 100),
    "reference_timestep": whole(0, 999),
    "rank": whole(0, 4096),
}
"""Valid values of the numbers of `PersonalizeConfig`."""


@dataclass(frozen=True)
class PersonalizeConfig:
    """Settings of the training of an identity (PFStorer section 3); the open points of the paper are fields."""

    method: Method = "pfstorer"
    train: TrainConfig = field(default_factory=TrainConfig)
    layers: tuple[str, ...] = ()
    """Spatial transformers of the UNet that a block follows; empty selects the base's list."""
    ref_source: Literal["cached", "self"] = "cached"
    """Input of a block's attention at inference: features of a reference, stored in the identity, or its own input."""
    start: Literal["prior", "open", "closed"] = "closed"
    """Start of the training. prior: the blocks of the base's prior, or `open` without one; open: gamma = 1, and the
    last layers of the blocks are 0; closed: gamma = 0 (PFStorer section 3.2)."""
    references: int = 1
    """Largest number of photographs whose features a block attends to at once; the paper uses one."""
    reference_timestep: int = 0
    """Timestep of the references in the base: 0 as in ViCo, or 999, where restoring starts."""
    masked: bool = True
    """Whether a block attends only to the tokens of a reference that show the subject (ViCo section 3.2)."""
    first_step: float = 0.0
    """Share of the samples at timestep 999, where every restoration starts; the others are uniform."""
    p_self: float = 0.1
    """Share of the iterations without a reference, so that `ref_source` self stays usable."""
    weighting: Weighting = "prediction"
    """Space of L_diff and L_gen: the network's prediction, or the clean latent computed from it."""
    lambda_gen: float = 0.1
    gen_rows: int = 1
    """Samples of a batch for L_gen."""
    pool: int = 256
    """Number of degraded crops that are made and encoded before the training, which draws its samples from them."""
    lambda_pers: float = 5e-4
    lambda_pixel: float = 0.0
    """Weight of the pixel error of the decoded images; this loss and the next four use the samples at timestep 999."""
    lambda_color: float = 0.0
    """Weight of the error of the decoded images averaged over squares: colours and brightness, without detail."""
    lambda_perceptual: float = 0.0
    """Weight of the perceptual distance of the decoded images (needs the `metrics` extra)."""
    lambda_id: float = 0.0
    """Weight of the identity loss on the decoded images (needs the `metrics` extra)."""
    lambda_face: float = 0.0
    """Weight of the distance between the recognizer's feature maps of the decoded faces (needs the same extra)."""
    gamma_learning_rate: float = 5e-3
    token_learning_rate: float = 5e-3
    """0 leaves the token as it is: L_pers has no effect then, and the features of a reference are computed once."""
    init_word: str = "face"
    subject_prompt: str = "a photo of a {}"
    level: Literal["light", "heavy"] = "heavy"
    largest_sf: float = 4.0
    """The degradation reduces each crop by a random factor from 4, the factor of `level`, to this one."""
    p_hq: float = 0.03
    framing: Literal["face", "none"] = "face"
    """face: crop around small or off-centre faces (needs the `metrics` extra); none: centre crop."""
    keep_all: bool = False
    """Use all photographs, also copies, other people, and photographs without a face or with a blurred face."""
    rank: int = 0
    """Rank of the matrices of the blocks; 0 for full matrices."""

    def __post_init__(self) -> None:
        """Raise `SettingError` for the first field with a value of another type, or out of range."""
        check_settings(self, PERSONALIZE_RANGES)

    @classmethod
    def for_base(cls, base: BaseConfig, train: Mapping[str, Any] | None = None, **values: Any) -> PersonalizeConfig:
        """Return the defaults of a base with some values changed; `train` has fields of `TrainConfig`."""
        training = known_fields(TrainConfig, train or {})
        known_fields(cls, values)
        trained = {name: value for name, value in base.personalize.items() if name in training}
        own = {name: value for name, value in base.personalize.items() if name not in training}
        return cls(train=TrainConfig(**{**trained, **(train or {})}), **{**own, **values})

    def longer(self, factor: float) -> PersonalizeConfig:
        """Return the settings of a training of `factor` times as many iterations, at least one.

        A longer training has more crops in the same ratio, a shorter one the same crops.
        """
        train = replace(self.train, iterations=max(1, round(self.train.iterations * factor)))
        return replace(self, train=train, pool=round(self.pool * max(1.0, factor)))

    def thorough(self) -> PersonalizeConfig:
        """Return the settings of a training for more likeness: with a prior four times as long, without one twice.

        The default is short with a prior.
        """
        return self.longer(4 if self.start == "prior" else 2)


SUPPORTED_SETTINGS = {
    "tap": ("post",),
    "residual": ("delta",),
    "ref_sft": ("self",),
    "ref_timestep": ("0",),
    "main_prompt": ("null",),
    "null_cond": ("zero_latent",),
    "ref_source": ("cached", "self"),
}
"""Supported values of settings in identities of earlier versions."""


def unsupported_setting(settings: Mapping[str, Any]) -> str | None:
    """Return the first setting of an identity that this version cannot reproduce, with the supported values."""
    for name, supported in SUPPORTED_SETTINGS.items():
        if name in settings and settings[name] not in supported:
            return f"{name}={settings[name]!r:.80}, and this version supports only {' or '.join(map(repr, supported))}"
    return None


@dataclass(frozen=True)
class TileConfig:
    """Settings of the tiles (StableSR section 3.4)."""

    mode: Literal["fast", "parity"] = "fast"
    """`parity` uses StableSR's tiles and squares; `fast` needs fewer tiles and no squares."""
    overlap: int | None = None
    """Pixels shared by neighbouring tiles; None is half a tile in parity mode, else a quarter."""
    chop: int = 1280
    """In parity mode, larger images are restored in squares with this side in pixels."""
    chop_stride: int = 1000
    batch: int | None = None
    """Tiles that pass through the denoiser at once; None is the engine's number."""

    def __post_init__(self) -> None:
        """Raise `SettingError` for the first field with a value of another type; `Recipe.resolve` checks the ranges."""
        check_settings(self)


@dataclass(frozen=True)
class RestoreConfig:
    """Settings of a restoration; None selects the default of the plan or base."""

    steps: int | None = None
    sampler: str | None = None
    seed: int = 0
    strength: float = 1.0
    """Scale of the identity: 0 is the base, 1 as trained."""
    scale: float = 1.0
    """Size of the result relative to the input."""
    cfw_weight: float | None = None
    """Weight of the LQ image's features in the decoder: 0 is the plain decoder, 1 as trained."""
    color_fix: Literal["auto", "adain", "wavelet", "none"] = "auto"
    """`auto`: adain for one tile, wavelet for several."""
    colorize: bool = False
    """Whether the result of a grey or sepia image may have other colours."""
    remove_scratches: bool = False
    """Whether scratches, dust and creases are removed first."""
    coarse: Literal["auto", "on", "off"] = "auto"
    """Whether the image is restored at a reduced scale first; `auto`: if a face is larger than 0.8 of a tile."""
    init: Literal["lq", "noise"] = "lq"
    eta: float = 0.0
    """Share of fresh noise in DDIM: 0 is deterministic, 1 is as noisy as DDPM."""
    tile: TileConfig = field(default_factory=TileConfig)

    def __post_init__(self) -> None:
        """Raise `SettingError` for the first field with a value of another type; `Recipe.resolve` checks the ranges."""
        check_settings(self, {"seed": whole(0)})


def to_json(config: Any) -> str:
    """Write a configuration as stable, indented JSON."""
    return json.dumps(asdict(config), indent=2, sort_keys=True)


def changed(config: ConfigT, **values: Any) -> ConfigT:
    """Return a copy of a configuration with the `values` that are not None."""
    return replace(config, **{k: v for k, v in values.items() if v is not None})  # type: ignore[type-var]
