"""How alike two faces are, in words: the reading of dlib's distances for a person without technical knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pfstorer_rt.faces.dlib import SAME_PERSON

VERY_LIKELY = 0.45
"""Largest distance of `very likely the same person`; photographs of one person taken alike are usually within it."""
LOST = 0.03
"""Growth of the distance by which the likeness counts as lower than in the input image."""
OTHER_SETTINGS = "try another strength, number of steps or seed"
"""What the user can do about it."""
Level = Literal["good", "fair", "poor", "unknown"]


@dataclass(frozen=True)
class Likeness:
    """A reading of the distance of a result to the reference photographs."""

    level: Level
    text: str
    """One sentence, with advice where the likeness is low."""
    distance: float | None
    """Mean distance of the face embeddings; None without a face."""


def read_likeness(after: float | None, before: float | None = None) -> Likeness:
    """Return the reading of a result.

    after, before: mean distance of the result and of the input image to the references; None without a face.
    """
    if after is None:
        return Likeness("unknown", "No face was found in the result, so the likeness cannot be measured.", None)
    if before is not None and after > before + LOST and after > VERY_LIKELY:
        text = f"The likeness is lower than in the input: {OTHER_SETTINGS}."
        return Likeness("poor", text, after)
    if after <= VERY_LIKELY:
        return Likeness("good", "Very likely the same person.", after)
    if after <= SAME_PERSON:
        return Likeness("fair", "Probably the same person.", after)
    return Likeness(
        "poor", "The face differs from the photographs: try a higher strength or better photographs.", after
    )
