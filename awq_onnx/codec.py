"""THE definition of the numbers: how a weight becomes the codes of `com.microsoft::MatMulNBits`, and back.

The search, the reference kernel and the writer all call this module; nothing else rounds or packs a weight.
Format: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, com.microsoft.MatMulNBits:
weight = (code - zero_point) * scale, codes of one block share scale and zero point, blocks run along K.
The same codes can be stored for ONNX's own DequantizeLinear (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html):
see `Matrix`.

Shapes: K in, N out, block_size b, G = ceil(K / b) blocks. A weight is worked on as blocks (G, b, N), N innermost:
that is a view of ONNX's own (K, N) layout, and the long contiguous axis is what makes numpy fast. Only `pack`
turns it into the (N, G, b * bits / 8) of the file. A last block that K does not fill is padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from awq_onnx.arrays import in_memory

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

FINFO: Any = ml_dtypes.finfo  # numpy's does not know bfloat16


def max_code(bits: int) -> int:
    return (1 << bits) - 1


def middle_code(bits: int) -> int:
    """The zero point where none is stored."""
    return 1 << (bits - 1)


@dataclass(frozen=True)
class Format:
    """What the codes of one MatMul look like: block size, zero points or none, dtype of the scales, bits of a code.

    stored: the block size in the file where that is smaller, a divisor: its blocks then repeat a scale and zero point.
    positive: whether symmetric scales have to be; else the sign of a scale says on which side the largest weight is.
    explicit: whether zero points are written that are all in the middle.
    """

    block_size: int
    symmetric: bool
    scale_dtype: np.dtype[np.generic]
    bits: int = 4
    stored: int | None = None
    positive: bool = False
    explicit: bool = False

    @property
    def stored_block_size(self) -> int:
        return self.stored or self.block_size

    @property
    def has_zero_points(self) -> bool:
        """In the file."""
        return self.explicit or not self.symmetric

    def blocks_of(self, K: int) -> int:
        return -(-K // self.block_size)

    def sizes(self, K: int, N: int) -> tuple[int, int, int]:
        """Bytes of the codes, scales and zero points of a weight (K, N) in the file."""
        blocks = -(-K // self.stored_block_size)
        codes, scales = blocks * self.stored_block_size * self.bits // 8, blocks * self.scale_dtype.itemsize
        zero_points = -(-blocks * self.bits // 8) if self.has_zero_points else 0
        return N * codes, N * scales, N * zero_points


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every block: float32 (G, N) each, where the weight is.

    `scales` hold values that `Format.scale_dtype` represents exactly (see `round_scales`) and are never 0;
    `zero_points` hold integers 0 .. 2^bits - 1.
    """

    scales: Float32
    zero_points: Float32
    bits: int = 4


def to_blocks(weight: Float32, block_size: int) -> Float32:
    """(K, N) -> (G, block_size, N); a view where K is a multiple of block_size."""
    K, N = weight.shape
    missing = -K % block_size
    if missing:
        weight = np.concatenate([weight, np.zeros((missing, N), np.float32, like=weight)])
    return weight.reshape(-1, block_size, N)  # (G, b, N)


def from_blocks(blocks: Float32, K: int) -> Float32:
    """(G, b, N) -> (K, N), the padding cut off."""
    return blocks.reshape(-1, blocks.shape[2])[:K]  # (K, N)


def round_scales(scales: Float32, dtype: DTypeLike) -> Float32:
    """The nearest finite scales that `dtype` can hold, as float32.

    A scale that would be 0 (an all-zero block, or one too small for `dtype`) is 1: its codes are then 0.
    """
    largest = _largest(np.dtype(dtype))
    rounded = np.minimum(np.maximum(scales, -largest), largest)
    if np.dtype(dtype) == ml_dtypes.bfloat16:
        rounded = _as_bfloat16(rounded)
    else:
        rounded = rounded.astype(dtype, copy=False).astype(np.float32, copy=False)
    smallest = np.finfo(np.float32).smallest_normal  # below it 1 / scale overflows
    return np.where(np.abs(rounded) < smallest, np.float32(1), rounded)


def _as_bfloat16(values: Float32) -> Float32:
    """The nearest bfloat16, of two the even one, by its bits: arrays on a GPU do not have the dtype."""
    bits = values.astype(np.float32).view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits &= np.uint32(0xFFFF0000)
    return bits.view(np.float32)


