"""User studies: blind, random, safe with several raters, and the intervals of the shares."""

import csv
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pfstorer_rt import study
from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.studio.config import Limits, StudioConfig
from pfstorer_rt.studio.guard import Guard
from pfstorer_rt.studio.workspace import open_workspace

METHODS = ("mild", "ours", "rival")


@pytest.fixture
def made(home, tmp_path):
    """A study of three methods and four pictures; the colour of a picture tells its method to the test."""
    results = {}
    for number, method in enumerate(METHODS):
        folder = tmp_path / method
        folder.mkdir()
        results[method] = {}
        for name in "abcd":
            results[method][name] = folder / f"{name}.png"
            Image.new("RGB", (8, 8), (50 * number, ord(name), 0)).save(results[method][name])
    return study.create_study(results, [results["mild"]["a"]])


def test_a_study_is_private_and_can_be_opened_again(made):
    assert study.open_study(made.code) == made
    assert made.folder.stat().st_mode & 0o077 == 0
    assert made.methods == METHODS and made.pictures == ("a", "b", "c", "d")
    assert [each.code for each in study.list_studies()] == [made.code]
    study.delete_study(made.code)
    assert not made.folder.exists()


@pytest.mark.parametrize("code", ["", "unknown", "../identities", "a/b"])
def test_unknown_codes(home, code):
    with pytest.raises(BadFileError, match="no study has this code"):
        study.open_study(code)


def test_a_study_needs_two_methods_and_a_common_picture(home, tmp_path):
    with pytest.raises(SettingError, match="1 methods: expected 2 to 8"):
        study.create_study({"a": {"x": tmp_path}})
    with pytest.raises(SettingError, match="no picture of the same name"):
        study.create_study({"a": {"x": tmp_path}, "b": {"y": tmp_path}})


def test_the_order_is_random_between_raters_and_fixed_for_each(made):
    assert study.trials(made, "ann") == study.trials(made, "ann")
    places = {method: [0] * len(METHODS) for method in METHODS}
    for rater in range(200):
        for trial in study.trials(made, f"rater{rater}"):
            for place, method in enumerate(trial.shown):
                places[method][place] += 1
    spread = 5 * math.sqrt(800 * (1 / 3) * (2 / 3))  # five standard deviations of a binomial count
    assert all(abs(count - 800 / 3) < spread for counts in places.values() for count in counts)


def vote_all(made, rater, method="ours"):
    for trial in study.trials(made, rater):
        for question in study.QUESTIONS:
            study.record_vote(made, rater, trial, question, method)


def test_votes_of_many_raters_at_once_are_complete(made):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: vote_all(made, f"rater{number}"), range(40)))
    with (made.folder / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 * 4 * 2 and all(None not in row.values() for row in rows)
    assert {row["method"] for row in rows} == {"ours"}
    assert (made.folder / "votes.csv").stat().st_mode & 0o077 == 0


def test_the_last_vote_counts(made):
    trial = study.trials(made, "ann")[0]
    study.record_vote(made, "ann", trial, "quality", "mild")
    study.record_vote(made, "ann", trial, "quality", "ours")
    assert [vote["method"] for vote in study.read_votes(made)] == ["ours"]


@pytest.mark.parametrize(
    ("question", "method", "rater"), [("beauty", "ours", "a"), ("quality", "x", "a"), ("quality", "ours", "..")]
)
def test_wrong_votes_are_refused(made, question, method, rater):
    with pytest.raises(SettingError, match="not a vote of this study"):
        study.record_vote(made, rater, study.trials(made, "a")[0], question, method)


def test_rows_that_are_no_votes_of_the_study_do_not_count(made):
    vote_all(made, "ann")
    row = f"2026,ann,{made.pictures[0]},quality,ours,a | b"
    with (made.folder / "votes.csv").open("ab") as file:
        changes = ("ann", ".."), ("quality", "x"), ("ours", "x"), ("2026", "\xff")
        for changed in ("", ",,,,,", "a", *(row.replace(*change) for change in changes)):
            file.write(changed.encode("latin-1") + b"\r\n")
    assert len(study.read_votes(made)) == len(made.pictures) * 2
    (made.folder / "votes.csv").write_bytes(b"no,header,of,votes\r\n1,2,3,4\r\n")
    assert study.read_votes(made) == [] and study.shares(made)[0].votes == 0


@pytest.mark.parametrize("content", [b'time,rater\r\n"' + b"x" * 200_000, b"\0\r\na\0b"], ids=["a huge field", "zeros"])
def test_a_file_of_votes_that_is_no_table_is_one_line_or_empty(made, content):
    (made.folder / "votes.csv").write_bytes(content)
    try:
        assert study.read_votes(made) == []
    except BadFileError as error:
        assert "votes.csv" in str(error) and "\n" not in str(error)


def test_a_pipe_in_place_of_the_votes_is_not_opened(made):
    os.mkfifo(made.folder / "votes.csv")
    assert study.read_votes(made) == []


def test_a_study_does_not_fill_the_disk(made, monkeypatch):
    monkeypatch.setattr(study, "_LARGEST_VOTES", 1000)
    with pytest.raises(SettingError, match="too many votes"):
        for number in range(100):
            vote_all(made, f"rater{number}")
    assert (made.folder / "votes.csv").stat().st_size < 1300


def test_names_that_are_not_text_are_kept(home, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    made = study.create_study({method: {name: tmp_path / "a.png"} for method in ("ours", "mild")})
    (trial,) = study.trials(made, "ann")
    study.record_vote(made, "ann", trial, "quality", "ours")
    assert study.read_votes(study.open_study(made.code))[0]["picture"] == name


def binomial_tail(count, total, share):
    """P(X >= count) of a binomial distribution, summed from its definition."""
    return sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count, total + 1))


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (61, 96)])
def test_the_interval_is_clopper_pearsons(count, total):
    """Each end is the share at which the observed count is a 2.5 % event (Clopper and Pearson 1934)."""
    low, high = study.interval(count, total)
    assert low == 0 if count == 0 else binomial_tail(count, total, low) == pytest.approx(0.025, rel=1e-6)
    upper = 1 - binomial_tail(count + 1, total, high)
    assert high == 1 if count == total else upper == pytest.approx(0.025, rel=1e-6)


