"""The cases of the guided fuzzer depend on the fuzzer's bytes alone."""

import importlib
import random
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fuzz")


@pytest.fixture
def guided(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fuzz_guided")


def test_the_readers_are_those_of_the_unguided_fuzzer(fuzz, guided):
    assert tuple(fuzz.READERS) == guided.READERS


def test_the_same_bytes_make_the_same_change_and_other_bytes_another(fuzz, guided):
    numbers = [random.Random(seed).randbytes(60) for seed in range(20)]
    changed, again = ([fuzz.change_bytes(bytes(200), guided.Chosen(each)) for each in numbers] for _ in range(2))
    assert changed == again and len(set(changed)) > 10


def test_numbers_after_the_end_of_the_bytes_are_valid(guided):
    rng = guided.Chosen(b"")
    assert (rng.random(), rng.randrange(7), rng.choice("abc")) == (0.0, 0, "a")
    assert rng.randbytes(3) == b"\0\0\0"


def test_a_case_is_accepted_or_refused(fuzz, guided, tmp_path):
    chosen = guided.Chosen(random.Random(1).randbytes(400))
    assert fuzz.run_case("manifest", chosen, tmp_path) in ("accepted", "refused")
