"""What a quantised model tells of how it was made: less than the report of the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from awq_onnx.errors import RecipeError, ReportFileError
from awq_onnx.inspection import Findings, PackedLayer, inspect
from awq_onnx.page.content import Content
from awq_onnx.passes.packed import LOOKUP
from awq_onnx.plain import built
from awq_onnx.recipe import Recipe
from awq_onnx.report import MatMulReport

ORIGINAL = "ORIGINAL.onnx"  # the model does not say what it was made of


def content_of(path: Path) -> Content:
    """Raises ModelFileError, and ReportFileError where awq-onnx did not make the model."""
    found = inspect(path)
    if not isinstance(found, Findings) or found.recipe is None:
        raise _untold(path)
    layers = [one for one in found.layers if one.op_type != LOOKUP]
    if any(one.label is None for one in layers):
        raise _untold(path)
    try:
        recipe = built(Recipe, found.recipe, "its recipe")
    except (ValueError, RecipeError) as error:
        raise _untold(path) from error
    return Content(
        output=found.model,
        size_after_bytes=found.size_bytes,
        footprint_after=found.footprint,
        matmuls=tuple(_rows(layers)),
        recipe=recipe,
        version=found.version or "?",
        command=shlex.join(["awq-onnx", ORIGINAL, "-o", path.name, *recipe.arguments()]),
    )


def _untold(path: Path) -> ReportFileError:
    return ReportFileError(f"{path} does not tell how it was quantised, as the models that awq-onnx makes do")


def _rows(layers: Sequence[PackedLayer]) -> Iterator[MatMulReport]:
    for one in layers:
        if one.label is not None and None not in (one.K, one.N, one.bits, one.block_size):
            shape = {name: getattr(one, name) for name in ("name", "K", "N", "bits", "block_size")}
            yield MatMulReport(**shape, **asdict(one.label), fold=None, mul_gain=None)
