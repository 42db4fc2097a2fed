"""A running studio and headless Chromium. `make test-studio` runs these tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.identity import kept_plan

SCREENS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SHOTS = os.environ.get("PFSTORER_SHOTS")
"""Folder for screenshots; none are kept without it."""


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
def address(base, data):
    """The address of a running studio."""
    environment = {**os.environ, "PFSTORER_HOME": str(data)}
    command = [sys.executable, "-m", "pfstorer_rt.cli", "studio", "--no-open", "--base", str(base), "--port", "0"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line.startswith("studio: http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


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
        found.set_default_timeout(60_000)
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
