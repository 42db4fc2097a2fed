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


def test_small_faces_have_a_row_for_each_base_and_way_of_learning(tables):
    found = {**dict.fromkeys(tables.SMALL_COLUMNS, "2.0"), "set": "real", "image": "0"}
    rows = [
        {**found, "base": base, "learning": learning, "method": method, "identity": identity, "learn_cpu_s": seconds}
        for base, learning, seconds in (
            ("portrait", "default", "50"),
            ("portrait", "thorough", "300"),
            ("tiny", "default", "600"),
        )
        for method, identity in (("Input", "0.1"), ("Base", "0.2"), ("PFStorer", "0.5"))
    ]
    lines = [text.split(" | ")[1:] for text in tables.small_part(rows).splitlines() if text.startswith("| real")]
    assert [(cells[0], cells[-2], cells[-1].rstrip(" |")) for cells in lines] == [
        ("Input", "10.0", ""),
        ("`portrait`, no identity", "20.0", ""),
        ("`portrait`", "50.0", "50"),
        ("`portrait`, `--thorough`", "50.0", "300"),
        ("`tiny`, no identity", "20.0", ""),
        ("`tiny`", "50.0", "600"),
    ]


def test_changed_images_have_a_row_for_each_change_and_input(tables):
    found = {**dict.fromkeys(tables.TONE_COLUMNS, "2.0"), "set": "real", "method": "Base"}
    rows = [
        {**found, "change": change, "input": kind, "identity": value}
        for change in ("grey", "blue")
        for kind, value in (("changed", "0.4"), ("usual", "0.5"), ("unaltered", "0.2"))
    ]
    lines = [text for text in tables.tones_part(rows).splitlines() if text.startswith("| real")]
    assert [text.split(" | ")[2] for text in lines] == ["grey"] * 3 + ["blue"] * 3
    assert [text.rstrip(" |").split(" | ")[-1] for text in lines] == ["50.0", "40.0", "20.0"] * 2


def test_scratches_have_a_row_for_each_damage_and_setting(tables):
    rows = [
        {
            "set": "real",
            "level": level,
            "damage": damage,
            "setting": setting,
            "psnr": "20",
            "lpips": "0.3",
            "cosine": value,
        }
        for level in ("light", "heavy")
        for damage, setting, value in (
            ("scratches", "remove_scratches", "0.5"),
            ("scratches", "default", "0.3"),
            ("none", "default", "0.6"),
            ("none", "remove_scratches", "0.59"),
            ("scratches", "input", "0.1"),
        )
    ]
    lines = [text for text in tables.scratches_part(rows).splitlines() if text.startswith("| real")]
    assert [text.split(" | ")[1] for text in lines] == ["light"] * 5 + ["heavy"] * 5
    assert [text.rstrip(" |").split(" | ")[-1] for text in lines] == ["60.0", "59.0", "10.0", "30.0", "50.0"] * 2
