"""How a rounded layer lies in the file: as MatMulNBits reads it, or as DequantizeLinear does (format qdq)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from awq_onnx import codec
from awq_onnx.codec import Float32, Format, Matrix, UInt8
from awq_onnx.journal import Entry
from awq_onnx.output import OutputFiles
from awq_onnx.recipe import Recipe
from awq_onnx.rounding import Rounded
from awq_onnx.store import describe
from awq_onnx.targets import QDQ

SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
LARGEST_BLOCK = 256  # of MatMulNBits


def write(
    name: str, rounded: Rounded, fmt: Format, shape: tuple[int, int], files: OutputFiles, recipe: Recipe
) -> Entry:
    """Put codes and zero points into the output; what is in the journal about them. shape: (K, N) of the weight.

    Scales are kept aside, float32 (G, N): a fold may still divide them.
    """
    if recipe.format == QDQ:
        return _write_matrix(name, rounded, fmt, Matrix(*shape, fmt.bits, fmt.symmetric), files)
    codes, grid = codec.as_stored(rounded.codes, rounded.grid, fmt)
    written = files.append(f"{name}.codes", codes)
    packed = codec.pack_zero_points(grid.zero_points, fmt.bits) if fmt.has_zero_points else None
    return {
        "codes": describe(written),
        "zero_points": None if packed is None else describe(files.append(f"{name}.zero_points", packed)),
        "scales": describe(files.keep(f"{name}.scales", grid.scales)),
        "block_size": fmt.stored_block_size,
        "per_axis": False,
    }


def _write_matrix(name: str, rounded: Rounded, fmt: Format, matrix: Matrix, files: OutputFiles) -> Entry:
    grid, per_axis = rounded.grid, fmt.stored is not None
    codes = _tensor(matrix.pack(rounded.codes), matrix, (matrix.K, matrix.N))
    written = files.append_tensor(f"{name}.codes", codes)
    zero_points = None
    if fmt.has_zero_points:
        raw = matrix.pack_zero_points(grid.zero_points)
        dims = (matrix.N,) if per_axis else grid.zero_points.shape
        zero_points = describe(files.append_tensor(f"{name}.zero_points", _tensor(raw, matrix, dims)))
    return {
        "codes": describe(written),
        "zero_points": zero_points,
        "scales": describe(files.keep(f"{name}.scales", grid.scales)),
        "block_size": fmt.block_size,
        "per_axis": per_axis,
    }


def _tensor(raw: UInt8, matrix: Matrix, dims: tuple[int, ...]) -> ir.TensorProtocol:
    dtype = (SIGNED if matrix.signed else UNSIGNED)[matrix.bits]
    if matrix.bits == 8:
        return ir.Tensor(raw.view(dtype.numpy()).reshape(dims), dtype=dtype)
    return ir.PackedTensor(raw, dtype, shape=ir.Shape(dims))


def scales_as_read(scales: Float32, dtype: DTypeLike, recipe: Recipe, *, per_axis: bool) -> NDArray[np.generic]:
    """Scales (G, N) as the node of the recipe's format reads them; per_axis: as (N,), which is all that there is."""
    if recipe.format != QDQ:
        return codec.pack_scales(scales, dtype)
    return (scales[0] if per_axis else scales).astype(dtype)


def as_matmul_nbits(
    codes: ir.TensorProtocol, zero_points: ir.TensorProtocol | None, scales: Float32, bits: int, block_size: int
) -> tuple[NDArray[Any], NDArray[Any] | None, Float32, int]:
    """A written layer as MatMulNBits reads it, whatever its format: codes, zero points, scales (G, N), block size."""
    if len(codes.shape) == 3:
        return codes.numpy(), None if zero_points is None else zero_points.numpy(), scales, block_size
    K, N = codes.shape.numpy()
    matrix = Matrix(K, N, bits, codes.dtype in SIGNED.values())
    points = np.full(scales.shape, codec.middle_code(bits), np.uint8)
    if zero_points is not None:
        points = matrix.unpack_zero_points(_raw(zero_points), len(scales))
    grid = codec.Grid(scales, points.astype(np.float32), bits)
    stored = min(block_size & -block_size, LARGEST_BLOCK)  # a power of two, which divides the block
    fmt = Format(block_size, matrix.signed, scales.dtype, bits, stored)
    packed, grid = codec.as_stored(matrix.unpack(_raw(codes), block_size, points), grid, fmt)
    return packed, codec.pack_zero_points(grid.zero_points, bits), grid.scales, stored


def _raw(tensor: ir.TensorProtocol) -> UInt8:
    return np.frombuffer(tensor.tobytes(), np.uint8)
