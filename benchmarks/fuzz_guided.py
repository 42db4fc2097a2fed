"""Read damaged files with every reader, guided by the coverage of the code.

    python benchmarks/fuzz_guided.py --seconds 60 --output benchmarks/results/fuzz_guided.json

The cases are those of `fuzz.py`, but libFuzzer makes their random numbers. It keeps the numbers that reach new code and
varies them. Every reader has its own process, which ends at the first failure, as `fuzz.py` defines it. The numbers of
that case are then in a file `crash-*` in the working directory, and `--reader identity --repeat crash-FILE` repeats it.
Needs the package `atheris` (Linux, CPython 3.11 or 3.12).
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

READERS = ("plan", "manifest", "onnx", "identity", "base", "image", "checkpoint")
LENGTH, SEEDS = 400, 50
"""Bytes of the random numbers of a case, and number of the first cases."""


class Chosen(random.Random):
    """A generator whose numbers come from bytes; 0 after their end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data, self.at = data, 0

    def getrandbits(self, k: int, /) -> int:
        """Return k bits."""
        size = (k + 7) // 8
        taken = self.data[self.at : self.at + size].ljust(size, b"\0")
        self.at += size
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number in [0, 1)."""
        return self.getrandbits(32) / 2**32


def run_reader(reader: str, seconds: int, repeat: Path | None) -> None:
    """Run the cases of one reader for a time, or one case; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pfstorer_rt"]):
        import fuzz

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:

        def case(data: bytes) -> None:
            outcome = fuzz.run_case(reader, Chosen(data), Path(folder))
            if outcome not in ("accepted", "refused"):
                raise AssertionError(outcome)

        for number in range(3):  # imports are no time of a case
            fuzz.run_case(reader, random.Random(number), Path(folder))
        options = [f"-timeout={fuzz.SECONDS}", f"-max_total_time={seconds}", "-rss_limit_mb=3000"]
        options += [f"-max_len={LENGTH}", "-len_control=0", "-print_final_stats=1", str(write_seeds(Path(folder)))]
        atheris.Setup([sys.argv[0], *([str(repeat)] if repeat else options)], case)
        atheris.Fuzz()


def write_seeds(folder: Path) -> Path:
    """Write the numbers of the first cases, and return their folder."""
    seeds = folder / "seeds"
    seeds.mkdir()
    for number in range(SEEDS):
        (seeds / str(number)).write_bytes(random.Random(number).randbytes(LENGTH))
    return seeds


def count_cases(reader: str, seconds: int) -> dict[str, int]:
    """Run one reader in a process of its own; returns its number of cases, and whether one failed."""
    command = [sys.executable, __file__, "--reader", reader, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    if done.returncode or not found:
        print(f"{reader}: {done.stderr[-3000:]}", file=sys.stderr)
    return {"cases": int(found[1]) if found else 0, "failed": int(bool(done.returncode))}


def main() -> int:
    """Run all readers, print the counts, and return 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="time for each reader")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--reader", choices=READERS, help="run one reader in this process")
    parser.add_argument("--repeat", type=Path, help="with --reader: file with the numbers of one case")
    arguments = parser.parse_args()
    if arguments.reader:
        run_reader(arguments.reader, arguments.seconds, arguments.repeat)
        return 0
    from common import machine, write_report

    readers = {reader: count_cases(reader, arguments.seconds) for reader in READERS}
    failures = sum(count["failed"] for count in readers.values())
    report = {"seconds": arguments.seconds, "readers": readers, "failures": failures, "machine": machine()}
    write_report(report, arguments.output)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
