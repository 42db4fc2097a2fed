"""PFStorer runtime: personalized face restoration. Names are imported on first use, so `import pfstorer_rt` is instant.

The imports under `TYPE_CHECKING` tell type checkers and editors what each name is. `_MODULES` tells Python where to
find it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as in `typing`, whose import takes most of the time before the command line handles Ctrl-C
if TYPE_CHECKING:
    from pfstorer_rt.config import PersonalizeConfig as PersonalizeConfig
    from pfstorer_rt.config import RestoreConfig as RestoreConfig
    from pfstorer_rt.config import TileConfig as TileConfig
    from pfstorer_rt.config import TrainConfig as TrainConfig
    from pfstorer_rt.degradation.degrade import degrade as degrade
    from pfstorer_rt.engine.session import Session as Session
    from pfstorer_rt.engine.session import open_session as open_session
    from pfstorer_rt.errors import PFStorerError as PFStorerError
    from pfstorer_rt.evaluation.folders import evaluate as evaluate
    from pfstorer_rt.identity import Identity as Identity
    from pfstorer_rt.models.base import Base as Base
    from pfstorer_rt.models.base import load_base as load_base
    from pfstorer_rt.plan import Plan as Plan
    from pfstorer_rt.runtime.batch import BatchConfig as BatchConfig
    from pfstorer_rt.runtime.batch import restore_files as restore_files
    from pfstorer_rt.runtime.restorer import Restorer as Restorer
    from pfstorer_rt.training.personalize import personalize as personalize

# GNU OpenMP, which PyTorch uses on Linux, reads this when it is loaded. A thread that waits for another one spins for
# this number of rounds before it sleeps. The default is millions of rounds: on a machine with another busy process, the
# spinning threads take the processor time of the thread for which they wait. With 1,000 rounds, threads that are needed
# again at once already sleep, and a training takes a quarter longer on an idle machine (benchmarks/busy.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# ONNX Runtime reads this when it is loaded. Its builds with telemetry would write events to the user's cache folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "Base": "pfstorer_rt.models.base",
    "BatchConfig": "pfstorer_rt.runtime.batch",
    "Identity": "pfstorer_rt.identity",
    "PFStorerError": "pfstorer_rt.errors",
    "PersonalizeConfig": "pfstorer_rt.config",
    "Plan": "pfstorer_rt.plan",
    "RestoreConfig": "pfstorer_rt.config",
    "Restorer": "pfstorer_rt.runtime.restorer",
    "Session": "pfstorer_rt.engine.session",
    "TileConfig": "pfstorer_rt.config",
    "TrainConfig": "pfstorer_rt.config",
    "degrade": "pfstorer_rt.degradation.degrade",
    "evaluate": "pfstorer_rt.evaluation.folders",
    "load_base": "pfstorer_rt.models.base",
    "open_session": "pfstorer_rt.engine.session",
    "personalize": "pfstorer_rt.training.personalize",
    "restore_files": "pfstorer_rt.runtime.batch",
}
__all__ = sorted(_MODULES)

if not TYPE_CHECKING:  # a type checker would accept every name of a module that has this function

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'pfstorer_rt' has no attribute {name!r}")
        from importlib import import_module

        from pfstorer_rt.extras import needed_by

        with needed_by(name, {"degrade": "torch", "evaluate": "metrics"}.get(name, "train")):
            return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
