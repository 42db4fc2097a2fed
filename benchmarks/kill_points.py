"""Kill `personalize`, `export` and `restore` before each of their writes, run them again, and compare the files.

A write point is a file that is opened for writing, or a file or folder that is made, renamed or removed. A child
process runs the work and kills itself (SIGKILL) before its N-th write point, for N = 1, 2, ... until it finishes. After
every kill the output must be the old file or the new one. After the next run, all files must be those of a run that was
never killed. Needs Linux or macOS.

    python benchmarks/kill_points.py --output benchmarks/results/kill_points.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Work = Callable[[Path], None]
"""work(folder): the work of a command, with all its files in a new folder."""
Files = dict[str, bytes]

MAKES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Audit events of writes, besides `open`."""


def run(work: Work, folder: Path, point: int = 0) -> bool:
    """Run work in a child process that kills itself before a write point; returns whether the work finished.

    point: number of the write point, from 1; 0 never kills. Raises `RuntimeError` if the work fails.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.addaudithook(killing(f"{folder}", point))
            work(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the work failed before or after write point {point}")
    return status == 0


def killing(folder: str, point: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that kills the process before the write point `point` in a folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            writes = event in MAKES
        if writes and str(arguments[0]).startswith(folder):
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def tree(folder: Path) -> Files:
    """Return the bytes of every file below a folder by its relative name, and "" for every empty folder."""
    return {
        f"{path.relative_to(folder)}": path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def kill_everywhere(
    work: Work, prepare: Work, output: str, parent: Path, start: int = 1, stride: int = 1
) -> Iterator[int]:
    """Yield the number of every write point of a work after its check; raises `AssertionError` for a wrong file.

    prepare: writes the files that exist before the work. output: relative name of the file that the work writes.
    stride: only every n-th write point, from `start`.
    """
    expected_at = parent / "expected"
    expected_at.mkdir()
    prepare(expected_at)
    old = tree(expected_at).get(output)
    assert run(work, expected_at)
    expected = tree(expected_at)
    finished, point = False, start
    while not finished:
        folder = parent / f"{point}"
        folder.mkdir()
        prepare(folder)
        finished = run(work, folder, point)
        left = tree(folder).get(output)
        assert left in (old, expected[output]), f"{output} is half-written after a kill before write point {point}"
        assert finished or run(work, folder)
        found = tree(folder)
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not wrong, f"after a kill before write point {point} and another run: {wrong}"
        if not finished:
            yield point
        point += stride


def works(base: Any, photo: Path) -> dict[str, tuple[Work, Work, str]]:
    """Return the work, the preparation and the output of every command, by its name."""
    from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
    from pfstorer_rt.runtime.batch import BatchConfig, Saving, restore_files
    from pfstorer_rt.runtime.restorer import Restorer
    from pfstorer_rt.training.personalize import personalize

    config = PersonalizeConfig.for_base(
        base.config, {"iterations": 2, "batch": 1, "checkpoint_every": 1, "device": "cpu"}, pool=2, framing="none"
    )
    restorer = Restorer.from_base(base, device="cpu")

    def at_home(folder: Path) -> None:
        os.environ["PFSTORER_HOME"] = f"{folder / 'home'}"

    def learn(folder: Path) -> None:
        at_home(folder)
        personalize("alice", [photo], base, config)

    def restore(folder: Path) -> None:
        at_home(folder)
        settings = BatchConfig(RestoreConfig(steps=1), saving=Saving(overwrite=True), compare=True)
        (done,) = restore_files(restorer, [photo], folder / "out" / "restored.png", settings)
        assert done.status == "done", done.report()

    def export(folder: Path) -> None:
        from pfstorer_rt.export import export_plan

        at_home(folder)
        export_plan(folder / "base.plan", None, base)

    def nothing(folder: Path) -> None:
        pass

    def older(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out" / "restored.png").write_bytes(b"an older result")

    def older_plan(folder: Path) -> None:
        (folder / "base.plan").write_bytes(b"an older plan")
        first = photo.parent / "first"
        if not first.exists():
            export(first)  # traces the graphs, which takes half a minute
        shutil.copytree(first / "home" / "cache" / "graphs", folder / "home" / "cache" / "graphs")

    return {
        "restore": (restore, older, "out/restored.png"),
        "personalize": (learn, nothing, "home/identities/alice.safetensors"),
        "export": (export, older_plan, "base.plan"),
    }


def table(report: dict[str, Any]) -> str:
    """Return the table of the kills of every command."""
    from common import line

    rows = [("command", "killed before a write", "half-written files", "leftovers after the next run"), ("---",) * 4]
    rows += [(f"`{name}`", str(count), "0", "0") for name, count in report["killed"].items()]
    return "".join(line(row) + "\n" for row in rows)


def main() -> int:
    """Run all commands, print the number of write points of each, and write the report; the first fault is raised."""
    from common import machine, replace_table, write_report

    from pfstorer_rt.imaging.files import save_image
    from pfstorer_rt.models.base import build_base

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commands", nargs="+", default=["restore", "personalize", "export"])
    parser.add_argument("--stride", type=int, default=1, help="only every n-th write point")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="page whose table to replace")
    arguments = parser.parse_args()
    if arguments.page:
        replace_table(arguments.page, "kill_points.py", table(json.loads(arguments.output.read_text())))
        return 0
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory() as temporary:
        photo = Path(temporary) / "photo.png"
        save_image(photo, np.random.default_rng(0).random((80, 72, 3), np.float32))
        known = works(build_base("nano", seed=0), photo)
        for name in arguments.commands:
            parent = Path(temporary) / name
            parent.mkdir()
            counts[name] = sum(1 for _ in kill_everywhere(*known[name], parent, stride=arguments.stride))
            print(f"{name}: killed before {counts[name]} writes", file=sys.stderr)
    report = {"killed": counts, "stride": arguments.stride, "machine": machine()}
    write_report(report, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
