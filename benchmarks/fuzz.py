"""Read damaged and hostile files with every reader and count the outcomes.

Each case changes a small valid file: single bytes, a cut, pieces of the file moved or repeated, or values of its JSON.
A reader may accept the file or raise `PFStorerError` (a configuration: `ValueError`). Everything else is a failure: any
other exception, a case of more than 10 seconds, a process that ends, or 500 MB more memory than at the start.

Run: `python benchmarks/fuzz.py --seconds 60`; `--output` writes the counts as JSON. A case is given by the name of its
reader and a number, and `--case image 17` repeats one. `--page` writes the table of an earlier `--output` to a page.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import line, machine, replace_table, write_report
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "shared"))

from small_plan import small_manifest, small_payloads

from pfstorer_rt.base_files import read_config
from pfstorer_rt.config import PRESETS, to_json
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.files import image_size, load_image
from pfstorer_rt.models.stablesr.checkpoint import read_checkpoint
from pfstorer_rt.plan import COMPONENTS, Plan, write_plan

SECONDS, MEGABYTES = 10, 500
"""Limits of one case: time, and memory above the memory of the process at its start."""
PIXELS = 1_000_000
LAYER = "up_blocks.1.attentions.0"
HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**31, 2**63, -(2**63), 1e308, "", "x" * 5000, "../x", "\n\x1b[2J", "\0", "64"),
    *([], {}, [[]], [None] * 1000, {"a": {"b": []}}, [0], ["x"]),
]
FIXED: dict[str, str] = {
    "manifest": "a schema with line breaks or terminal escapes was printed unchanged",
    "identity": "a schema or a name in the metadata with line breaks or terminal escapes was printed unchanged, and a "
    "setting of 5000 characters was printed in full",
    "checkpoint": "an index in a pickle of 300 bytes took 2.6 GB of memory",
}
"""Reader -> what an earlier run found and what was changed."""


# ---- changes


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Apply one to four random changes to bytes."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not raw:
            break
        at, size = rng.randrange(len(raw)), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.randrange(256)
        elif kind == 2:
            del raw[at:]
        elif kind == 3:
            del raw[at : at + size]
        elif kind == 4:
            other = rng.randrange(len(raw))
            raw[at:at] = raw[other : other + size * rng.choice((1, 16))]
        elif kind == 5:
            raw[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        else:
            raw[at : at + size] = rng.randbytes(size)
    return bytes(raw)


def change_json(text: str, rng: random.Random) -> str:
    """Replace, remove or add values at random places of JSON."""
    data = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        node, parent, key = data, None, None
        while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
            parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = parent[key]
        if parent is None:
            return json.dumps(copy.deepcopy(rng.choice(HOSTILE)))
        action = rng.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice(("evil", "", "x" * 300, "\n"))] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(data)


def change_text(text: str, rng: random.Random) -> bytes:
    """Change JSON as values or as bytes."""
    return change_json(text, rng).encode() if rng.random() < 0.7 else change_bytes(text.encode(), rng)


# ---- readers: each makes a changed file and reads it


def read_plan(path: Path) -> None:
    """Open a plan and read its payloads."""
    plan = Plan.open(path)
    for component in COMPONENTS:
        plan.read(component)


def fuzz_plan(folder: Path, rng: random.Random) -> None:
    """The zip of a plan."""
    payloads = small_payloads()
    path = write_plan(folder / "a.plan", small_manifest(payloads), payloads).path
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    read_plan(path)


def fuzz_manifest(folder: Path, rng: random.Random) -> None:
    """The manifest in the valid zip of a plan."""
    payloads = small_payloads()
    text = change_text(small_manifest(payloads).to_json(), rng)
    with zipfile.ZipFile(folder / "a.plan", "w") as archive:
        archive.writestr("manifest.json", text)
        for name, data in payloads.items():
            archive.writestr(f"{name}.onnx", data)
    read_plan(folder / "a.plan")


def fuzz_onnx(folder: Path, rng: random.Random) -> None:
    """A graph in a valid plan with the right sha256."""
    payloads, name = small_payloads(), rng.choice(COMPONENTS)
    payloads[name] = change_bytes(payloads[name], rng)
    read_plan(write_plan(folder / "a.plan", small_manifest(payloads), payloads).path)


def small_identity() -> Identity:
    """An identity of one block."""
    shapes = {"token": (8,), "blocks.0.gamma": (4,), "blocks.0.block.ff.weight": (4, 4), "reference.0": (6, 4)}
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    tensors["mask.0"] = torch.ones(6, dtype=torch.bool)
    settings = {"rank": 0, "ref_source": "cached", "subject_prompt": "a photo of a {}"}
    gamma = {LAYER: {"mean": 0.1, "max": 0.2}}
    return Identity("alice", "0" * 64, "nano", "pfstorer", (LAYER,), settings, ("1" * 64,), tensors, gamma)


def fuzz_identity(folder: Path, rng: random.Random) -> None:
    """An identity file: its bytes, its header, or the JSON in its header."""
    path = small_identity().save(folder / "a.safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode()
    kind = rng.randrange(3)
    if kind == 0:
        path.write_bytes(change_bytes(data, rng))
    else:
        if kind == 1:
            changed = change_text(header, rng)
        else:
            values = json.loads(header)
            key = rng.choice(("layers", "settings", "references", "gamma"))
            values["__metadata__"][key] = change_text(values["__metadata__"][key], rng).decode("utf-8", "replace")
            changed = json.dumps(values).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    Identity.load(path)


def fuzz_base(folder: Path, rng: random.Random) -> None:
    """The configuration of a base."""
    text = to_json(PRESETS[rng.choice(list(PRESETS))])
    (folder / "config.json").write_bytes(change_text(text, rng))
    try:
        read_config(folder)
    except ValueError as error:
        raise PFStorerError(str(error)) from error


def small_image(kind: str) -> bytes:
    """Return a small image file with an EXIF orientation."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    if kind == "GIF":
        image = image.convert("P")
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return buffer.getvalue()


