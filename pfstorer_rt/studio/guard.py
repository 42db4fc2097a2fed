"""The guard in front of the page: host names, token, origin, headers, and the size of uploads (ASGI)."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from starlette.requests import cookie_parser

from pfstorer_rt.studio.config import LOOPBACK, StudioConfig
from pfstorer_rt.studio.workspace import Workspace

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "pfstorer_studio"
STUDY = "/study/"
"""Paths of user studies: a rater has the code of the study and not the token."""
CLOSED = ("/gradio_api/proxy=", "/proxy=", "/monitoring", "/gradio_api/deep_link", "/gradio_api/run-history")
"""Paths of Gradio that the studio does not use."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The browser itself refuses every other host."""
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"same-origin",  # "no-referrer" makes browsers hide the origin of the raters' own forms
    b"x-content-type-options": b"nosniff",
    b"cross-origin-resource-policy": b"same-origin",
}
SIGN_IN = Path(__file__).parent / "sign_in.html"


class Guard:
    """Refuses requests that do not come from the page's own visitors, before Gradio reads them."""

    def __init__(self, app: App, config: StudioConfig, workspace: Workspace) -> None:
        self.app, self.config, self.workspace = app, config, workspace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:  # the page uses no websockets
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refusal(scope, headers)
        if refused is not None:
            await respond(send, *refused)
            return
        if self.enters(scope):
            await respond(send, 303, "", {b"location": b"/", b"set-cookie": self.cookie()})
            return
        await self.app(scope, self.limited(scope, receive), secured(send))

    def refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Return the status and page of a refusal; None for an allowed request."""
        path, host = scope["path"], host_of("//" + headers.get(b"host", ""))
        if self.config.token is None and host not in (*LOOPBACK, self.config.host):
            return 400, "This address is not served here."  # a foreign name that resolves to this machine
        origin = headers.get(b"origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and host_of(origin) != host:
            return 403, "Requests from other pages are refused."
        if path.startswith(CLOSED):
            return 404, "Not found."
        if path.startswith(STUDY) or self.has_token(headers) or self.enters(scope):
            return self.upload_refusal(scope, headers)
        wrong = "token" in parse_qs(scope["query_string"].decode("latin-1"))
        text = "This token is wrong." if wrong else "Enter the token of this studio."
        return 401, SIGN_IN.read_text().replace("<!-- text -->", text)

    def has_token(self, headers: dict[bytes, str]) -> bool:
        """Whether the visitor has entered the token; true where there is none."""
        if self.config.token is None:
            return True
        # `SimpleCookie` raises an error for some names, and other pages of this machine can set cookies of any name.
        return same(cookie_parser(headers.get(b"cookie", "")).get(COOKIE, ""), cookie_value(self.config.token))

    def enters(self, scope: Scope) -> bool:
        """Whether a request brings the right token in its address."""
        if self.config.token is None or scope["path"] != "/":
            return False
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return same(given[0], self.config.token)

    def cookie(self) -> bytes:
        """Return the cookie of a visitor who entered the token; scripts and other sites cannot use it."""
        cookie = SimpleCookie({COOKIE: cookie_value(self.config.token or "")})
        cookie[COOKIE].update({"path": "/", "httponly": "1", "samesite": "Strict"})
        return cookie[COOKIE].OutputString().encode("latin-1")

    def upload_refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Refuse an upload that would fill the workspace."""
        if not scope["path"].startswith("/gradio_api/upload"):
            return None
        length = headers.get(b"content-length", "0")
        size = int(length) if length.isdecimal() else 0
        if self.workspace.used_bytes() + size > self.workspace.limits.total_bytes:
            return 413, "The studio holds too many files; close other pages or restart it."
        return None

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that ends a request once its body is larger than the workspace may be."""
        left = self.workspace.limits.total_bytes if "upload" in scope["path"] else self.workspace.limits.file_bytes

        async def read() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return {"type": "http.disconnect"} if left < 0 else message

        return read


def host_of(address: str) -> str | None:
    """Return the host name of an address, in lower case and without its port."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def cookie_value(token: str) -> str:
    """Return a token as the value of a cookie, which may have ASCII characters only."""
    return quote(token, safe="")


def same(given: str, token: str) -> bool:
    """Compare a token in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def secured(send: Send) -> Send:
    """Add the headers of every answer."""

    async def add(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in HEADERS]
            message = {**message, "headers": [*kept, *HEADERS.items()]}
        await send(message)

    return add


async def respond(send: Send, status: int, text: str, headers: dict[bytes, bytes] | None = None) -> None:
    """Send a short answer."""
    kind = b"text/html; charset=utf-8" if text.startswith("<") else b"text/plain; charset=utf-8"
    fields = {b"content-type": kind, b"cache-control": b"no-store", **HEADERS, **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": list(fields.items())})
    await send({"type": "http.response.body", "body": text.encode()})
