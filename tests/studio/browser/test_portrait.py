"""The three stories of the page on the shipped base: learn a person, restore, compare in a study. Takes minutes."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from studio_page import check, drop, open_tab, press, wait_for_text

import pfstorer_rt
from pfstorer_rt.base_files import find_base

pytestmark = [pytest.mark.browser, pytest.mark.slow]
IMAGES = Path(pfstorer_rt.__file__).parent / "demo_images"
ITERATIONS = 12
"""Iterations of the training; the base's own number takes far longer."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Directory with the shipped base, which learns a person in few iterations."""
    folder = shutil.copytree(find_base("portrait"), tmp_path_factory.mktemp("base") / "portrait")
    config = json.loads((folder / "config.json").read_text())
    config["personalize"]["iterations"] = ITERATIONS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("page", [("desktop", "light")], indirect=True, ids=["desktop-light"])
def test_the_stories_on_the_shipped_base(page, shoot, tmp_path, address):
    page.set_default_timeout(1_500_000)
    old = tmp_path / "old.jpg"
    blurred = Image.open(IMAGES / "original.jpg").filter(ImageFilter.GaussianBlur(3)).resize((320, 320))
    blurred.save(old, quality=40)

    open_tab(page, "People")
    drop(page, "#photographs", [str(IMAGES / f"reference_{number}.jpg") for number in range(1, 5)])
    page.wait_for_selector("#crops li >> nth=3")
    assert page.locator("#crops .refused").count() == 0
    page.fill("#name textarea, #name input", "alice")
    page.check("#consent input")
    press(page, "Learn this person")
    page.wait_for_selector("#preview figure >> nth=2")
    wait_for_text(page, "#people-status", "alice is learned", seconds=1500)
    check(page, shoot, "portrait-people")

    open_tab(page, "Restore")
    drop(page, "#pictures", [str(old)])
    wait_for_text(page, "#faces", "The green frame shows the person.")
    press(page, "Restore")
    wait_for_text(page, "#reading", "same person", seconds=300)
    with page.expect_download() as download:
        page.locator("#results a").click()
    restored = tmp_path / "old_restored.jpg"
    download.value.save_as(restored)
    check(page, shoot, "portrait-restore")

    open_tab(page, "Compare")
    page.fill("#method-A textarea, #method-A input", "before")
    page.fill("#method-B textarea, #method-B input", "restored")
    drop(page, "#folder-A", [str(old)])
    page.wait_for_selector("#folder-A tr.file")
    drop(page, "#folder-B", [str(restored)])
    page.wait_for_selector("#folder-B tr.file")
    press(page, "Compare")
    page.wait_for_selector("#sides pf-viewer")
    press(page, "Make a study of these folders")
    page.wait_for_selector("#study-results a")
    rater = page.context.new_page()
    rater.goto(address + page.locator("#study-results a").get_attribute("href"))
    rater.get_by_role("link", name="Start").click()
    for question in ("quality", "identity"):
        rater.locator(f"input[name={question}][value=B]").check()
    rater.get_by_role("button", name="Next").click()
    rater.wait_for_selector("h1:has-text('Thank you')")
    rater.close()
    press(page, "Show the results")
    wait_for_text(page, "#study-results", "95 % interval")
    check(page, shoot, "portrait-study")
