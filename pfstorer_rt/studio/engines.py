"""The engine of the chosen person: a plan, or a base with an identity in PyTorch. One is open at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfstorer_rt.base_files import find_base, fingerprint_directory
from pfstorer_rt.errors import PFStorerError, SettingError
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import show_path
from pfstorer_rt.identity import Identity, kept_plan, list_identities, named_identity
from pfstorer_rt.plan import Plan
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.studio.config import StudioConfig
from pfstorer_rt.studio.plans import ensure_plan, find_plan
from pfstorer_rt.studio.work import Report

if TYPE_CHECKING:
    from pfstorer_rt.models.base import Base

NOBODY = "base"
"""Choice: the base without an identity."""


class Engines:
    """Opens the engine of a choice, and keeps it until another one is chosen."""

    def __init__(self, config: StudioConfig) -> None:
        self.config = config
        self._base: Base | None = None
        self._open: tuple[Any, Restorer] | None = None
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def base(self) -> Base:
        """Return the base; it is loaded once. Raises `MissingBackendError` without the extra `train`."""
        with self._loading:
            if self._base is None:
                with needed_by("a base in PyTorch", "train"):
                    from pfstorer_rt.models.base import load_base

                self._base = load_base(self.config.base)
            return self._base

    @cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of the base, without its networks; raises `BadFileError` for a damaged base."""
        return fingerprint_directory(find_base(self.config.base))

    def choices(self) -> list[tuple[str, str]]:
        """Return (label, choice) of the identities on this base, the plans, and the base alone."""
        found = [(f"{name}", f"identity:{name}") for name in self.people()]
        stems = [plan.stem for plan in self.config.plans]
        for number, plan in enumerate(self.config.plans):
            name = plan.stem if stems.count(plan.stem) == 1 else show_path(plan)
            found.append((f"{name} (plan)", f"plan:{number}"))
        return [*found, ("Anybody: without a learned person", NOBODY)]

    def people(self) -> list[str]:
        """Return the names of the readable identities that were learned on this base."""
        names = []
        for path in list_identities():
            try:
                if Identity.load(path, tensors=False).base_fingerprint == self.fingerprint:
                    names.append(path.stem)
            except PFStorerError:  # shown in the tab of people
                continue
        return names

    def plans(self) -> list[Path]:
        """Return the plans of the command, and the plans that the studio made for people."""
        made = [plan for name in self.people() if (plan := find_plan(name)) is not None]
        return [*self.config.plans, *made]

    def face(self, choice: str) -> list[float]:
        """Return the mean embedding of the face of a choice; empty if it has none. Raises `PFStorerError`."""
        kind, _, value = choice.partition(":")
        if kind == "plan":
            return Plan.open(self.given_plan(value)).manifest.face
        return Identity.load(named_identity(value)).face if kind == "identity" else []

    def prepare(self, choice: str, report: Report) -> str:
        """Make the plan of a person who has none; returns a note where that failed. Raises `CancelledError`."""
        kind, _, name = choice.partition(":")
        return ensure_plan(name, self.config.base, report) if kind == "identity" and name in self.people() else ""

    def given_plan(self, number: str) -> Path:
        """Return a plan of the command by its number in the choices; raises `SettingError` for another number."""
        if not number.isdecimal() or int(number) >= len(self.config.plans):
            raise SettingError(f"plan {number!r}: choose one of the list")
        return self.config.plans[int(number)]

    @contextmanager
    def use(self, choice: str) -> Iterator[Restorer]:
        """Yield the engine of a choice of `choices`; one call at a time. Raises the errors of `Restorer`."""
        with self._lock:
            yield self._restorer(choice)

    def close(self) -> None:
        """Free the open engine."""
        with self._lock:
            if self._open is not None:
                self._open[1].__exit__(None, None, None)
            self._open = None

    def _restorer(self, choice: str) -> Restorer:
        key = (choice, self._version(choice))
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None
        kind, _, value = choice.partition(":")
        if kind == "plan":
            restorer = Restorer.from_plan(self.given_plan(value))
        elif kind == "identity" and (plan := find_plan(value)) is not None:
            restorer = Restorer.from_plan(plan)
        elif kind == "identity":
            restorer = Restorer.from_base(self.base(), Identity.load(named_identity(value)))
        elif choice == NOBODY:
            restorer = Restorer.from_base(self.base())
        else:
            raise SettingError(f"person {choice!r}: choose one of the list")
        self._open = (key, restorer)
        return restorer

    def _version(self, choice: str) -> object:
        """Return a value that changes when the file of an identity or its plan is replaced."""
        if not choice.startswith("identity:"):
            return None
        path = named_identity(choice.partition(":")[2])
        return [file.stat().st_mtime_ns if file.is_file() else None for file in (path, kept_plan(path))]
