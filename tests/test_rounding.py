"""Codes on their grids: never worse than plain rounding, and with the errors that were reported."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from builders import (
    FLOAT16,
    FLOAT32,
    PLAIN,
    Array,
    activations,
    every_format,
    plain_error,
    read_by,
    statistics_of,
    weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from awq_onnx import codec, compensate, grids, rounding, search
from awq_onnx.codec import Format
from awq_onnx.kernels import reference
from awq_onnx.rounding import STRIP, Rounded, Rounding
from awq_onnx.search import Base, Reader, ScaleLimits
from awq_onnx.statistics import InputStatistics

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def shipped_weight(rounded: Rounded, scale: Array, fmt: Format) -> Array:
    """The weight that x, not x / s, meets: from the bytes of the file, float64 (K, N)."""
    scales: Array = codec.pack_scales(rounded.grid.scales, fmt.scale_dtype)
    restored = reference.dequantize(
        rounded.codes,
        scales,
        None if fmt.symmetric else codec.pack_zero_points(rounded.grid.zero_points),
        scale.size,
    )
    weight: Array = restored.T.astype(np.float64) / scale[:, None]
    return weight


def assert_same(one: Rounded, other: Rounded) -> None:
    """Bit by bit."""
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.grid.scales, other.grid.scales)
    np.testing.assert_array_equal(one.grid.zero_points, other.grid.zero_points)
    assert (one.loss, one.plain_loss, one.energy) == (other.loss, other.plain_loss, other.energy)


def random_scale(rng: np.random.Generator, K: int, wildness: float) -> Array:
    scale: Array = np.exp(wildness * rng.standard_normal(K)).astype(np.float32)
    return scale


def compensated(rng: np.random.Generator, K: int, *, outliers: int = 0) -> InputStatistics:
    """An input whose correlations its validation rows confirm."""
    x = activations(rng, K, T=384, outliers=outliers)
    statistics = statistics_of(x[:256], x[256:])
    assert compensate.find(statistics, np.ones(K, np.float32)) is not None
    return statistics


# The weights of an input


@every_format
@property_test
@given(
    seed=seeds,
    K=st.sampled_from([20, 32, 50, 96]),
    wildness=st.sampled_from([0, 0.5, 3]),
    validation=st.sampled_from([None, 16]),
)
def test_no_group_ends_worse_than_plain_rounding(
    fmt: Format, seed: int, K: int, wildness: float, validation: int | None
) -> None:
    rng = np.random.default_rng(seed)
    x = activations(rng, K, T=48, outliers=1)
    statistics = statistics_of(x) if validation is None else statistics_of(x[validation:], x[:validation])
    scale = random_scale(rng, K, wildness)
    weights = [weight(rng, K, 5), weight(rng, K, 3) ** 3]
    kept, rounded = rounding.round_group(read_by(statistics, *weights, fmt=fmt), scale)
    assert sum(one.loss for one in rounded) <= sum(one.plain_loss for one in rounded)
    for w, one in zip(weights, rounded, strict=True):
        plain = plain_error(w, np.ones(K, np.float32), fmt)
        assert one.plain_loss == pytest.approx(statistics.loss(plain), rel=1e-4)
    assert np.array_equal(kept, scale) or (kept == 1).all()


@every_format
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_weight_on_its_grid_stays_as_it_is(fmt: Format, strength: float) -> None:
    """Plain rounding loses nothing here, so whatever a scale or a refit would change is a loss."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (64, 6))
    codes[::16], codes[1::16] = -8, 7
    w = (codes * 0.25).astype(np.float32)
    scale = random_scale(rng, 64, strength)
    kept, (rounded,) = rounding.round_group(read_by(statistics_of(activations(rng, 64)), w, fmt=fmt), scale)
    assert rounded.plain_loss == 0
    assert rounded.loss == 0
    np.testing.assert_array_equal(shipped_weight(rounded, kept, fmt), w)


