"""The stories of the page in a real browser: restore, learn, compare, with keyboard alone, and accessibility."""

import json
import zipfile

import pytest

pytestmark = pytest.mark.browser
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]


def violations(page):
    """What axe finds wrong, with the elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": RULES}}).response["violations"]
    return [
        f"{each['id']}: {node['html'][:160]} {node['failureSummary'][:200]}" for each in found for node in each["nodes"]
    ]


def wide(page):
    """Elements that are wider than the screen."""
    return page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && getComputedStyle(e).visibility !== 'hidden' && !e.closest('.studio-scroll'))"
        ".map(e => e.tagName + '.' + e.className + '#' + e.id).slice(0, 5)"
    )


def drop(page, selector, files):
    page.set_input_files(f"{selector} input[type=file]", files)


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def check(page, shoot, name):
    """Keep a screenshot, and check accessibility and width."""
    page.wait_for_timeout(500)
    shoot(name)
    assert violations(page) == []
    assert wide(page) == []


def test_restoring(page, shoot, files, tmp_path):
    check(page, shoot, "restore-empty")
    drop(page, "#pictures", [files("old.png", 0, 0.1), files("older.jpg", 9, 0.1)])
    page.wait_for_selector("#faces li >> nth=1")
    page.get_by_role("button", name="Restore", exact=True).click()
    page.wait_for_selector("#results tbody tr >> nth=1")
    page.wait_for_function("document.querySelector('pf-viewer').shadowRoot.querySelectorAll('img').length === 2")
    check(page, shoot, "restore-done")
    first = page.evaluate("document.querySelector('pf-viewer').shadowRoot.querySelector('figure:last-child img').src")
    slider = page.locator("#strength input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    slider.dispatch_event("pointerup")
    page.wait_for_function(
        "old => document.querySelector('pf-viewer').shadowRoot.querySelector('figure:last-child img').src !== old",
        arg=first,
    )
    with page.expect_download() as download:
        page.locator("#zip a").click()
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == ["old_restored.png", "older_restored.jpg", "report.json"]
        strengths = {entry["input"]: entry["strength"] for entry in json.loads(archive.read("report.json"))}
    assert strengths == {"old.png": 0.95, "older.jpg": 1.0}


def test_learning_renaming_and_deleting(page, shoot, files):
    open_tab(page, "People")
    drop(page, "#photographs", [files(f"{i}.png", 5 * i) for i in range(3)] + [files("copy.png", 0)])
    page.wait_for_selector("#crops li >> nth=3")
    assert "almost the same image" in page.locator("#crops .refused").inner_text()
    page.fill("#name textarea, #name input", "alice")
    page.get_by_role("button", name="Learn this person").click()
    page.wait_for_selector("#people-status .error")
    assert "consent is missing" in page.locator("#people-status").inner_text()
    page.check("#consent input")
    page.get_by_role("button", name="Learn this person").click()
    page.wait_for_selector("#preview figure >> nth=2")
    page.wait_for_function("document.querySelector('#people-status').innerText.includes('is learned')")
    check(page, shoot, "people-learned")
    assert page.locator("#person input").input_value() == "alice"
    page.fill("#confirmation textarea, #confirmation input", "alice")
    page.get_by_role("button", name="Delete for good").click()
    page.wait_for_function("document.querySelector('#people-status').innerText.includes('is deleted')")
    assert "Nobody is learned yet" in page.locator("#known").inner_text()


def test_comparing_and_a_study(page, shoot, files, address):
    open_tab(page, "Compare")
    page.fill("#method-A textarea, #method-A input", "mine")
    page.fill("#method-B textarea, #method-B input", "theirs")
    drop(page, "#folder-A", [files("a.png"), files("b.png", 5)])
    page.wait_for_selector("#folder-A tr.file >> nth=1")
    drop(page, "#folder-B", [files("a_restored.png", 1), files("b_restored.png", 6)])
    page.wait_for_selector("#folder-B tr.file >> nth=1")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_selector("#sides pf-viewer")
    stage = page.locator("#sides pf-viewer .stage")
    stage.focus()
    page.keyboard.press("+")
    zooms = stage.locator("img").evaluate_all("images => images.map(image => image.style.transform)")
    assert len(zooms) == 2 and zooms[0] == zooms[1] and "scale(1.5)" in zooms[0]
    check(page, shoot, "compare")
    page.get_by_role("button", name="Make a study of these folders").click()
    link = page.locator("#study-results a").get_attribute("href")
    rater = page.context.new_page()
    rater.goto(address + link)
    rater.get_by_role("link", name="Start").click()
    for _ in range(2):
        assert violations(rater) == []
        for question in ("quality", "identity"):
            rater.locator(f"input[name={question}][value=A]").check()
        rater.get_by_role("button", name="Next").click()
    assert "Thank you" in rater.content()
    rater.close()
    page.get_by_role("button", name="Show the results").click()
    page.wait_for_function("document.querySelector('#study-results').innerText.includes('of 2')")
    check(page, shoot, "study")


def test_the_machine(page, shoot):
    open_tab(page, "Machine")
    page.get_by_role("button", name="Examine this machine").click()
    page.wait_for_selector("#machine table >> nth=4")
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
    viewer = page.locator("pf-viewer input[type=range]")
    viewer.focus()
    page.keyboard.press("Home")
    assert page.evaluate("document.querySelector('pf-viewer').share") == 0


def test_an_error_is_one_readable_line(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    drop(page, "#pictures", [str(bad)])
    page.wait_for_selector("#restore-status .error")
    text = page.locator("#restore-status").inner_text()
    assert "bad.png" in text and "Traceback" not in text and "\n" not in text.strip()
