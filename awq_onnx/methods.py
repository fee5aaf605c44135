"""What a recipe says about a layer, in the words of the search, the rounding and the codec."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from awq_onnx.codec import Format
from awq_onnx.grids import CLIPPED, FITTED, WHOLE
from awq_onnx.passes import embedding
from awq_onnx.passes.embedding import Table
from awq_onnx.passes.sites import Site
from awq_onnx.recipe import AWQ, AWQ_GPTQ, BEST, EVERY_FORMULA, FAST, GPTQ, Recipe
from awq_onnx.rounding import Rounding
from awq_onnx.search import FORMULAS, Candidates
from awq_onnx.targets import QDQ, WHOLE_COLUMN

STORED_BLOCK_SIZES = (256, 128, 64, 32, 16)
LOOKED_UP_BITS = (4, 8)  # of an embedding, and of a layer that makes logits


def candidates_of(recipe: Recipe) -> Candidates:
    """Which scales are tried, of a method that has them."""
    formulas = FORMULAS if recipe.scale_from == EVERY_FORMULA else (recipe.scale_from,)
    return Candidates(formulas, recipe.alpha)


def rounding_of(recipe: Recipe, *, random: bool = False) -> Rounding:
    """How weights get onto their grids. random: calibration ran on noise."""
    ranges = {AWQ_GPTQ: FITTED, AWQ: CLIPPED}.get(recipe.method, WHOLE)
    compensate = recipe.method in (AWQ_GPTQ, GPTQ) and recipe.quality != FAST
    return Rounding(ranges, compensate, random)


def makes_up_for_drift(recipe: Recipe) -> bool:
    """Whether weights make up for what the rounding of the layers before does to their input, see `awq_onnx.drift`."""
    return recipe.quality == BEST and recipe.method == AWQ_GPTQ


def format_of(site: Site, recipe: Recipe) -> Format:
    """Without a target."""
    settings = {"bits": recipe.bits, "block_size": recipe.block_size}
    if site.is_head and recipe.lm_head_bits is not None:
        settings["bits"] = recipe.lm_head_bits
    settings |= recipe.overrides(site.name)
    bits, block_size = settings["bits"], settings["block_size"]
    dtype = np.dtype(site.dtype.numpy())
    plain = Format(
        block_size,
        recipe.symmetric,
        dtype,
        bits,
        positive=recipe.runs_on.positive_scales,
        explicit=recipe.explicit_zero_points,
    )
    filled = _filled(site.K, block_size, recipe) if packed_lookups(site, recipe) else None
    if block_size != WHOLE_COLUMN:
        kept = filled is None or "block_size" in recipe.overrides(site.name)
        return plain if kept else replace(plain, block_size=filled or block_size)
    smallest = min(STORED_BLOCK_SIZES, key=lambda size: -(-site.K // size) * (size * bits / 8 + dtype.itemsize))
    stored = filled or smallest
    return replace(plain, block_size=-(-site.K // stored) * stored, stored=stored)


def packed_lookups(site: Site, recipe: Recipe) -> list[ir.Node]:
    """The lookups of a layer's weight that can read it packed. Standard ONNX has no node for that; rows have to fill
    their blocks.
    """
    if recipe.format == QDQ or _filled(site.K, WHOLE_COLUMN, recipe) is None:
        return []
    return embedding.lookups(site)


def format_of_table(table: Table, recipe: Recipe) -> Format | None:
    """None where it has none. Rows fill their blocks: where the wanted size does not divide them, a smaller one."""
    block_size = _filled(table.D, recipe.block_size, recipe)
    if block_size is None:
        return None
    bits = recipe.embedding_bits or max(bits for bits in recipe.all_bits if bits in LOOKED_UP_BITS)
    return Format(block_size, False, np.dtype(table.tensor.dtype.numpy()), bits)


def _filled(K: int, wanted: int, recipe: Recipe) -> int | None:
    """The largest block size, up to the wanted one, that K numbers fill; None where there is none."""
    offered = [size for size in STORED_BLOCK_SIZES if size in recipe.runs_on.block_sizes and K % size == 0]
    return max((size for size in offered if wanted == WHOLE_COLUMN or size <= wanted), default=None)
