"""A user study as in the paper (figure 8): blind and random, with two questions, and the shares of each method.

A study is a private folder: `study.json`, copies of all pictures, and `votes.csv` with a row for each vote.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pfstorer_rt import checks
from pfstorer_rt.errors import BadFileError, SettingError, one_line
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import atomic_write, home, inside, is_name, make_folder, open_plain, show_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

QUESTIONS = {
    "quality": "Which picture has the best quality?",
    "identity": "Which picture looks most like the person?",
}
"""Question -> its text. The paper asks for quality and for identity."""
COLUMNS = ("time", "rater", "picture", "question", "method", "shown")
"""Columns of `votes.csv`; `shown` is the order of the methods on the page of the rater."""
CONFIDENCE = 0.95
_LARGEST_VOTES = 1 << 26
"""Bytes of `votes.csv`. A vote has about 100 bytes, and raters need only the code of the study."""
_ENCODING = "utf-8", "surrogateescape"
"""Encoding of `votes.csv`; names of pictures may contain bytes that are not text."""
_METHODS = (2, 8)
"""Smallest and largest number of methods."""


@dataclass(frozen=True)
class Study:
    """A study: its folder, its code, and what is compared."""

    folder: Path
    code: str
    methods: tuple[str, ...]
    pictures: tuple[str, ...]
    """Names of the pictures; every method has one of each name."""
    references: int = 0
    """Number of reference photographs of the person."""

    def picture(self, method: str, picture: str) -> Path:
        """Return the file of a method's result."""
        return self.folder / f"method_{self.methods.index(method)}" / f"{self.pictures.index(picture)}.png"

    def reference(self, number: int) -> Path:
        """Return the file of a reference photograph."""
        return self.folder / "references" / f"{number}.png"


@dataclass(frozen=True)
class Trial:
    """One picture as a rater sees it."""

    picture: str
    shown: tuple[str, ...]
    """The methods in the order of the page; the rater sees no names."""


@dataclass(frozen=True)
class Share:
    """How often raters chose a method."""

    question: str
    method: str
    votes: int
    of: int
    """Number of votes on this question."""
    share: float
    low: float
    high: float
    """Clopper-Pearson interval of the share, 95 %."""


def studies_dir() -> Path:
    """Return the folder of all studies, in the user's data directory."""
    return home() / "studies"


def create_study(results: Mapping[str, Mapping[str, Path]], references: Sequence[Path] = ()) -> Study:
    """Copy pictures into a new study in the user's data directory; returns the study.

    results: method -> name of a picture -> file. Pictures that a method lacks are left out. references: photographs of
    the person. Pictures are written as PNG without metadata, because metadata may name the method. Raises
    `SettingError` for fewer than 2 or more than 8 methods, and for methods without a common picture.
    """
    least, most = _METHODS
    if not least <= len(results) <= most:
        raise SettingError(f"{len(results)} methods: expected {least} to {most}")
    pictures = sorted(set.intersection(*(set(own) for own in results.values())))
    if not pictures:
        raise SettingError("the methods have no picture of the same name; rename the files so that their names agree")
    code = secrets.token_hex(8)
    study = Study(studies_dir() / code, code, tuple(results), tuple(pictures), len(references))
    make_folder(study.folder, private=True)
    try:
        for method, own in results.items():
            for picture in pictures:
                _copy(own[picture], study.picture(method, picture))
        for number, file in enumerate(references):
            _copy(file, study.reference(number))
        description = {key: value for key, value in asdict(study).items() if key != "folder"}
        with atomic_write(study.folder / "study.json", mode=0o600) as file_:
            file_.write(json.dumps(description, indent=2).encode())
    except BaseException:
        shutil.rmtree(study.folder, ignore_errors=True)
        raise
    return study


def _copy(source: Path, target: Path) -> None:
    from pfstorer_rt.imaging.files import load_image, save_image

    make_folder(target.parent, private=True)
    save_image(target, load_image(source).pixels)


