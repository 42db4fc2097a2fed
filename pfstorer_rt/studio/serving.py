"""Serve the page on this machine until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from pfstorer_rt.errors import PFStorerError, one_line
from pfstorer_rt.extras import needed_by
from pfstorer_rt.studio.config import StudioConfig
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.workspace import Workspace, open_workspace


def make_app(config: StudioConfig, workspace: Workspace) -> Any:
    """Return the page as an ASGI application, behind its guard.

    Raises `MissingBackendError` without the extra `studio`.
    """
    # Gradio reads these when it is imported and when a component is made.
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with needed_by("the studio", "studio"):
        import gradio as gr
        from fastapi import FastAPI
        from fastapi.responses import FileResponse, PlainTextResponse

        from pfstorer_rt.studio.guard import Guard
        from pfstorer_rt.studio.page import build_page
        from pfstorer_rt.studio.study_pages import add_study_pages
        from pfstorer_rt.studio.theme import scripts, style, theme
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def picture(key: str, name: str) -> Any:
        path = workspace.published(f"{key}/{name}")
        if path is None or not path.is_file():
            return PlainTextResponse("Not found.", 404)
        return FileResponse(path, headers={"cache-control": "private, no-store"})

    app.get("/pictures/{key}/{name}")(picture)
    add_study_pages(app)
    page = build_page(workspace, Engines(config))
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=config.host,
        server_port=config.port,
        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=config.limits.file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme(),
        css=style(),
        head=scripts(),
    )
    return Guard(app, config, workspace)


def serve(config: StudioConfig, on_ready: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted; then all files of the page are deleted.

    on_ready: called with the address of the page. Raises `MissingBackendError` without the extra `studio`, and
    `PFStorerError` when the port cannot be used.
    """
    with needed_by("the studio", "studio"):
        import uvicorn
    with open_workspace(config.limits) as workspace, listen(config.host, config.port) as open_socket:
        app = make_app(config, workspace)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=2))
        on_ready(address(config, open_socket.getsockname()[1]))
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            server.run(sockets=[open_socket])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host.strip("[]"), port))
        found.listen()
    except OSError as error:
        found.close()
        reason = one_line(error)
        raise PFStorerError(
            f"{host} port {port}: cannot be used ({reason}); choose another port", setting="port"
        ) from error
    return found


def address(config: StudioConfig, port: int) -> str:
    """Return the address of the page, with the token where there is one."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{port}/" + (f"?token={quote(config.token, safe='')}" if config.token else "")
