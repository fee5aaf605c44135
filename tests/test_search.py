"""The choices: scales that pay, grids that never lose, and errors that are those of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from awq_onnx import codec, rounding, search, threads
from awq_onnx.codec import Format
from awq_onnx.kernels import reference
from awq_onnx.rounding import Rounded
from awq_onnx.search import ALPHAS, Reader, ScaleLimits
from awq_onnx.statistics import InputStatistics

Array = NDArray[Any]

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)
FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
FORMATS = [
    pytest.param(Format(32, False, FLOAT32), id="zero points-float32"),
    pytest.param(Format(32, True, FLOAT32), id="symmetric-float32"),
    pytest.param(Format(32, False, FLOAT16), id="zero points-float16"),
    pytest.param(Format(16, True, FLOAT16), id="symmetric-float16"),
]
every_format = pytest.mark.parametrize("fmt", FORMATS)
PLAIN = Format(32, False, FLOAT32)


def statistics_of(x: Array) -> InputStatistics:
    """What calibration would learn from activations (T, K)."""
    x = x.astype(np.float32)
    magnitude = np.abs(x)
    return InputStatistics(x.T @ x / np.float32(len(x)), magnitude.mean(axis=0), magnitude.max(axis=0), len(x))


def read_by(statistics: InputStatistics, *weights: Array) -> list[Reader]:
    """Weights that read one input."""
    return [Reader(one, statistics) for one in weights]


def with_second_moment(H: Array) -> InputStatistics:
    diagonal = np.sqrt(np.diagonal(H)).astype(np.float32)
    return InputStatistics(H.astype(np.float32), diagonal, diagonal, 1)


def activations(rng: np.random.Generator, K: int, *, T: int = 256, outliers: int = 0) -> Array:
    """Correlated channels of different strength; the first `outliers` of a shuffle are 30 times stronger."""
    mixed = rng.standard_normal((T, 12)) @ rng.standard_normal((12, K)) + rng.standard_normal((T, K))
    strength = np.exp(rng.standard_normal(K) * 0.5)
    strength[rng.permutation(K)[:outliers]] *= 30
    return (mixed * strength).astype(np.float32)


def weight(rng: np.random.Generator, K: int, N: int) -> Array:
    return (rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)


def plain_error(w: Array, scale: Array, fmt: Format) -> Array:
    """Q(s W) / s - W on the min-max grid: (K, N)."""
    blocks = codec.to_blocks(scale[:, None] * w, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    restored = codec.dequantize(codec.centred_codes(blocks, grid), grid)
    return codec.from_blocks(restored, len(w)) / scale[:, None] - w


def shipped_weight(rounded: Rounded, scale: Array, fmt: Format) -> Array:
    """The weight that x, not x / s, meets: from the bytes of the file, float64 (K, N)."""
    restored = reference.dequantize(
        codec.pack(rounded.centred, rounded.grid),
        codec.pack_scales(rounded.grid.scales, fmt.scale_dtype),
        None if fmt.symmetric else codec.pack_zero_points(rounded.grid.zero_points),
        scale.size,
    )
    return restored.T.astype(np.float64) / scale[:, None]


# The loss


def test_the_loss_is_the_mean_squared_output_error_of_a_token() -> None:
    rng = np.random.default_rng(0)
    x, error = activations(rng, 48), weight(rng, 48, 10)
    direct = np.sum((x.astype(np.float64) @ error) ** 2) / len(x)
    assert statistics_of(x).loss(error) == pytest.approx(direct, rel=1e-4)


def test_the_estimate_is_exact_for_eight_directions() -> None:
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((60, 8)))[0] * np.arange(1, 9)
    statistics, error = with_second_moment(U @ U.T), weight(rng, 60, 10)
    assert statistics.estimated_loss(error) == pytest.approx(statistics.loss(error), rel=1e-4)


def test_the_estimate_is_exact_for_eight_directions_and_independent_channels_beside_them() -> None:
    rng = np.random.default_rng(0)
    H = np.diag(rng.uniform(0.5, 1, 60))
    U = np.linalg.qr(rng.standard_normal((40, 8)))[0] * np.arange(20, 28)
    H[:40, :40] = U @ U.T
    statistics, error = with_second_moment(H), weight(rng, 60, 10)
    assert statistics.estimated_loss(error) == pytest.approx(statistics.loss(error), rel=1e-4)


def test_the_estimate_is_exact_for_a_diagonal() -> None:
    rng = np.random.default_rng(0)
    statistics, error = with_second_moment(np.diag(2.0 ** -np.arange(40))), weight(rng, 40, 10)
    assert statistics.estimated_loss(error) == pytest.approx(statistics.loss(error), rel=1e-4)


@pytest.mark.parametrize("K", [1, 5, 8, 9])
def test_the_estimate_works_for_fewer_channels_than_eigenvectors(K: int) -> None:
    rng = np.random.default_rng(0)
    statistics, error = statistics_of(activations(rng, K)), weight(rng, K, 4)
    assert statistics.estimated_loss(error) == pytest.approx(statistics.loss(error), rel=0.05 if K > 8 else 1e-4)


# The scale


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outliers", [0, 3])
def test_the_estimate_chooses_nearly_what_the_full_second_moment_would(seed: int, outliers: int) -> None:
    rng = np.random.default_rng(seed)
    statistics = statistics_of(activations(rng, 128, outliers=outliers))
    w = weight(rng, 128, 48)
    choice = search.search_scale(read_by(statistics, w), PLAIN)
    candidates = [search.candidate_scale(statistics.act_mean, alpha, ScaleLimits()) for alpha in ALPHAS]
    full = [statistics.loss(plain_error(w, scale, PLAIN)) for scale in candidates]
    assert statistics.loss(plain_error(w, choice.scale, PLAIN)) <= 1.02 * min(full)


def test_alpha_zero_is_no_scale_and_among_the_candidates() -> None:
    assert 0.0 in ALPHAS
    mean = np.array([0.1, 1, 50], np.float32)
    limits = ScaleLimits(tie=np.array([0, 0, 1]))
    assert search.candidate_scale(mean, 0.0, limits).tolist() == [1, 1, 1]


def test_alpha_one_is_proportional_to_the_mean_and_centred_on_one() -> None:
    scale = search.candidate_scale(np.array([1, 4, 16], np.float32), 1.0, ScaleLimits())
    np.testing.assert_allclose(scale, [0.25, 1, 4], rtol=1e-6)


@every_format
@pytest.mark.parametrize("K", [64, 50])
def test_the_chosen_scale_loses_no_more_than_none(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, K, outliers=1))
    choice = search.search_scale(read_by(statistics, weight(rng, K, 12), weight(rng, K, 7)), fmt)
    assert len(choice.losses) == len(ALPHAS)
    assert choice.losses[ALPHAS.index(choice.alpha)] == min(choice.losses) <= choice.losses[0]
    np.testing.assert_array_equal(
        choice.scale, search.candidate_scale(statistics.act_mean, choice.alpha, ScaleLimits())
    )


@every_format
def test_planted_outlier_channels_are_worth_a_scale(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 128, outliers=3))
    choice = search.search_scale(read_by(statistics, weight(rng, 128, 32)), fmt)
    assert choice.alpha > 0
    assert min(choice.losses) < 0.4 * choice.losses[0]


def test_readers_of_one_input_are_searched_together() -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 64, outliers=2))
    weights = [weight(rng, 64, 8), weight(rng, 64, 16)]
    together = search.search_scale(read_by(statistics, *weights), PLAIN)
    apart = [search.search_scale(read_by(statistics, w), PLAIN).losses for w in weights]
    np.testing.assert_allclose(together.losses, np.sum(apart, axis=0), rtol=1e-5)


@pytest.mark.parametrize("outliers", [0, 3])
def test_dead_channels_leave_scales_and_losses_finite(outliers: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, 64, outliers=outliers)
    x[:, [0, 17, 40]] = 0
    statistics = statistics_of(x)
    for alpha in ALPHAS:
        scale = search.candidate_scale(statistics.act_mean, alpha, ScaleLimits())
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    choice = search.search_scale(read_by(statistics, weight(rng, 64, 8)), PLAIN)
    assert np.isfinite(choice.losses).all()
    _, rounded = rounding.round_group(read_by(statistics, weight(rng, 64, 8)), choice.scale, PLAIN)
    assert np.isfinite([rounded[0].loss, rounded[0].plain_loss]).all()


def test_channels_that_are_all_dead_get_no_scale() -> None:
    statistics = statistics_of(np.zeros((4, 64)))
    choice = search.search_scale(read_by(statistics, weight(np.random.default_rng(0), 64, 8)), PLAIN)
    assert choice.alpha == 0
    assert (choice.scale == 1).all()


def test_means_as_far_apart_as_single_precision_allows_give_finite_positive_scales() -> None:
    mean = np.array([1e-44, 1e-38, 1, 1e18], np.float32)  # squares beyond would overflow the second moment
    for alpha in ALPHAS:
        scale = search.candidate_scale(mean, alpha, ScaleLimits())
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


@property_test
@given(seed=seeds, alpha=st.sampled_from(ALPHAS))
def test_tied_channels_share_one_scale(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    tie = rng.integers(0, 5, 24) * 3  # numbers with gaps between them
    mean = (rng.exponential(size=24) * (rng.random(24) < 0.8)).astype(np.float32)
    scale = search.candidate_scale(mean, alpha, ScaleLimits(tie=tie))
    for number in np.unique(tie):
        assert len(set(scale[tie == number].tolist())) == 1


def test_a_tie_takes_the_mean_of_its_channels() -> None:
    limits = ScaleLimits(tie=np.array([0, 1, 0]))
    scale = search.candidate_scale(np.array([1, 8, 3], np.float32), 1.0, limits)
    np.testing.assert_allclose(scale, [0.5, 2, 0.5], rtol=1e-6)


@property_test
@given(seed=seeds, alpha=st.sampled_from(ALPHAS[1:]))
def test_no_scale_falls_below_its_limit(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    mean, smallest = rng.exponential(size=(2, 24)).astype(np.float32)
    free = search.candidate_scale(mean, alpha, ScaleLimits())
    limited = search.candidate_scale(mean, alpha, ScaleLimits(smallest=smallest))
    np.testing.assert_array_equal(limited, np.maximum(free, smallest))


def test_a_scale_that_would_overflow_half_precision_is_not_chosen() -> None:
    rng = np.random.default_rng(0)
    fmt = Format(32, False, FLOAT16)
    w = weight(rng, 64, 4)
    w[3, 0] = 6e4
    x = activations(rng, 64)
    x[:, 3] *= 1e4
    statistics = statistics_of(x)
    choice = search.search_scale(read_by(statistics, w), fmt)
    _, (rounded,) = rounding.round_group(read_by(statistics, w), choice.scale, fmt)
    assert np.isfinite(codec.pack_scales(rounded.grid.scales, FLOAT16)).all()
    assert np.isfinite(rounded.loss)


# The grid


@every_format
@property_test
@given(seed=seeds, K=st.sampled_from([20, 32, 50, 96]), wildness=st.sampled_from([0, 0.5, 3]))
def test_no_group_ends_worse_than_plain_rounding(fmt: Format, seed: int, K: int, wildness: float) -> None:
    rng = np.random.default_rng(seed)
    statistics = statistics_of(activations(rng, K, T=32, outliers=1))
    scale = np.exp(wildness * rng.standard_normal(K)).astype(np.float32)
    weights = [weight(rng, K, 5), weight(rng, K, 3) ** 3]
    kept, rounded = rounding.round_group(read_by(statistics, *weights), scale, fmt)
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
    scale = np.exp(strength * rng.standard_normal(64)).astype(np.float32)
    kept, (rounded,) = rounding.round_group(read_by(statistics_of(activations(rng, 64)), w), scale, fmt)
    assert rounded.plain_loss == 0
    assert rounded.loss == 0
    np.testing.assert_array_equal(shipped_weight(rounded, kept, fmt), w)


def test_one_weight_that_a_scale_would_ruin_does_not_cost_the_others_their_refit() -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 64))
    on_grid = (rng.integers(-8, 8, (64, 6)) * 0.25).astype(np.float32)
    on_grid[::16], on_grid[1::16] = -2, 1.75
    scale = np.exp(3 * rng.standard_normal(64)).astype(np.float32)
    kept, (first, second) = rounding.round_group(read_by(statistics, on_grid, weight(rng, 64, 6)), scale, PLAIN)
    assert (kept == 1).all()
    assert first.loss == 0
    assert second.loss < 0.97 * second.plain_loss


@every_format
@pytest.mark.parametrize("K", [128, 50, 20])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_error_that_the_search_measured_is_the_error_that_ships(fmt: Format, K: int, scaled: bool) -> None:
    rng = np.random.default_rng(K)
    w = weight(rng, K, 9)
    statistics = statistics_of(activations(rng, K, outliers=2))
    scale = search.candidate_scale(statistics.act_mean, 0.3, ScaleLimits()) if scaled else np.ones(K, np.float32)
    scale, (rounded,) = rounding.round_group(read_by(statistics, w), scale, fmt)
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
    choice = search.search_scale(read_by(statistics, w), fmt)
    scale, (rounded,) = rounding.round_group(read_by(statistics, w), choice.scale, fmt)
    np.testing.assert_array_equal(scale, choice.scale)
    assert rounded.loss < 0.4 * rounded.plain_loss


def weighted_error(blocks: Array, h: Array, centred: Array, grid: codec.Grid) -> Array:
    """sum h e^2 of every block: float64 (G, N)."""
    error = codec.dequantize(centred, grid).astype(np.float64) - blocks
    return np.asarray((h * error**2).sum(axis=1))


@st.composite
def blocks_and_costs(draw: st.DrawFn, block_size: int) -> tuple[Array, Array]:
    """Weights (G, b, N) of many kinds, and what an error on each row costs (G, b, 1)."""
    rng = np.random.default_rng(draw(seeds))
    G, N = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    blocks = rng.standard_normal((G, block_size, N)) ** draw(st.sampled_from([1, 2, 3, 5]))
    blocks *= rng.random(blocks.shape) < draw(st.sampled_from([0.05, 0.5, 1]))
    blocks = (blocks * draw(st.sampled_from([1e-3, 1, 1e3]))).astype(np.float32)
    if draw(st.booleans()):
        blocks = np.rint(blocks * 4) / 4
    h = np.exp(draw(st.sampled_from([0, 1, 4])) * rng.standard_normal((G, block_size, 1)))
    h *= rng.random(h.shape) < draw(st.sampled_from([0.1, 1]))
    return blocks, h.astype(np.float32)


@every_format
@property_test
@given(data=st.data())
def test_a_refit_never_costs_more_than_the_plain_grid(fmt: Format, data: st.DataObject) -> None:
    blocks, h = data.draw(blocks_and_costs(fmt.block_size))
    plain = codec.minmax_grid(blocks, fmt)
    before = weighted_error(blocks, h, codec.centred_codes(blocks, plain), plain)
    after = weighted_error(blocks, h, *rounding.refit(blocks, h, fmt))
    energy = (h * blocks.astype(np.float64) ** 2).sum(axis=1)  # refit compares in single precision
    assert (after <= before * (1 + 1e-5) + 2e-6 * energy).all()


@every_format
@property_test
@given(data=st.data())
def test_a_refitted_grid_can_be_stored(fmt: Format, data: st.DataObject) -> None:
    blocks, h = data.draw(blocks_and_costs(fmt.block_size))
    centred, grid = rounding.refit(blocks, h, fmt)
    codes = centred + grid.zero_points[:, None, :]
    assert ((codes >= 0) & (codes <= 15) & (codes % 1 == 0)).all()
    assert not fmt.symmetric or (grid.zero_points == 8).all()
    stored = codec.pack_scales(grid.scales, fmt.scale_dtype).astype(np.float32)
    np.testing.assert_array_equal(stored.T, grid.scales)
    assert np.isfinite(stored).all()
    assert (stored != 0).all()


@every_format
def test_a_refit_gains_on_normal_weights(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((4, fmt.block_size, 50)).astype(np.float32)
    h = np.ones((4, fmt.block_size, 1), np.float32)
    plain = codec.minmax_grid(blocks, fmt)
    before = weighted_error(blocks, h, codec.centred_codes(blocks, plain), plain).sum()
    assert weighted_error(blocks, h, *rounding.refit(blocks, h, fmt)).sum() < 0.93 * before


@every_format
def test_a_weight_whose_input_was_dead_in_calibration_is_rounded_plainly(fmt: Format) -> None:
    """No error costs anything there (an expert that no token reached), but it may wake up later."""
    rng = np.random.default_rng(0)
    w = weight(rng, 64, 8)
    scale, (rounded,) = rounding.round_group(read_by(statistics_of(np.zeros((4, 64))), w), np.ones(64, np.float32), fmt)
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
        read_by(statistics_of(activations(rng, 64)), w), np.ones(64, np.float32), fmt
    )
    assert np.abs(shipped_weight(rounded, scale, fmt)).max() <= 20 * size


@every_format
@pytest.mark.parametrize("K", [128, 50])
def test_an_error_in_the_scaled_weight_costs_less_where_the_scale_is_large(fmt: Format, K: int) -> None:
    """Dividing by s shrinks it again: the refit of s W is weighted with diag(H) / s^2."""
    rng = np.random.default_rng(0)
    statistics = statistics_of(rng.standard_normal((256, K)) * np.exp(rng.standard_normal(K)))
    w = weight(rng, K, 32)
    scale = search.candidate_scale(statistics.act_mean, 0.5, ScaleLimits())
    kept, (rounded,) = rounding.round_group(read_by(statistics, w), scale, fmt)
    np.testing.assert_array_equal(kept, scale)
    cost = (statistics.diagonal / scale**2)[:, None]
    blocks = codec.to_blocks(scale[:, None] * w, fmt.block_size)
    centred, grid = rounding.refit(blocks, codec.to_blocks(cost, fmt.block_size), fmt)
    np.testing.assert_array_equal(rounded.centred, centred)
    np.testing.assert_allclose(rounded.grid.scales, grid.scales, rtol=1e-6)
    np.testing.assert_array_equal(rounded.grid.zero_points, grid.zero_points)


# Threads


def results_with_cores(cores: int, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, ...]:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 50, outliers=1))
    w = weight(rng, 50, 901)
    choice = search.search_scale(read_by(statistics, w), fmt)
    scale, (rounded,) = rounding.round_group(read_by(statistics, w), choice.scale, fmt)
    losses = np.array([*choice.losses, rounded.loss, rounded.plain_loss, rounded.energy])
    arrays = (losses, scale, codec.pack(rounded.centred, rounded.grid), rounded.grid.scales, rounded.grid.zero_points)
    return tuple(array.tobytes() for array in arrays)


@every_format
def test_two_runs_give_the_same_bytes_on_any_number_of_cores(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    one = results_with_cores(1, fmt, monkeypatch)
    assert results_with_cores(1, fmt, monkeypatch) == one
    assert results_with_cores(2, fmt, monkeypatch) == one
    assert results_with_cores(3, fmt, monkeypatch) == one
