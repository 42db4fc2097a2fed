"""`compare_plan`: compare a finished plan with PyTorch, on every backend that runs it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.session import BACKENDS, Session, open_session
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import MissingBackendError, ParityError, PFStorerError
from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.files import from_tensor
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import psnr
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import Component, components
from pfstorer_rt.plan import Plan
from pfstorer_rt.runtime.restorer import Restorer

from .build import resolve
from .parity import probe_inputs, probe_tiles

LEAST_PSNR = {"fp32": 45.0, "fp16": 45.0, "int8": 40.0}
"""Smallest allowed PSNR in dB of a restored image against PyTorch, by the precision of the plan."""
IDENTICAL = 120.0
"""PSNR in dB of identical images."""

Row = dict[str, Any]
Open = Callable[[str], Session]
EXACT = {"openvino": "CPU:f32"}
"""Providers that compute in the precision of the graph, for backends that default to a lower one."""


class SessionRunner(BaseRunner):
    """One component on one backend, for polygraphy's comparator."""

    def __init__(self, name: str, session: Session, feed: dict[str, HostArray]) -> None:
        super().__init__(name=name)
        self.session, self.feed = session, feed

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and numbers of axes of the feed; all sizes are free."""
        metadata = TensorMetadata()
        for name in self.session.inputs:
            metadata.add(name, dtype=self.feed[name].dtype, shape=(None,) * self.feed[name].ndim)
        return metadata

    def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
        """Run the session."""
        started = perf_counter()
        outputs = self.session.run(**{name: feed_dict[name] for name in self.session.inputs})
        self.inference_time = perf_counter() - started
        return {name: np.ascontiguousarray(array) for name, array in outputs.items()}


def compare_plan(plan: Plan, identity: str | Path | Identity | None, base: str | Path | Base | None) -> list[Row]:
    """Compare a plan with its base and identity in PyTorch fp32, and its backends with each other.

    Returns one row for each component, kind of tile and pair of backends: largest and mean absolute difference,
    cosine distance, whether all values are finite; then one row for each kind of tile and backend with the PSNR in dB
    of the restored image against PyTorch's. Raises `MissingBackendError` when no backend here runs the plan.
    """
    loaded, identity = resolve(identity, base)
    loaded = loaded.copy().to("cpu", torch.float32)  # a base object is not changed
    backends, refused = _openers(plan)
    if not backends:
        raise MissingBackendError(f"nothing here runs this {plan.manifest.target} plan: {'; '.join(refused)}")
    originals, rows = open_sessions(loaded, identity), []
    for component in components(loaded, identity).values():
        sessions: dict[str, Session] = {"torch": originals[component.name]}
        sessions |= {name: open_component(component.name) for name, open_component in backends.items()}
        rows += _compare_component(component, sessions)
    return rows + _compare_images(plan, loaded, identity, list(backends))


def _openers(plan: Plan) -> tuple[dict[str, Open], list[str]]:
    found: dict[str, Open] = {}
    refused = []
    for name in BACKENDS:
        try:
            with open_session(plan, "encoder", name, EXACT.get(name)):
                found[name] = lambda component, name=name: open_session(plan, component, name, EXACT.get(name))  # type: ignore[misc]
        except MissingBackendError as error:
            refused.append(str(error))
    return found, refused


def _compare_component(component: Component, sessions: dict[str, Session]) -> list[Row]:
    probes = probe_inputs(component)
    feeds = [{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in probes.values()]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run([SessionRunner(n, s, feeds[0]) for n, s in sessions.items()], data_loader=feeds)
    outputs = {name: [dict(iteration.items()) for iteration in found] for name, found in results.items()}
    return [
        {"component": component.name, "tile": tile, "pair": f"{one} / {other}", **differences(first, second)}
        for one, other in combinations(sessions, 2)
        for tile, first, second in zip(probes, outputs[one], outputs[other], strict=True)
    ]


def differences(found: Mapping[str, HostArray], expected: Mapping[str, HostArray]) -> Row:
    """Compare outputs by name; returns `finite` (all values of both), `max` and `mean` absolute difference and
    `cosine_distance`, each for the worst output."""
    pairs = [[outputs[name].astype(np.float64).ravel() for outputs in (found, expected)] for name in expected]
    return {
        "finite": all(bool(np.isfinite(array).all()) for pair in pairs for array in pair),
        "max": max(float(np.abs(a - b).max()) for a, b in pairs),
        "mean": max(float(np.abs(a - b).mean()) for a, b in pairs),
        "cosine_distance": max(1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs),
    }


def _compare_images(plan: Plan, base: Base, identity: Identity | None, backends: list[str]) -> list[Row]:
    tiles = {name: from_tensor(image) for name, image in probe_tiles(base.config.tile).items()}
    with Restorer.from_base(base, identity, device="cpu") as restorer:
        expected = {name: restorer.restore(pixels) for name, pixels in tiles.items()}
    rows = []
    for backend in backends:
        with Restorer.from_plan(plan.path, backend, trust=plan.trusted, provider=EXACT.get(backend)) as restorer:
            for name, pixels in tiles.items():
                try:
                    finite, decibels = True, agreement(restorer.restore(pixels), expected[name])
                except PFStorerError:  # raised for an image with values that are not finite
                    finite, decibels = False, 0.0
                rows.append(
                    {
                        "component": "image",
                        "tile": name,
                        "pair": f"torch / {backend}",
                        "finite": finite,
                        "psnr": round(decibels, 2),
                    }
                )
    return rows


def agreement(found: Pixels, expected: Pixels) -> float:
    """Return the PSNR in dB of two images (H, W, 3) in [0, 1], at most 120."""
    return min(psnr(found, expected), IDENTICAL)


def check_rows(rows: list[Row], precision: str = "fp32") -> None:
    """Raise `ParityError` for a value that is not finite, and for a restored image below `LEAST_PSNR`.

    Pure noise is not checked in int8, because its ranges are measured on photographs.
    """
    least = LEAST_PSNR[precision]
    judged = [r for r in rows if precision != "int8" or r["tile"] != "noise"]
    wrong = [f"{r['component']} on {r['tile']} ({r['pair']}) is not finite" for r in rows if not r["finite"]]
    wrong += [
        f"the restored {r['tile']} tile agrees to {r['psnr']} dB ({r['pair']}), expected {least}"
        for r in judged
        if r.get("psnr", least) < least
    ]
    if wrong:
        raise ParityError("; ".join(wrong) + "; export with precision fp32", setting="precision")
