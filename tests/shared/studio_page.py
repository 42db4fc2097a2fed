"""What the tests of the studio do with its page in a browser."""

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


def wait_for_text(page, selector, text, seconds=60):
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)",
        arg=[selector, text],
        timeout=1000 * seconds,
    )


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
    """Keep a screenshot, and check width and accessibility, in light and in dark."""
    wait_for_pictures(page)
    shoot(name)
    assert wide(page) == []
    for _ in range(2):
        assert violations(page) == []
        page.evaluate("document.body.classList.toggle('dark')")
        wait_for_pictures(page)
