"""Rounding that makes up for its own errors: as GPTQ does, and only where rows that H has not seen agree."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import FLOAT16, FLOAT32, FORMATS, Array, activations, statistics_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx import codec, compensate
from awq_onnx.codec import Format, Grid
from awq_onnx.compensate import LEAST_FOR_NOISE, SHRINKS, WORTH_IT, Compensation
from awq_onnx.statistics import InputStatistics

property_test = settings(max_examples=50, deadline=None)
every_format = pytest.mark.parametrize(
    "fmt",
    [
        *FORMATS,
        pytest.param(Format(32, False, FLOAT32, 8), id="zero points-8 bits"),
        pytest.param(Format(32, True, FLOAT16, 8), id="symmetric-8 bits"),
    ],
)
every_size = pytest.mark.parametrize("K", [1, 20, 32, 50, 128, 200])
# How strongly channels are correlated, how many rows tell so, and what of it should then be believed.
BELIEVED = [(1, 640, 0.1), (0.5, 80, 0.3), (0.3, 80, 0.5), (0.2, 80, 0.7)]


# What is expected, the long way, in double precision


def moment(statistics: InputStatistics, scale: Array, shrink: float = 0) -> Array:
    """H of x / s, its off-diagonal shrunk: float64 (K, K)."""
    H: Array = statistics.second_moment / np.outer(scale, scale).astype(np.float64)
    shrunk: Array = (1 - shrink) * H + shrink * np.diag(np.diagonal(H))
    return shrunk


def gptq(scaled: Array, grid: Grid, block_size: int, order: Array, H: Array) -> Array:
    """GPTQ as it was published: every error goes, along the Cholesky factor of H^-1, into all weights still to come.

    order: the first is rounded first.
    """
    upper = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    left = scaled[order].astype(np.float64)
    codes = np.zeros((len(grid.scales) * block_size, scaled.shape[1]))
    for i, channel in enumerate(order):
        step, zero_point = grid.scales[channel // block_size], grid.zero_points[channel // block_size]
        code = np.rint(left[i] / step + zero_point).clip(0, 2**grid.bits - 1) - zero_point
        codes[channel] = code
        left[i:] -= np.outer(upper[i, i:], (left[i] - code * step) / upper[i, i])
    return codes.reshape(-1, block_size, scaled.shape[1])


def feedback_of(H: Array, order: Array) -> Array:
    """L_ji / L_ii below the diagonal, 0 elsewhere: H[order] = L L', L lower triangular."""
    L = np.linalg.cholesky(H[np.ix_(order, order)])
    ratios: Array = np.tril(L / np.diagonal(L), -1)
    return ratios


def below(compensation: Compensation) -> Array:
    """What counts of the feedback: the part below the diagonal."""
    part: Array = np.tril(compensation.feedback, -1)
    return part


def gain_of(H: Array, order: Array, rows: Array) -> float:
    """What compensation by H does to white noise, on rows (R, K)."""
    ordered = rows[:, order].astype(np.float64)
    spread = ordered @ np.linalg.inv(np.eye(len(order)) + feedback_of(H, order).T)
    return float(np.square(spread).sum() / np.square(ordered).sum())


def gains(training: Array, validation: Array, scale: Array, shrinks: Sequence[float] = SHRINKS) -> dict[float, float]:
    statistics = statistics_of(training)
    order = np.argsort(statistics.diagonal / scale**2)
    return {one: gain_of(moment(statistics, scale, one), order, validation / scale) for one in shrinks}


def shrinks_of(found: Compensation | None, statistics: InputStatistics, scale: Array) -> list[float]:
    """By how much the correlations of these rows were shrunk; nothing where it is by none of `SHRINKS`."""
    assert found is not None
    candidates = {one: feedback_of(moment(statistics, scale, one), found.order) for one in SHRINKS}
    return [shrink for shrink, feedback in candidates.items() if np.allclose(below(found), feedback, atol=1e-3)]


# What goes in


def compensation_of(statistics: InputStatistics, scale: Array, shrink: float) -> Compensation:
    return compensate._Ordered.of(statistics, scale).compensation(shrink)


def random_scale(rng: np.random.Generator, K: int) -> Array:
    scale: Array = np.exp(0.5 * rng.standard_normal(K)).astype(np.float32)
    return scale


