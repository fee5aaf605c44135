"""The numbers: grids, rounding, packing; and that onnxruntime reads them as we do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from builders import run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from awq_onnx import codec
from awq_onnx.codec import Format, Grid
from awq_onnx.kernels import reference
from awq_onnx.targets import BLOCK_SIZES, WHOLE_COLUMN

Array = NDArray[Any]

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)
block_sizes = st.sampled_from([size for size in BLOCK_SIZES if size != WHOLE_COLUMN])
BITS = (2, 4, 8)
bit_counts = st.sampled_from(BITS)
KINDS = {False: "zero points", True: "symmetric"}
FORMATS = [
    pytest.param(Format(32, symmetric, np.dtype(dtype), bits), id=f"{kind}-{dtype}-{bits} bits")
    for symmetric, kind in KINDS.items()
    for dtype in ("float32", "float16")
    for bits in BITS
]
every_format = pytest.mark.parametrize("fmt", FORMATS)


def asymmetric(dtype: str = "float32") -> Format:
    return Format(32, False, np.dtype(dtype))


@st.composite
def blocks_of_weights(draw: st.DrawFn, largest: float = 1e4) -> Array:
    """(G, 16, N) float32, with the zeros, subnormals, equal and extreme values that Hypothesis likes."""
    G, N = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(arrays(np.float32, (G, 16, N), elements=st.floats(-largest, largest, width=32)))


def round_trip(blocks: Array, fmt: Format) -> tuple[Grid, Array, Array]:
    """The min-max grid of blocks, their centred codes, and the weights that these stand for."""
    grid = codec.minmax_grid(blocks, fmt)
    centred = codec.centred_codes(blocks, grid)
    return grid, centred, codec.dequantize(centred, grid)


def assert_usable(grid: Grid, fmt: Format) -> None:
    stored = codec.pack_scales(grid.scales, fmt.scale_dtype).astype(np.float32)
    assert np.isfinite(stored).all()
    assert (stored != 0).all()
    np.testing.assert_array_equal(stored, grid.scales.T)  # what is stored is what was searched with
    assert grid.bits == fmt.bits
    assert ((grid.zero_points >= 0) & (grid.zero_points < 1 << fmt.bits) & (grid.zero_points % 1 == 0)).all()


# Packing


@property_test
@given(G=st.integers(1, 9), block_size=block_sizes, N=st.integers(1, 9), bits=bit_counts, seed=seeds)
def test_unpacked_codes_are_the_packed_ones(G: int, block_size: int, N: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (G, block_size, N)).astype(np.float32)
    zero_points = rng.integers(0, 1 << bits, (G, N)).astype(np.float32)
    grid = Grid(np.ones((G, N), np.float32), zero_points, bits)
    packed = codec.pack(codes - zero_points[:, None, :], grid)
    assert packed.shape == (N, G, block_size * bits // 8)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(codec.unpack(packed, bits), codes.transpose(2, 0, 1))


def test_the_even_element_is_in_the_low_nibble() -> None:
    codes = np.zeros((1, 16, 1), np.float32)
    codes[0, :4, 0] = [1, 2, 3, 4]
    grid = Grid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    assert codec.pack(codes, grid)[0, 0, :2].tolist() == [0x21, 0x43]


@property_test
@given(shape=array_shapes(min_dims=2, max_dims=2, max_side=9), bits=bit_counts, seed=seeds)
def test_unpacked_zero_points_are_the_packed_ones(shape: tuple[int, int], bits: int, seed: int) -> None:
    G, N = shape
    zero_points = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    packed = codec.pack_zero_points(zero_points.astype(np.float32), bits)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    assert packed.shape == (N, -(-G * bits // 8))
    np.testing.assert_array_equal(codec.unpack_zero_points(packed, G, bits), zero_points.T)


def test_zero_points_of_an_odd_number_of_blocks_start_every_row_on_a_new_byte() -> None:
    zero_points = np.array([[1, 4], [2, 5], [3, 6]], np.float32)  # (G, N)
    assert codec.pack_zero_points(zero_points).tolist() == [[0x21, 0x03], [0x54, 0x06]]


@property_test
@given(K=st.integers(1, 600), N=st.integers(1, 5), block_size=block_sizes)
def test_blocks_run_along_k_and_are_padded_with_zeros(K: int, N: int, block_size: int) -> None:
    weight = np.arange(1, K * N + 1, dtype=np.float32).reshape(K, N)
    blocks = codec.to_blocks(weight, block_size)
    assert blocks.shape == (Format(block_size, False, np.dtype(np.float32)).blocks_of(K), block_size, N)
    assert not blocks.reshape(-1, N)[K:].any()
    np.testing.assert_array_equal(codec.from_blocks(blocks, K), weight)


def test_blocks_of_a_weight_that_fills_them_are_no_copy() -> None:
    weight = np.ones((64, 3), np.float32)
    assert np.shares_memory(codec.to_blocks(weight, 32), weight)


# Rounding


@every_format
@property_test
@given(blocks=blocks_of_weights())
def test_every_block_has_a_usable_grid_and_codes_of_so_many_bits(fmt: Format, blocks: Array) -> None:
    grid, centred, restored = round_trip(blocks, fmt)
    assert_usable(grid, fmt)
    codes = centred + grid.zero_points[:, None, :]
    assert ((codes >= 0) & (codes < 1 << fmt.bits) & (codes % 1 == 0)).all()
    assert np.isfinite(restored).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@property_test
@given(blocks=blocks_of_weights())
def test_a_weight_inside_the_range_moves_half_a_scale_at_most(dtype: str, blocks: Array) -> None:
    grid, _, restored = round_trip(blocks, asymmetric(dtype))
    scales, zero_points = grid.scales[:, None, :], grid.zero_points[:, None, :]
    inside = (blocks >= -zero_points * scales) & (blocks <= (15 - zero_points) * scales)
    assert (np.abs(restored - blocks) <= scales * 0.50001)[inside].all()


@property_test
@given(blocks=blocks_of_weights())
def test_the_asymmetric_range_reaches_every_weight_of_its_block(blocks: Array) -> None:
    grid, _, restored = round_trip(blocks, asymmetric())
    assert (np.abs(restored - blocks) <= grid.scales[:, None, :] * 0.50001).all()


@every_format
@property_test
@given(blocks=blocks_of_weights(), seed=seeds)
def test_zero_stays_exactly_zero(fmt: Format, blocks: Array, seed: int) -> None:
    pruned = np.random.default_rng(seed).random(blocks.shape) < 0.3
    _, _, restored = round_trip(np.where(pruned, np.float32(0), blocks), fmt)
    assert not restored[pruned].any()


@every_format
def test_an_all_zero_block_has_a_finite_scale_and_zero_weights(fmt: Format) -> None:
    blocks = np.ones((2, 32, 3), np.float32)
    blocks[1, :, 2] = 0
    grid, _, restored = round_trip(blocks, fmt)
    assert_usable(grid, fmt)
    assert not restored[1, :, 2].any()


@every_format
def test_a_huge_outlier_is_kept_and_ruins_only_its_own_block(fmt: Format) -> None:
    blocks = np.random.default_rng(0).standard_normal((3, 32, 4)).astype(np.float32)
    usual = round_trip(blocks, fmt)[2]
    huge = np.float32(6e4 if fmt.scale_dtype == np.float16 else 1e30)
    blocks[1, 5, 2] = huge
    grid, _, restored = round_trip(blocks, fmt)
    assert_usable(grid, fmt)
    assert restored[1, 5, 2] == pytest.approx(huge, rel=0.04)
    restored[1, :, 2] = usual[1, :, 2]
    np.testing.assert_array_equal(restored, usual)


@every_format
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_block_of_one_sign_is_rounded_as_finely_as_its_mirror_image(fmt: Format, sign: int) -> None:
    blocks = sign * np.random.default_rng(0).uniform(1, 2, (2, 32, 5)).astype(np.float32)
    grid, _, restored = round_trip(blocks, fmt)
    assert_usable(grid, fmt)
    step = 2 / (codec.middle_code(fmt.bits) if fmt.symmetric else codec.max_code(fmt.bits))
    assert np.abs(restored - blocks).max() < 0.55 * step


@every_format
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-38, 1e-7, 6e-8])
def test_weights_too_small_for_a_scale_leave_no_infinity(fmt: Format, size: float) -> None:
    blocks = np.random.default_rng(0).choice(np.array([-size, 0, size], np.float32), (2, 32, 4))
    grid, _, restored = round_trip(blocks, fmt)
    assert_usable(grid, fmt)
    assert np.abs(restored - blocks).max() <= 2 * size


def test_the_symmetric_grid_uses_its_full_range_on_the_side_of_the_largest_weight() -> None:
    blocks = np.zeros((1, 16, 2), np.float32)
    blocks[0, 0] = [-8, 8]
    blocks[0, 1] = [7, -7]
    grid, centred, restored = round_trip(blocks, Format(16, True, np.dtype(np.float32)))
    assert grid.scales.tolist() == [[1, -1]]
    assert centred[0, :2].tolist() == [[-8, -8], [7, 7]]
    np.testing.assert_array_equal(restored, blocks)


@pytest.mark.parametrize(("bits", "middle"), [(2, 2), (4, 8), (8, 128)])
def test_the_symmetric_grid_has_its_zero_point_in_the_middle(bits: int, middle: int) -> None:
    grid, _, _ = round_trip(np.full((2, 32, 3), 5, np.float32), Format(32, True, np.dtype(np.float32), bits))
    assert codec.middle_code(bits) == middle
    assert (grid.zero_points == middle).all()


@pytest.mark.parametrize("symmetric", KINDS)
def test_four_bits_are_four_times_finer_than_two_and_eight_sixteen_times_finer_than_four(
    symmetric: bool,
) -> None:
    blocks = np.random.default_rng(0).standard_normal((3, 32, 50)).astype(np.float32)
    errors = [
        np.abs(round_trip(blocks, Format(32, symmetric, np.dtype(np.float32), bits))[2] - blocks).mean()
        for bits in BITS
    ]
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.2)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)


def test_a_nearest_scale_in_half_precision_is_exact_in_half_precision() -> None:
    scales = np.array([0.1, 1 / 3, 1e-9, 0], np.float32)
    rounded = codec.round_scales(scales, np.float16)
    assert rounded.dtype == np.float32
    assert rounded.tolist() == [float(np.float16(0.1)), float(np.float16(1 / 3)), 1, 1]


@given(st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32)), st.integers(0, 2**16 - 1))
def test_a_nearest_scale_in_bfloat16_is_the_one_of_ml_dtypes(any_scale: np.float32, high: int) -> None:
    tie = np.uint32(high << 16 | 0x8000).view(np.float32)  # right between two of bfloat16
    scales = np.array([one for one in (any_scale, tie) if np.isfinite(one)], np.float32)
    largest = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    nearest = np.clip(scales, -largest, largest).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.where(np.abs(nearest) < np.finfo(np.float32).smallest_normal, np.float32(1), nearest)
    np.testing.assert_array_equal(codec.round_scales(scales, ml_dtypes.bfloat16), expected)


# onnxruntime

CASES = [
    pytest.param(64, 8, 32, id="plain"),
    pytest.param(96, 7, 32, id="odd blocks, odd N"),
    pytest.param(80, 4, 16, id="five blocks of 16"),
    pytest.param(33, 5, 32, id="odd K"),
    pytest.param(100, 3, 64, id="K no multiple of the block"),
    pytest.param(20, 6, 32, id="K smaller than the block"),
    pytest.param(7, 1, 16, id="one column"),
    pytest.param(130, 9, 128, id="two rows in the last block"),
    pytest.param(300, 5, 256, id="blocks of 256"),
]


def weight_with_oddities(K: int, N: int, rng: np.random.Generator) -> Array:
    weight = (rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
    weight[:, N // 2] = 0  # a dead output
    weight[K // 2] = 0  # a pruned input
    weight[K // 3, 0] = 3  # an outlier
    return weight


def run_in_onnxruntime(x: Array, N: int, fmt: Format, tensors: dict[str, Array], accuracy_level: int) -> Array:
    K = x.shape[1]
    dtype = helper.np_dtype_to_tensor_dtype(x.dtype)
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=K, N=N, bits=fmt.bits, block_size=fmt.block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info("x", dtype, ["T", K])],
        [helper.make_tensor_value_info("y", dtype, ["T", N])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return run(helper.make_model(graph, opset_imports=opsets, ir_version=8), {"x": x})["y"]


@pytest.mark.parametrize(("K", "N", "block_size"), CASES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", BITS)
def test_onnxruntime_reads_the_packed_weight_as_we_do(
    K: int, N: int, block_size: int, symmetric: bool, dtype: str, bits: int
) -> None:
    rng = np.random.default_rng(K + N)
    fmt = Format(block_size, symmetric, np.dtype(dtype), bits)
    x = rng.standard_normal((5, K)).astype(dtype)
    grid, centred, restored = round_trip(codec.to_blocks(weight_with_oddities(K, N, rng), block_size), fmt)
    tensors = {"codes": codec.pack(centred, grid), "scales": codec.pack_scales(grid.scales, dtype)}
    if not symmetric:
        tensors["zero_points"] = codec.pack_zero_points(grid.zero_points, bits)

    y = run_in_onnxruntime(x, N, fmt, tensors, accuracy_level=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 5e-3, "atol": 1e-2}
    np.testing.assert_allclose(y, reference.matmul_nbits(x, **tensors, bits=bits), **tolerance)
    np.testing.assert_allclose(y, x.astype(np.float32) @ codec.from_blocks(restored, K), **tolerance)
    assert not y[:, N // 2].any() or N == 1


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("K", [96, 100])
@pytest.mark.parametrize("bits", BITS)
def test_int8_arithmetic_in_onnxruntime_agrees_to_a_percent(K: int, symmetric: bool, bits: int) -> None:
    """The default accuracy level; negative scales and odd numbers of blocks are what its kernels could trip over."""
    rng = np.random.default_rng(0)
    fmt = Format(32, symmetric, np.dtype(np.float32), bits)
    x = rng.standard_normal((6, K)).astype(np.float32)
    grid, centred, restored = round_trip(codec.to_blocks(weight_with_oddities(K, 9, rng), 32), fmt)
    tensors = {"codes": codec.pack(centred, grid), "scales": codec.pack_scales(grid.scales, np.float32)}
    if not symmetric:
        tensors["zero_points"] = codec.pack_zero_points(grid.zero_points, bits)
    expected = x @ codec.from_blocks(restored, K)
    error = run_in_onnxruntime(x, 9, fmt, tensors, accuracy_level=4) - expected
    assert np.linalg.norm(error) < 0.015 * np.linalg.norm(expected)


# The codes as DequantizeLinear reads them


@st.composite
def packed_weights(draw: st.DrawFn) -> tuple[codec.Matrix, Array, Array, int]:
    """A matrix, MatMulNBits' B of it and its zero points (G, N), and the block size."""
    bits, symmetric = draw(st.sampled_from((4, 8))), draw(st.booleans())
    K, N, block_size = draw(st.integers(1, 200)), draw(st.integers(1, 7)), draw(block_sizes)
    rng = np.random.default_rng(draw(seeds))
    weight = rng.standard_normal((K, N)).astype(np.float32)
    blocks = codec.to_blocks(weight, block_size)
    grid = codec.minmax_grid(blocks, Format(block_size, symmetric, np.dtype(np.float32), bits))
    packed = codec.pack(codec.centred_codes(blocks, grid), grid)
    return codec.Matrix(K, N, bits, symmetric), packed, grid.zero_points, block_size


