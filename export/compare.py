"""`compare_plan`: a finished plan against PyTorch, on every backend that runs it here (polygraphy's comparator)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from pfstorer_rt.engine.session import BACKENDS, Array, Session, open_session
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import MissingBackendError, ParityError, PFStorerError
from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.files import from_tensor
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import psnr
from pfstorer_rt.models.base import Base
from pfstorer_rt.plan import COMPONENTS, Plan
from pfstorer_rt.runtime.restorer import Restorer

from .build import resolve
from .parity import probe_inputs, probe_tiles

LEAST_PSNR = {"fp32": 45.0, "fp16": 45.0, "int8": 40.0}
"""dB that a restored picture has to agree with PyTorch's to, by the plan's precision."""
IDENTICAL = 120.0
"""dB written for pictures without a difference."""

Row = dict[str, Any]
Open = Callable[[str], Session]
EXACT = {"openvino": "CPU:f32"}
"""Providers that compute in the precision of the graph, for backends that would choose a lower one."""


class SessionRunner(BaseRunner):
    """One component of one backend, as polygraphy's comparator wants it."""

    def __init__(self, name: str, session: Session, feed: dict[str, Array]) -> None:
        super().__init__(name=name)
        self.session, self.feed = session, feed

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and numbers of axes, as in the feed: all sizes are free."""
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
    """Compare a plan with the base and identity it was made of, in PyTorch fp32, and its backends with each other.

    Returns one row for each component, kind of tile and pair of backends: largest and mean absolute difference,
    cosine distance, whether all values are finite; then one row for each kind of tile and backend with the PSNR in dB
    of the restored picture against PyTorch's. Raises `MissingBackendError` when nothing here runs the plan.
    """
    base, identity = resolve(identity, base)
    base.to("cpu", torch.float32)
    backends, refused = _openers(plan)
    if not backends:
        raise MissingBackendError(f"nothing here runs this {plan.manifest.target} plan: {'; '.join(refused)}")
    originals = open_sessions(base, identity)
    rows: list[Row] = []
    for component in COMPONENTS:
        sessions: dict[str, Session] = {"torch": originals[component]}
        sessions |= {name: open_component(component) for name, open_component in backends.items()}
        probes = probe_inputs(component, base, "strength" in originals[component].inputs)
        rows += _compare_component(component, sessions, probes)
    return rows + _compare_pictures(plan, base, identity, list(backends))


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


def _compare_component(
    component: str, sessions: dict[str, Session], probes: dict[str, dict[str, torch.Tensor]]
) -> list[Row]:
    feeds = [{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in probes.values()]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        runners = [SessionRunner(name, session, feeds[0]) for name, session in sessions.items()]
        results = Comparator.run(runners, data_loader=feeds)
        pairs = list(combinations(range(len(sessions)), 2))
        differences, cosines = (
            Comparator.compare_accuracy(results, compare_func=function, comparisons=pairs)
            for function in (SimpleCompareFunc(check_error_stat="max"), CosineSimilarityCompareFunc())
        )
    outputs = {name: [dict(i.items()) for i in iterations] for name, iterations in results.items()}
    rows = []
    for pair, iterations in differences[0].items():
        for i, (tile, by_output) in enumerate(zip(probes, iterations, strict=True)):
            finite = all(np.isfinite(a).all() for name in pair for a in outputs[name][i].values())
            angles = cosines[0][pair][i]
            rows.append(
                {
                    "component": component,
                    "tile": tile,
                    "pair": " / ".join(pair),
                    "finite": bool(finite),
                    "max": max(float(r.max_absdiff) for r in by_output.values()),
                    "mean": max(float(r.mean_absdiff) for r in by_output.values()),
                    "cosine_distance": max(1 - float(angles[name].cosine_similarity) for name in by_output),
                }
            )
    return rows


def _compare_pictures(plan: Plan, base: Base, identity: Identity | None, backends: list[str]) -> list[Row]:
    tiles = {name: from_tensor(image) for name, image in probe_tiles(base.config.tile).items()}
    with Restorer.from_base(base, identity, device="cpu") as restorer:
        expected = {name: restorer.restore(pixels) for name, pixels in tiles.items()}
    rows = []
    for backend in backends:
        with Restorer.from_plan(plan.path, backend, trust=plan.trusted, provider=EXACT.get(backend)) as restorer:
            for name, pixels in tiles.items():
                try:
                    finite, decibels = True, agreement(restorer.restore(pixels), expected[name])
                except PFStorerError:  # a picture that is not finite is refused
                    finite, decibels = False, 0.0
                rows.append(
                    {
                        "component": "picture",
                        "tile": name,
                        "pair": f"torch / {backend}",
                        "finite": finite,
                        "psnr": round(decibels, 2),
                    }
                )
    return rows


def agreement(found: Pixels, expected: Pixels) -> float:
    """Return the PSNR in dB of two pictures (H, W, 3) in [0, 1], at most 120."""
    return min(psnr(found, expected), IDENTICAL)


def check_rows(rows: list[Row], precision: str = "fp32") -> None:
    """Raise `ParityError` for a value that is not finite, and for a picture that agrees with less than `LEAST_PSNR`.

    What int8 makes of pure noise is not judged: its ranges are those of photographs.
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
        raise ParityError("; ".join(wrong) + "; export with --precision fp32")
