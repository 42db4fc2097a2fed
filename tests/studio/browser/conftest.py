"""A running studio and headless Chromium. `make test-studio` runs these tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studio_page import WAIT

from pfstorer_rt.identity import kept_plan

SCREENS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SHOTS = os.environ.get("PFSTORER_SHOTS")
"""Folder for screenshots; none are kept without it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add a screenshot and the text of the page to the report of a failure."""
    report = yield
    if report.failed and (page := item.funcargs.get("page")):
        shot = Path(SHOTS or item.funcargs["tmp_path"]) / f"failed-{item.name}.png"
        page.screenshot(path=shot, full_page=True)
        report.sections += [("screenshot", str(shot)), ("text of the page", page.locator("body").inner_text())]
    if report.failed and (log := item.funcargs.get("log")):
        report.sections.append(("messages of the studio", log.read_text()))
    return report


@pytest.fixture(scope="session")
def chromium():
    """The path of Chromium, which the tests need."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "Chromium is missing: `apt-get install chromium`"
    return found


@pytest.fixture(scope="session")
def base(nano_base, tmp_path_factory):
    """Directory of a nano base that learns a person in a few seconds."""
    from dataclasses import replace

    from pfstorer_rt.models.base import build_base

    config = replace(nano_base.config, steps=1, personalize={"iterations": 16, "batch": 1, "pool": 4})
    return build_base(config, seed=0).save(tmp_path_factory.mktemp("base") / "nano")


@pytest.fixture
def data(tmp_path):
    """The data directory of the studio."""
    return tmp_path / "home"


@pytest.fixture
def alice(data, make_nano_identity, exported_once):
    """A learned person with her plan; the base of the studio has the weights of `nano_base`."""
    identity = make_nano_identity(gammas=(2.0, 2.0, 2.0, 2.0))
    path = identity.save(data / "identities" / "alice.safetensors")
    shutil.copyfile(exported_once(identity).path, kept_plan(path))


@pytest.fixture
def log(tmp_path):
    """The file with the messages of the studio."""
    return tmp_path / "studio.log"


@pytest.fixture
def address(base, data, log):
    """The address of a running studio."""
    environment = {**os.environ, "PFSTORER_HOME": str(data)}
    command = [sys.executable, "-m", "pfstorer_rt", "studio", "--no-open", "--base", str(base), "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=environment, stderr=stderr)
    try:
        yield wait_for_address(process, log)
    finally:
        process.terminate()
        process.wait(timeout=WAIT)


def wait_for_address(process, log):
    """Return the address that the studio prints when it is ready."""
    end = time.monotonic() + WAIT
    while not (found := re.search(r"^studio: (http://127\.0\.0\.1:\d+\S*)\s", log.read_text(), re.MULTILINE)):
        assert process.poll() is None, "the studio ended: " + log.read_text()
        assert time.monotonic() < end, f"no address within {WAIT} s: " + log.read_text()
        time.sleep(0.1)
    return found[1]


@pytest.fixture
def files(tmp_path, face):
    """Function (name, shift, noise, enlarged) -> path of a picture of the face."""

    def make(name, shift=0, noise=0.0, enlarged=1):
        pixels = face[shift : shift + 220, shift : shift + 220]
        pixels = np.clip(pixels + np.random.default_rng(shift).normal(0, noise, pixels.shape), 0, 1)
        path = tmp_path / name
        picture = Image.fromarray((pixels * 255).astype(np.uint8))
        picture.resize((enlarged * picture.width, enlarged * picture.height)).save(path)
        return str(path)

    return make


@pytest.fixture(params=[("desktop", "light"), ("phone", "dark")], ids="-".join)
def page(request, chromium, address):
    """An open page; requests to other hosts fail the test, and so do errors in the page."""
    from playwright.sync_api import sync_playwright

    screen, scheme = request.param
    foreign, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport=SCREENS[screen], color_scheme=scheme, accept_downloads=True)

        def check(route):
            if route.request.url.startswith(address):
                return route.continue_()
            foreign.append(route.request.url)
            return route.abort()

        context.route("**/*", check)
        found = context.new_page()
        found.set_default_timeout(1000 * WAIT)
        found.on("pageerror", lambda error: errors.append(str(error)))
        found.goto(address)
        found.wait_for_selector("#pictures input[type=file]", state="attached")
        found.wait_for_function("document.querySelector('#person input')?.value.length > 0")
        yield found
        browser.close()
    assert not foreign and not errors


@pytest.fixture
def shoot(page, request):
    """Function (name): keep a screenshot of the whole page."""

    def save(name):
        if SHOTS:
            screen = request.node.callspec.id
            page.screenshot(path=Path(SHOTS) / f"{name}-{screen}.png", full_page=True)

    return save
