"""Means, and the contents of the report files."""

import base64
import csv
import io
import json
import math
import os
from html.parser import HTMLParser

import pytest
from PIL import Image

from pfstorer_rt.evaluation.page import THUMBNAIL_SIDE, Chart, svg_chart, thumbnail
from pfstorer_rt.evaluation.report import Report, Row

NASTY = "<b>ours</b> & | co"


@pytest.fixture
def report(simple, make_image):
    """Two images by three methods; MUSIQ is refused, one result is missing, and no method's SSIM is complete."""
    small = thumbnail(make_image(300, 400))
    rows = [
        Row("original", "a", {"psnr": math.inf, "ssim": 1.0, "musiq": None}, thumbnail=small),
        Row(NASTY, "a", {"psnr": 20.0, "ssim": 0.5, "musiq": None}, 2.0, thumbnail=small),
        Row("input", "a", {"psnr": 10.0, "ssim": 0.25, "musiq": None}, thumbnail=small),
        Row("original", "b", {"psnr": math.inf, "ssim": 1.0, "musiq": None}),
        Row(NASTY, "b", {"psnr": None, "ssim": None, "musiq": None}, None, "no result", failed=True),
        Row("input", "b", {"psnr": 14.0, "ssim": None, "musiq": None}),
    ]
    assert "musiq" in simple.refused
    return Report(rows, simple, ["a note <i>"], {"level": "heavy", "seed": 7})


class Page(HTMLParser):
    """Checks that elements are closed in order and collects their contents."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_means_and_counts_skip_missing_figures(report):
    summary = report.summary()
    assert list(summary) == ["input", NASTY, "original"] and report.images == ["a", "b"]
    assert summary["input"].means == {"psnr": 12.0, "ssim": 0.25, "musiq": None, "seconds": None}
    assert summary["input"].counts == {"psnr": 2, "ssim": 1, "musiq": 0, "seconds": 0}
    ours = summary[NASTY]
    assert (ours.images, ours.failed, ours.means["psnr"], ours.means["seconds"]) == (2, 1, 20.0, 2.0)
    assert summary["original"].means["psnr"] == math.inf


def test_means_over_common_images(report):
    common = report.summary(common=True)
    assert report.uneven() and report.common_images() == {"a"}, "SSIM has no value for b"
    assert common["input"].means["psnr"] == 10.0
    assert {(s.images, s.counts["psnr"], s.counts["ssim"]) for s in common.values()} == {(1, 1, 1)}
    assert common[NASTY].means["seconds"] == 2.0  # only one method has times
    whole = Report([row for row in report.rows if row.image == "a"], report.metrics)
    assert not whole.uneven() and whole.common_images() == {"a"} and whole.summary(common=True) == whole.summary()


def test_csv_has_a_row_for_each_result(report):
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == len(report.rows)
    ours = {row["image"]: row for row in rows if row["method"] == NASTY}
    assert (float(ours["a"]["psnr"]), float(ours["a"]["seconds"]), ours["a"]["musiq"]) == (20.0, 2.0, "")
    assert (ours["b"]["psnr"], ours["b"]["note"]) == ("", "no result")
    assert float(rows[0]["psnr"]) == math.inf


def test_json_is_strict_and_names_licence_version_and_refusal(report):
    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(report.json(), parse_constant=refuse)
    assert document["methods"]["input"]["means"]["psnr"] == 12.0 and document["settings"]["seed"] == 7
    assert document["methods"]["original"]["means"]["psnr"] == "inf"
    assert document["common_images"]["input"]["images"] == 1
    assert document["common_images"]["input"]["means"]["psnr"] == 10.0
    metrics = document["metrics"]
    assert list(metrics) == ["psnr", "ssim", "musiq"] and all(m["licence"] and m["version"] for m in metrics.values())
    assert metrics["psnr"]["refused"] is None and metrics["musiq"]["refused"].startswith("not measured: ")


def test_markdown_tables_are_regular(report):
    lines = report.markdown().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables if "ssim" not in line.lower() or "method" in line}
    assert widths == {6}  # method, three metrics and seconds; the table of metrics has five columns, too
    row = next(line for line in tables if line.startswith("| <b>ours"))
    assert row == "| <b>ours</b> & \\| co | 20.00 (1 of 2) | 0.500 (1 of 2) | not measured | 2.00 |"
    assert "Means over the 1 of 2 images for which every method has a value of every metric:" in lines
    same = [line for line in lines if line.startswith("| <b>ours")][1]
    assert same == "| <b>ours</b> & \\| co | 20.00 | 0.500 | not measured | 2.00 |", "one population in a row"
    assert "- a note <i>" in lines and "- level: heavy" in lines
    assert any(line.startswith("| MUSIQ") and "not measured: " in line for line in tables)


def test_the_page_is_one_file(report):
    page = Page(report.html())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "i"} and [tag for tag, _ in page.tags].count("b") == 3
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert len(page.images) == 3
    for source in page.images:
        image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        image.load()
        assert image.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE * 3 // 4)
    words = " ".join(page.words)
    assert NASTY in words and "not measured" in words and "a note <i>" in words and "∞" in words
    assert [tag for tag, _ in page.tags].count("svg") == 2  # PSNR and SSIM; MUSIQ has no plot


def test_chart_positions_are_proportional_to_the_figures():
    dots = {"one": [0.0, 5.0, 10.0], "two": [math.inf]}
    drawn = Page(svg_chart(Chart("PSNR", dots, {"one": 5.0, "two": math.inf})))
    x = [float(a["cx"]) for tag, a in drawn.tags if tag == "circle"]
    assert len(x) == 3 and x[1] - x[0] == pytest.approx(x[2] - x[1]) and x[2] > x[0]
    bars = [float(a["x"]) + 1.5 for tag, a in drawn.tags if tag == "rect"]
    assert bars == [pytest.approx(x[1])]


@pytest.mark.parametrize("figures", [[], [3.0], [2.0, 2.0]])
def test_a_chart_of_few_figures_is_valid(figures):
    drawn = Page(svg_chart(Chart("x", {"one": figures}, {"one": figures[0] if figures else None})))
    assert [tag for tag, _ in drawn.tags].count("circle") == len(figures)


def test_write_replaces_all_four_files(report, tmp_path):
    report.write(tmp_path / "new" / "folder")
    report.write(tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["index.html", "results.csv", "results.md", "summary.json"]
    assert (tmp_path / "new" / "folder" / "results.csv").read_text() == report.csv()


def test_names_that_are_not_text_do_not_stop_the_report(simple, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    Report([Row(name, name, {"psnr": 20.0, "ssim": 0.5, "musiq": None})], simple, [name], {}).write(tmp_path)
    assert "caf\\udce9" in (tmp_path / "results.csv").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())
