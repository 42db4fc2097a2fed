"""The tables of the portrait part of docs/results.md."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("portrait_tables")


def test_recipes_have_one_table_for_each_reduction(tables):
    found = {**dict.fromkeys(tables.RECIPE_COLUMNS, "2.0"), "likeness": "0.5"}
    rows = [
        {"person": "a", "recipe": "default", "sf": "4", "image": "0", **found, "cosine": "0.5", "learn_cpu_s": "90"},
        {"person": "b", "recipe": "default", "sf": "4", "image": "0", **found, "cosine": "0.7", "learn_cpu_s": "80"},
        {"person": "a", "recipe": "input", "sf": "8", "image": "0", **found, "learn_cpu_s": "0"},
    ]
    first, second = tables.recipes_part(rows).split("Reduced to ")[1:]
    assert first.startswith("a quarter") and "2 people" in tables.recipes_part(rows)
    assert "| PFStorer | 2.00 | 2.000 | 2.00 | 2.0 | 60.0 | 50.0 | 2.000 | - | 80 to 90 |" in first
    assert second.startswith("an eighth") and "| Input |" in second and "| PFStorer |" not in second


def test_the_closed_gap_is_the_place_of_the_likeness_between_base_and_original(tables):
    likeness = {("a", "base"): 0.2, ("a", "original"): 0.8, ("a", "default"): 0.5, ("a", "another"): 0.1}
    likeness |= {("b", "base"): 0.0, ("b", "original"): 0.4, ("b", "paper"): 0.1}
    rows = [{"person": p, "recipe": r, "likeness": str(value)} for (p, r), value in likeness.items()]
    closed = {recipe: tables.gap_closed(recipe, rows) for recipe in ("base", "original", "default", "paper", "another")}
    assert closed == {"base": "0 %", "original": "100 %", "default": "50 %", "paper": "25 %", "another": "-"}
    assert tables.gap_closed("vico", rows) == "-"


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
