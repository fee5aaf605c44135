"""The tables of embeddings: their rows on grids. Between the graph and the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from awq_onnx import codec, grids
from awq_onnx.codec import Float32, Format, Grid
from awq_onnx.journal import Entry
from awq_onnx.output import OutputFiles
from awq_onnx.passes.embedding import Table
from awq_onnx.search import SLICE, slices
from awq_onnx.store import OpenedModel, describe, described


@dataclass(frozen=True)
class TableResult:
    """A table (V, D) that is packed and written: codes uint8 (V, D * bits / 8), scales (V, D / b), zero_points uint8.

    error: ||W - W'|| / ||W||.
    """

    table: Table
    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol
    bits: int
    block_size: int
    error: float


def write_table(table: Table, fmt: Format, opened: OpenedModel, files: OutputFiles) -> Entry:
    """Pack a table into the output: what `result_of` makes a result of."""
    rows = opened.read(table.tensor)
    parts, error, energy = [], 0.0, 0.0
    for some in slices(table.V, SLICE):
        centred, grid, its_error, its_energy = _rounded(np.asarray(rows[some].T, np.float32), fmt)
        parts.append((codec.pack(centred, grid), grid))
        error, energy = error + its_error, energy + its_energy
    codes = np.concatenate([packed for packed, _ in parts])
    grid = Grid(
        np.concatenate([grid.scales for _, grid in parts], axis=1),
        np.concatenate([grid.zero_points for _, grid in parts], axis=1),
        fmt.bits,
    )
    name = f"{table.value.name or table.name}.rows"
    return {
        "codes": describe(files.append(f"{name}.codes", codes.reshape(table.V, -1))),
        "scales": describe(files.append(f"{name}.scales", codec.pack_scales(grid.scales, fmt.scale_dtype))),
        "zero_points": describe(
            files.append(f"{name}.zero_points", codec.pack_zero_points(grid.zero_points, fmt.bits))
        ),
        "bits": fmt.bits,
        "block_size": fmt.block_size,
        "error": float(np.sqrt(error / energy)) if energy else 0.0,
    }


def losses_of(table: Table, formats: Sequence[Format], opened: OpenedModel) -> tuple[float, ...]:
    """What each of several formats loses: squared error over energy, from some rows."""
    rows = opened.read(table.tensor)[:: -(-table.V // SLICE)]
    columns = np.asarray(rows.T, np.float32)
    losses = []
    for fmt in formats:
        _, _, error, energy = _rounded(columns, fmt)
        losses.append(error / energy if energy else 0.0)
    return tuple(losses)


def result_of(entry: Entry, table: Table, folder: Path) -> TableResult:
    """What was written of a table. folder: where the files are."""
    codes, scales, zero_points = (described(entry[name], folder) for name in ("codes", "scales", "zero_points"))
    return TableResult(table, codes, scales, zero_points, entry["bits"], entry["block_size"], entry["error"])


def _rounded(columns: Float32, fmt: Format) -> tuple[Float32, Grid, float, float]:
    """Some rows of a table, as columns (D, n): codes (G, b, n), grid, the squares of errors and of weights."""
    blocks = codec.to_blocks(columns, fmt.block_size)
    codes, grid = grids.fit(blocks, np.ones((*blocks.shape[:2], 1), np.float32), fmt)
    error = codec.dequantize(codes, grid) - blocks
    return codes, grid, float(np.vdot(error, error)), float(np.vdot(blocks, blocks))
