"""`bench`."""

import json

import pytest
from PIL import Image


def test_bench_writes_csv_plot_and_json(run, nano_plan, tmp_path):
    import csv

    done = run(
        "bench",
        "--engine",
        nano_plan.path,
        "--backend",
        "onnxruntime",
        "--steps",
        1,
        "--runs",
        2,
        "--size",
        64,
        "--size",
        100,
        "--csv",
        tmp_path / "new" / "b.csv",
        "--plot",
        tmp_path / "b.png",
        "--json",
    )
    report = json.loads(done.out)
    assert report["provider"] == "CPUExecutionProvider" and report["method"].startswith("wall clock")
    assert set(report["clock"]) == {"mhz", "governor", "load_before", "load_after"}
    sizes, parts = report["images_ms"], report["components_ms"]
    assert list(sizes) == ["image 64x64", "image 100x100"] and set(parts) > {"encoder", "denoiser", "decoder"}
    for figures in {**sizes, **parts}.values():
        assert figures["p50"] > 0 and figures["runs"] == 2
        assert not {"p90", "p99"} & set(figures), "two runs have no 90th percentile"
    assert "ends after 2 runs." in report["method"]
    large = sizes["image 100x100"]
    assert large["tiles_per_s"] == pytest.approx(9 / large["p50"] * 1e3)  # 128 pixels, tiles 48 apart: 3 x 3
    assert large["megapixels_per_s"] == pytest.approx(0.01 / large["p50"] * 1e3)
    rows = list(csv.DictReader((tmp_path / "new" / "b.csv").open()))
    assert [row["measured"] for row in rows] == [*parts, *sizes]
    assert (rows[0]["p90"], rows[0]["p99"]) == ("", "")
    assert float(rows[-1]["p50"]) == large["p50"] and rows[0]["processor"]
    with Image.open(tmp_path / "b.png") as plot:
        assert plot.format == "PNG" and plot.getcolors(1 << 20)


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_bench_overwrites_no_file(refused, nano_plan, tmp_path, option):
    (tmp_path / "notes.png").write_text("precious")
    refused(2, "bench", "--engine", nano_plan.path, option, tmp_path / "notes.png", words=("--overwrite",))
    assert (tmp_path / "notes.png").read_text() == "precious"


def test_a_plot_is_a_png(refused, nano_plan, tmp_path):
    refused(2, "bench", "--engine", nano_plan.path, "--plot", tmp_path / "b.jpg", words=("ends with .png",))


@pytest.mark.parametrize(
    ("runs", "expected"), [(2, ["p50"]), (9, ["p50"]), (10, ["p50", "p90"]), (100, ["p50", "p90", "p99"])]
)
def test_percentiles_need_enough_runs(runs, expected):
    from pfstorer_rt.runtime.bench import percentiles

    assert list(percentiles(lambda: None, runs, 60)) == [*expected, "runs"]