@property_test
@given(packed_weights())
def test_codes_for_dequantize_linear_come_back_as_they_were(case: tuple[codec.Matrix, Array, Array, int]) -> None:
    matrix, packed, zero_points, block_size = case
    raw = matrix.pack(packed)
    assert raw.shape == (-(-matrix.K * matrix.N * matrix.bits // 8),)
    assert np.array_equal(matrix.unpack(raw, block_size, zero_points.astype(np.uint8)), packed)


@property_test
@given(packed_weights())
def test_zero_points_for_dequantize_linear_come_back_as_they_were(case: tuple[codec.Matrix, Array, Array, int]) -> None:
    matrix, _, zero_points, _ = case
    raw = matrix.pack_zero_points(zero_points)
    assert np.array_equal(matrix.unpack_zero_points(raw, len(zero_points)), zero_points)
    assert not matrix.signed or not raw.any()  # the middle is the 0 of a signed code


@property_test
@given(packed_weights())
def test_onnx_reads_the_bytes_of_a_matrix_as_its_codes(case: tuple[codec.Matrix, Array, Array, int]) -> None:
    matrix, packed, _, _ = case
    dtype = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}[matrix.bits, matrix.signed]
    tensor = TensorProto(dims=[matrix.K, matrix.N], data_type=TensorProto.DataType.Value(dtype))
    tensor.raw_data = matrix.pack(packed).tobytes()
    codes = codec.unpack(packed, matrix.bits).reshape(matrix.N, -1)[:, : matrix.K].T.astype(int)
    expected = codes - codec.middle_code(matrix.bits) if matrix.signed else codes
    assert np.array_equal(numpy_helper.to_array(tensor).astype(int), expected)


@property_test
@given(blocks=blocks_of_weights(), bits=st.sampled_from((4, 8)))
def test_a_positive_symmetric_grid_covers_both_ends(blocks: Array, bits: int) -> None:
    fmt = Format(16, True, np.dtype(np.float32), bits, positive=True)
    grid, _, restored = round_trip(blocks, fmt)
    assert (grid.scales > 0).all()
    assert (np.abs(restored - blocks) <= grid.scales[:, None, :] * 0.501).all()
