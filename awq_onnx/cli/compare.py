"""Compare a quantised model with its original: argv -> measure() -> a table, and a verdict for pipelines."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from awq_onnx.cli.display import Display, show
from awq_onnx.cli.options import NOTHING, PROG, Parser, add_machine, machine_of, settings
from awq_onnx.errors import RecipeError, TooFarError
from awq_onnx.recipe import COMPARED, Recipe

if TYPE_CHECKING:
    from awq_onnx.comparison import Comparison

EPILOG = """\
examples:
  awq-onnx compare model.onnx model_int4.onnx                     on text that the original writes itself
  awq-onnx compare model.onnx model_int4.onnx --data notes.txt    on your text (tokenizer.json beside the original)
  awq-onnx compare model.onnx model_int4.onnx --max-kl 0.1        for a pipeline: fails where they are further apart
  awq-onnx compare encoder.onnx small.onnx --data inputs.npz --max-error 0.2

The two may be any models with the same inputs, outputs and tokens: of float16, of int8, made by other tools.

exit codes:
  0 done                               4 no room for the outputs of the original
  1 further apart than allowed         5 the data do not fit the model
  2 an option cannot be used so        6 a Python package is missing
  3 the models cannot be compared      7 onnxruntime cannot run a model
  130 interrupted                      8 a fault of awq-onnx
"""


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        f"{PROG} compare",
        "Run two models on the same inputs, one after the other, and tell how far the second is from the first, "
        "how large and how fast both are, and where they disagree most.",
        EPILOG,
    )
    parser.add_argument("original", type=Path, help="the .onnx file that is right")
    parser.add_argument("quantized", type=Path, help="the .onnx file to compare with it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="show no progress")

    data = parser.add_argument_group("data", "default: text that the original writes itself")
    data.add_argument(
        "--data", "--calibration", type=Path, metavar="FILE", help=".txt, .jsonl (field text), .npz or .npy"
    )
    data.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer.json (default: beside the original)"
    )
    for name, default, what in (
        ("samples", COMPARED, "windows, or samples, to compare on"),
        ("sequence-length", Recipe().sequence_length, "tokens in each window of text"),
        ("seed", Recipe().seed, "of everything that is sampled"),
    ):
        data.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")

    limits = parser.add_argument_group("limits", "exit code 1 above them")
    limits.add_argument("--max-kl", type=_limit, metavar="X", help="mean KL in nats per token, of models with logits")
    limits.add_argument("--max-error", type=_limit, metavar="X", help="relative error of the outputs, of any model")

    add_machine(
        parser,
        "the second model runs when the first is closed",
        "memory to work with, like 500MB or 2GiB; what does not fit stays on the disk (default: by what is free)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    with settings():
        recipe = Recipe(samples=arguments.samples, sequence_length=arguments.sequence_length, seed=arguments.seed)
    machine = machine_of(arguments)
    from rich.console import Console

    from awq_onnx.cli import comparison_table
    from awq_onnx.pair import measure, open_pair

    with open_pair(arguments.original, arguments.quantized) as pair:
        if arguments.max_kl is not None and pair.wanted.logits is None:
            raise _without_logits()
        reader = comparison_table.reader(arguments.original, arguments.tokenizer)
        with Display(Console(stderr=True, quiet=arguments.quiet)) as display:
            report = measure(pair, arguments.data, arguments.tokenizer, recipe, machine, display)
    shown = comparison_table.as_json if arguments.json else comparison_table.as_text
    show(shown(report, arguments.original, arguments.quantized, reader))
    _judge(report.comparison, arguments)
    return 0


def interrupted(_: argparse.Namespace) -> str:
    return NOTHING


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def _without_logits() -> RecipeError:
    return RecipeError("--max-kl limits the distance of probabilities, and the models have no logits; use --max-error")


def _judge(comparison: Comparison, arguments: argparse.Namespace) -> None:
    """Raises TooFarError where the models are further apart than allowed, or not even numbers."""
    if arguments.max_kl is not None and comparison.kl_mean is None:
        raise _without_logits()
    for what, value, option, limit in (
        ("mean KL", comparison.kl_mean, "--max-kl", arguments.max_kl),
        ("relative error of the outputs", comparison.relative_error, "--max-error", arguments.max_error),
    ):
        if limit is not None and not (value is not None and value <= limit):
            raise TooFarError(f"the {what} is {value:.6g}, more than {option} {limit:g}")
