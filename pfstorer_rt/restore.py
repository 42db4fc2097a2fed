"""The runtime: a picture of any size through encoder, tiled diffusion, decoder and colour fix (StableSR 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.engine.session import Session, choose_backend
from pfstorer_rt.errors import MismatchError, PFStorerError
from pfstorer_rt.identity import Identity, identity_path, list_identities
from pfstorer_rt.image import color_fix, from_tensor, resize_bicubic, to_tensor
from pfstorer_rt.plan import COMPONENTS, Manifest, Plan
from pfstorer_rt.sampling import SAMPLERS, respace, start_from_lq
from pfstorer_rt.tiling import Blender, Tile, axis_offsets, pad_to_multiple, plan_tiles

Pixels = npt.NDArray[np.float32]
Step = Callable[[int, int], None]
"""step(done, total), called after each pass over the tiles."""

PADDING = 32
"""The canvas's sides are multiples of this, in pixels."""
MAX_ENLARGEMENT = 4.0
"""A picture smaller than a tile is enlarged to one by at most this factor, and padded for the rest."""


@dataclass(frozen=True)
class Canvas:
    """How a picture is laid on the canvas that the networks see, in pixels."""

    height: int
    width: int
    """Of the enlarged picture, before padding."""
    pad_bottom: int
    pad_right: int
    out_height: int
    out_width: int
    """Of the result."""


def plan_canvas(height: int, width: int, tile: int, scale: float) -> Canvas:
    """Enlarge until the short side is a tile, then pad to multiples of 32 and to at least a tile.

    Enlarging stops at a factor of 4 (or at `scale`): a picture of a few pixels is padded, so that
    3 x 5000 does not become 192 x 320000. Raises `ValueError` when scale is not above 0.
    """
    if not 0 < scale <= 16:
        raise ValueError(f"scale {scale}: expected above 0 and at most 16")
    s = max(scale, min(tile / min(height, width), max(MAX_ENLARGEMENT, scale)))
    h, w = max(1, round(height * s)), max(1, round(width * s))
    bottom, right = pad_to_multiple(max(h, tile), max(w, tile), PADDING)
    out = max(1, round(height * scale)), max(1, round(width * scale))
    return Canvas(h, w, max(h, tile) + bottom - h, max(w, tile) + right - w, *out)


