"""The command `awq-onnx`: a file for each of its commands, argv -> call -> exit code. The only package that prints.

The result goes to stdout, progress and errors to stderr. Everything heavy is imported after the arguments are
understood, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from awq_onnx.cli.display import CannotPrintError
from awq_onnx.cli.options import NOTHING
from awq_onnx.errors import AwqOnnxError, InternalError

INTERRUPTED, CLOSED_PIPE = 130, 141
TRACEBACK = "AWQ_ONNX_TRACEBACK"  # in the environment: show the traceback of a fault of ours
QUANTIZE = "quantize"  # what is meant where no command is named
COMMANDS = (QUANTIZE, "compare", "inspect", "report")


class Command(Protocol):
    """What each module of a command holds."""

    def parser(self) -> argparse.ArgumentParser: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it, print the result; the exit code. Raises AwqOnnxError."""
        ...

    def interrupted(self, arguments: argparse.Namespace) -> str:
        """What an interruption left. Imports nothing: it may have come in the middle of an import."""
        ...


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    command, arguments = None, argparse.Namespace()
    try:
        _prepare()
        words = sys.argv[1:] if argv is None else list(argv)
        named = bool(words) and words[0] in COMMANDS
        command = _command(words[0] if named else QUANTIZE)
        arguments = command.parser().parse_args(words[1:] if named else words)
        sys.exit(command.run(arguments))
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop_output()
        sys.exit(CLOSED_PIPE)
    except CannotPrintError as error:
        _drop_output()
        _fail(str(error), error.exit_code)
    except AwqOnnxError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        left = command.interrupted(arguments) if command is not None else NOTHING
        _fail(f"interrupted; {left}", INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _fail(f"a fault of awq-onnx: {what}; please report it ({TRACEBACK}=1 shows where)", InternalError.exit_code)


def _prepare() -> None:
    """The process, for any command."""
    signal.signal(signal.SIGTERM, _interrupt)  # leave nothing behind then either
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # what it warns of is refused in words of our own
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not fit the terminal's encoding


def _command(name: str) -> Command:
    command: Command = importlib.import_module(f"awq_onnx.cli.{name}")
    return command


def _drop_output() -> None:
    """What was printed and could not be written is not tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    print(f"awq-onnx: {message}", file=sys.stderr)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