def open_study(code: str) -> Study:
    """Open a study of the user's data directory; raises `BadFileError` for an unknown code or a damaged file."""
    unknown = BadFileError("no study has this code; check the link")
    if not is_name(code):
        raise unknown
    folder = inside(studies_dir(), code)
    try:
        entry = checks.read_json((folder / "study.json").read_text(), 1 << 20)
        methods, pictures = tuple(entry["methods"]), tuple(entry["pictures"])
        checks.list_of(checks.text(200), 100)(entry["methods"], "methods")
        # File names may contain bytes that are not text.
        checks.list_of(checks.text(1000, r"[^\0]*"), 10_000)(entry["pictures"], "pictures")
        checks.whole(0, 1000)(entry["references"], "references")
    except OSError as error:
        raise unknown from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadFileError(f"{show_path(folder)}: the description of this study is damaged; delete it") from error
    return Study(folder, code, methods, pictures, entry["references"])


def list_studies() -> list[Study]:
    """Return all readable studies, the newest first."""
    folders = sorted(studies_dir().glob("*/study.json"), key=lambda file: -file.stat().st_mtime)
    found = []
    for file in folders:
        try:
            found.append(open_study(file.parent.name))
        except BadFileError:
            continue
    return found


def delete_study(code: str) -> None:
    """Delete a study with its pictures and votes."""
    shutil.rmtree(open_study(code).folder)


def trials(study: Study, rater: str) -> list[Trial]:
    """Return the pictures in the order of a rater: the same for the same rater, random otherwise."""
    seed = hashlib.sha256(f"{study.code} {rater}".encode()).digest()
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(study.pictures))
    return [
        Trial(study.pictures[i], tuple(study.methods[k] for k in rng.permutation(len(study.methods)))) for i in order
    ]


def record_vote(study: Study, rater: str, trial: Trial, question: str, method: str) -> None:
    """Append a vote to `votes.csv`; several raters may vote at once, also from several processes.

    Raises `SettingError` for an unknown question or method, a rater that is no plain name, and for a study with too
    many votes.
    """
    if question not in QUESTIONS or method not in study.methods or not is_name(rater):
        raise SettingError(f"vote of {rater[:80]!r} for {method[:80]!r}: not a vote of this study")
    text = io.StringIO()
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    csv.writer(text).writerow((moment, rater, trial.picture, question, method, " | ".join(trial.shown)))
    path = study.folder / "votes.csv"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size > _LARGEST_VOTES:
            raise SettingError("this study has too many votes; delete it and begin another one")
        head = "" if size else ",".join(COLUMNS) + "\r\n"
        os.write(descriptor, (head + text.getvalue()).encode(*_ENCODING))  # one write: a row is complete or missing
    finally:
        os.close(descriptor)


def read_votes(study: Study) -> list[dict[str, str]]:
    """Return the votes; the last vote of a rater on a picture and question replaces earlier ones.

    Rows that are no votes of this study are left out: the file can be edited by hand. Raises `BadFileError` for a file
    that is no CSV table.
    """
    path = study.folder / "votes.csv"
    if not path.is_file():
        return []
    known = {"method": study.methods, "picture": study.pictures, "question": QUESTIONS}
    try:
        with open_plain(path) as file:
            text = file.read(2 * _LARGEST_VOTES).decode(*_ENCODING)
        rows = [
            row
            for row in csv.DictReader(io.StringIO(text, newline=""))
            if is_name(row.get("rater")) and all(row.get(column) in values for column, values in known.items())
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise BadFileError(f"{show_path(path)}: cannot be read ({one_line(error)}); correct or delete it") from error
    return list({(row["rater"], row["picture"], row["question"]): row for row in rows}.values())


def shares(study: Study) -> list[Share]:
    """Return the share of every method for both questions, with Clopper-Pearson intervals.

    The interval takes votes as independent; votes of one rater are not quite. Raises `MissingBackendError` without
    SciPy.
    """
    votes, found = read_votes(study), []
    for question in QUESTIONS:
        own = [vote["method"] for vote in votes if vote["question"] == question]
        for method in study.methods:
            count = own.count(method)
            low, high = interval(count, len(own))
            found.append(Share(question, method, count, len(own), count / len(own) if own else 0.0, low, high))
    return found


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share, (0, 1) without votes."""
    if not total:
        return 0.0, 1.0
    with needed_by("a confidence interval", "studio"):
        from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(CONFIDENCE, "exact")
    return float(found.low), float(found.high)
