"""The stories of the page in a real browser: restore, learn, compare, with keyboard alone, and accessibility."""

import csv
import io
import json
import zipfile

import pytest
from studio_page import LONG_WAIT, RESULT, check, compare, drop, open_tab, press, rate, wait_for_text

pytestmark = pytest.mark.browser


def test_restoring(alice, page, shoot, files, tmp_path):
    check(page, shoot, "restore-empty")
    drop(page, "#pictures", [files("old.png", 0, 0.1), files("older.jpg", 9, 0.1)])
    page.wait_for_selector("#faces li >> nth=1")
    press(page, "Restore")
    page.wait_for_selector("#zip a")
    page.wait_for_selector("#results tbody tr >> nth=1")
    page.wait_for_function(f"{RESULT}.includes('old_restored')")
    check(page, shoot, "restore-done")
    first = page.evaluate(RESULT)
    page.locator("#strength input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"old => {RESULT} !== old", arg=first)
    page.wait_for_selector("#cancel-restore:disabled")
    with page.expect_download() as download:
        page.locator("#zip a").click()
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == ["old_restored.png", "older_restored.jpg", "report.json"]
        strengths = {entry["input"]: entry["strength"] for entry in json.loads(archive.read("report.json"))}
    assert strengths == {"old.png": 0.95, "older.jpg": 1.0}
    page.locator("#next-shown").click()
    page.wait_for_function(f"{RESULT}.includes('older')")


def test_cancelling_keeps_what_is_finished(page, files):
    drop(page, "#pictures", [files(f"{number:02}.png", number, enlarged=4) for number in range(12)])
    page.wait_for_selector("#faces li >> nth=11")
    press(page, "Restore")
    page.wait_for_selector("#results tbody tr")
    page.locator("#next-shown").click()
    page.wait_for_function("document.querySelector('#shown input').value === '01.png'")
    page.locator("#cancel-restore").click()
    wait_for_text(page, "#restore-status", "Cancelled. What was finished is kept.")
    page.wait_for_selector("#zip a")
    assert 0 < page.locator("#results tbody tr").count() < 12


def test_learning_renaming_exporting_importing_and_deleting(page, shoot, files, tmp_path):
    open_tab(page, "People")
    wait_for_text(page, "#known", "Nobody is learned yet")
    check(page, shoot, "people-empty")
    drop(page, "#photographs", [files(f"{i}.png", 5 * i) for i in range(3)] + [files("copy.png", 0)])
    page.wait_for_selector("#crops li >> nth=3")
    assert page.locator("#crops .refused").inner_text().split("\n")[-1] == (
        "Not used: almost the same image as 0.png"
    ), "the photograph's own name, without a folder"
    page.fill("#name textarea, #name input", "alice")
    press(page, "Learn this person")
    page.wait_for_selector("#people-status .error")
    assert "consent is missing" in page.locator("#people-status").inner_text()
    page.check("#consent input")
    press(page, "Learn this person")
    page.wait_for_selector("#preview figure >> nth=2")
    wait_for_text(page, "#people-status", "preparing alice for fast restoration")
    wait_for_text(page, "#people-status", "alice is learned", LONG_WAIT)  # its plan is exported
    check(page, shoot, "people-learned")
    assert page.locator("#person input").input_value() == "alice"
    page.fill("#new-name textarea, #new-name input", "ann")
    press(page, "Rename")
    wait_for_text(page, "#known-status", "alice is now named ann")
    press(page, "Export the chosen person")
    with page.expect_download() as download:
        page.locator("#export-link a").click()
    download.value.save_as(tmp_path / "ann.safetensors")
    page.fill("#confirmation textarea, #confirmation input", "ann")
    press(page, "Delete for good")
    wait_for_text(page, "#known-status", "is deleted")
    assert "Nobody is learned yet" in page.locator("#known").inner_text()
    drop(page, "#import", [str(tmp_path / "ann.safetensors")])
    wait_for_text(page, "#known-status", "ann is stored on this machine")
    wait_for_text(page, "#known", "ann")


def test_comparing_and_a_study(page, shoot, files, address, tmp_path):
    mine, theirs = [files("a.png"), files("b.png", 5)], [files("a_restored.png", 1), files("b_restored.png", 6)]
    compare(page, {"mine": mine, "theirs": theirs})
    stage = page.locator("#sides pf-viewer .stage")
    stage.focus()
    page.keyboard.press("+")
    zooms = stage.locator("img").evaluate_all("images => images.map(image => image.style.transform)")
    assert len(zooms) == 2 and zooms[0] == zooms[1] and "scale(1.5)" in zooms[0]
    check(page, shoot, "compare")
    rate(page, address, pictures=2, choice="A")
    check(page, shoot, "study")
    with page.expect_download() as download:
        page.locator("#study-results a.studio-download").click()
    download.value.save_as(tmp_path / "votes.csv")
    assert len(list(csv.DictReader(io.StringIO((tmp_path / "votes.csv").read_text())))) == 4


def test_the_machine(alice, page, shoot):
    open_tab(page, "Machine")
    press(page, "Examine this machine")
    page.wait_for_selector("#machine table >> nth=4")
    wait_for_text(page, "#plans", "person alice")
    press(page, "Time this plan")
    page.wait_for_selector("#plot img")
    check(page, shoot, "machine")


def test_the_keyboard_alone(page, files):
    """Tab reaches every control, the focus is visible, and Enter restores."""
    drop(page, "#pictures", [files("old.png", 0, 0.1)])  # a file dialog belongs to the system
    page.wait_for_selector("#faces li")
    page.locator("body").click(position={"x": 1, "y": 1})
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(() => {const e = document.activeElement;"
            " const seen = s => s.outlineStyle !== 'none' || s.boxShadow !== 'none';"
            " const around = e.closest('label') || e;"
            " return [e.innerText || e.getAttribute('aria-label') || e.id || '',"
            " seen(getComputedStyle(e)) || seen(getComputedStyle(around))]})()"
        )
        reached.add(found[0].strip())
        assert found[1], found
        if found[0].strip() == "Restore" and "People" in reached:
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#results tbody tr")
    page.wait_for_function(f"{RESULT}.includes('old_restored')")
    viewer = page.locator("pf-viewer input[type=range]")
    viewer.focus()
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('pf-viewer').share === 0")


def test_an_error_is_one_readable_line(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    drop(page, "#pictures", [str(bad)])
    page.wait_for_selector("#restore-status .error")
    text = page.locator("#restore-status").inner_text().strip()
    assert text.startswith("bad.png: ") and "Traceback" not in text and "\n" not in text
