"""The three stories of the page on the shipped base: learn a person, restore, compare in a study. Takes minutes."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from studio_page import LONG_WAIT, check, compare, drop, open_tab, press, rate, wait_for_text

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
    page.set_default_timeout(1000 * LONG_WAIT)
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
    wait_for_text(page, "#people-status", "alice is learned", 3 * LONG_WAIT)
    check(page, shoot, "portrait-people")

    open_tab(page, "Restore")
    drop(page, "#pictures", [str(old)])
    wait_for_text(page, "#faces", "The green frame shows the person.")
    press(page, "Restore")
    wait_for_text(page, "#reading", "same person", LONG_WAIT)
    with page.expect_download() as download:
        page.locator("#results a").click()
    restored = tmp_path / "old_restored.jpg"
    download.value.save_as(restored)
    check(page, shoot, "portrait-restore")

    compare(page, {"before": [str(old)], "restored": [str(restored)]})
    rate(page, address, pictures=1, choice="B")
    check(page, shoot, "portrait-study")