@cache
def _largest(dtype: np.dtype[Any]) -> np.float32:
    return np.float32(FINFO(dtype).max)


def minmax_grid(blocks: Float32, fmt: Format) -> Grid:
    """The plain grid of round-to-nearest. blocks (G, b, N).

    With zero points the codes cover [min(block, 0), max(block, 0)], so that 0 stays exactly 0.
    Symmetric: the full signed range, scale = (the value of largest magnitude) / -8 (at 4 bits), which may be
    negative; it wastes no code and beats max|w| / 7 by a third of the error. Where the scale has to be positive it is
    max(max w / 7, min w / -8).
    """
    if fmt.symmetric:
        low, high = blocks.min(axis=1), blocks.max(axis=1)  # (G, N)
        middle = middle_code(fmt.bits)
        if fmt.positive:
            widest = np.maximum(high / np.float32(middle - 1), low / np.float32(-middle))
        else:
            widest = np.where(-low >= high, low, high) / np.float32(-middle)
        scales = round_scales(widest, fmt.scale_dtype)
        return Grid(scales, np.full_like(scales, middle), fmt.bits)
    low = np.minimum(blocks.min(axis=1), 0)  # (G, N)
    high = np.maximum(blocks.max(axis=1), 0)
    largest = max_code(fmt.bits)
    scales = round_scales((high - low) / np.float32(largest), fmt.scale_dtype)
    zero_points = np.clip(np.rint(-low / scales), 0, largest)
    return Grid(scales, zero_points, fmt.bits)


def centred_codes(blocks: Float32, grid: Grid, out: Float32 | None = None) -> Float32:
    """The nearest code of every weight, less its zero point: float32 integers (G, b, N)."""
    steps: Float32 = np.multiply(blocks, (1 / grid.scales)[:, None, :], out=out)
    np.rint(steps, out=steps)
    np.maximum(steps, -grid.zero_points[:, None, :], out=steps)
    np.minimum(steps, (max_code(grid.bits) - grid.zero_points)[:, None, :], out=steps)
    return steps


def dequantize(centred: Float32, grid: Grid, out: Float32 | None = None) -> Float32:
    """(code - zero_point) * scale for codes from `centred_codes`: float32 (G, b, N)."""
    weights: Float32 = np.multiply(centred, grid.scales[:, None, :], out=out)
    return weights


def pack(centred: Float32, grid: Grid) -> UInt8:
    """The bytes of MatMulNBits' input B: uint8 (N, G, b * bits / 8)."""
    codes = _joined((centred + grid.zero_points[:, None, :]).astype(np.uint8), grid.bits)  # (G, b * bits / 8, N)
    return in_memory(np.ascontiguousarray(codes.transpose(2, 0, 1), like=codes))


def as_stored(codes: UInt8, grid: Grid, fmt: Format) -> tuple[UInt8, Grid]:
    """Packed codes (N, G, b * bits / 8) and their grid, in blocks of the size that is stored."""
    parts = fmt.block_size // fmt.stored_block_size
    if parts == 1:
        return codes, grid
    scales, zero_points = np.repeat(grid.scales, parts, axis=0), np.repeat(grid.zero_points, parts, axis=0)
    return codes.reshape(codes.shape[0], codes.shape[1] * parts, -1), Grid(scales, zero_points, grid.bits)


