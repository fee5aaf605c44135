"""Look at a model: what would be quantised, or how it was. Nothing is run or written."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from awq_onnx.cli.alike import alike, pattern
from awq_onnx.cli.display import aligned, show, two_columns
from awq_onnx.cli.options import NOTHING, PROG, Parser, add_recipe, recipe_of
from awq_onnx.machine import size_text

if TYPE_CHECKING:
    from awq_onnx.inspection import Findings, Forecast, PackedLayer, PlannedLayer

    Layer: TypeAlias = "PlannedLayer | PackedLayer"

PLANNED = ("", "", "K x N", "bits", "block", "now", "then")
PACKED = ("", "", "K x N", "bits", "block", "alpha", "error", "RTN's")
UNKNOWN = "-"
EPILOG = """\
examples:
  awq-onnx inspect model.onnx                         what `awq-onnx model.onnx` would do
  awq-onnx inspect model.onnx --block-size 128 --lm-head 8 --exclude '*/layers.0/*'
  awq-onnx inspect model_int4.onnx --all              how it was quantised, layer by layer

exit codes: those of awq-onnx --help
"""


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        f"{PROG} inspect",
        "Before: which layers would be quantised, what their scales would be folded into, what would stay and why, "
        "and the size. Of a quantised model: bits, block size, alpha, where the scale went, and the error of each "
        "layer, ||X E|| / ||X W||, beside that of plain rounding (RTN).",
        EPILOG,
    )
    parser.add_argument("model", type=Path, help="a .onnx file; no weight of it is read")
    parser.add_argument("--all", action="store_true", help="a line for each layer, not one for all that are alike")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_recipe(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    from awq_onnx.inspection import Forecast, inspect

    recipe = recipe_of(arguments)
    found = inspect(arguments.model, recipe)
    if not isinstance(found, Forecast) and recipe.arguments():
        print(f"{PROG}: the model is quantised already: the settings have no part in what is shown", file=sys.stderr)
    if arguments.json:
        show(json.dumps(found.to_dict(), indent=2))
        return 0
    planned = isinstance(found, Forecast)
    show(two_columns(list(_forecast(found) if isinstance(found, Forecast) else _findings(found))))
    show(_table(found.layers, PLANNED if planned else PACKED, every=arguments.all))
    return 0


def interrupted(_: argparse.Namespace) -> str:
    return NOTHING


def _forecast(found: Forecast) -> Iterator[tuple[str, str]]:
    """What would be done."""
    from awq_onnx.report import grouped

    yield "Model", _model(found)
    share = found.predicted_bytes / found.size_bytes
    yield "Would become", f"about {size_text(found.predicted_bytes)}, {share:.0%} of that"
    chosen = any(one.bits is None for one in found.layers)
    yield "Quantised", f"{len(found.layers)} layers{', bits and blocks chosen by calibration' * chosen}"
    for text in grouped((one.reason, one.what) for one in found.kept):
        yield "Left alone", text
    for note in found.notes:
        yield "Note", note


def _findings(found: Findings) -> Iterator[tuple[str, str]]:
    """What was done."""
    yield "Model", _model(found)
    tool = f"awq-onnx {found.version}" if found.version else "another tool, which left no word of how"
    yield "Quantised", f"{len(found.layers)} layers by {tool}"
    if found.recipe is not None:
        settings = ", ".join(f"{name} {value}" for name, value in _unusual(found.recipe).items())
        yield "Recipe", settings or "the default"
    levels = sorted({one.accuracy_level for one in found.layers if one.accuracy_level is not None})
    if levels:
        yield "Accuracy", f"level {', '.join(map(str, levels))}"


def _model(found: Forecast | Findings) -> str:
    return f"{found.model}, {size_text(found.size_bytes)}, opset {found.opset}, IR version {found.ir_version}"


def _unusual(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default."""
    from awq_onnx.recipe import Recipe

    plain = json.loads(json.dumps(Recipe().to_dict()))
    return {name: value for name, value in recipe.items() if value != plain.get(name)}


def _table(layers: Sequence[Layer], headings: Sequence[str], *, every: bool) -> str:
    """A line for the layers that are alike, or for every one, below the place that their scale goes to."""
    places = [[one] for one in layers] if every else alike(layers, _place, lambda _: None)
    rows = [[_cells(some) for some in _together(place, every)] for place in places]
    lines = iter(aligned([headings, *(row for some in rows for row in some)]))
    text, last = [next(lines)], None
    for place, some in zip(places, rows, strict=True):
        title = pattern([_place(one) for one in place])
        text += [] if title == last else [title]
        text += [next(lines) for _ in some]
        last = title
    return "\n".join(["", *text])


def _together(layers: Sequence[Layer], every: bool) -> list[list[Layer]]:
    return [[one] for one in layers] if every else alike(layers, lambda one: one.name, _shape)


def _shape(one: Layer) -> tuple[object, ...]:
    return one.op_type, one.K, one.N, one.bits, one.block_size


def _place(one: Layer) -> str:
    """Where the scale of a layer goes."""
    from awq_onnx.inspection import PackedLayer
    from awq_onnx.passes.packed import LOOKUP

    told = one.label if isinstance(one, PackedLayer) else one
    if one.op_type in (LOOKUP, "Gather"):
        return "Tables of embeddings"
    if told is None:
        return "Scale unknown"
    if told.folded_into is None:
        return f"No scale: {told.reason} ({told.blocked_by})" if told.reason else "No scale"
    return f"Scale folded into {told.folded_into}"


def _cells(layers: Sequence[Layer]) -> list[str]:
    """The line of layers that are alike."""
    from awq_onnx.inspection import PackedLayer

    first = layers[0]
    shape = UNKNOWN if first.K is None else f"{first.K} x {first.N}"
    count = f"{len(layers)} x" if len(layers) > 1 else ""
    cells = [count, pattern([one.name for one in layers]), shape, _text(first.bits), _text(first.block_size)]
    packed = [one for one in layers if isinstance(one, PackedLayer)]
    return [
        *cells,
        *(_errors(packed) if packed else _sizes([one for one in layers if not isinstance(one, PackedLayer)])),
    ]


def _sizes(layers: Sequence[PlannedLayer]) -> list[str]:
    packed = [one.packed_bytes for one in layers if one.packed_bytes is not None]
    return [size_text(sum(one.size_bytes for one in layers)), size_text(sum(packed)) if packed else UNKNOWN]


def _errors(layers: Sequence[PackedLayer]) -> list[str]:
    """alpha, the error of the layers and that of plain rounding: geometric means."""
    labels = [one.label for one in layers if one.label is not None]
    if not labels:
        return [UNKNOWN] * 3
    alphas = sorted({one.alpha for one in labels})
    span = f"{alphas[0]:.2f}" if len(alphas) == 1 else f"{alphas[0]:.2f}-{alphas[-1]:.2f}"
    return [span, _mean([one.error for one in labels]), _mean([one.plain_error for one in labels])]


def _mean(errors: Sequence[float]) -> str:
    return f"{math.exp(sum(math.log(max(one, 1e-9)) for one in errors) / len(errors)):.4f}"


def _text(number: int | None) -> str:
    return UNKNOWN if number is None else str(number)
