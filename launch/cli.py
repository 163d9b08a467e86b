"""The command ``moeyard``. Nothing heavy is imported here, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from launch.commands import inspect_commands, model_commands, train_commands
from moe.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="moeyard",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_commands.add_to(app)
model_commands.add_to(app)
inspect_commands.add_to(app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"moeyard {version('moeyard')}")
        except PackageNotFoundError:
            print("moeyard, not installed: running from a clone")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors that you can mend, too.")] = False,
) -> None:
    """Train mixture-of-experts language models, look at their experts, and serve them.

    Begin with:  moeyard doctor   and   moeyard train --config tiny
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Program entry. Exit codes: 0 done, 1 failed, 2 unusable options or input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args  # wherever it stands: people add it to the end of the line that failed
    args = ["--debug"] * debug + [arg for arg in args if arg != "--debug"]
    _prepare_streams()
    try:
        # Not the command's own main(): it would turn interrupts, closed pipes and EOFErrors into codes without a word.
        command = typer.main.get_command(app)
        with command.make_context("moeyard", args) as context:
            result = command.invoke(context)
        sys.stdout.flush()  # here, where a closed pipe is no surprise
    except typer.Exit as end:
        return end.exit_code
    except UserError as error:
        if debug:
            raise
        _print_error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()  # the reader (head, less) has left
        return 0
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_output()
        print(f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        return 1
    except Exception as error:
        # Usage errors know how to show themselves; their class differs between versions of typer.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if not callable(show) or not isinstance(code, int):
            raise
        show()
        return code
    return result if isinstance(result, int) else 0


def _prepare_streams() -> None:
    """Streams that the caller closed lead nowhere; characters that stdout's encoding lacks are shown as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Drop what stdout still holds if it cannot be written; the interpreter would complain once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: UserError) -> None:
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) == 1:
        print(f"error: {lines[0]}", file=sys.stderr)
    else:
        print(f"error: {len(lines)} problems", file=sys.stderr)
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
