"""The specification itself, against three loops that know nothing of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from awq_onnx.kernels import reference

Array = NDArray[Any]

BITS = (4, 8)
SHAPES = [pytest.param(16, 1, 16, id="one block"), pytest.param(40, 3, 16, id="three blocks, the last not full")]


def tensors(K: int, N: int, block_size: int, dtype: str = "float32", bits: int = 4) -> tuple[Array, Array, Array]:
    """Random codes, scales and zero points of a node."""
    rng = np.random.default_rng(K)
    G = -(-K // block_size)
    codes = rng.integers(0, 256, (N, G, block_size * bits // 8), np.uint8)
    scales = (rng.standard_normal((N, G)) / 2 ** (bits - 1)).astype(dtype)
    return codes, scales, rng.integers(0, 256, (N, -(-G * bits // 8)), np.uint8)


def number(packed: Array, index: int, bits: int) -> int:
    if bits == 8:
        return int(packed[index])
    byte = int(packed[index // 2])
    return byte >> 4 if index % 2 else byte & 15


def naive(a: Array, codes: Array, scales: Array, zero_points: Array | None, bits: int = 4) -> Array:
    """A times the weight, one multiplication at a time."""
    N, _, block_bytes = codes.shape
    y = np.zeros((len(a), N))
    for t in range(a.shape[0]):
        for n in range(N):
            for k in range(a.shape[1]):
                block, inside = divmod(k, block_bytes * 8 // bits)
                zero_point = {4: 8, 8: 128}[bits] if zero_points is None else number(zero_points[n], block, bits)
                code = number(codes[n, block], inside, bits)
                y[t, n] += float(a[t, k]) * (code - zero_point) * float(scales[n, block])
    return y


@pytest.mark.parametrize(("K", "N", "block_size"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_it_computes_what_three_loops_compute(K: int, N: int, block_size: int, bits: int) -> None:
    codes, scales, zero_points = tensors(K, N, block_size, bits=bits)
    a = np.random.default_rng(1).standard_normal((2, K)).astype(np.float32)
    y = reference.matmul_nbits(a, codes, scales, zero_points, bits=bits)
    np.testing.assert_allclose(y, naive(a, codes, scales, zero_points, bits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("K", "N", "block_size"), SHAPES)
@pytest.mark.parametrize(("bits", "middle"), [(4, 0x88), (8, 128)])
def test_no_zero_points_mean_the_middle(K: int, N: int, block_size: int, bits: int, middle: int) -> None:
    codes, scales, zero_points = tensors(K, N, block_size, bits=bits)
    a = np.random.default_rng(1).standard_normal((2, K)).astype(np.float32)
    y = reference.matmul_nbits(a, codes, scales, bits=bits)
    np.testing.assert_allclose(y, naive(a, codes, scales, None, bits), rtol=1e-4, atol=1e-5)
    told = np.full_like(zero_points, middle)
    np.testing.assert_array_equal(y, reference.matmul_nbits(a, codes, scales, told, bits=bits))


def test_the_bias_is_added_to_every_row() -> None:
    codes, scales, zero_points = tensors(40, 3, 16)
    a = np.ones((2, 40), np.float32)
    bias = np.array([1, -2, 3], np.float32)
    plain = reference.matmul_nbits(a, codes, scales, zero_points)
    np.testing.assert_allclose(reference.matmul_nbits(a, codes, scales, zero_points, bias), plain + bias, rtol=1e-6)


def test_half_precision_is_summed_in_single_precision_and_returned_in_half() -> None:
    codes = np.full((1, 16, 128), 0x99, np.uint8)  # 4096 weights of 1: sums above 2048 are lost in half precision
    y = reference.matmul_nbits(np.ones((1, 4096), np.float16), codes, np.ones((1, 16), np.float16))
    assert y.dtype == np.float16
    assert y.item() == 4096


def test_leading_axes_stay() -> None:
    codes, scales, zero_points = tensors(40, 3, 16)
    a = np.random.default_rng(1).standard_normal((2, 4, 40)).astype(np.float32)
    y = reference.matmul_nbits(a, codes, scales, zero_points)
    assert y.shape == (2, 4, 3)
    flat = reference.matmul_nbits(a.reshape(8, 40), codes, scales, zero_points)
    np.testing.assert_allclose(y.reshape(8, 3), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_a_dequantised_weight_has_k_columns_without_the_padding(bits: int) -> None:
    codes, scales, zero_points = tensors(40, 3, 16, bits=bits)
    weight = reference.dequantize(codes, scales, zero_points, 40, bits)
    assert weight.dtype == np.float32
    identity = np.eye(40, dtype=np.float32)
    np.testing.assert_allclose(weight.T, naive(identity, codes, scales, zero_points, bits), rtol=1e-6, atol=1e-7)
