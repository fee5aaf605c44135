"""What a quantised model tells of how it was made: less than the report of the run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from awq_onnx.errors import RecipeError, ReportFileError
from awq_onnx.footprint import footprint_of
from awq_onnx.page.content import Content
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.sites import node_name
from awq_onnx.plain import built
from awq_onnx.recipe import Recipe
from awq_onnx.report import MatMulReport
from awq_onnx.store import open_model

ORIGINAL = "ORIGINAL.onnx"  # the model does not say what it was made of
PREFIX = "awq_onnx."  # of our metadata
NOT_FOLDED = re.compile(r"nothing: (?P<reason>.*) \((?P<blocked_by>.*)\)", re.DOTALL)


def content_of(path: Path) -> Content:
    """Raises ModelFileError, and ReportFileError where awq-onnx did not make the model."""
    with open_model(path) as opened:
        told, size_bytes = opened.model.metadata_props, opened.size_bytes
        try:
            recipe = built(Recipe, json.loads(told[f"{PREFIX}recipe"]), "its recipe")
            matmuls = tuple(_rows(opened.model.graph))
        except (KeyError, ValueError, RecipeError) as error:
            raise ReportFileError(
                f"{path} does not tell how it was quantised, as the models that awq-onnx makes do"
            ) from error
        footprint = footprint_of(opened.model, size_bytes)
    command = shlex.join(["awq-onnx", ORIGINAL, "-o", path.name, *recipe.arguments()])
    return Content(
        str(path), size_bytes, footprint, matmuls, recipe, told.get(f"{PREFIX}version", "?"), command=command
    )


def _rows(graph: ir.Graph) -> Iterator[MatMulReport]:
    for node in all_nodes(graph):
        told = node.metadata_props
        if f"{PREFIX}error" not in told:
            continue
        K, N, bits, block_size = (node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size"))
        place = told[f"{PREFIX}folded_into"]
        unfolded = NOT_FOLDED.fullmatch(place)
        yield MatMulReport(
            name=node_name(node),
            K=K,
            N=N,
            bits=bits,
            block_size=block_size,
            alpha=float(told[f"{PREFIX}alpha"]),
            scale_from=told[f"{PREFIX}scale_from"],
            folded_into=None if unfolded else place,
            fold=None,
            reason=unfolded["reason"] if unfolded else None,
            blocked_by=unfolded["blocked_by"] if unfolded else None,
            mul_gain=None,
            error=float(told[f"{PREFIX}error"]),
            plain_error=float(told[f"{PREFIX}error_of_plain_rounding"]),
        )