def test_one_weight_that_a_scale_would_ruin_does_not_cost_the_others_their_refit() -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 64))
    on_grid = (rng.integers(-8, 8, (64, 6)) * 0.25).astype(np.float32)
    on_grid[::16], on_grid[1::16] = -2, 1.75
    scale = random_scale(rng, 64, 3)
    kept, (first, second) = rounding.round_group(read_by(statistics, on_grid, weight(rng, 64, 6), fmt=PLAIN), scale)
    assert (kept == 1).all()
    assert first.loss == 0
    assert second.loss < 0.97 * second.plain_loss


@every_format
@pytest.mark.parametrize("K", [128, 50, 20])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("compensate_too", [True, False])
def test_the_error_that_is_reported_is_the_error_that_ships(
    fmt: Format, K: int, scaled: bool, compensate_too: bool
) -> None:
    rng = np.random.default_rng(K)
    w = weight(rng, K, 9)
    statistics = compensated(rng, K, outliers=2) if compensate_too else statistics_of(activations(rng, K, outliers=2))
    scale = Base(statistics.act_mean).scale(0.3, ScaleLimits()) if scaled else np.ones(K, np.float32)
    scale, (rounded,) = rounding.round_group(read_by(statistics, w, fmt=fmt), scale)
    error = shipped_weight(rounded, scale, fmt) - w
    H = statistics.second_moment.astype(np.float64)
    assert rounded.loss == pytest.approx(np.vdot(error, H @ error), rel=1e-5)
    assert rounded.energy == pytest.approx(np.vdot(w, H @ w), rel=1e-5)
    if not scaled:
        assert rounded.plain_loss == pytest.approx(statistics.loss(plain_error(w, scale, fmt)), rel=1e-5)


@every_format
def test_a_scaled_and_refitted_weight_is_clearly_better_than_a_plain_one(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 128, outliers=3))
    w = weight(rng, 128, 32)
    choice = search.search_scale(read_by(statistics, w, fmt=fmt))
    scale, (rounded,) = rounding.round_group(read_by(statistics, w, fmt=fmt), choice.scale)
    np.testing.assert_array_equal(scale, choice.scale)
    assert rounded.loss < 0.4 * rounded.plain_loss


@every_format
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_compensation_helps_on_rows_that_calibration_never_saw(fmt: Format, alpha: float) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, 128, T=1024)
    statistics = statistics_of(x[:256], x[256:512])
    w = weight(rng, 128, 32)
    wanted = Base(statistics.act_mean).scale(alpha, ScaleLimits())
    losses = []
    for one in (statistics, replace(statistics, validation=None)):
        scale, (rounded,) = rounding.round_group(read_by(one, w, fmt=fmt), wanted)
        np.testing.assert_array_equal(scale, wanted)
        losses.append(np.square(x[512:] @ (shipped_weight(rounded, scale, fmt) - w)).sum())
    assert losses[0] < 0.5 * losses[1]


