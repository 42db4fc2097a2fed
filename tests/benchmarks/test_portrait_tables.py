"""The tables of the portrait part of docs/results.md."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("portrait_tables")


def test_a_table_counts_faces_and_leaves_empty_cells_out_of_the_means(tables):
    found = dict.fromkeys(tables.COLUMNS, "2.0")
    rows = [
        {"method": "portrait", **found, "psnr": "20", "id_original_dlib": "0.5"},
        {"method": "portrait", **found, "psnr": "30", "id_original_dlib": ""},
        {"method": "input", **found},
    ]
    first, second = tables.table(rows).splitlines()[2:]
    assert first.startswith("| Input | 2.00 |") and first.endswith("| 1 of 1 |")
    assert second.startswith("| `portrait` | 25.00 |") and second.endswith("| 0.500 | 1 of 2 |")
