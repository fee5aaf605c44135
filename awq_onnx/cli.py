"""The command `awq-onnx`: argv -> Recipe -> quantize() -> exit code. The only module that prints.

The result goes to stdout, progress and errors to stderr. Everything heavy is imported after the arguments are
understood, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from awq_onnx._version import __version__
from awq_onnx.errors import AwqOnnxError, InternalError, RecipeError
from awq_onnx.machine import CPU, DEVICES, Machine, size_bytes
from awq_onnx.recipe import (
    ACCURACY_LEVELS,
    BITS,
    BLOCK_SIZES,
    LM_HEADS,
    METHODS,
    QUALITIES,
    SCALES_FROM,
    Recipe,
    help_of,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar

    from awq_onnx.report import Report

INTERRUPTED = 130
TRACEBACK = "AWQ_ONNX_TRACEBACK"  # in the environment: show the traceback of a fault of ours

EPILOG = """\
examples:
  awq-onnx model.onnx                                 writes model_int4.onnx and model_int4.onnx.data
  awq-onnx model.onnx -o small/model.onnx --force     ... elsewhere, over what is there
  awq-onnx model.onnx --calibration notes.txt         calibrated on your text (tokenizer.json beside the model)
  awq-onnx encoder.onnx --calibration inputs.npz      ... on your inputs, arrays named like the model's inputs

