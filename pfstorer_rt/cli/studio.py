"""`pfstorer-rt studio`."""

from __future__ import annotations

from pathlib import Path

import click

from pfstorer_rt.cli.options import check_plan


@click.command()
@click.option("--base", default="portrait", show_default=True, help="Base: portrait, or a base directory.")
@click.option(
    "--engine",
    "engines",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Plan file to offer beside the stored identities; repeat the option for several plans.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve; others need a --token.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Port; 0: a free one.")
@click.option(
    "--token",
    envvar="PFSTORER_STUDIO_TOKEN",
    help="Password that every visitor must enter, 8 characters or more. [default: $PFSTORER_STUDIO_TOKEN, else none]",
)
@click.option("--open/--no-open", "show", default=True, help="Open the page in the browser.")
def command(base: str, engines: tuple[Path, ...], host: str, port: int, token: str | None, show: bool) -> None:
    """Restore pictures and learn people on a page in the browser.

    Only this machine can open the page, unless --host and --token are given. Nothing is sent to other machines. The
    files of the page are deleted when the command ends.

    \b
    Example:
      pfstorer-rt studio
    """
    from pfstorer_rt.base_files import find_base
    from pfstorer_rt.console import echo
    from pfstorer_rt.plan import Plan
    from pfstorer_rt.studio.config import StudioConfig
    from pfstorer_rt.studio.serving import serve

    def ready(address: str) -> None:
        echo(f"studio: {address}  (Ctrl-C ends it)", err=True)
        if show:
            import webbrowser

            webbrowser.open(address)

    find_base(base)  # its error comes before the page is served
    for engine in engines:
        check_plan(str(engine))
        Plan.open(engine)
    serve(StudioConfig(base, engines, host, port, token), ready)