def fuzz_image(folder: Path, rng: random.Random) -> None:
    """An image file."""
    path = folder / "a.image"
    path.write_bytes(change_bytes(small_image(rng.choice(("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"))), rng))
    image_size(path, PIXELS)
    load_image(path, PIXELS)


def fuzz_checkpoint(folder: Path, rng: random.Random) -> None:
    """A checkpoint, as `torch.save` (both formats) and safetensors write it."""
    import safetensors.torch

    tensors = {"model.a.weight": torch.ones(3, 4), "model.b.bias": torch.ones(4)}
    kind = rng.randrange(3)
    path = folder / ("a.safetensors" if kind == 2 else "a.ckpt")
    if kind == 2:
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 1}, path, _use_new_zipfile_serialization=kind == 0)
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    read_checkpoint(path)


OUTCOMES = ("refused", "accepted", "failed")
READERS: dict[str, Callable[[Path, random.Random], None]] = {
    "plan": fuzz_plan,
    "manifest": fuzz_manifest,
    "onnx": fuzz_onnx,
    "identity": fuzz_identity,
    "base": fuzz_base,
    "image": fuzz_image,
    "checkpoint": fuzz_checkpoint,
}


# ---- cases in a process of their own


def numbered(reader: str, number: int) -> random.Random:
    """Return the random numbers of a case."""
    return random.Random(f"{reader} {number}")


def run_case(reader: str, rng: random.Random, folder: Path) -> str:
    """Run one case; returns `accepted`, `refused` or the traceback of a failure."""
    try:
        READERS[reader](folder, rng)
    except PFStorerError as error:
        text = str(error)
        return "refused" if "\n" not in text and len(text) < 1000 else f"a long message: {text[:2000]}"
    except Exception:
        return traceback.format_exc()
    return "accepted"


def work(pipe: Connection) -> None:
    """Run cases in this process and send their outcomes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for reader in READERS:  # imports and buffers are no memory of a case
            for number in range(3):
                run_case(reader, numbered(reader, -1 - number), Path(folder))
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send("ready")
        while True:
            reader, number = pipe.recv()
            outcome = run_case(reader, numbered(reader, number), Path(folder))
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10
            pipe.send(f"{more} MB of memory" if more > MEGABYTES else outcome)


class Worker:
    """A process that runs cases. It is replaced after a case that exceeds a limit or ends the process."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=work, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self.pipe.recv()

    def run(self, reader: str, number: int) -> str:
        """Run a case and return its outcome."""
        self.pipe.send((reader, number))
        try:
            outcome = str(self.pipe.recv()) if self.pipe.poll(SECONDS) else f"more than {SECONDS} seconds"
        except EOFError:
            outcome = "the process ended"
        if outcome not in ("accepted", "refused") and "Traceback" not in outcome:
            self._process.kill()
            self._process.join()
            self._start()
        return outcome

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def fuzz(seconds: float, first: int) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Run cases of all readers in turn; returns counts by reader, and the failures."""
    counts = {reader: dict.fromkeys(OUTCOMES, 0) for reader in READERS}
    failures: list[dict[str, Any]] = []
    worker, end, number = Worker(), time.monotonic() + seconds, first
    while time.monotonic() < end:
        for reader in READERS:
            outcome = worker.run(reader, number)
            failed = outcome not in counts[reader]
            counts[reader]["failed" if failed else outcome] += 1
            if failed:
                failures.append({"reader": reader, "number": number, "outcome": outcome})
                print(f"{reader} {number}: {outcome}", file=sys.stderr)
        number += 1
    worker.close()
    return counts, failures


def table(report: dict[str, Any]) -> str:
    """Return the table of the counts by reader."""
    rows = [("reader", "cases", "refused", "accepted", "failures"), ("---",) * 5]
    for reader, count in report["readers"].items():
        rows.append((reader, *(f"{n:,}" for n in (sum(count.values()), *map(count.get, OUTCOMES)))))
    totals = [sum(count[outcome] for count in report["readers"].values()) for outcome in OUTCOMES]
    rows.append(("all", *(f"{n:,}" for n in (report["cases"], *totals))))
    return "".join(line(row) + "\n" for row in rows)


def main() -> int:
    """Run for a time, print the counts, and return 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each reader")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", nargs=2, metavar=("READER", "NUMBER"), help="repeat one case")
    parser.add_argument("--page", type=Path, help="page whose table to replace")
    arguments = parser.parse_args()
    if arguments.page:
        replace_table(arguments.page, "fuzz.py", table(json.loads(arguments.output.read_text())))
        return 0
    if arguments.case:
        reader, number = arguments.case
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(reader, numbered(reader, int(number)), Path(folder)))
        return 0
    counts, failures = fuzz(arguments.seconds, arguments.first)
    total = sum(sum(count.values()) for count in counts.values())
    report = {
        "cases": total,
        "seconds": arguments.seconds,
        "limits": {"seconds": SECONDS, "megabytes": MEGABYTES},
        "readers": counts,
        "failures": len(failures),
        "found_and_fixed": FIXED,
        "machine": machine(),
    }
    write_report(report, arguments.output)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
