"""The page as an ASGI application: who gets in, what can be fetched, and what an upload may hold."""

import asyncio
import re

import pytest
from starlette.testclient import TestClient

from pfstorer_rt.errors import SettingError
from pfstorer_rt.studio.config import Limits, StudioConfig
from pfstorer_rt.studio.guard import COOKIE, POLICY, Guard
from pfstorer_rt.studio.serving import address, make_app
from pfstorer_rt.studio.workspace import open_workspace

TOKEN = "correct horse"


@pytest.fixture(scope="module")
def application(quick_base, tmp_path_factory):
    """The whole application without a token, and its workspace."""
    with pytest.MonkeyPatch.context() as patch, open_workspace(Limits(total_bytes=2 << 20)) as workspace:
        patch.setenv("PFSTORER_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_app(StudioConfig(base=quick_base), workspace), workspace


@pytest.fixture
def page(application):
    """A browser on this machine."""
    with TestClient(application[0], base_url="http://127.0.0.1:7860") as client:
        yield client


@pytest.fixture
def locked(application):
    """A browser on another machine; the application has a token."""
    app = Guard(application[0].app, StudioConfig(host="0.0.0.0", token=TOKEN), application[1])
    with TestClient(app, base_url="http://studio.example") as client:
        yield client


def test_the_page_names_no_other_host(page):
    answer = page.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == POLICY
    assert "fonts.g" not in answer.text and "cdn" not in answer.text.lower()
    style = page.get("/theme.css")
    assert style.status_code == 200 and not re.search(r"url\(.?https?:|@import", style.text)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.5:7860", ""])
def test_other_host_names_are_refused(page, host):
    assert page.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_names_of_this_machine_are_served(page, host):
    assert page.get("/theme.css", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example"])
def test_other_pages_cannot_send(page, origin):
    assert page.post("/gradio_api/queue/join", json={}, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:22/",
        "/gradio_api/file=http://127.0.0.1:22/",
        "/monitoring",
        "/pictures/x/passwd",
        "/pictures/..%2f..%2fetc/passwd",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_but_published_files_can_be_fetched(page, path):
    answer = page.get(path, follow_redirects=False)
    assert answer.status_code in (302, 403, 404, 405)
    assert "root:" not in answer.text and "SSH" not in answer.text and "[project]" not in answer.text
    assert "127.0.0.1:22" not in answer.headers.get("location", "")


def test_an_identity_in_the_data_directory_cannot_be_fetched(page, make_nano_identity):
    from pfstorer_rt.identity import named_identity

    path = make_nano_identity().save(named_identity("alice"))
    assert page.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_published_files_can_be_fetched_and_are_not_kept(page, application):
    workspace = application[1]
    file = workspace.session("x").folder / "a.png"
    file.write_bytes(b"picture")
    answer = page.get(f"/{workspace.publish(file)}")
    assert answer.content == b"picture" and answer.headers["cache-control"] == "private, no-store"


def test_uploads_are_private_and_limited(page, application):
    workspace = application[1]
    done = page.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 100)})
    assert done.status_code == 200 and str(workspace.uploads) in done.text
    refused = page.post("/gradio_api/upload", files={"files": ("b.png", b"x" * (3 << 20))})
    assert refused.status_code == 413
    names = [path.name for path in workspace.uploads.rglob("*") if path.is_file()]
    assert "a.png" in names and "b.png" not in names


def test_a_body_without_a_length_is_cut(application):
    """A request that states no length cannot fill the memory."""
    guard, left = application[0], []

    async def endless():
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    receive = guard.limited({"path": "/gradio_api/upload"}, endless)

    async def read():
        for _ in range(4):
            left.append((await receive())["type"])

    asyncio.run(read())
    assert left == ["http.request"] * 2 + ["http.disconnect"] * 2


def test_a_token_is_needed_everywhere(locked):
    for path in ("/", "/config", "/theme.css", "/pictures/a/b", "/gradio_api/info"):
        answer = locked.get(path)
        assert answer.status_code == 401, path
        assert "token" in answer.text
    assert locked.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
    assert "This token is wrong" in locked.get("/?token=wrong").text


def test_the_token_opens_the_page_and_leaves_the_address(locked):
    entered = locked.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"]
    assert COOKIE in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert locked.get("/").status_code == 200


TOKENS = ["abc+defgh", "secret#12345", "aaaa&bbbb", "100%25secure", 'a; b=c,"d\\', "/path/?x=1"]
TOKENS += ["gr\xfc\xdfe dich", "\u5bc6\u7801" * 4]


@pytest.mark.parametrize("token", TOKENS)
def test_the_printed_address_opens_the_page(application, token):
    config = StudioConfig(host="0.0.0.0", token=token)
    link = address(config, 7860).removeprefix("http://0.0.0.0:7860")
    assert link.isascii() and " " not in link
    with TestClient(Guard(application[0].app, config, application[1]), base_url="http://studio.example") as client:
        assert client.get(link, follow_redirects=False).status_code == 303
        assert client.get("/theme.css").status_code == 200
        client.cookies.clear()
        assert client.get("/", params={"token": token}).status_code == 200, "typed"
        assert client.get("/theme.css", headers={"cookie": f"{COOKIE}=wrong"}).status_code == 401


@pytest.mark.parametrize("cookie", ["other:app=1", "a/b=1; c", "expires=1", '"', "=", "\xff=\xfe"])
def test_cookies_of_other_pages_do_no_harm(locked, cookie):
    locked.get("/", params={"token": TOKEN})
    mine = locked.cookies[COOKIE]
    locked.cookies.clear()
    for header, status in ((cookie, 401), (f"{cookie}; {COOKIE}={mine}", 200), (f"{COOKIE}={mine}; {cookie}", 200)):
        assert locked.get("/theme.css", headers={"cookie": header.encode("latin-1")}).status_code == status


def test_other_machines_need_a_token():
    with pytest.raises(SettingError, match=r"host 0\.0\.0\.0: other machines can reach"):
        StudioConfig(host="0.0.0.0")
    with pytest.raises(SettingError, match="expected 8 or more"):
        StudioConfig(token="short")
    with pytest.raises(SettingError, match="bytes that are not UTF-8: expected text; choose another token"):
        StudioConfig(token="gr\udcfc\udcdfe dich")
    assert StudioConfig(host="0.0.0.0", token=TOKEN) and StudioConfig(host="::1") and StudioConfig(host="127.0.0.2")
