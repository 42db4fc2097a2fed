"""`pfstorer-rt identities`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pfstorer_rt.console import counted, echo, note


@click.group()
def command() -> None:
    """List, show, verify, encrypt, decrypt or remove learned identities.

    They are biometric data and readable by you alone.

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
    from pfstorer_rt.cli.inspect import megabytes
    from pfstorer_rt.errors import PFStorerError
    from pfstorer_rt.files import show_path
    from pfstorer_rt.identity import Identity, identities_dir, list_identities, list_unfinished

    paths, unfinished = list_identities(), list_unfinished()
    if not paths and not unfinished and not as_json:
        echo(f"no identities in {identities_dir()}; make one with `pfstorer-rt personalize`", err=True)
    for path in paths:
        try:
            identity = Identity.load(path, tensors=False)
        except PFStorerError as error:
            reason = str(error).removeprefix(f"{show_path(path)}: ")
            text = reason if reason.startswith("encrypted") else f"unreadable: {reason}"
            echo(json.dumps({"name": path.stem, "error": str(error)}) if as_json else f"{path.stem}  {text}")
            continue
        report: dict[str, Any] = {
            "name": path.stem,
            "base": identity.base_name,
            "method": identity.method,
            "references": len(identity.references),
            "bytes": path.stat().st_size,
        }
        echo(
            json.dumps(report)
            if as_json
            else f"{path.stem}  {identity.method} on {identity.base_name}, "
            f"{counted(len(identity.references), 'reference')}, {megabytes(report['bytes'])}"
        )
    for name in unfinished:
        text = f"{name}  training not finished; run the same `personalize` command again to resume"
        echo(json.dumps({"name": name, "training": "not finished"}) if as_json else text)


@command.command("show")
@click.argument("name")
@click.option("-v", "--verbose", is_flag=True, help="Print all values except tensors and settings.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def show_command(name: str, verbose: bool, as_json: bool) -> None:
    """Show one identity.

    \b
    Example:
      pfstorer-rt identities show alice
    """
    from pfstorer_rt.cli.inspect import print_report
    from pfstorer_rt.identity import identity_path
    from pfstorer_rt.runtime.describe import describe_identity

    print_report(describe_identity(identity_path(name)), verbose, as_json)


@command.command("verify")
@click.argument("name")
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path))
def verify_command(name: str, photos: tuple[Path, ...]) -> None:
    """Check an identity file.

    It must be complete and private, and its base must be present. With PHOTOS (files or folders), also check that the
    identity was learned from them.

    \b
    Example:
      pfstorer-rt identities verify alice photos/alice/*.jpg
    """
    from pfstorer_rt.runtime.identities import verify_identity

    checks = verify_identity(name, photos)
    for check in checks:
        echo(f"{'ok' if check.passed else 'FAILED':<8}{check.text}")
    sys.exit(0 if all(check.passed for check in checks) else 1)


@command.command("encrypt")
@click.argument("names", nargs=-1, required=True)
def encrypt_command(names: tuple[str, ...]) -> None:
    """Encrypt identities with a passphrase.

    The passphrase is read from the environment variable PFSTORER_PASSPHRASE, or asked for. There is no way to read the
    identity without it. Plans that were exported are not changed.

    \b
    Example:
      pfstorer-rt identities encrypt alice
    """
    from pfstorer_rt.encryption import SHORTEST, VARIABLE, passphrase_given
    from pfstorer_rt.errors import SettingError
    from pfstorer_rt.runtime.identities import check_plain, encrypt_identity

    passphrase = passphrase_given()
    if passphrase is None and sys.stdin.isatty():
        passphrase = click.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True)
    if passphrase is None:
        raise SettingError(f"no passphrase, and no terminal to ask for it; set {VARIABLE}")
    if len(passphrase) < SHORTEST:
        raise SettingError(f"a passphrase of {len(passphrase)} characters; expected {SHORTEST} or more")
    for name in dict.fromkeys(names):
        check_plain(name)  # an error comes before anything is encrypted
    for name in dict.fromkeys(names):
        encrypt_identity(name, passphrase)
        echo(f"{name}: encrypted")


@command.command("decrypt")
@click.argument("names", nargs=-1, required=True)
def decrypt_command(names: tuple[str, ...]) -> None:
    """Decrypt identities.

    \b
    Example:
      pfstorer-rt identities decrypt alice
    """
    from pfstorer_rt.runtime.identities import check_encrypted, decrypt_identity

    for name in dict.fromkeys(names):
        check_encrypted(name)  # an error comes before anything is decrypted
    for name in dict.fromkeys(names):
        decrypt_identity(name)
        echo(f"{name}: decrypted")


@command.command("rm")
@click.argument("names", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Delete without a question.")
def rm_command(names: tuple[str, ...], yes: bool) -> None:
    """Delete identities permanently.

    Also deletes checkpoints and crops of interrupted trainings, the plan of the studio, and compiled networks.

    \b
    Example:
      pfstorer-rt identities rm alice --yes
    """
    from pfstorer_rt.runtime.identities import delete_identity, find_kept

    for name in dict.fromkeys(names):
        for text in find_kept(name).notes:  # an unknown name is an error before anything is deleted
            note(text)
    for name in dict.fromkeys(names):
        if yes or confirmed(name):
            delete_identity(name)
            echo(f"{name}: deleted")


def confirmed(name: str) -> bool:
    """Ask whether to delete an identity; raises `click.UsageError` when there is no terminal to answer from."""
    try:
        return click.confirm(f"delete {name}?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(f"{name} was not deleted: the question was not answered; pass --yes") from None
