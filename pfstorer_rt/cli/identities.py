"""`pfstorer-rt identities`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click


@click.group()
def command() -> None:
    """List, show, verify or remove learned identities (biometric data, kept for you alone).

    \b
    Example:
      pfstorer-rt identities list
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per identity.")
def list_command(as_json: bool) -> None:
    """List the named identities.

    \b
    Example:
      pfstorer-rt identities list --json
    """
    from pfstorer_rt.errors import BadFileError
    from pfstorer_rt.identity import Identity, identities_dir, list_identities

    paths = list_identities()
    if not paths and not as_json:
        click.echo(f"no identities in {identities_dir()}; make one with `pfstorer-rt personalize`", err=True)
    for path in paths:
        try:
            identity = Identity.load(path, tensors=False)
        except BadFileError as error:
            click.echo(
                json.dumps({"name": path.stem, "error": str(error)}) if as_json else f"{path.stem}  unreadable: {error}"
            )
            continue
        report: dict[str, Any] = {
            "name": path.stem,
            "base": identity.base_name,
            "method": identity.method,
            "references": len(identity.references),
            "bytes": path.stat().st_size,
        }
        click.echo(
            json.dumps(report)
            if as_json
            else f"{path.stem}  {identity.method} on {identity.base_name}, {len(identity.references)} references, "
            f"{report['bytes'] / 1e6:.1f} MB"
        )


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def show_command(name: str, as_json: bool) -> None:
    """Show one identity.

    \b
    Example:
      pfstorer-rt identities show alice
    """
    from pfstorer_rt.cli.inspect import describe_identity, print_report
    from pfstorer_rt.identity import identity_path

    print_report(describe_identity(identity_path(name)), as_json)


@command.command("verify")
@click.argument("name")
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path))
def verify_command(name: str, photos: tuple[Path, ...]) -> None:
    """Check that a file is whole, that its base is here, and which PHOTOS (files or folders) it was learned from.

    \b
    Example:
      pfstorer-rt identities verify alice photos/alice/*.jpg
    """
    from pfstorer_rt.base_files import find_base, fingerprint_directory
    from pfstorer_rt.errors import PFStorerError
    from pfstorer_rt.files import sha256_file
    from pfstorer_rt.identity import Identity, identity_path
    from pfstorer_rt.imaging.find import find_images

    path = identity_path(name)
    identity = Identity.load(path)
    failed = False

    def say(good: bool, text: str) -> None:
        nonlocal failed
        failed |= not good
        click.echo(("ok      " if good else "FAILED  ") + text)

    finite = all(bool(t.isfinite().all()) for t in identity.tensors.values() if t.is_floating_point())
    say(bool(identity.tensors) and finite, f"{len(identity.tensors)} tensors, all finite")
    say(path.stat().st_mode & 0o077 == 0, "readable by its owner only")
    try:
        here = fingerprint_directory(find_base(identity.base_name))
        say(
            here == identity.base_fingerprint,
            f"base {identity.base_name} is here and the one it was learned on",
        )
    except PFStorerError as error:
        say(False, str(error))
    for photo in find_images(photos) if photos else ():
        say(sha256_file(photo) in identity.references, f"learned from {photo}")
    sys.exit(1 if failed else 0)


@command.command("rm")
@click.argument("names", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm_command(names: tuple[str, ...], yes: bool) -> None:
    """Delete identities for good, with what an interrupted training and engines' caches keep of them.

    \b
    Example:
      pfstorer-rt identities rm alice --yes
    """
    from pfstorer_rt.errors import BadFileError
    from pfstorer_rt.files import remove_leftovers
    from pfstorer_rt.identity import identities_dir, identity_path, read_metadata

    paths: list[tuple[str, list[Path]]] = []
    for name in names:
        path = identity_path(name)
        checkpoint = path.with_name(path.stem + ".training.pt")
        named = path.parent == identities_dir()  # other folders hold files of other programs too
        if path.is_file() and not named:
            read_metadata(path)
        present = [checkpoint] if checkpoint.is_file() and (named or is_checkpoint(checkpoint)) else []
        present += [path] if path.is_file() else []
        if not present:
            raise BadFileError(f"{name}: no such identity; `pfstorer-rt identities list` shows the known ones")
        # The identity goes last: without it the rest could not be found again after an interruption.
        paths.append((name, [*compiled_networks(path), *present]))
    for name, present in paths:
        if yes or confirmed(name):
            for path in present:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            remove_leftovers(present[-1].parent)
            click.echo(f"{name}: deleted")


def confirmed(name: str) -> bool:
    """Ask whether to delete an identity; raises `click.UsageError` where nobody is there to answer."""
    try:
        return click.confirm(f"delete {name}?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(f"{name} was not deleted: nobody answered; pass --yes") from None


def is_checkpoint(path: Path) -> bool:
    """Whether a file is the state of an interrupted training, as `TrainState.save` writes it."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises many kinds for another file
        return False
    return isinstance(state, dict) and {"iteration", "signature", "parameters"} <= state.keys()


def compiled_networks(path: Path) -> list[Path]:
    """Return the folders in which engines keep compiled networks of this identity.

    None, with a note on stderr, for a file that cannot be read, or whose tensors do not have the fingerprint in its
    metadata: such a file could name the networks of another identity.
    """
    from pfstorer_rt.engine.openvino import cache_folder
    from pfstorer_rt.errors import PFStorerError
    from pfstorer_rt.files import cache_home, show_path
    from pfstorer_rt.identity import Identity

    try:
        folder = cache_folder(Identity.load(path).fingerprint)
    except (PFStorerError, ValueError):
        compiled = cache_home() / "openvino"
        if path.is_file() and compiled.is_dir():
            click.echo(
                f"note: compiled networks of {show_path(path)} may be left in {show_path(compiled)}, as its "
                "fingerprint is not known; that folder can be deleted at any time",
                err=True,
            )
        return []
    return [folder] if folder.is_dir() else []