@every_format
def test_without_correlations_validation_rows_change_nothing(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(*rng.standard_normal((2, 20, 96)).astype(np.float32))
    w, scale = weight(rng, 96, 8), np.ones(96, np.float32)
    _, (first,) = rounding.round_group(read_by(statistics, w, fmt=fmt), scale)
    _, (second,) = rounding.round_group(read_by(replace(statistics, validation=None), w, fmt=fmt), scale)
    assert_same(first, second)


def test_every_weight_is_compensated_as_its_own_input_wants() -> None:
    """Experts of one group: each sees its own rows."""
    rng = np.random.default_rng(0)
    inputs = [compensated(rng, 64), statistics_of(activations(rng, 64)), compensated(rng, 64)]
    readers = [Reader(weight(rng, 64, 8), one, fmt=PLAIN) for one in inputs]
    scale = np.ones(64, np.float32)
    _, together = rounding.round_group(readers, scale)
    for reader, one in zip(readers, together, strict=True):
        _, (alone,) = rounding.round_group([reader], scale)
        assert_same(one, alone)


# Dead inputs, tiny weights


@pytest.mark.parametrize("outliers", [0, 3])
def test_dead_channels_leave_losses_finite(outliers: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, 64, T=384, outliers=outliers)
    x[:, [0, 17, 40]] = 0
    for statistics in (statistics_of(x), statistics_of(x[:256], x[256:])):
        for alpha in (0, 0.5, 1):
            scale = Base(statistics.act_mean).scale(alpha, ScaleLimits())
            _, (rounded,) = rounding.round_group(read_by(statistics, weight(rng, 64, 8), fmt=PLAIN), scale)
            assert np.isfinite([rounded.loss, rounded.plain_loss]).all()
            assert np.isfinite(shipped_weight(rounded, scale, PLAIN)).all()


@every_format
def test_a_weight_whose_input_was_dead_in_calibration_is_rounded_plainly(fmt: Format) -> None:
    """No error costs anything there (an expert that no token reached), but it may wake up later."""
    rng = np.random.default_rng(0)
    w = weight(rng, 64, 8)
    scale, (rounded,) = rounding.round_group(
        read_by(statistics_of(np.zeros((4, 64))), w, fmt=fmt), np.ones(64, np.float32)
    )
    plain = w + plain_error(w, scale, fmt)
    np.testing.assert_allclose(shipped_weight(rounded, scale, fmt), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1e-12, 1e-25, 1e-37])
def test_weights_that_decayed_to_almost_nothing_stay_almost_nothing(symmetric: bool, size: float) -> None:
    """Squares of such weights underflow in single precision, and scales below the smallest normal become 1."""
    rng = np.random.default_rng(0)
    w = (rng.uniform(-15, 15, (64, 8)) * size).astype(np.float32)
    fmt = Format(32, symmetric, FLOAT32)
    scale, (rounded,) = rounding.round_group(
        read_by(statistics_of(activations(rng, 64)), w, fmt=fmt), np.ones(64, np.float32)
    )
    assert np.abs(shipped_weight(rounded, scale, fmt)).max() <= 20 * size


def costs(statistics: InputStatistics, scale: Array, block_size: int, flattening: float) -> Array:
    """What an error in s W costs, diag(H) / s^2, and `flattening` times the mean of its block: (G, b, 1)."""
    cost = codec.to_blocks((statistics.diagonal / scale**2)[:, None], block_size)
    flattened: Array = cost + np.float32(flattening) * cost.mean(axis=1, keepdims=True)
    return flattened


@every_format
@pytest.mark.parametrize("K", [128, 50])
def test_an_error_in_the_scaled_weight_costs_less_where_the_scale_is_large(fmt: Format, K: int) -> None:
    """Dividing by s shrinks it again: the refit of s W is weighted with diag(H) / s^2, flattened within a block."""
    rng = np.random.default_rng(0)
    statistics = statistics_of(rng.standard_normal((256, K)) * np.exp(rng.standard_normal(K)))
    w = weight(rng, K, 32)
    scale = Base(statistics.act_mean).scale(0.5, ScaleLimits())
    kept, (rounded,) = rounding.round_group(read_by(statistics, w, fmt=fmt), scale)
    np.testing.assert_array_equal(kept, scale)
    blocks = codec.to_blocks(scale[:, None] * w, fmt.block_size)
    h = costs(statistics, scale, fmt.block_size, rounding.FLATTENING)
    centred, grid = grids.fit(blocks, h, fmt)
    np.testing.assert_array_equal(rounded.codes, codec.pack(centred, grid))
    np.testing.assert_allclose(rounded.grid.scales, grid.scales, rtol=1e-6)
    np.testing.assert_array_equal(rounded.grid.zero_points, grid.zero_points)