def unpack(packed: UInt8, bits: int = 4) -> UInt8:
    """The codes of packed bytes: uint8 (N, G, b * bits / 8) -> (N, G, b)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: UInt8 = (packed[..., None] >> shifts) & np.uint8(max_code(bits))  # (N, G, b * bits / 8, 8 / bits)
    return codes.reshape(*packed.shape[:2], -1)  # (N, G, b)


def _joined(codes: UInt8, bits: int) -> UInt8:
    """As many codes as fit into a byte, neighbours along axis 1, the first in the lowest bits."""
    in_a_byte = 8 // bits
    joined = codes[:, ::in_a_byte]
    for at in range(1, in_a_byte):
        joined = joined | (codes[:, at::in_a_byte] << np.uint8(bits * at))
    return joined


def pack_zero_points(zero_points: Float32, bits: int = 4) -> UInt8:
    """The bytes of MatMulNBits' input zero_points: (G, N) -> uint8 (N, ceil(G * bits / 8)), rows of whole bytes."""
    codes = zero_points.T.astype(np.uint8)  # (N, G)
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % (8 // bits))))
    return np.ascontiguousarray(_joined(padded, bits))


def unpack_zero_points(packed: UInt8, blocks: int, bits: int = 4) -> UInt8:
    """uint8 (N, ceil(G * bits / 8)) -> (N, G) zero points."""
    return unpack(packed[:, None, :], bits).reshape(packed.shape[0], -1)[:, :blocks]  # (N, G)


def pack_scales(scales: Float32, dtype: DTypeLike) -> NDArray[np.generic]:
    """MatMulNBits' input scales: (G, N) float32 -> (N, G) of `dtype`."""
    return np.ascontiguousarray(scales.T).astype(dtype)


ROWS_AT_ONCE = 64  # of a matrix that is packed; a multiple of 16, so that they fill whole bytes


@dataclass(frozen=True)
class Matrix:
    """How the codes of a weight (K, N) lie for DequantizeLinear: row by row, the first in the lowest bits of a byte.

    signed: codes less the middle one, in two's complement: what a symmetric weight is in, since DequantizeLinear takes
    0 for the zero point that is not given, where MatMulNBits takes the middle.
    """

    K: int
    N: int
    bits: int
    signed: bool

    def pack(self, packed: UInt8) -> UInt8:
        """MatMulNBits' B, (N, G, b * bits / 8), as the bytes of a (K, N): uint8 (ceil(K * N * bits / 8),)."""
        columns = packed.reshape(self.N, 1, -1)
        rows_bytes = ROWS_AT_ONCE * self.bits // 8
        parts = [
            self._bytes(unpack(columns[:, :, at : at + rows_bytes], self.bits)[:, 0, : self.K - start].T)
            for start, at in zip(range(0, self.K, ROWS_AT_ONCE), range(0, columns.shape[2], rows_bytes), strict=False)
        ]
        return np.concatenate(parts)

    def unpack(self, raw: UInt8, block_size: int, zero_points: UInt8) -> UInt8:
        """What `pack` packed; the padding of a last block are its zero points. zero_points: uint8 (G, N)."""
        packed = np.empty((self.N, len(zero_points), block_size * self.bits // 8), np.uint8)
        for at, points in enumerate(zero_points):  # a block of rows at a time: codes take more memory than their bytes
            rows = range(at * block_size, min((at + 1) * block_size, self.K))
            codes = np.repeat(points[None], block_size, axis=0)  # (b, N)
            codes[: len(rows)] = self._rows(raw, rows)
            packed[:, at] = _joined(codes[None], self.bits)[0].T
        return packed

    def pack_zero_points(self, zero_points: Float32) -> UInt8:
        """The bytes of DequantizeLinear's x_zero_point, (G, N): uint8 (ceil(G * N * bits / 8),)."""
        return self._bytes(zero_points.astype(np.uint8))

    def unpack_zero_points(self, raw: UInt8, blocks: int) -> UInt8:
        """uint8 (ceil(G * N * bits / 8),) -> (G, N) zero points."""
        return self._rows(raw, range(blocks))

    def _bytes(self, codes: UInt8) -> UInt8:
        """Codes (rows, N) as they are stored; the last byte is filled up with zeros."""
        flat = (codes ^ self._offset).reshape(1, -1)
        raw: UInt8 = _joined(np.pad(flat, ((0, 0), (0, -flat.size % (8 // self.bits)))), self.bits)[0]
        return raw

    def _rows(self, raw: UInt8, rows: range) -> UInt8:
        """The codes of some rows: (len(rows), N)."""
        first, in_a_byte = rows.start * self.N, 8 // self.bits
        some = raw[first // in_a_byte : -(-rows.stop * self.N // in_a_byte)]
        codes: UInt8 = unpack(some[None, None, :], self.bits).reshape(-1)[first % in_a_byte :][: len(rows) * self.N]
        return (codes ^ self._offset).reshape(len(rows), self.N)

    @property
    def _offset(self) -> np.uint8:
        """Flipping the highest bit of a code takes the middle one from it."""
        return np.uint8(middle_code(self.bits) if self.signed else 0)