exit codes:
  0 done                               5 the calibration data do not fit the model
  2 an option cannot be used so        6 a Python package is missing
  3 the model cannot be quantised      7 onnxruntime cannot run the model
  4 the output cannot be written       8 a fault of awq-onnx
  130 interrupted; the same command goes on from there
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # leave nothing behind then either
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # what it warns of is refused in words of our own
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not fit the terminal's encoding
    try:
        _quantize(arguments)
    except AwqOnnxError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        from awq_onnx.output import work_folder

        kept = work_folder(_output(arguments)).exists()
        _fail(f"interrupted; {'the same command goes on from here' if kept else 'nothing was written'}", INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _fail(f"a fault of awq-onnx: {what}; please report it ({TRACEBACK}=1 shows where)", InternalError.exit_code)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"awq-onnx: {message}", file=sys.stderr)
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """An argument that cannot be used is told in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(RecipeError.exit_code, f"awq-onnx: {message}; see awq-onnx --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="awq-onnx",
        description="Quantise the weights of a transformer in ONNX to 4 bits with AWQ (activation-aware weight "
        "quantization). The result runs in plain onnxruntime. No data, tokenizer or GPU is needed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="the .onnx file to quantise; it is not changed")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the file to write (default: MODEL_int4.onnx beside the model)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON instead of a summary")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--version", action="version", version=f"awq-onnx {__version__}")

    calibration = parser.add_argument_group("calibration", "default: text that the model writes itself")
    calibration.add_argument("--calibration", type=Path, metavar="FILE", help=".txt, .jsonl (field text), .npz or .npy")
    calibration.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer.json (default: beside the model)"
    )
    _add_number(calibration, "samples")
    _add_number(calibration, "sequence_length")
    _add_number(calibration, "seed")

    choice = parser.add_argument_group("which layers, and how")
    for name, metavar in (("include", "PATTERN"), ("exclude", "PATTERN"), ("override", "PATTERN:SETTINGS")):
        choice.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=help_of(name))
    _add_choice(choice, "lm_head", LM_HEADS)
    _add_choice(choice, "embedding", LM_HEADS)
    choice.add_argument("--allow-mul", action="store_true", help=help_of("allow_mul"))

    method = parser.add_argument_group("quality")
    _add_choice(method, "quality", QUALITIES)
    _add_choice(method, "method", METHODS)
    _add_choice(method, "scale_from", SCALES_FROM)
    method.add_argument("--alpha", type=float, metavar="A", help=help_of("alpha"))

    format_group = parser.add_argument_group("format")
    _add_number(format_group, "bits", BITS)
    _add_number(format_group, "block_size", BLOCK_SIZES)
    format_group.add_argument("--target-bits", type=float, metavar="BITS", help=help_of("target_bits"))
    format_group.add_argument("--target-size", type=_size, metavar="SIZE", help=help_of("target_size"))
    format_group.add_argument("--symmetric", action="store_true", help=help_of("symmetric"))
    _add_number(format_group, "accuracy_level", ACCURACY_LEVELS)

    machine = parser.add_argument_group("machine", "the budget changes no bit of the result, threads hardly ever")
    machine.add_argument(
        "--device",
        choices=DEVICES,
        default=CPU,
        help="what computes; cuda wants onnxruntime-gpu and cupy (default: cpu)",
    )
    machine.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    machine.add_argument(
        "--memory-budget",
        type=_size,
        metavar="SIZE",
        help="memory to work with, like 500MB or 2GiB (default: a quarter of what is free, at most 1GiB)",
    )
    return parser


def _size(text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_choice(group: Any, name: str, choices: Sequence[str]) -> None:
    option = f"--{name.replace('_', '-')}"
    group.add_argument(option, choices=choices, default=getattr(Recipe(), name), help=help_of(name))


def _add_number(group: Any, name: str, choices: Sequence[int] | None = None) -> None:
    metavar = "N" if choices is None else "{" + ",".join(map(str, choices)) + "}"
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=int,
        default=Recipe.__dataclass_fields__[name].default,
        choices=choices,
        metavar=metavar,
        help=help_of(name),
    )


def _quantize(arguments: argparse.Namespace) -> None:
    recipe = _recipe(arguments)
    from rich.console import Console

    from awq_onnx.pipeline import quantize

    with Display(Console(stderr=True, quiet=arguments.quiet)) as display:
        report = quantize(
            arguments.model,
            _output(arguments),
            recipe,
            calibration=arguments.calibration,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.force,
            machine=_machine(arguments),
            progress=display,
        )
    print(report.to_json() if arguments.json else _summary(report))


def _output(arguments: argparse.Namespace) -> Path:
    given: Path | None = arguments.output
    model: Path = arguments.model
    return given or model.with_name(f"{model.stem}_int4.onnx")


def _machine(arguments: argparse.Namespace) -> Machine:
    try:
        return Machine(device=arguments.device, threads=arguments.threads, memory_budget=arguments.memory_budget)
    except RecipeError as error:
        raise RecipeError(f"--{str(error).replace('_', '-', 1)}") from None


def _recipe(arguments: argparse.Namespace) -> Recipe:
    try:
        settings: dict[str, Any] = {name: getattr(arguments, name) for name in Recipe.__dataclass_fields__}
        repeated = {name: tuple(settings[name]) for name in ("include", "exclude", "override")}
        return Recipe(**(settings | repeated))
    except RecipeError as error:
        raise RecipeError(f"--{str(error).replace('_', '-', 1)}") from None


def _summary(report: Report) -> str:
    """The summary as two columns, a label only where it differs from the line before."""
    rows = report.rows()
    width = max(len(label) for label, _ in rows)
    lines, last = [], ""
    for label, text in rows:
        lines.append(f"{label if label != last else '':<{width}}  {text}")
        last = label
    return "\n".join(lines)


class Display:
    """Progress on stderr: on a terminal a bar for each stage, elsewhere a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichBar | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._console.quiet:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=self._console,
                transient=False,
            )
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._finish_task()
            self._bar.stop()

    def stage(self, title: str) -> None:
        if self._bar is None:
            self._console.print(f"{title} ...", highlight=False, soft_wrap=True)
            return
        self._finish_task()
        self._task = self._bar.add_task(title, total=1.0)

    def advance(self, fraction: float) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, fraction)

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _finish_task(self) -> None:
        """A stage that ended shows as full, whether or not it told its progress."""
        if self._bar is not None and self._bar.task_ids:
            self._bar.update(self._bar.task_ids[-1], completed=1.0)