def tight_grid(scaled: Array, fmt: Format) -> Grid:
    """The largest weights are beyond it, as on a grid that was refitted."""
    grid = codec.minmax_grid(codec.to_blocks(scaled, fmt.block_size), fmt)
    return replace(grid, scales=codec.round_scales(grid.scales * np.float32(0.8), fmt.scale_dtype))


def nearest(scaled: Array, grid: Grid, fmt: Format) -> Array:
    codes: Array = codec.centred_codes(codec.to_blocks(scaled, fmt.block_size), grid)
    return codes


def error_of(codes: Array, grid: Grid, scaled: Array) -> Array:
    """Float64 (K, N)."""
    restored = (codes.astype(np.float64) * grid.scales[:, None, :]).reshape(-1, scaled.shape[1])
    error: Array = restored[: len(scaled)] - scaled
    return error


def loss_of(codes: Array, grid: Grid, scaled: Array, H: Array) -> float:
    error = error_of(codes, grid, scaled)
    return float(np.vdot(error, H @ error))


def correlated(rng: np.random.Generator, T: int, K: int, strength: float) -> tuple[Array, Array]:
    """T rows for training and 400 for validation: noise of 1, and 12 common causes."""
    causes = strength * rng.standard_normal((12, K))
    x = (rng.standard_normal((T + 400, 12)) @ causes + rng.standard_normal((T + 400, K))).astype(np.float32)
    return x[:T], x[T:]


# How errors pass on


@every_size
def test_feedback_is_the_triangular_factor_over_its_diagonal(K: int) -> None:
    rng = np.random.default_rng(K)
    statistics, scale = statistics_of(activations(rng, K)), random_scale(rng, K)
    for shrink in SHRINKS:
        found = compensation_of(statistics, scale, shrink)
        assert found.feedback.dtype == np.float32
        expected = feedback_of(moment(statistics, scale, shrink), found.order)
        np.testing.assert_allclose(below(found), expected, rtol=1e-3, atol=1e-4 * (1 + np.abs(expected).max()))


@every_size
def test_behind_the_feedback_channels_share_nothing(K: int) -> None:
    """With A = I + F, H = A D A' and D diagonal: so every channel makes up for all that those before it did."""
    rng = np.random.default_rng(K)
    statistics, scale = statistics_of(activations(rng, K)), random_scale(rng, K)
    found = compensation_of(statistics, scale, 0.1)
    apart = np.linalg.inv(np.eye(K) + below(found))
    D = apart @ moment(statistics, scale, 0.1)[np.ix_(found.order, found.order)] @ apart.T
    sizes = np.sqrt(np.diagonal(D))
    np.testing.assert_allclose(D / np.outer(sizes, sizes), np.eye(K), atol=1e-4)


@every_size
def test_channels_are_kept_by_the_rising_diagonal_of_the_scaled_moment(K: int) -> None:
    rng = np.random.default_rng(K)
    statistics, scale = statistics_of(activations(rng, K, outliers=1)), random_scale(rng, K) ** 3
    order = compensation_of(statistics, scale, 0.3).order
    assert sorted(order.tolist()) == list(range(K))
    assert (np.diff((statistics.diagonal / scale**2)[order]) >= 0).all()


# Rounding