@every_format
@pytest.mark.parametrize("K", [128, 50])
@pytest.mark.parametrize("random", [True, False])
def test_compensated_codes_lie_on_a_grid_for_flatter_costs(fmt: Format, K: int, random: bool) -> None:
    rng = np.random.default_rng(0)
    statistics, w = compensated(rng, K), weight(rng, K, 32)
    scale = Base(statistics.act_mean).scale(0.5, ScaleLimits())
    kept, (rounded,) = rounding.round_group(read_by(statistics, w, fmt=fmt), scale, Rounding(random=random))
    np.testing.assert_array_equal(kept, scale)
    scaled = scale[:, None] * w
    h = costs(statistics, scale, fmt.block_size, rounding.FLATTENING_COMPENSATED)
    _, grid = grids.fit(codec.to_blocks(scaled, fmt.block_size), h, fmt)
    np.testing.assert_allclose(rounded.grid.scales, grid.scales, rtol=1e-6)
    np.testing.assert_array_equal(rounded.grid.zero_points, grid.zero_points)
    compensation = compensate.find(statistics, scale, random=random)
    assert compensation is not None
    centred = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    np.testing.assert_array_equal(rounded.codes, codec.pack(centred, grid))


# Weights as they are stored


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_a_weight_of_any_dtype_is_rounded_where_it_lies(dtype: type, transposed: bool, factor: float) -> None:
    rng = np.random.default_rng(0)
    statistics, scale = compensated(rng, 50), np.ones(50, np.float32)
    stored: Array = weight(rng, 50, 9).astype(dtype)
    read = stored.astype(np.float32) * np.float32(factor)
    if transposed:
        stored = np.ascontiguousarray(stored.T).T
    stored.setflags(write=False)
    _, (found,) = rounding.round_group([Reader(stored, statistics, factor=factor, fmt=PLAIN)], scale)
    _, (expected,) = rounding.round_group([Reader(read, statistics, fmt=PLAIN)], scale)
    assert_same(found, expected)


@pytest.mark.parametrize("head_size", [None, 4])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_weight_and_the_statistics_are_left_as_they_were(head_size: int | None, scaled: bool) -> None:
    rng = np.random.default_rng(0)
    statistics, w = compensated(rng, 64), weight(rng, 64, 8)
    before, H = w.copy(), statistics.second_moment.copy()
    scale = random_scale(rng, 64, 0.5 * scaled)
    rounding.round_group([Reader(w, statistics, head_size, fmt=PLAIN)], scale)
    np.testing.assert_array_equal(w, before)
    np.testing.assert_array_equal(statistics.second_moment, H)


# Strips


