"""MatMulNBits in numpy: what every kernel, and onnxruntime's own, must compute.

Source: com.microsoft.MatMulNBits in onnxruntime's docs/ContribOperators.md: Y = A dequant(B)' + bias, with
dequant(B)[n, k] = (code - zero_point) * scale of block k // block_size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.codec import Float32, UInt8

Floats = NDArray[np.floating[Any]]


def dequantize(codes: UInt8, scales: Floats, zero_points: UInt8 | None, K: int, bits: int = 4) -> Float32:
    """The weight that the tensors of a node stand for: float32 (N, K).

    codes: uint8 (N, G, b * bits / 8). scales: (N, G). zero_points: uint8 (N, ceil(G * bits / 8)), None for the middle
    code everywhere.
    """
    N, G, _ = codes.shape
    unpacked = codec.unpack(codes, bits).astype(np.float32)  # (N, G, b)
    if zero_points is None:
        unpacked -= codec.middle_code(bits)
    else:
        unpacked -= codec.unpack_zero_points(zero_points, G, bits)[:, :, None]
    return (unpacked * scales.astype(np.float32)[:, :, None]).reshape(N, -1)[:, :K]  # (N, K)


def matmul_nbits(
    a: Floats,
    codes: UInt8,
    scales: Floats,
    zero_points: UInt8 | None = None,
    bias: Floats | None = None,
    bits: int = 4,
) -> Floats:
    """A (…, K) times the weight: (…, N) in the dtype of `a`, summed in float32."""
    product = a.astype(np.float32) @ dequantize(codes, scales, zero_points, a.shape[-1], bits).T
    if bias is not None:
        product += bias.astype(np.float32)
    return product.astype(a.dtype)