@every_format
@every_size
def test_codes_are_those_of_gptq_from_the_last_channel_to_the_first(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(K)
    statistics, scale = statistics_of(activations(rng, K, outliers=K // 50)), random_scale(rng, K)
    scaled = scale[:, None] * weight(rng, K, 24)
    grid, compensation = tight_grid(scaled, fmt), compensation_of(statistics, scale, 0.1)
    codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    H = moment(statistics, scale, 0.1)
    expected = gptq(scaled, grid, fmt.block_size, compensation.order[::-1], H)
    assert codes.shape == expected.shape
    assert (codes == expected).mean() >= 0.995
    assert loss_of(codes, grid, scaled, H) == pytest.approx(loss_of(expected, grid, scaled, H), rel=0.01)
    assert K < 20 or (codes != nearest(scaled, grid, fmt)).mean() > 0.05


@every_format
@every_size
def test_nothing_on_the_diagonal_of_the_feedback_or_above_it_counts(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(K)
    statistics, scaled = statistics_of(activations(rng, K)), weight(rng, K, 24)
    grid, compensation = tight_grid(scaled, fmt), compensation_of(statistics, np.ones(K, np.float32), 0.1)
    spoiled = np.where(np.tri(K, k=-1, dtype=bool), compensation.feedback, np.float32(np.nan))
    codes, same = (
        compensate.round_weight(scaled, grid, fmt.block_size, one)
        for one in (compensation, replace(compensation, feedback=spoiled))
    )
    np.testing.assert_array_equal(codes, same)


@pytest.mark.parametrize("K", [50, 200])
def test_columns_do_not_depend_on_each_other(K: int) -> None:
    """But for the last bits of a sum, which tell where a target lies half between two codes."""
    rng, fmt = np.random.default_rng(K), Format(32, False, FLOAT32)
    statistics, scaled = statistics_of(activations(rng, K)), weight(rng, K, 24)
    grid, compensation = tight_grid(scaled, fmt), compensation_of(statistics, np.ones(K, np.float32), 0.1)
    together = compensate.round_weight(scaled, grid, 32, compensation)
    for part in (slice(1), slice(1, 20), slice(20, 24)):
        own = Grid(grid.scales[:, part], grid.zero_points[:, part])
        apart = compensate.round_weight(scaled[:, part], own, 32, compensation)
        assert (together[:, :, part] == apart).mean() >= 0.995


@every_format
@every_size
def test_codes_can_be_stored_and_padding_is_zero(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(K)
    statistics, scale = statistics_of(activations(rng, K, outliers=K // 50)), random_scale(rng, K)
    scaled = scale[:, None] * weight(rng, K, 24) ** 3
    grid = tight_grid(scaled, fmt)
    codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation_of(statistics, scale, 0.1))
    assert codes.dtype == np.float32
    stored = codes + grid.zero_points[:, None, :]
    assert ((stored >= 0) & (stored < 2**fmt.bits) & (stored % 1 == 0)).all()
    assert not codes.reshape(-1, 24)[K:].any()


@every_format
@every_size
def test_without_correlations_it_is_rounding_to_the_nearest(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(K)
    scale, scaled = random_scale(rng, K), weight(rng, K, 24)
    diagonal = np.diag(rng.exponential(size=K)).astype(np.float32)
    statistics = replace(statistics_of(np.ones((1, K))), second_moment=diagonal)
    compensation = compensation_of(statistics, scale, 0.1)
    assert not below(compensation).any()
    grid = tight_grid(scaled, fmt)
    codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    np.testing.assert_array_equal(codes, nearest(scaled, grid, fmt))


@pytest.mark.parametrize("dead", [[0], [5, 6, 40], list(range(32)), list(range(1, 50))])
def test_dead_channels_are_rounded_to_the_nearest_and_nobody_minds_them(dead: list[int]) -> None:
    rng = np.random.default_rng(0)
    fmt, live = Format(16, False, FLOAT32), np.delete(np.arange(50), dead)
    x = activations(rng, 50)
    x[:, dead] = 0
    statistics, scale = statistics_of(x), random_scale(rng, 50)
    scaled = scale[:, None] * weight(rng, 50, 24)
    grid, compensation = tight_grid(scaled, fmt), compensation_of(statistics, scale, 0.1)
    assert sorted(compensation.order[: len(dead)].tolist()) == dead
    assert np.isfinite(compensation.feedback).all()
    codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    flat, plain = codes.reshape(-1, 24), nearest(scaled, grid, fmt).reshape(-1, 24)
    np.testing.assert_array_equal(flat[dead], plain[dead])
    H = moment(statistics, scale, 0.1) + np.diag(np.isin(np.arange(50), dead))  # any, for GPTQ needs an inverse
    expected = gptq(scaled, grid, fmt.block_size, compensation.order[::-1], H).reshape(-1, 24)
    assert (flat[live] == expected[live]).mean() >= 0.995


def test_the_weight_is_left_as_it_was() -> None:
    rng = np.random.default_rng(0)
    scaled, statistics = weight(rng, 50, 24), statistics_of(activations(rng, 50))
    before, grid = scaled.copy(), tight_grid(scaled, Format(32, False, FLOAT32))
    compensation = replace(compensation_of(statistics, np.ones(50, np.float32), 0.1), order=np.arange(50))
    compensate.round_weight(scaled, grid, 32, compensation)
    np.testing.assert_array_equal(scaled, before)


# What compensation does to rows that H has not seen


@pytest.mark.parametrize("K", [1, 50, 128, 129, 300])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_the_gain_is_what_becomes_of_white_noise(K: int, shrink: float) -> None:
    rng = np.random.default_rng(K)
    x, scale = activations(rng, K, T=400), random_scale(rng, K)
    statistics = statistics_of(x[:300])
    rows: Array = x[300:] / scale
    ordered = compensate._Ordered.of(statistics, scale)
    expected = gain_of(moment(statistics, scale, shrink), ordered.order, rows)
    assert ordered.gain(shrink, ordered.rows(x[300:], scale)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize(("strength", "T"), [(1.0, 640), (0.5, 80), (0.2, 80), (0.1, 40)])
def test_the_gain_is_that_of_a_real_weight(strength: float, T: int, shrink: float) -> None:
    """Whether it falls to an eighth or rises by half: without rounding anything, it is known."""
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, T, 64, strength)
    statistics, scale = statistics_of(training, validation), random_scale(rng, 64)
    scaled, fmt = scale[:, None] * weight(rng, 64, 48), Format(32, False, FLOAT32)
    rows: Array = validation / scale
    ordered = compensate._Ordered.of(statistics, scale, unseen=validation)
    gain, compensation = ordered.gain(shrink, ordered.rows(validation, scale)), ordered.compensation(shrink)
    grid = codec.minmax_grid(codec.to_blocks(scaled, fmt.block_size), fmt)
    losses = [
        np.square(rows @ error_of(codes, grid, scaled)).sum()
        for codes in (compensate.round_weight(scaled, grid, 32, compensation), nearest(scaled, grid, fmt))
    ]
    assert gain == pytest.approx(losses[0] / losses[1], rel=0.2)


@pytest.mark.parametrize("K", [50, 300])
def test_asking_for_one_gain_changes_no_other(K: int) -> None:
    """All shrinks are tried in the memory of one matrix."""
    rng = np.random.default_rng(0)
    x, scale = activations(rng, K, T=400), random_scale(rng, K)
    statistics = statistics_of(x[:300], x[300:])
    one = compensate._Ordered.of(statistics, scale, unseen=x[300:])
    rows = one.rows(x[300:], scale)
    for shrink in (*SHRINKS, *SHRINKS[::-1]):
        fresh = compensate._Ordered.of(statistics, scale, unseen=x[300:])
        assert one.gain(shrink, rows) == fresh.gain(shrink, rows)
    again = compensate._Ordered.of(statistics, scale, memory=one.matrix).compensation(0.1)
    fresh_one = compensation_of(statistics, scale, 0.1)
    np.testing.assert_array_equal(again.order, fresh_one.order)
    np.testing.assert_array_equal(below(again), below(fresh_one))


@pytest.mark.parametrize("dead", [[], [5, 6, 40]])
def test_the_moment_that_judges_is_that_of_the_other_rows(dead: list[int]) -> None:
    rng = np.random.default_rng(0)
    x, scale = activations(rng, 50, T=400), random_scale(rng, 50)
    x[:300, dead] = 0
    ordered = compensate._Ordered.of(statistics_of(x[:300], x[300:]), scale, unseen=x[300:])
    alone = compensate._Ordered.of(statistics_of(x[:300]), scale)
    np.testing.assert_array_equal(ordered.order, alone.order)
    np.testing.assert_allclose(ordered.roots, alone.roots, rtol=1e-4)
    np.testing.assert_allclose(np.triu(ordered.matrix, 1), np.triu(alone.matrix, 1), atol=1e-4)


# Whether to compensate


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("strength", "T", "shrink"), BELIEVED)
def test_correlations_are_believed_as_far_as_validation_confirms_them(
    strength: float, T: int, shrink: float, scaled: bool
) -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, T, 64, strength)
    scale = random_scale(rng, 64) if scaled else np.ones(64, np.float32)
    expected = gains(training, validation, scale)
    assert min(expected, key=expected.__getitem__) == shrink
    statistics = statistics_of(training, validation)
    assert shrinks_of(compensate.find(statistics, scale), statistics, scale) == [shrink]


@pytest.mark.parametrize(("strength", "T", "shrink"), BELIEVED)
def test_correlations_of_noise_are_never_believed_more_than_by_half(strength: float, T: int, shrink: float) -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, T, 64, strength)
    statistics, scale = statistics_of(training, validation), np.ones(64, np.float32)
    (found,) = shrinks_of(compensate.find(statistics, scale, random=True), statistics, scale)
    assert found >= LEAST_FOR_NOISE
    assert found == max(shrink, 0.5)


def test_in_the_end_the_rows_for_validation_are_believed_too() -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, 100, 64, 1)
    statistics, scale = statistics_of(training, validation), random_scale(rng, 64)
    found = compensate.find(statistics, scale)
    assert len(shrinks_of(found, statistics, scale)) == 1
    assert shrinks_of(found, statistics_of(training), scale) == []
    assert found is not None
    np.testing.assert_array_equal(found.order, np.argsort(statistics.diagonal / scale**2))


def test_without_rows_to_check_it_nothing_is_compensated() -> None:
    rng = np.random.default_rng(0)
    training, _ = correlated(rng, 640, 64, 1)
    assert compensate.find(statistics_of(training), np.ones(64, np.float32)) is None


@pytest.mark.parametrize("rows", [4, 10, 30])
@pytest.mark.parametrize("K", [64, 256])
@pytest.mark.parametrize("random", [True, False])
def test_correlations_by_chance_are_not_compensated(K: int, rows: int, random: bool) -> None:
    rng = np.random.default_rng(rows)
    training, validation = rng.standard_normal((2, rows, K)).astype(np.float32)
    assert min(gains(training, validation, np.ones(K)).values()) > 1
    assert compensate.find(statistics_of(training, validation), np.ones(K, np.float32), random=random) is None


def test_correlations_that_validation_does_not_share_are_not_compensated() -> None:
    rng = np.random.default_rng(0)
    training, _ = correlated(rng, 640, 64, 1)
    _, validation = correlated(rng, 640, 64, 1)  # of other causes
    assert compensate.find(statistics_of(training, 0.1 * validation), np.ones(64, np.float32)) is None


def test_what_is_hardly_worth_it_is_left() -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, 640, 64, 0.1)
    scale = np.ones(64, np.float32)
    assert WORTH_IT < min(gains(training, validation, scale).values()) < 1
    assert compensate.find(statistics_of(training, validation), scale) is None


def test_rows_that_are_all_zero_check_nothing() -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, 640, 64, 1)
    assert compensate.find(statistics_of(training, 0 * validation), np.ones(64, np.float32)) is None


@pytest.mark.parametrize("dead", [[0], [5, 6, 40], list(range(48))])
def test_channels_alive_in_validation_alone_break_nothing(dead: list[int]) -> None:
    """What a subtraction leaves of their sums is rounding: as correlations these could be anything."""
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, 640, 64, 1)
    training[:, dead] = 0
    statistics, scale = statistics_of(training, 3 * validation), np.ones(64, np.float32)
    found = compensate.find(statistics, scale)
    assert found is not None
    assert np.isfinite(found.feedback).all()