@every_format
@pytest.mark.parametrize("compensate_too", [True, False])
@pytest.mark.parametrize("N", [STRIP, STRIP + 1, 2 * STRIP + 300])
def test_a_wide_weight_is_rounded_as_its_strips_would_be(fmt: Format, compensate_too: bool, N: int) -> None:
    rng = np.random.default_rng(0)
    statistics = compensated(rng, 50) if compensate_too else statistics_of(activations(rng, 50))
    w, scale = weight(rng, 50, N), random_scale(rng, 50, 0.1)
    kept, (whole,) = rounding.round_group(read_by(statistics, w, fmt=fmt), scale)
    np.testing.assert_array_equal(kept, scale)
    strips = search.slices(N, STRIP)
    assert len(strips) == -(-N // STRIP)
    apart = [rounding.round_group(read_by(statistics, w[:, strip], fmt=fmt), scale)[1][0] for strip in strips]
    assert_same(whole, Rounded.joined(apart))
    assert whole.codes.shape == (N, fmt.blocks_of(50), fmt.block_size // 2)
    assert whole.grid.scales.shape == whole.grid.zero_points.shape == (fmt.blocks_of(50), N)


def test_strips_of_eight_bits_stay_of_eight_bits() -> None:
    rng, fmt = np.random.default_rng(0), Format(32, False, FLOAT16, 8)
    statistics, w = statistics_of(activations(rng, 64)), weight(rng, 64, STRIP + 2)
    _, (rounded,) = rounding.round_group([Reader(w, statistics, fmt=fmt)], np.ones(64, np.float32))
    assert rounded.grid.bits == 8
    assert rounded.codes.shape == (STRIP + 2, 2, 32)
    assert (
        rounded.loss
        < 0.01 * rounding.round_group(read_by(statistics, w, fmt=PLAIN), np.ones(64, np.float32))[1][0].loss
    )


@every_format
def test_a_wide_weight_that_keeps_its_plain_grid_keeps_it_in_every_strip(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    w = (rng.integers(-8, 8, (64, STRIP + 6)) * 0.25).astype(np.float32)
    w[::16], w[1::16] = -2, 1.75
    readers = read_by(statistics_of(activations(rng, 64)), w, fmt=fmt)
    kept, (rounded,) = rounding.round_group(readers, random_scale(rng, 64, 3))
    assert (kept == 1).all()
    np.testing.assert_array_equal(shipped_weight(rounded, kept, fmt), w)


@pytest.mark.parametrize("head_size", [8, 1024])
def test_what_a_head_counts_does_not_depend_on_strips(head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    statistics, w = statistics_of(activations(rng, 32)), weight(rng, 32, 2048)
    w[:, :1024] *= 30
    scale, readers = np.ones(32, np.float32), [Reader(w, statistics, head_size, fmt=PLAIN)]
    _, (in_strips,) = rounding.round_group(readers, scale)
    monkeypatch.setattr(rounding, "STRIP", 2048)
    _, (whole,) = rounding.round_group(readers, scale)
    np.testing.assert_array_equal(in_strips.codes, whole.codes)
    for name in ("loss", "plain_loss", "energy"):
        assert getattr(in_strips, name) == pytest.approx(getattr(whole, name), rel=1e-5)


@every_format
@pytest.mark.parametrize("compensate_too", [True, False])
def test_two_runs_give_the_same_bits_on_any_number_of_threads(fmt: Format, compensate_too: bool) -> None:
    rng = np.random.default_rng(0)
    statistics = compensated(rng, 50, outliers=1) if compensate_too else statistics_of(activations(rng, 50, outliers=1))
    readers = read_by(statistics, weight(rng, 50, 3 * STRIP - 5), weight(rng, 50, 7), fmt=fmt)
    scale = Base(statistics.act_mean).scale(0.5, ScaleLimits())
    with threadpool_limits(1, "blas"):
        kept, expected = rounding.round_group(readers, scale)
        np.testing.assert_array_equal(kept, scale)
        for threads in (1, 2, 3):
            with ThreadPoolExecutor(threads) as pool:
                _, found = rounding.round_group(readers, scale, spread=pool.map)
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("compensate_too", [True, False])
def test_of_a_wide_weight_a_few_strips_are_in_memory(compensate_too: bool, tmp_path: Path) -> None:
    """And twice what ships, for a moment, and a matrix of how to compensate."""
    rng, K, N = np.random.default_rng(0), 256, 8 * STRIP
    statistics = compensated(rng, K) if compensate_too else statistics_of(activations(rng, K))
    np.save(tmp_path / "w.npy", weight(rng, N, K).astype(np.float16))
    stored = np.load(tmp_path / "w.npy", mmap_mode="r").T  # read from a file, transposed there
    tracemalloc.start()
    _, (rounded,) = rounding.round_group([Reader(stored, statistics, fmt=PLAIN)], np.ones(K, np.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ships = rounded.codes.nbytes + rounded.grid.scales.nbytes + rounded.grid.zero_points.nbytes
    strip = 4 * K * STRIP
    assert peak < 5 * strip + 2 * ships + 2 * statistics.second_moment.nbytes
