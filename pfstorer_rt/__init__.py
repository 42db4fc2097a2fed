"""PFStorer runtime: personalized face restoration. Names are resolved on first use, so importing is instant."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "load_base": "pfstorer_rt.models.base",
    "Base": "pfstorer_rt.models.base",
    "Identity": "pfstorer_rt.identity",
    "personalize": "pfstorer_rt.training.personalize",
    "TrainConfig": "pfstorer_rt.config",
    "PersonalizeConfig": "pfstorer_rt.config",
    "RestoreConfig": "pfstorer_rt.config",
    "TileConfig": "pfstorer_rt.config",
    "Restorer": "pfstorer_rt.runtime.restorer",
    "Plan": "pfstorer_rt.plan",
    "open_session": "pfstorer_rt.engine.session",
    "Session": "pfstorer_rt.engine.session",
    "degrade": "pfstorer_rt.degradation.degrade",
    "evaluate": "pfstorer_rt.evaluation.folders",
    "PFStorerError": "pfstorer_rt.errors",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pfstorer_rt' has no attribute {name!r}")
    from pfstorer_rt.extras import needed_by

    with needed_by(name):
        return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
