"""PyTorch as an engine: the base and the identity themselves, the reference that plans are compared with."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from pfstorer_rt.engine.session import Array, numpy_run
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.codec import Decoder, Encoder, feature_names
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.plan import COMPONENTS, Manifest


class TorchSession:
    """A module whose forward takes `inputs` in order and returns `outputs` in order."""

    def __init__(
        self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], device: torch.device
    ) -> None:
        self.module, self.inputs, self.outputs, self.device = module.eval(), inputs, outputs, device
        self.provider = f"PyTorch {torch.__version__} {device}"

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        return numpy_run(self, arrays)

    @torch.no_grad()
    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do the same on tensors of `device`."""
        result = self.module(*(tensors[name].to(self.device) for name in self.inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        return {name: tensor.float() for name, tensor in zip(self.outputs, outputs, strict=True)}

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def component_modules(base: Base, identity: Identity | None = None) -> dict[str, nn.Module]:
    """Return the unfused component modules by name; raises `MismatchError` for an identity of another base."""
    return {"encoder": Encoder(base), "denoiser": Denoiser(base, identity), "decoder": Decoder(base)}


def component_names(component: str, base: Base, strength: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a component's input and output names, in order."""
    variational = base.config.vae["class"] == "AutoencoderKL"
    features = feature_names(base)
    return {
        "encoder": (("image",), (("mean", "std") if variational else ("mean",)) + features),
        "denoiser": (("x", "t", "z_lq", "strength") if strength else ("x", "t", "z_lq"), ("prediction",)),
        "decoder": (("latent", *features, "cfw_weight") if features else ("latent",), ("image",)),
    }[component]


def open_sessions(
    base: Base, identity: Identity | None = None, attention: str = "auto"
) -> dict[str, TorchSession]:
    """Open all components of a base, with an identity or without, on a backend of `pfstorer_rt.ops`."""
    modules = component_modules(base, identity)
    base.set_attention(attention, modules["denoiser"])
    strength = bool(getattr(modules["denoiser"], "has_strength", False))
    return {c: TorchSession(modules[c], *component_names(c, base, strength), base.device) for c in COMPONENTS}


def manifest(base: Base, identity: Identity | None = None, target: str = "torch", precision: str = "fp32") -> Manifest:
    """Describe a base and an identity as a plan would."""
    c = base.config
    return Manifest(
        target=target, precision=precision, tile=c.tile, factor=c.factor, latent_channels=c.latent_channels,
        prediction_type=c.prediction_type, sampler=c.sampler, steps=c.steps, base_name=c.name,
        base_fingerprint=base.fingerprint, identity_name=identity.name if identity else None,
        identity_fingerprint=identity.fingerprint if identity else None,
        method=identity.method if identity else None,
        strength=identity is not None and identity.method != "dreambooth", cfw=base.cfw is not None,
        cfw_weight=c.cfw_weight if base.cfw else 0.0, licence=c.licence,
    )  # fmt: skip