def test_shares_of_both_questions(made):
    vote_all(made, "ann", "ours")
    vote_all(made, "bob", "mild")
    found = {(share.question, share.method): share for share in study.shares(made)}
    assert found["quality", "ours"].share == 0.5 and found["identity", "rival"].votes == 0
    assert found["quality", "ours"].of == 8
    assert sum(share.share for share in study.shares(made)) == pytest.approx(2)


@pytest.fixture
def rater(made):
    """A browser of a rater, who has no token."""
    from fastapi import FastAPI

    from pfstorer_rt.studio.study_pages import add_study_pages

    app = FastAPI()
    add_study_pages(app)
    with open_workspace(Limits()) as workspace:
        guard = Guard(app, StudioConfig(host="0.0.0.0", token="a long token"), workspace)
        with TestClient(guard, base_url="http://studio.example") as client:
            yield client


def test_a_rater_votes_without_seeing_names(made, rater):
    page = rater.get(f"/study/{made.code}/")
    for number in range(4):
        page = rater.get(f"/study/{made.code}/{number}")
        assert not [method for method in METHODS if re.search(rf"\b{method}\b", page.text)]
        choice = "ABC"[number % 3]
        page = rater.post(f"/study/{made.code}/{number}", data={"quality": choice, "identity": choice})
    assert "Thank you" in page.text
    (name,) = {vote["rater"] for vote in study.read_votes(made)}
    chosen = [vote["method"] for vote in study.read_votes(made) if vote["question"] == "quality"]
    assert chosen == [trial.shown[number % 3] for number, trial in enumerate(study.trials(made, name))]


def test_the_picture_of_a_letter_is_the_method_that_is_counted(made, rater, tmp_path):
    rater.get(f"/study/{made.code}/")
    (tmp_path / "shown.png").write_bytes(rater.get(f"/study/{made.code}/0/1.png").content)
    red = Image.open(tmp_path / "shown.png").convert("RGB").getpixel((0, 0))[0]
    rater.post(f"/study/{made.code}/0", data={"quality": "B", "identity": "B"})
    assert {vote["method"] for vote in study.read_votes(made)} == {METHODS[red // 50]}


def test_a_rater_sees_nothing_but_the_study(made, rater):
    assert rater.get("/").status_code == 401
    assert rater.get("/study/0123456789abcdef/").status_code == 404
    assert rater.get(f"/study/{made.code}/0/0.png").status_code == 404, "before the start page"
    rater.get(f"/study/{made.code}/")
    assert rater.post(f"/study/{made.code}/0", data={"quality": "Z", "identity": "A"}).status_code == 400
    assert rater.get(f"/study/{made.code}/reference/9.png").status_code == 404
    assert study.read_votes(made) == []
