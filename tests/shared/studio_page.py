"""What the tests of the studio do with its page in a browser."""

from contextlib import suppress

WAIT = 120
"""Seconds that a test waits for the page, where nothing is learned or exported; a quiet machine needs a fifth."""
LONG_WAIT = 600
"""Seconds that a test waits until a person is learned and the plan is exported."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
RESULT = "document.querySelector('#viewer pf-viewer').shadowRoot.querySelector('figure:last-child img').src"


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
    page.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def wait_for_text(page, selector, text, seconds=WAIT):
    """Wait until an element has a text. An error in the element, or no such text in time, fails with its text."""
    from playwright.sync_api import TimeoutError

    ended = "e => e?.innerText.includes(text) || e?.querySelector('.error')"
    with suppress(TimeoutError):
        page.wait_for_function(
            f"([selector, text]) => ({ended})(document.querySelector(selector))",
            arg=[selector, text],
            timeout=1000 * seconds,
        )
    found = page.locator(selector).inner_text()
    assert text in found, f"{selector} has the text {found!r}; {text!r} was expected within {seconds} s"


def compare(page, methods):
    """Drop the pictures of two methods, {name: files}, and compare them."""
    open_tab(page, "Compare")
    for letter, (name, files) in zip("AB", methods.items(), strict=True):
        page.fill(f"#method-{letter} textarea, #method-{letter} input", name)
        drop(page, f"#folder-{letter}", files)
        page.wait_for_selector(f"#folder-{letter} tr.file >> nth={len(files) - 1}")
    press(page, "Compare")
    page.wait_for_selector("#sides pf-viewer")


def rate(page, address, pictures, choice):
    """Make a study of the compared pictures, and answer it as a rater who chooses the result `choice` (A or B)."""
    press(page, "Make a study of these folders")
    link = page.locator("#study-results a").get_attribute("href")
    rater = page.context.new_page()
    rater.set_default_timeout(1000 * WAIT)
    rater.goto(address + link)
    rater.get_by_role("link", name="Start").click()
    for number in range(1, pictures + 1):
        rater.wait_for_selector(f"h1:has-text('Picture {number} of {pictures}')")
        assert violations(rater) == []
        for question in ("quality", "identity"):
            rater.locator(f"input[name={question}][value={choice}]").check()
        rater.get_by_role("button", name="Next").click()
    rater.wait_for_selector("h1:has-text('Thank you')")
    rater.close()
    press(page, "Show the results")
    wait_for_text(page, "#study-results", "95 % interval")


def wait_for_pictures(page):
    """Wait until all pictures are loaded, also those of the viewers, and no animation runs."""
    page.wait_for_function(
        "[document, ...[...document.querySelectorAll('pf-viewer')].map(viewer => viewer.shadowRoot)]"
        ".flatMap(root => [...root.querySelectorAll('img')]).every(image => image.complete && image.naturalWidth > 0)"
    )
    page.wait_for_function(
        "document.getAnimations().every(a => a.playState !== 'running' || a.effect.getTiming().iterations === Infinity)"
    )


def check(page, shoot, name):
    """Keep a screenshot, and check that there is no error, the width, and accessibility in light and in dark."""
    wait_for_pictures(page)
    shoot(name)
    assert wide(page) == []
    assert page.locator(".error:visible").all_inner_texts() == []
    for _ in range(2):
        assert violations(page) == []
        page.evaluate("document.body.classList.toggle('dark')")
        wait_for_pictures(page)