def test_channels_dead_everywhere_do_not_hinder_the_others() -> None:
    rng = np.random.default_rng(0)
    training, validation = correlated(rng, 640, 64, 1)
    training[:, :10] = validation[:, :10] = 0
    found = compensate.find(statistics_of(training, validation), np.ones(64, np.float32))
    assert found is not None
    assert np.isfinite(found.feedback).all()


@property_test
@given(
    falling=st.lists(st.floats(0.01, 10), max_size=6),
    rising=st.lists(st.floats(0.01, 10), max_size=6),
)
def test_the_least_of_unimodal_costs_is_found_and_no_cost_is_asked_for_twice(
    falling: list[float], rising: list[float]
) -> None:
    before = [1 + sum(falling[at:]) for at in range(len(falling))]
    costs = before + [1 + sum(rising[:at]) for at in range(len(rising) + 1)]
    asked: list[float] = []

    def cost(candidate: float) -> float:
        asked.append(candidate)
        return costs[int(candidate)]

    assert compensate._least(range(len(costs)), cost) == (len(falling), 1)
    assert len(set(asked)) == len(asked)


def test_validation_alone_is_nothing_to_learn_from() -> None:
    ones = np.ones((9, 4), np.float32)
    assert compensate.find(statistics_of(0 * ones, ones), np.ones(4, np.float32)) is None


def test_finding_takes_the_memory_of_one_matrix_and_leaves_the_statistics_alone() -> None:
    rng, K = np.random.default_rng(0), 1024
    training, validation = correlated(rng, 640, K, 1)
    statistics, scale = statistics_of(training, validation[:50]), random_scale(rng, K)
    before = statistics.second_moment.copy()
    tracemalloc.start()
    found = compensate.find(statistics, scale)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert peak < 1.7 * before.nbytes
    np.testing.assert_array_equal(statistics.second_moment, before)
