"""Parity: an exported component has to compute what its PyTorch original computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pfstorer_rt.engine.session import Session
from pfstorer_rt.errors import ParityError

LIMIT = {"fp32": 1e-4}
"""Largest absolute difference allowed, in units of the output's standard deviation."""


@torch.no_grad()
def measure(original: nn.Module, session: Session, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare a session with the module it was made from, on one set of inputs.

    Returns `max_abs` (largest absolute difference), `std` (of the original's output) and `relative`
    (their ratio); the worst output counts. A value that is not finite makes `relative` infinite.
    """
    result = original(*(inputs[name] for name in session.inputs))
    expected = result if isinstance(result, tuple) else (result,)
    found = session.run(**{name: inputs[name].numpy() for name in session.inputs})
    worst = {"max_abs": 0.0, "std": 0.0, "relative": 0.0}
    for name, tensor in zip(session.outputs, expected, strict=True):
        reference, output = tensor.double().numpy(), found[name].astype(np.float64)
        difference = float(np.abs(output - reference).max())
        spread = float(reference.std())
        relative = difference / max(spread, 1e-12) if np.isfinite(difference) else float("inf")
        if relative >= worst["relative"]:
            worst = {"max_abs": difference, "std": spread, "relative": relative}
    return worst


def check(component: str, figures: dict[str, float], precision: str) -> None:
    """Raise `ParityError` when `measure`'s figures are over the precision's limit."""
    limit = LIMIT[precision]
    if not figures["relative"] <= limit:
        raise ParityError(
            f"{component}: the exported graph differs from PyTorch by {figures['relative']:.2e} of the output's "
            f"deviation; at most {limit:.0e} is allowed at {precision}; no plan was written"
        )
