"""The restorer: an image of any size through encoder, tiled diffusion, decoder and colour fix (StableSR 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from pfstorer_rt.arrays import Array
from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.diffusion import SAMPLERS, denoise_by, respace, start_from_lq
from pfstorer_rt.engine.session import Session, choose_backend
from pfstorer_rt.errors import BadFileError, MismatchError, SettingError
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import show_path
from pfstorer_rt.identity import Identity, identities_dir, identity_path, list_identities
from pfstorer_rt.imaging.bands import ColorFixed, Cropped, Padded, Result
from pfstorer_rt.imaging.color import ColorFix
from pfstorer_rt.imaging.rows import (
    Pixels,
    Rows,
    Spool,
    check_pixels,
    check_temporary_space,
    from_pixels,
    read_whole,
    to_pixels,
)
from pfstorer_rt.imaging.shown import shown_to_networks
from pfstorer_rt.imaging.tone import Shown
from pfstorer_rt.plan import COMPONENTS, DEFAULT_BASE, Manifest, Plan
from pfstorer_rt.runtime.coarse import Guided, Passes, choose_scale, may_be_coarse, on_canvas, reduced_to
from pfstorer_rt.runtime.layout import CodecTiles, Layout
from pfstorer_rt.runtime.memory import run_codec
from pfstorer_rt.runtime.part import Inserted, Part, Predict, base_layout, blended, find_part, recorded
from pfstorer_rt.runtime.recipe import Recipe
from pfstorer_rt.runtime.scratches import without_scratches
from pfstorer_rt.runtime.selection import Mixed, Selection
from pfstorer_rt.runtime.tiled_networks import Codec, Done, TiledDenoiser, crop
from pfstorer_rt.tiling import Tile, blend_by_rows, ramp_weights

if TYPE_CHECKING:
    from pfstorer_rt.models.base import Base

Step = Callable[[int, int], None]
"""step(done, total), called after each batch of tiles; total counts all tiles through all networks and steps."""

RestoreSquare = Callable[[Rows, Layout, Tile, Done], Rows]
"""restore(style, layout, square, done): the result of one square; style: its pixels."""


class Restorer:
    """Restores images with one engine; a context manager that frees the engine, as `close` does.

    Attributes: `manifest`, the description of the engine; `sessions`, its open components by name; `backend`, the
    library that runs them; `provider`, the device or execution provider of this library; `note`, the reason why a GPU
    that exists is not used, or None.
    """

    def __init__(
        self, manifest: Manifest, sessions: Mapping[str, Session], backend: str, note: str | None = None
    ) -> None:
        self.manifest, self.backend, self.note = manifest, backend, note
        self._stack = ExitStack()
        self._sessions = {name: self._stack.enter_context(session) for name, session in sessions.items()}
        self.provider = self.sessions["denoiser"].provider

    @property
    def sessions(self) -> dict[str, Session]:
        """Return the open components by name; raises `SettingError` after `close`."""
        if not self._sessions:
            raise SettingError("this restorer is closed; open the plan or the base again")
        return self._sessions

    @classmethod
    def from_plan(
        cls,
        path: str | Path,
        backend: str = "auto",
        base: str | Path | None = None,
        trust: bool = False,
        provider: str | None = None,
        attention: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        compiled: bool = False,
    ) -> Restorer:
        """Open a plan; with backend `torch`, open the plan's base and identity instead.

        trust: run a TensorRT plan, which is executable code, from any source. provider: the backend's name of a device
        or execution provider (`cpu`, `cuda`; for OpenVINO `CPU:f32`, `GPU`); None selects the best. attention, device,
        precision, compiled: with backend `torch`, as in `from_base`.
        Raises `BadFileError`, `MissingBackendError`, or `MismatchError` when `torch` cannot find base or identity.
        """
        plan = Plan.open(path, trust)
        if backend == "torch":
            found = _find_identity(plan.manifest)
            named = base or plan.manifest.base_name
            return cls.from_base(named, found, plan.manifest, device, attention, precision, compiled)
        plan.check_trusted()
        choice = choose_backend(backend, plan.manifest.target)
        sessions = {name: choice.open_component(plan, name, provider) for name in COMPONENTS}
        return cls(plan.manifest, sessions, choice.name)

    @classmethod
    def from_base(
        cls,
        base: Base | str | Path = DEFAULT_BASE,
        identity: str | Path | Identity | None = None,
        expected: Manifest | None = None,
        device: str = "auto",
        attention: str = "auto",
        precision: str = "auto",
        compiled: bool = False,
    ) -> Restorer:
        """Run a base (name, directory or loaded) and an identity in PyTorch, without a plan.

        A loaded base keeps its device and its kernels; the restorer shares its weights. device: `auto`, `cpu`, `cuda`
        or `cuda:N`; with `auto`, `note` is the reason why a GPU that exists is not used. attention: a backend of
        `pfstorer_rt.ops`. precision: `fp32`, `fp16`, or `auto` for fp16 on a GPU and fp32 on a CPU. compiled: compile
        the networks with Inductor at the first run of each shape.
        Raises `MissingBackendError` when the device or the attention cannot be used.
        Raises `MismatchError` when the identity or the expected manifest belongs to another base.
        """
        with needed_by("a base in PyTorch", "train"):
            if identity is not None and not isinstance(identity, Identity):
                identity = Identity.load(identity_path(identity))  # a foreign file is refused before the slow imports
            from pfstorer_rt.device import choose_device
            from pfstorer_rt.engine.torch import open_sessions
            from pfstorer_rt.models.base import Base, load_base
            from pfstorer_rt.models.components import manifest

        loaded = base if isinstance(base, Base) else load_base(base)
        if expected is not None and loaded.fingerprint != expected.base_fingerprint:
            raise MismatchError(
                f"the plan was made of base {expected.base_name!r} ({expected.base_fingerprint[:12]}), got base "
                f"{loaded.fingerprint[:12]}; open the plan's own base, or run the plan with another backend than torch"
            )
        choice = choose_device(device)
        sessions = open_sessions(loaded, identity, attention, choice.device, precision, compiled)
        return cls(manifest(loaded, identity), sessions, "torch", choice.refused)

    def __enter__(self) -> Restorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine; the end of a `with` block does this too."""
        self._sessions = {}
        self._stack.close()

    def restore(self, pixels: Pixels, config: RestoreConfig | None = None, step: Step | None = None) -> Pixels:
        """Restore one image.

        pixels: (H, W, 3) float32 in [0, 1], sRGB. Returns (round(H*scale), round(W*scale), 3) in [0, 1]; a grey image
        gives a grey result, and a sepia image a sepia result, unless `config.colorize` is set.
        Raises `ValueError` for other pixels and for a setting out of range, `PFStorerError` if the engine returns NaN.
        """
        check_pixels(pixels)
        source = self.prepared(Spool.of(from_pixels(pixels)), config)
        result = self.restore_rows(source, config, step)
        return to_pixels(read_whole(result))

    def restore_rows(
        self,
        source: Rows,
        config: RestoreConfig | None = None,
        step: Step | None = None,
        passes: Passes | None = None,
    ) -> Rows:
        """Restore an image by rows, so that memory depends on the size of a tile and not of the image.

        source: a `prepared` image. passes: the result of `passes` for the same image and settings; None computes it.
        The networks have finished when this returns. Colour fix and resizing run while rows are read from the result,
        which raises `PFStorerError` for values that are not finite. Raises `PFStorerError` before the first tile if the
        disk has too little space for the temporary files of a large image.
        Latents stay in memory: about 32 * channels / factor^2 bytes per pixel.
        """
        plan = passes or self.passes(source, config)
        check_temporary_space(plan.temporary_bytes)
        shown, back, again = Shown(source) if plan.fine.recipe.colorize else shown_to_networks(source)
        passed = 0

        def done(n: int) -> None:
            nonlocal passed
            passed += n
            if step:
                step(min(passed, plan.total), plan.total)  # tiles that are repeated with less memory count again

        images: Sequence[Rows] = [on_canvas(shown, plan.fine.canvas)]
        if plan.coarse is not None:
            canvas = plan.coarse.canvas
            coarse = self._restore_selected([on_canvas(shown, canvas)], plan.coarse, plan.selection, again, done)
            images = [Guided(images[0], rows, reduced_to(shown, canvas)) for rows in coarse]
        return self._restore_selected(images, plan.last, plan.selection, back, done)[-1]

    def prepared(self, source: Rows, config: RestoreConfig | None = None) -> Rows:
        """Return an image as `restore_rows` takes it: without scratches, if they are to be removed."""
        return without_scratches(source) if config and config.remove_scratches else source

    def passes(self, source: Rows, config: RestoreConfig | None = None) -> Passes:
        """Return the passes of an image; with coarse to fine, the scale of the first depends on the largest face."""
        fine = self.layout(source.height, source.width, config)
        choice = choose_scale(source, fine, self.manifest.tile)
        if choice.scale is None:
            return Passes(fine)
        first = replace(config or RestoreConfig(), scale=choice.scale)
        return Passes(fine, self.layout(source.height, source.width, first), choice.notes, limit=choice.limit)

    def needs_content(self, height: int, width: int, config: RestoreConfig | None = None) -> bool:
        """Whether `passes` depends on the content of an image of height x width pixels."""
        return may_be_coarse(self.layout(height, width, config), self.manifest.tile)

    def recipe(self, config: RestoreConfig | None = None) -> Recipe:
        """Return all settings with this engine's defaults; raises `ValueError` for a setting that does not fit it."""
        return Recipe.resolve(config or RestoreConfig(), self.manifest, self.sessions["denoiser"].tile_batch)

    def layout(self, height: int, width: int, config: RestoreConfig | None = None) -> Layout:
        """Return the canvas and the tiles of an image of height x width pixels; raises the errors of `recipe`."""
        variational = "std" in self.sessions["encoder"].outputs
        return Layout.of(height, width, self.recipe(config), self.manifest, variational)

    def _restore_selected(
        self,
        images: Sequence[Rows],
        layout: Layout,
        selection: Selection | None,
        back: Callable[[Rows], Rows],
        done: Done,
    ) -> list[Rows]:
        """Restore an image in one pass; returns the result, after the result of the base if there is a selection.

        images: the image, or one for the base and one for the identity.
        """
        if selection is None:
            return [self._restore_pass(images[-1], layout, back, self._restore_square, done)]
        traces: dict[Tile, list[Array]] = {square: [] for square in layout.squares}

        def by_base(style: Rows, layout: Layout, square: Tile, done: Done) -> Rows:
            return self._restore_square(style, layout, square, done, partial(recorded, predictions=traces[square]))

        def by_identity(style: Rows, layout: Layout, square: Tile, done: Done) -> Rows:
            part, trace = find_part(layout, square, selection), traces.pop(square)
            return self._restore_part(style, part, trace, done) if part else style

        base = self._restore_pass(images[0], base_layout(layout), back, by_base, done)
        person = self._restore_pass(images[-1], layout, back, by_identity, done)
        return [base, Mixed(base, person, selection)]

    def _restore_pass(
        self, image: Rows, layout: Layout, back: Callable[[Rows], Rows], restore: RestoreSquare, done: Done
    ) -> Rows:
        """Restore an image of the size of a canvas without its padding; back: gives the result its hue.

        Several squares are restored from the same seed each, and blended (StableSR's tiled inference script).
        """
        style, squares = Padded(image, layout.canvas), layout.squares
        restored: Rows
        if len(squares) == 1:
            restored = restore(style, layout, squares[0], done)
        else:
            restored = Spool(style.height, style.width)
            patches = (read_whole(restore(Cropped(style, s), layout, s, done)) for s in squares)
            for start, rows in blend_by_rows(squares, patches, style.height, style.width):
                restored.write(start, rows)
        complaint = f"{self.backend} returned values that are not finite; use another backend"
        return Result(back(restored), layout.canvas, complaint)

    def _restore_part(self, style: Rows, part: Part, trace: Sequence[Array], done: Done) -> Rows:
        """Restore the part of a square on which the identity acts; trace: the predictions of the base."""
        weights = self.sessions["denoiser"].place(part.weights)
        follow = partial(blended, predictions=trace, part=part, weights=weights)
        cropped = Cropped(style, part.pixels)
        restored = self._restore_square(cropped, part.layout, part.layout.squares[0], done, follow, part)
        return Inserted(style, restored, part.pixels)

    def _restore_square(
        self,
        style: Rows,
        layout: Layout,
        square: Tile,
        done: Done,
        changed: Callable[[Predict], Predict] = lambda predict: predict,
        part: Part | None = None,
    ) -> Rows:
        """Encode, sample on one field of noise, decode, fix colours.

        changed: maps the function of the denoiser's predictions to the function that the sampler calls. part: `style`
        is this part of a square; it has the noise of its place in the square.
        """
        recipe, schedule, session = layout.recipe, self.manifest.schedule, self.sessions["denoiser"]
        codec = Codec(self.sessions["encoder"], self.sessions["decoder"], layout.codec, self.manifest.factor)
        encoded, tiles = run_codec(layout.codec, lambda t: codec._replace(tiles=t).encode(style, done))
        z_lq, generator = encoded.latents["mean"], np.random.Generator(np.random.Philox(recipe.seed))
        whole = Tile(0, 0, *z_lq.shape[2:])
        field, place, inner = (part.square, part.place, part.inner) if part else (whole, whole, whole)

        def noise() -> Array:  # drawn on the host, so that a seed gives the same noise with every engine
            drawn = generator.standard_normal((*z_lq.shape[:2], field.height, field.width), np.float32)
            return session.place(crop(drawn, place))

        z_lq = session.place(z_lq)
        if "std" in encoded.latents:
            z_lq = z_lq + session.place(encoded.latents["std"]) * noise()
        first = noise()
        x = start_from_lq(z_lq, first, schedule) if recipe.init == "lq" else first
        denoiser = self._denoiser(layout)
        predict = changed(lambda x, t: denoiser(x, t, crop(z_lq, inner), done))
        denoise = denoise_by(predict, schedule, self.manifest.prediction_type)
        x = SAMPLERS[recipe.sampler](denoise, x, respace(recipe.steps), schedule, noise, recipe.eta)
        latent = session.fetch(x)

        def decode(tiles: CodecTiles) -> Spool:
            by_tiles = codec._replace(tiles=tiles)
            return by_tiles.decode(latent, by_tiles.features(style, encoded, recipe.cfw_weight), done)

        decoded, _ = run_codec(tiles, decode)
        automatic: ColorFix = "adain" if len(layout.tiles) == 1 else "wavelet"
        return ColorFixed(decoded, style, automatic if recipe.color_fix == "auto" else recipe.color_fix)

    def _denoiser(self, layout: Layout) -> TiledDenoiser:
        session, recipe = self.sessions["denoiser"], layout.recipe
        strength = np.full(1, recipe.strength, np.float32)
        fixed = {"strength": strength} if "strength" in session.inputs else {}
        weights = ramp_weights(layout.tiles) if recipe.mode == "fast" else None
        return TiledDenoiser(session, layout.tiles, weights, recipe.batch, fixed)


def _find_identity(manifest: Manifest) -> Identity | None:
    """Find the identity of a plan among the identities in the user's data directory."""
    if manifest.identity_name is None:
        return None
    for path in list_identities():
        with suppress(BadFileError):  # damaged, or encrypted with another passphrase
            identity = Identity.load(path)
            if identity.fingerprint == manifest.identity_fingerprint:
                return identity
    raise MismatchError(
        f"the plan's identity {manifest.identity_name!r} is not in {show_path(identities_dir())}; backend torch needs "
        "it, other backends do not",
        setting="backend",
    )
