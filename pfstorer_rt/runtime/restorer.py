"""The runtime: a picture of any size through encoder, tiled diffusion, decoder and colour fix (StableSR 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.diffusion import SAMPLERS, respace, start_from_lq
from pfstorer_rt.engine.session import Session, choose_backend
from pfstorer_rt.errors import MismatchError
from pfstorer_rt.extras import needed_by
from pfstorer_rt.identity import Identity, identity_path, list_identities
from pfstorer_rt.imaging.bands import (
    PADDING,
    Bands,
    ColorFixed,
    Cropped,
    Padded,
    Resized,
    Result,
    Spooled,
    Unit,
    plan_canvas,
)
from pfstorer_rt.imaging.rows import Pixels, Rows, Spool
from pfstorer_rt.plan import COMPONENTS, Manifest, Plan
from pfstorer_rt.runtime.stages import CodecTiles, Done, TiledDenoiser, chop_offsets, decode, encode, run
from pfstorer_rt.tiling import Tile, blend_by_rows, plan_tiles, ramp_weights

Step = Callable[[int, int], None]
"""step(done, total), called after each batch of tiles; total counts all tiles through all networks and steps."""

OVERLAP = {"parity": 2, "fast": 4}
"""Share of a tile, 1/n, that neighbouring tiles have in common when the caller does not say."""
CODEC_TILE = {False: 512, True: 1280}
"""Side in pixels of the encoder's and decoder's tiles, and for variational autoencoders, whose norms see all of it."""
CODEC_MARGIN = {False: 32, True: 128}
"""Pixels around them that are thrown away: about half of what convolutions see, their far reach weighs little."""


@dataclass(frozen=True)
class Work:
    """What a restoration will do."""

    height: int
    width: int
    """Of the canvas, in pixels."""
    tiles: int
    """Of the denoiser, in one step."""
    codec_tiles: int
    """Of the encoder, and as many of the decoder."""
    steps: int
    batch: int
    squares: int = 1
    """Parts that are restored one after the other (parity with StableSR above 1280 pixels)."""

    @property
    def total(self) -> int:
        """Tiles through networks."""
        return self.tiles * self.steps + 2 * self.codec_tiles


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
        cls,
        path: str | Path,
        backend: str = "auto",
        base: str | Path | None = None,
        trust: bool = False,
        provider: str | None = None,
        attention: str = "auto",
    ) -> Restorer:
        """Open a plan; with backend `torch`, open the base and identity that it was made of instead.

        trust: run a TensorRT plan, which is executable code, whoever built it. provider: where the backend runs it,
        in its own words (`cpu`, `cuda`; for OpenVINO `CPU:f32`, `GPU`); None takes its best. attention: with backend
        `torch`, a backend of `pfstorer_rt.ops`.
        Raises `BadFileError`, `MissingBackendError`, or `MismatchError` when `torch` cannot find them.
        """
        plan = Plan.open(path, trust)
        if backend == "torch":
            found = _find_identity(plan.manifest)
            return cls.from_base(base or plan.manifest.base_name, found, plan.manifest, attention=attention)
        plan.check_trusted()
        choice = choose_backend(backend, plan.manifest.target)
        sessions = {name: choice.open_component(plan, name, provider) for name in COMPONENTS}
        return cls(plan.manifest, sessions, choice.name)

    @classmethod
    def from_base(
        cls,
        base: object = "tiny",
        identity: str | Path | Identity | None = None,
        expected: Manifest | None = None,
        device: str = "auto",
        attention: str = "auto",
    ) -> Restorer:
        """Run a base (name, directory or loaded) and an identity in PyTorch, without a plan.

        attention: a backend of `pfstorer_rt.ops`; raises `MissingBackendError` when it is refused.
        Raises `MismatchError` when the identity, or the manifest that is expected, is of another base.
        """
        with needed_by("a base in PyTorch"):
            from pfstorer_rt.engine.torch import open_sessions
            from pfstorer_rt.models.base import Base, load_base
            from pfstorer_rt.models.components import manifest

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
        return cls(manifest(loaded, identity), open_sessions(loaded, identity, attention), "torch")

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
        with one_host_thread(self.backend != "torch"):
            result = self.restore_rows(Spool.of(pixels), config, step)
            return result.read(0, result.height)

    def restore_rows(self, source: Rows, config: RestoreConfig | None = None, step: Step | None = None) -> Rows:
        """Restore a picture that is read and given by rows, so that memory is needed for tiles and not for it.

        source: rows (n, W, 3) float32 in [0, 1]. The networks are done when this returns; what is read from the result
        is colour-fixed and brought to size on the way, and `PFStorerError` raised for values that are not finite.
        Latents stay in memory: about 32 * channels / factor^2 bytes a pixel.
        """
        config = config or RestoreConfig()
        self.check(config)
        canvas = plan_canvas(source.height, source.width, self.manifest.tile, config.scale)
        shrinking = canvas.height < source.height
        style = Padded(Resized(Unit(source), canvas.height, canvas.width, shrinking), canvas)
        work, passed = self.plan(source.height, source.width, config), 0

        def done(n: int) -> None:
            nonlocal passed
            passed += n
            if step:
                step(passed, work.total)

        with one_host_thread(self.backend != "torch"):
            restore = self._restore_squares if work.squares > 1 else self._area
            restored = restore(style, config, done)
        return Result(
            restored, canvas, lambda: f"{self.backend} gave values that are not finite; try another --backend"
        )

    def plan(self, height: int, width: int, config: RestoreConfig) -> Work:
        """Say what restoring a picture of that size will do."""
        canvas = plan_canvas(height, width, self.manifest.tile, config.scale)
        height, width = canvas.padded
        squares = self._squares(height, width, config)
        h, w = squares[0].height, squares[0].width
        tiles, codec = self._tiles(h, w, config), self._codec_tiles(h, w, config)
        n = len(squares)
        batch = min(len(tiles), config.tile.batch)
        return Work(height, width, n * len(tiles), n * len(codec), self.steps(config), batch, n)

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
        if not np.isfinite(self.cfw_weight(config)):
            raise ValueError(f"cfw_weight {config.cfw_weight}: expected a finite number, 0 for the plain decoder")
        if config.cfw_weight and not self.manifest.cfw:
            raise ValueError(
                f"cfw_weight {config.cfw_weight}: this engine has no controllable feature wrapping; leave it at 0, or "
                "import the base with --cfw and export it again"
            )
        if config.tile.mode not in OVERLAP:
            raise ValueError(f"tiling {config.tile.mode!r}: expected one of {', '.join(OVERLAP)}")
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

    def cfw_weight(self, config: RestoreConfig) -> float:
        """Return how far the decoder follows the LQ image's features."""
        return self.manifest.cfw_weight if config.cfw_weight is None else config.cfw_weight

    def overlap(self, config: RestoreConfig) -> int:
        """Return the pixels that neighbouring tiles share."""
        m = self.manifest
        share = m.tile // m.factor // OVERLAP[config.tile.mode] * m.factor
        return share if config.tile.overlap is None else config.tile.overlap

    def _squares(self, height: int, width: int, config: RestoreConfig) -> list[Tile]:
        """Cut a canvas into StableSR's squares; one that is the canvas unless parity is asked for."""
        chop = max(config.tile.chop, self.manifest.tile)
        if config.tile.mode == "fast" or max(height, width) <= chop:
            return [Tile(0, 0, height, width)]
        sides = min(height, chop), min(width, chop)
        rows, columns = (
            chop_offsets(n, side, config.tile.chop_stride) for n, side in zip((height, width), sides, strict=True)
        )
        return [Tile(y, x, *sides) for y in rows for x in columns]

    def _tiles(self, height: int, width: int, config: RestoreConfig) -> list[Tile]:
        """Cut a canvas or square into the denoiser's tiles, in latent pixels."""
        f, even = self.manifest.factor, config.tile.mode == "fast"
        return plan_tiles(height // f, width // f, self.manifest.tile // f, self.overlap(config) // f, even)

    def _codec_tiles(self, height: int, width: int, config: RestoreConfig) -> CodecTiles:
        """Cut a canvas or square into the tiles of encoder and decoder."""
        f, variational = self.manifest.factor, "std" in self._sessions["encoder"].outputs
        side = max(CODEC_TILE[variational] if config.tile.mode == "fast" else max(height, width), self.manifest.tile)
        return CodecTiles(height // f, width // f, side // f, CODEC_MARGIN[variational] // f)

    def _restore_squares(self, style: Bands, config: RestoreConfig, done: Done) -> Bands:
        """Restore square after square, each from the same seed, and blend them (method: image pipeline, step 3)."""
        squares = self._squares(style.height, style.width, config)
        spool = Spool(style.height, style.width)

        def patches() -> Iterator[npt.NDArray[np.float32]]:
            for square in squares:
                part = self._area(Cropped(style, square), config, done)
                yield part.read(0, square.height)[0].numpy()

        for start, rows in blend_by_rows(squares, patches(), style.height, style.width):
            spool.write(start, rows.transpose(1, 2, 0))
        return Spooled(spool)

    def _area(self, style: Bands, config: RestoreConfig, done: Done) -> Bands:
        """Encode, sample on one field of noise, decode, fix colours."""
        m, sessions = self.manifest, self._sessions
        generator, device = torch.Generator().manual_seed(config.seed), sessions["denoiser"].device
        codec = self._codec_tiles(style.height, style.width, config)
        encoded = encode(sessions["encoder"], style, codec, m.factor, device, done)
        z_lq = encoded["mean"]

        def noise() -> torch.Tensor:  # drawn on the host, so that a seed means the same on every device
            return torch.randn(z_lq.shape, generator=generator).to(device)

        if "std" in encoded:
            z_lq = z_lq + encoded["std"] * noise()
        first = noise()
        x = start_from_lq(z_lq, first) if config.init == "lq" else first
        denoiser = self._denoiser(style.height, style.width, config)
        x = SAMPLERS[self.sampler(config)](
            lambda x, t: denoiser(x, t, z_lq, done),
            x,
            respace(self.steps(config)),
            m.prediction_type,
            noise,
            eta=config.eta,
        )
        features = partial(self._features, encoded, style, config)
        decoded = decode(sessions["decoder"], x, features, codec, m.factor, done)
        kind = config.color_fix
        if kind == "auto":
            kind = "adain" if len(denoiser.tiles) == 1 else "wavelet"
        return ColorFixed(Spooled(decoded), style, kind)

    def _denoiser(self, height: int, width: int, config: RestoreConfig) -> TiledDenoiser:
        session, tiles = self._sessions["denoiser"], self._tiles(height, width, config)
        strength = torch.full((1,), config.strength, dtype=torch.float32)
        fixed = {"strength": strength} if "strength" in session.inputs else {}
        weights = ramp_weights(tiles) if config.tile.mode == "fast" else None
        return TiledDenoiser(session, tiles, weights, config.tile.batch, fixed)

    def _features(
        self, encoded: dict[str, torch.Tensor], style: Bands, config: RestoreConfig, tile: Tile
    ) -> dict[str, torch.Tensor]:
        """Return what the decoder takes besides the latent of a tile; nothing without feature wrapping."""
        if not self.manifest.cfw:
            return {}
        f = self.manifest.factor
        if not any(name.startswith("features_") for name in encoded):
            image = Cropped(style, Tile(*(f * side for side in tile))).read(0, f * tile.height)
            encoded = run(self._sessions["encoder"], {"image": image.contiguous()})
        features = {name: tensor for name, tensor in encoded.items() if name.startswith("features_")}
        return {**features, "cfw_weight": torch.full((1,), self.cfw_weight(config))}


@contextmanager
def one_host_thread(wanted: bool) -> Iterator[None]:
    """Let torch work in this thread alone.

    Its threads spin for a while after each operation, and take the processor from an engine that has threads of its
    own. What is left to torch beside an engine is little.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)


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
