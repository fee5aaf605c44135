"""Quantise a model: argv -> Recipe -> quantize() -> the summary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from awq_onnx import page
from awq_onnx._version import __version__
from awq_onnx.cli.display import Display, show, two_columns
from awq_onnx.cli.options import NOTHING, PROG, Parser, add_machine, add_number, add_recipe, machine_of, recipe_of
from awq_onnx.errors import ModelFileError, OutputError

if TYPE_CHECKING:
    from awq_onnx.report import Report

EPILOG = """\
examples:
  awq-onnx model.onnx                                 writes model_int4.onnx and model_int4.onnx.data
  awq-onnx model.onnx -o small.onnx --force           ... elsewhere, over what is there
  awq-onnx model.onnx -o small/                       a folder that optimum and onnxruntime-genai open as it is
  awq-onnx model.onnx --calibration notes.txt         calibrated on your text (tokenizer.json beside the model)
  awq-onnx encoder.onnx --calibration inputs.npz      ... on your inputs, arrays named like the model's inputs

other commands, each with its own --help:
  awq-onnx inspect model.onnx                         what would be done, or how a quantised model was made
  awq-onnx compare model.onnx model_int4.onnx         how far it is from the original, how large, how fast
  awq-onnx report run.json                            a page about a run, from what --json printed

exit codes:
  0 done                               5 the calibration data do not fit the model
  2 an option cannot be used so        6 a Python package is missing
  3 the model cannot be quantised      7 onnxruntime cannot run the model
  4 the output cannot be written       8 a fault of awq-onnx
  130 interrupted; the same command goes on from there
"""


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        PROG,
        "Quantise the weights of a transformer in ONNX to 4 bits with AWQ (activation-aware weight quantization). "
        "The result runs in plain onnxruntime. No data, tokenizer or GPU is needed.",
        EPILOG,
    )
    parser.add_argument("model", type=Path, help="the .onnx file to quantise; it is not changed")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE|DIR/",
        help="the file to write (default: MODEL_int4.onnx beside the model); a folder, or a name that ends with /: the "
        "model under its own name, with config, tokenizer and what else lies beside it and belongs to it",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON instead of a summary")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page of HTML about the run, to be read offline"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--version", action="version", version=f"awq-onnx {__version__}")

    calibration = parser.add_argument_group("calibration", "default: text that the model writes itself")
    calibration.add_argument("--calibration", type=Path, metavar="FILE", help=".txt, .jsonl (field text), .npz or .npy")
    calibration.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer.json (default: beside the model)"
    )
    add_number(calibration, "samples")
    add_number(calibration, "sequence_length")
    add_number(calibration, "seed")

    add_recipe(parser)
    add_machine(
        parser,
        "the budget changes no bit of the result, threads hardly ever",
        "memory to work with, like 500MB or 2GiB (default: a quarter of what is free, at most 1GiB)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    if not arguments.model.name:
        raise ModelFileError(f"{arguments.model} is a folder; name a .onnx file")
    look_at_places(arguments)
    from rich.console import Console

    from awq_onnx.folder import is_folder
    from awq_onnx.pipeline import quantize

    with Display(Console(stderr=True, quiet=arguments.quiet)) as display:
        if arguments.output and not is_folder(arguments.output) and not Path(arguments.output).suffix:
            display.note(f"{arguments.output} will be a file; {arguments.output}/ would be a folder.")
        report = quantize(
            arguments.model,
            _output(arguments),
            recipe,
            calibration=arguments.calibration,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.force,
            machine=machine_of(arguments),
            progress=display,
        )
    arguments.finished = report.output
    rows = [*report.rows(), *([("Page", str(arguments.report))] if arguments.report else [])]
    show(report.to_json() if arguments.json else two_columns(rows))
    if arguments.report is not None:
        _write_page(arguments.report, report)
    return 0


def _write_page(place: Path, report: Report) -> None:
    try:
        page.write_page(report, place)
    except OutputError as error:
        raise OutputError(f"{error}; the model {report.output} is finished all the same") from error


def interrupted(arguments: argparse.Namespace) -> str:
    if "finished" in arguments:
        return f"the model {arguments.finished} is finished, the page about it is not"
    kept = "work_folders" in arguments and any(path.exists() for path in arguments.work_folders)
    return "the same command goes on from here" if kept else NOTHING


def _output(arguments: argparse.Namespace) -> str:
    given: str | None = arguments.output
    model: Path = arguments.model
    return str(model.with_name(f"{model.stem}_int4.onnx")) if given is None else given


def look_at_places(arguments: argparse.Namespace) -> None:
    """Where the output may be made, for `interrupted`; and whether the page can be."""
    from awq_onnx.folder import graph_paths, is_folder
    from awq_onnx.output import work_folder

    output = _output(arguments)
    graphs = graph_paths(arguments.model, output)
    arguments.work_folders = [work_folder(path) for path in graphs if path.name]
    if arguments.report is not None:
        files = [arguments.model, *([arguments.calibration] if arguments.calibration is not None else []), *graphs]
        made = Path(output) if is_folder(output) else None
        page.check(arguments.report, overwrite=arguments.force, beside=files, made=made)
