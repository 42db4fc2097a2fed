"""The commands, each in its own file that is imported when it is called, and the exit status of a call."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from functools import partial
from importlib import import_module
from typing import Any

import click

from pfstorer_rt import encryption
from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import explain
from pfstorer_rt.errors import (
    BadFileError,
    MismatchError,
    MissingBackendError,
    PFStorerError,
    SettingError,
)
from pfstorer_rt.extras import missing

COMMANDS: dict[str, tuple[str, str]] = {
    "personalize": ("personalize", "Learn a person from 3-5 photographs."),
    "export": ("export", "Compile a base and an identity into one plan file."),
    "restore": ("restore", "Restore images with a plan or a base."),
    "fix": ("fix", "Restore images of a person in one command."),
    "studio": ("studio", "Restore pictures and learn people on a page in the browser."),
    "degrade": ("degrade", "Degrade good images, to test restoration."),
    "evaluate": ("evaluate", "Measure restored images against the originals."),
    "bench": ("bench", "Time a plan on this machine."),
    "inspect": ("inspect", "Show the contents of a base, identity or plan."),
    "identities": ("identities", "List, show, verify, encrypt or remove learned identities."),
    "import-base": ("import_base", "Convert StableSR / SD 2.1 checkpoints to a base."),
    "train-base": ("train_base", "Train a base on photographs."),
    "doctor": ("doctor", "Show what this machine can run, and which packages add more."),
    "demo": ("demo", "Run every step on images of a person who does not exist."),
}
"""Command -> (module, one-line help): the table keeps `--help` free of every heavy import."""
NEEDS = {
    "personalize": "train",
    "export": "export",
    "fix": "train",
    "degrade": "torch",
    "evaluate": "metrics",
    "inspect": "torch",
    "identities": "torch",
    "import-base": "train",
    "train-base": "train",
    "demo": "all",
}
"""Command -> the extra that installs everything that it needs."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        with fast_imports():
            return import_module(f"pfstorer_rt.cli.{COMMANDS[cmd_name][0]}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the error for an unknown one names the most similar command."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            from difflib import get_close_matches

            for near in get_close_matches(args[0], COMMANDS, 1):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; raises `MissingBackendError` with the name of the extra when a package is missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = str(ctx.invoked_subcommand)
            raise missing(command, error, NEEDS.get(command)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


EPILOG = "Set the environment variable PFSTORER_DEBUG=1 to see the full traceback of an error."


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="pfstorer-rt")
def cli() -> None:
    """Personalized face restoration: learn a face from a few photographs, then restore degraded ones.

    \b
    Example:
      pfstorer-rt personalize --identity alice photos/alice/*.jpg
      pfstorer-rt export      --identity alice -o alice.plan
      pfstorer-rt restore     --engine alice.plan old.jpg -o restored.png
    """


def run(arguments: list[str] | None = None) -> None:
    """Run the command line; an error becomes one line on stderr and an exit status.

    0: everything is done. 1: some inputs failed, the others are done; or an unexpected error. 2: the call was wrong.
    130: interrupted.
    """
    from pfstorer_rt.console import echo, escape_unencodable, open_closed_streams

    if os.environ.get("PFSTORER_DEBUG"):
        watch_signals()
        open_closed_streams()
        escape_unencodable()
        cli.main(arguments, prog_name="pfstorer-rt")
    try:
        watch_signals()
        open_closed_streams()
        escape_unencodable()
        quiet_libraries()
        if sys.stdin.isatty():
            question = "passphrase of the identity (Enter: none)"
            encryption.ask = partial(click.prompt, question, "", hide_input=True, show_default=False, err=True)
        cli.main(arguments, prog_name="pfstorer-rt", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command; the message is the help
        for line in error.format_message().splitlines():
            echo(line, err=True)
        sys.exit(error.exit_code)
    except click.Abort as error:  # click raises it for Ctrl-C, and where a question has no answer
        cause = error.__cause__
        fail(interrupted(cause, arguments) if isinstance(cause, KeyboardInterrupt) else "Aborted.", 130)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)  # only errors of usage have one
        name = name_of_command(arguments)
        command = context.command_path if context else "pfstorer-rt" + (f" {name}" if name in COMMANDS else "")
        hint = file_hint(arguments) if isinstance(error, click.NoSuchOption) else ""
        fail(f"{error.format_message()}{hint} ({command} --help)", error.exit_code)
    except (KeyboardInterrupt, Exception) as error:
        fail(*judge(error, arguments))


def file_hint(arguments: list[str] | None) -> str:
    """Return how to give a file whose name is read as an option; empty if there is no such file."""
    given = sys.argv[1:] if arguments is None else arguments
    files = [shlex.quote(f"./{name}") for name in given if name.startswith("-") and os.path.lexists(name)]
    return f" For the file of this name, give {files[0]}" if files else ""


_signals: list[int] = []
"""Signals that arrived during the command and ask it to stop."""
_failed: list[int] = []
"""The exit status of a command that has printed its error: a further Ctrl-C would print a traceback."""


def watch_signals() -> None:
    """Let SIGTERM and a closed terminal stop a command as Ctrl-C does, so that unfinished files are removed."""
    _signals.clear()
    _failed.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores SIGHUP
        signal.signal(signal.SIGHUP, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a command in the background ignores SIGINT
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, frame: object) -> None:
    _signals.append(number)
    if not _failed:
        raise KeyboardInterrupt


def judge(error: BaseException, arguments: list[str] | None) -> tuple[str, int]:
    """Return the message for an error that ended a command, and its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return interrupted(error, arguments), 130
    if _signals:  # a compiled module that is interrupted during its import raises ImportError
        return interrupted(KeyboardInterrupt(), arguments), 130
    module = COMMANDS.get(name_of_command(arguments), ("",))[0]
    command = getattr(sys.modules.get(f"pfstorer_rt.cli.{module}"), "command", None)
    if isinstance(error, (SettingError, BadFileError, MismatchError, MissingBackendError)):
        return explain(error, command), 2
    if isinstance(error, (PFStorerError, OSError, MemoryError)):
        return explain(error, command), 1
    # A defect here or in a library: one line for the user, the rest on request.
    return f"unexpected {type(error).__name__}: {explain(error)} (set PFSTORER_DEBUG=1 for details)", 1


def name_of_command(arguments: list[str] | None) -> str:
    """Return the first argument of the call, which names the command; empty without arguments."""
    return next(iter(sys.argv[1:] if arguments is None else arguments), "")


RESUME = "Run the same command again to resume."
NEXT = {
    **dict.fromkeys(("personalize", "restore", "degrade", "train-base", "demo"), RESUME),
    "fix": "Finished images are kept; the same command learns the person again and restores the others.",
}
"""Command -> what remains after Ctrl-C, for the commands that keep finished work."""


def interrupted(error: BaseException, arguments: list[str] | None) -> str:
    """Return the message for Ctrl-C, with the state that the interrupted call reported."""
    hint = NEXT.get(name_of_command(arguments), "Unfinished files were removed.")
    return f"Interrupted{f' ({error})' if str(error) else ''}. {hint}"


def fail(message: str, status: int) -> None:
    """Print one line on stderr and exit."""
    from pfstorer_rt.console import echo

    _failed.append(status)
    echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def quiet_libraries() -> None:
    """Keep libraries from writing to the terminal; call it before they are imported."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