class Restorer:
    """Restores pictures with one engine; a context manager that frees it.

    Attributes: `manifest`, what the engine is; `backend`, what runs it; `provider`, where.
    """

    def __init__(self, manifest: Manifest, sessions: Mapping[str, Session], backend: str) -> None:
        self.manifest, self.backend = manifest, backend
        self._stack = ExitStack()
        self._sessions = {name: self._stack.enter_context(session) for name, session in sessions.items()}
        self.provider = self._sessions["denoiser"].provider

    @classmethod
    def from_plan(
        cls, path: str | Path, backend: str = "auto", base: str | Path | None = None, trust: bool = False
    ) -> Restorer:
        """Open a plan; with backend `torch`, open the base and identity that it was made of instead.

        trust: run a TensorRT plan, which is executable code, whoever built it.
        Raises `BadFileError`, `MissingBackendError`, or `MismatchError` when `torch` cannot find them.
        """
        plan = Plan.open(path, trust)
        if backend == "torch":
            return cls.from_base(base or plan.manifest.base_name, _find_identity(plan.manifest), plan.manifest)
        plan.check_trusted()
        choice = choose_backend(backend, plan.manifest.target)
        sessions = {name: choice.open_component(plan, name) for name in COMPONENTS}
        return cls(plan.manifest, sessions, choice.name)

    @classmethod
    def from_base(
        cls,
        base: object = "tiny",
        identity: str | Path | Identity | None = None,
        expected: Manifest | None = None,
        device: str = "auto",
    ) -> Restorer:
        """Run a base (name, directory or loaded) and an identity in PyTorch, without a plan.

        Raises `MismatchError` when the identity, or the manifest that is expected, is of another base.
        """
        from pfstorer_rt.engine.torch import manifest, open_sessions
        from pfstorer_rt.models.base import Base, load_base

        loaded = base if isinstance(base, Base) else load_base(str(base))
        if identity is not None and not isinstance(identity, Identity):
            identity = Identity.load(identity_path(identity))
        if expected is not None and loaded.fingerprint != expected.base_fingerprint:
            raise MismatchError(
                f"the plan was made of base {expected.base_name!r} ({expected.base_fingerprint[:12]}), got base "
                f"{loaded.fingerprint[:12]}; give its base with --base, or run the plan with --backend onnxruntime"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded.to(device)
        return cls(manifest(loaded, identity), open_sessions(loaded, identity), "torch")

    def __enter__(self) -> Restorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def restore(self, pixels: Pixels, config: RestoreConfig | None = None, step: Step | None = None) -> Pixels:
        """Restore one picture.

        pixels: (H, W, 3) float32 in [0, 1], sRGB. Returns (round(H*scale), round(W*scale), 3) in [0, 1].
        Raises `ValueError` for a setting out of range, `PFStorerError` when the engine gives NaN.
        """
        config = config or RestoreConfig()
        self.check(config)
        m, image = self.manifest, to_tensor(pixels)
        canvas = plan_canvas(pixels.shape[0], pixels.shape[1], m.tile, config.scale)
        shrinking = canvas.height < pixels.shape[0]
        style = _pad(resize_bicubic(image, (canvas.height, canvas.width), antialias=shrinking), canvas)
        out = self._restore_canvas(style, config, step or (lambda done, total: None))
        out = out[:, :, : canvas.height, : canvas.width]
        size = (canvas.out_height, canvas.out_width)
        if out.shape[-2:] != size:
            out = resize_bicubic(out, size, antialias=size[0] < canvas.height)
        if not bool(torch.isfinite(out).all()):
            raise PFStorerError(f"{self.backend} gave values that are not finite; try another --backend")
        return from_tensor(out)

    def check(self, config: RestoreConfig) -> None:
        """Raise `ValueError` when a setting does not fit this engine, before any work."""
        respace(self.steps(config))
        plan_canvas(1, 1, self.manifest.tile, config.scale)
        if self.sampler(config) not in SAMPLERS:
            raise ValueError(f"sampler {config.sampler!r}: expected one of {', '.join(SAMPLERS)}")
        if not np.isfinite(config.strength):
            raise ValueError(f"strength {config.strength}: expected a finite number, 0 for the base and 1 as trained")
        if config.strength != 1.0 and not self.manifest.strength and self.manifest.identity_name:
            raise ValueError(
                f"strength {config.strength}: this engine's identity has no gated blocks to scale; leave it at 1"
            )
        if not np.isfinite(config.cfw_weight):
            raise ValueError(f"cfw_weight {config.cfw_weight}: expected a finite number, 0 for the plain decoder")
        if config.cfw_weight != 0 and not self.manifest.cfw:
            raise ValueError(
                f"cfw_weight {config.cfw_weight}: this engine has no controllable feature wrapping; leave it at 0, or "
                "import the base with --cfw and export it again"
            )
        overlap = self.overlap(config)
        if not 0 <= overlap < self.manifest.tile or overlap % self.manifest.factor:
            raise ValueError(
                f"overlap {overlap}: expected 0 to {self.manifest.tile - self.manifest.factor} in steps of "
                f"{self.manifest.factor} pixels"
            )
        if config.tile.batch < 1:
            raise ValueError(f"tile batch {config.tile.batch}: expected at least 1")
        if config.tile.chop < 1 or config.tile.chop % PADDING:
            raise ValueError(f"chop {config.tile.chop}: expected a multiple of {PADDING} pixels")
        if config.tile.chop_stride < 1:
            raise ValueError(f"chop_stride {config.tile.chop_stride}: expected at least 1 pixel")
        if config.color_fix not in ("auto", "adain", "wavelet", "none"):
            raise ValueError(f"colour fix {config.color_fix!r}: expected auto, adain, wavelet or none")
        if config.init not in ("lq", "noise"):
            raise ValueError(f"init {config.init!r}: expected lq or noise")
        if not 0 <= config.eta <= 1:
            raise ValueError(f"eta {config.eta}: expected 0 to 1")

    def steps(self, config: RestoreConfig) -> int:
        """Return the number of diffusion steps."""
        return self.manifest.steps if config.steps is None else config.steps

    def sampler(self, config: RestoreConfig) -> str:
        """Return the name of the sampler."""
        return config.sampler or self.manifest.sampler

    def overlap(self, config: RestoreConfig) -> int:
        """Return the pixels that neighbouring tiles share."""
        return self.manifest.tile // 2 if config.tile.overlap is None else config.tile.overlap

    def _restore_canvas(self, style: torch.Tensor, config: RestoreConfig, step: Step) -> torch.Tensor:
        """Restore (1, 3, H, W), in squares of `chop` pixels when it is larger (method: image pipeline, step 3)."""
        height, width = style.shape[-2:]
        sides = [min(n, max(config.tile.chop, self.manifest.tile)) for n in (height, width)]
        if sides == [height, width]:
            return self._restore_square(style, config, step)
        rows, columns = (
            axis_offsets(n, side, max(0, side - config.tile.chop_stride))
            for n, side in zip((height, width), sides, strict=True)
        )
        squares = [Tile(y, x, *sides) for y in rows for x in columns]
        blender = Blender(3, height, width)
        for i, square in enumerate(squares):

            def progress(done: int, total: int, i: int = i) -> None:
                step(i * total + done, len(squares) * total)

            part = self._restore_square(crop(style, square), config, progress)
            blender.add(square, part[0].numpy())
        return torch.from_numpy(blender.result())[None]

    def _restore_square(self, style: torch.Tensor, config: RestoreConfig, step: Step) -> torch.Tensor:
        """Encode, sample, decode, fix colours; every square starts from the same seed."""
        generator = torch.Generator().manual_seed(config.seed)
        encoded = self._run("encoder", image=style)
        z_lq = encoded["mean"].to(self._sessions["denoiser"].device)

        def noise() -> torch.Tensor:  # drawn on the host, so that a seed means the same on every device
            return torch.randn(z_lq.shape, generator=generator).to(z_lq.device)

        if "std" in encoded:
            z_lq = z_lq + encoded["std"].to(z_lq.device) * noise()
        first = noise()
        x = start_from_lq(z_lq, first) if config.init == "lq" else first
        tiles = self._latent_tiles(z_lq.shape[-2], z_lq.shape[-1], config)
        denoiser = self._tiled_denoiser(z_lq, tiles, config, step)
        sample, timesteps = SAMPLERS[self.sampler(config)], respace(self.steps(config))
        x = sample(denoiser, x, timesteps, self.manifest.prediction_type, noise, eta=config.eta)
        features = {name: tensor for name, tensor in encoded.items() if name.startswith("features_")}
        if features:
            features["cfw_weight"] = torch.full((1,), config.cfw_weight)
        decoded = self._run("decoder", latent=x, **features)["image"].cpu()
        kind = config.color_fix
        if kind == "auto":
            kind = "adain" if len(tiles) == 1 else "wavelet"
        return color_fix(decoded, style, kind).clamp(-1, 1)

    def _run(self, component: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        session = self._sessions[component]
        return session.run_tensors(**{name: tensor.to(session.device) for name, tensor in tensors.items()})

    def _latent_tiles(self, height: int, width: int, config: RestoreConfig) -> list[Tile]:
        m = self.manifest
        return plan_tiles(height, width, m.tile // m.factor, self.overlap(config) // m.factor)

    def _tiled_denoiser(
        self, z_lq: torch.Tensor, tiles: list[Tile], config: RestoreConfig, step: Step
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Return denoiser(x, t) of the canvas: predictions of the tiles, blended with gaussian weights."""
        session, total, done = self._sessions["denoiser"], self.steps(config), 0
        strength = torch.full((1,), config.strength, dtype=torch.float32, device=z_lq.device)
        fixed = {"strength": strength} if "strength" in session.inputs else {}

        def denoiser(x: torch.Tensor, t: int) -> torch.Tensor:
            nonlocal done
            blender = Blender(*x.shape[1:])
            for start in range(0, len(tiles), config.tile.batch):
                chosen = tiles[start : start + config.tile.batch]
                stacked = {
                    name: torch.stack([crop(canvas[0], tile) for tile in chosen])
                    for name, canvas in (("x", x), ("z_lq", z_lq))
                }
                times = torch.full((len(chosen),), t, dtype=torch.float32, device=z_lq.device)
                predictions = session.run_tensors(**stacked, t=times, **fixed)["prediction"]
                for tile, prediction in zip(chosen, predictions, strict=True):
                    blender.add(tile, prediction)
            done += 1
            step(done, total)
            blended: torch.Tensor = blender.result()
            return blended[None]

        return denoiser


def crop(array: Any, tile: Tile) -> Any:
    """Cut a tile out of the last two axes of an array or tensor."""
    rows, columns = tile.slices
    return array[..., rows, columns]


def _pad(image: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """Reflect at the right and bottom; where the picture is too small to reflect, repeat its edge."""
    pad = (0, canvas.pad_right, 0, canvas.pad_bottom)
    reflect = canvas.pad_right < image.shape[-1] and canvas.pad_bottom < image.shape[-2]
    return F.pad(image, pad, mode="reflect" if reflect else "replicate")


def _find_identity(manifest: Manifest) -> Identity | None:
    """Find the identity that a plan was made of among the named ones."""
    if manifest.identity_name is None:
        return None
    for path in list_identities():
        identity = Identity.load(path)
        if identity.fingerprint == manifest.identity_fingerprint:
            return identity
    raise MismatchError(
        f"the plan's identity {manifest.identity_name!r} is not among the identities here; backend torch needs it "
        "(`pfstorer-rt identities list`), backend onnxruntime does not"
    )
