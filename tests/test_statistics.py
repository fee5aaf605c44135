"""What calibration keeps of an input: sums over all of its rows, and a few rows apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import Array, activations, statistics_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx.statistics import Accumulator, InputStatistics, mean_of
from awq_onnx.symmetric import COLUMNS

property_test = settings(max_examples=50, deadline=None)


def accumulated(*updates: tuple[Array, int]) -> InputStatistics:
    """The statistics of updates (rows, validation_rows)."""
    accumulator = Accumulator(updates[0][0].shape[1])
    for rows, validation_rows in updates:
        accumulator.update(rows, validation_rows)
    return accumulator.finish()


def validation_of(statistics: InputStatistics) -> Array:
    assert statistics.validation is not None
    return statistics.validation


def assert_moment_of(found: Array, rows: Array) -> None:
    """found: X'X / T of `rows`, up to single precision."""
    x = rows.astype(np.float64)
    np.testing.assert_allclose(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * np.square(x).mean())


def assert_sums_of(found: InputStatistics, rows: Array) -> None:
    x = rows.astype(np.float64)
    assert found.tokens == len(x)
    assert_moment_of(found.second_moment, rows)
    np.testing.assert_allclose(found.act_mean, np.abs(x).mean(axis=0), rtol=1e-5)


def with_second_moment(H: Array) -> InputStatistics:
    diagonal = np.sqrt(np.diagonal(H)).astype(np.float32)
    return InputStatistics(H.astype(np.float32), diagonal, diagonal, 1)


# The loss


def estimated_loss(statistics: InputStatistics, error: Array) -> float:
    return float(statistics.column_energy(error).sum())


def test_the_loss_is_the_mean_squared_output_error_of_a_token() -> None:
    rng = np.random.default_rng(0)
    x, error = activations(rng, 48), weight(rng, 48, 10)
    direct = np.sum((x.astype(np.float64) @ error) ** 2) / len(x)
    assert statistics_of(x).loss(error) == pytest.approx(direct, rel=1e-4)


def test_the_loss_of_more_channels_than_a_block_is_the_same() -> None:
    rng = np.random.default_rng(0)
    x, error = activations(rng, COLUMNS + 50), weight(rng, COLUMNS + 50, 10)
    direct = np.sum((x.astype(np.float64) @ error) ** 2) / len(x)
    assert statistics_of(x).loss(error) == pytest.approx(direct, rel=1e-4)


def test_the_estimate_is_exact_for_eight_directions() -> None:
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((60, 8)))[0] * np.arange(1, 9)
    statistics, error = with_second_moment(U @ U.T), weight(rng, 60, 10)
    assert estimated_loss(statistics, error) == pytest.approx(statistics.loss(error), rel=1e-4)


def test_the_estimate_is_exact_for_eight_directions_and_independent_channels_beside_them() -> None:
    rng = np.random.default_rng(0)
    H = np.diag(rng.uniform(0.5, 1, 60))
    U = np.linalg.qr(rng.standard_normal((40, 8)))[0] * np.arange(20, 28)
    H[:40, :40] = U @ U.T
    statistics, error = with_second_moment(H), weight(rng, 60, 10)
    assert estimated_loss(statistics, error) == pytest.approx(statistics.loss(error), rel=1e-4)


def test_the_estimate_tells_the_columns_apart() -> None:
    rng = np.random.default_rng(0)
    H = np.diag(2.0 ** -np.arange(40))
    error = weight(rng, 40, 10)
    expected = np.einsum("kn,kl,ln->n", error, H, error)
    np.testing.assert_allclose(with_second_moment(H).column_energy(error), expected, rtol=1e-4)


def test_the_estimate_is_exact_for_a_diagonal() -> None:
    rng = np.random.default_rng(0)
    statistics, error = with_second_moment(np.diag(2.0 ** -np.arange(40))), weight(rng, 40, 10)
    assert estimated_loss(statistics, error) == pytest.approx(statistics.loss(error), rel=1e-4)


@pytest.mark.parametrize("K", [1, 5, 8, 9])
def test_the_estimate_works_for_fewer_channels_than_eigenvectors(K: int) -> None:
    rng = np.random.default_rng(0)
    statistics, error = statistics_of(activations(rng, K)), weight(rng, K, 4)
    assert estimated_loss(statistics, error) == pytest.approx(statistics.loss(error), rel=0.05 if K > 8 else 1e-4)


# The sums


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sums_are_those_of_all_rows_together(dtype: type) -> None:
    x: Array = activations(np.random.default_rng(0), 24).astype(dtype)
    found = accumulated((x[:1], 0), (x[1:100], 0), (x[100:100], 0), (x[100:], 0))
    assert_sums_of(found, x)
    np.testing.assert_array_equal(found.act_max, np.abs(x).max(axis=0).astype(np.float32))
    assert found.second_moment.dtype == found.act_mean.dtype == found.act_max.dtype == np.float32


def test_sums_of_more_channels_than_a_block_are_whole_and_symmetric() -> None:
    x = activations(np.random.default_rng(0), COLUMNS + 50, T=60)
    found = accumulated((x[:20], 0), (x[20:], 0))
    assert_sums_of(found, x)
    np.testing.assert_array_equal(found.second_moment, found.second_moment.T)


def test_half_precision_is_summed_in_single() -> None:
    """Squares of 1000 and sums of them are beyond fp16."""
    found = accumulated((np.full((64, 3), 1000, np.float16), 0))
    assert (found.second_moment == 1e6).all()
    assert (found.act_mean == 1000).all()


def test_the_largest_of_negative_activations_is_positive() -> None:
    assert accumulated((np.array([[-3, -1], [-2, -5]]), 0)).act_max.tolist() == [3, 5]


def test_no_rows_at_all_are_sums_of_zero() -> None:
    found = accumulated((np.empty((0, 3), np.float32), 0), (np.empty((0, 3), np.float32), 5))
    assert found.tokens == 0
    assert not found.second_moment.any()
    assert not found.act_mean.any()
    assert found.validation is None


@pytest.mark.parametrize("validation_rows", [0, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_inf_count_nowhere(bad: float, validation_rows: int) -> None:
    x = activations(np.random.default_rng(0), 12, T=40)
    spoiled = x.copy()
    spoiled[3, 5] = spoiled[20, 0] = spoiled[20, 11] = bad
    accumulator = Accumulator(12)
    accumulator.update(x)
    accumulator.update(spoiled, validation_rows)
    assert accumulator.spoiled_rows == 2
    found, left = accumulator.finish(), np.delete(x, [3, 20], axis=0)
    assert_sums_of(found, np.concatenate([x, left]))
    np.testing.assert_array_equal(found.act_max, np.abs(x).max(axis=0))
    if validation_rows:
        np.testing.assert_array_equal(validation_of(found), left)


def test_nothing_but_spoiled_rows_counts_as_nothing() -> None:
    accumulator = Accumulator(3)
    accumulator.update(np.full((4, 3), np.nan, np.float32))
    assert accumulator.spoiled_rows == 4
    found = accumulator.finish()
    assert found.tokens == 0
    assert np.isfinite(found.act_max).all()


# Rows for validation


def test_rows_are_kept_from_the_marked_updates_alone_and_count_like_all_others() -> None:
    x = activations(np.random.default_rng(0), 24)
    found = accumulated((x[:100], 0), (x[100:120], 30), (x[120:250], 0), (x[250:], 30))
    np.testing.assert_array_equal(validation_of(found), np.concatenate([x[100:120], x[250:]]))
    assert_sums_of(found, x)


@property_test
@given(T=st.integers(1, 700), most=st.integers(1, 100))
def test_rows_that_are_kept_are_no_more_than_asked_for_and_evenly_spread(T: int, most: int) -> None:
    numbered = np.repeat(np.arange(T, dtype=np.float32)[:, None], 2, axis=1)
    kept = validation_of(accumulated((numbered[:1], 0), (numbered, most)))[:, 0]
    assert min(T, most / 2) <= len(kept) <= most
    step = kept[1] - kept[0] if len(kept) > 1 else T
    assert (np.diff(kept) == step).all()
    assert kept[0] == 0
    assert kept[-1] + step >= T


def test_spoiled_rows_take_no_place_among_the_kept() -> None:
    x = np.ones((10, 3), np.float32)
    x[::2] = np.nan
    assert len(validation_of(accumulated((np.ones((1, 3)), 0), (x, 5)))) == 5


def test_rows_beyond_the_most_are_in_no_sum() -> None:
    """H must not know the sequences that are to judge it, except by the rows that can be taken out again."""
    x = activations(np.random.default_rng(0), 24, T=300)
    found = accumulated((x[:100], 0), (x[100:], 50))
    np.testing.assert_array_equal(validation_of(found), x[100::4])
    assert_sums_of(found, np.concatenate([x[:100], x[100::4]]))


def test_the_maximum_is_that_of_all_rows_also_of_those_that_are_not_kept() -> None:
    x = np.ones((100, 3), np.float32)
    x[51] = [2, -7, 5]
    found = accumulated((np.ones((5, 3)), 0), (x, 10))
    assert np.abs(validation_of(found)).max() == 1
    assert found.act_max.tolist() == [2, 7, 5]


@pytest.mark.parametrize("most", [8, 16])
def test_kept_rows_are_copies(most: int) -> None:
    x = activations(np.random.default_rng(0), 12, T=16)
    accumulator = Accumulator(12)
    accumulator.update(x)
    accumulator.update(x, most)
    expected = x[:: 16 // most].copy()
    x[:] = 0  # onnxruntime takes the buffer back
    np.testing.assert_array_equal(validation_of(accumulator.finish()), expected)


def test_there_is_no_validation_without_rows_for_it() -> None:
    x = activations(np.random.default_rng(0), 12, T=16)
    assert accumulated((x, 0), (x, 0)).validation is None
    assert accumulated((x, 0), (x[:0], 8)).validation is None


def test_rows_of_an_input_that_saw_validation_alone_stay_out_of_the_training_of_others() -> None:
    rng = np.random.default_rng(0)
    shared, x = activations(rng, 12, T=16), activations(rng, 12, T=16)
    alone = accumulated((shared, 16))
    merged = InputStatistics.merged([alone, accumulated((shared, 16), (x, 0))])
    np.testing.assert_allclose(training_moment(merged), x.T @ x / len(x), rtol=1e-3, atol=1e-3)
    assert not alone.diagonal_without(alone.validation).any()


# The moment of the other rows


def training_moment(found: InputStatistics) -> Array:
    """H without the rows for validation: float32 (K, K)."""
    return whole_moment(found, found.validation, np.arange(len(found.second_moment)))


def whole_moment(found: InputStatistics, unseen: Array | None, order: Array, height: int = 7) -> Array:
    """H of its upper rows, in an order of channels."""
    upper = np.zeros((len(order), len(order)), np.float32)
    for some, part in found.moments_without(unseen, order, height):
        assert len(part) <= height
        upper[some, some.start :] = part
    return np.triu(upper) + np.triu(upper, 1).T


@pytest.mark.parametrize("training", [1, 10, 1000])
def test_the_moment_for_training_is_that_of_the_rows_beside_validation(training: int) -> None:
    x = activations(np.random.default_rng(0), 24, T=training + 200, outliers=2)
    found = accumulated((x[:training], 0), (x[training:], 50))
    rows = x[:training].astype(np.float64)
    H = rows.T @ rows / training
    tolerance = 2e-5 * np.sqrt(np.outer(found.diagonal, found.diagonal)) * found.tokens / training
    live = np.diagonal(H) > 0.02 * found.diagonal
    assert live.any()
    assert (np.abs(training_moment(found) - H) <= tolerance)[np.ix_(live, live)].all()
    diagonal = found.diagonal_without(found.validation)
    assert diagonal.dtype == np.float32
    assert (np.abs(diagonal - np.diagonal(H)) <= np.diagonal(tolerance))[live].all()


@pytest.mark.parametrize("without", [True, False])
def test_the_moment_is_asked_for_in_any_order_of_channels(without: bool) -> None:
    x = activations(np.random.default_rng(0), 24)
    found = accumulated((x[:200], 0), (x[200:], 100))
    unseen = found.validation if without else None
    order = np.random.default_rng(1).permutation(24)
    ordered, whole = (whole_moment(found, unseen, one) for one in (order, np.arange(24)))
    np.testing.assert_allclose(ordered, whole[np.ix_(order, order)], rtol=1e-4, atol=1e-4)


def test_without_unseen_rows_the_moment_is_that_of_all_rows() -> None:
    statistics = statistics_of(activations(np.random.default_rng(0), 24))
    np.testing.assert_array_equal(training_moment(statistics), statistics.second_moment)
    np.testing.assert_array_equal(statistics.diagonal_without(None), statistics.diagonal)


def test_asking_for_the_moment_of_other_rows_leaves_that_of_all_rows_alone() -> None:
    x = activations(np.random.default_rng(0), 24)
    found = accumulated((x[:200], 0), (x[200:], 100))
    before, unseen = found.second_moment.copy(), validation_of(found).copy()
    np.testing.assert_array_equal(training_moment(found), training_moment(found))
    training_moment(replace(found, validation=None))[...] = 0  # a part may be overwritten
    found.diagonal_without(found.validation)[...] = 0
    np.testing.assert_array_equal(found.second_moment, before)
    np.testing.assert_array_equal(validation_of(found), unseen)


@pytest.mark.parametrize("left", [0, 1e-3])
def test_channels_that_carry_little_but_in_validation_are_dead_for_training(left: float) -> None:
    """What the subtraction leaves of them is rounding, and the correlations of that could be anything."""
    x = activations(np.random.default_rng(0), 24)
    x[:200, [3, 17]] *= left
    found = accumulated((x[:200], 0), (x[200:], 100))
    diagonal = found.diagonal_without(found.validation)
    assert np.flatnonzero(diagonal == 0).tolist() == [3, 17]
    others = np.delete(np.arange(24), [3, 17])
    assert_moment_of(whole_moment(found, found.validation, others), x[:200, others])
    np.testing.assert_allclose(diagonal[others], np.square(x[:200, others]).mean(axis=0), rtol=1e-4)


# Several inputs as one


@pytest.mark.parametrize("K", [64, 50])
def test_the_moments_of_blocks_are_the_diagonal_blocks_of_the_scaled_moment(K: int) -> None:
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((200, K)), np.exp(rng.standard_normal(K)).astype(np.float32)
    moments = statistics_of(x).block_moments(scale, 16)
    scaled = np.pad(x / scale, ((0, 0), (0, -K % 16)))
    whole = scaled.T @ scaled / 200
    for at, block in enumerate(moments):
        np.testing.assert_allclose(block, whole[16 * at : 16 * at + 16, 16 * at : 16 * at + 16], rtol=1e-3, atol=1e-4)


def test_merged_statistics_are_those_of_all_rows_together() -> None:
    rng = np.random.default_rng(0)
    parts = [activations(rng, 24, T=T) for T in (40, 100, 7)]
    kept = [activations(rng, 24, T=T) for T in (20, 10)]
    updates = [[(parts[0], 0), (kept[0], 99)], [(parts[1], 0)], [(kept[1], 99), (parts[2], 0)]]
    found = InputStatistics.merged([accumulated(*one) for one in updates])
    rows = np.concatenate([*parts, *kept])
    assert_sums_of(found, rows)
    np.testing.assert_array_equal(found.act_max, np.abs(rows).max(axis=0))
    np.testing.assert_array_equal(validation_of(found), np.concatenate(kept))
    assert_moment_of(training_moment(found), np.concatenate(parts))


def test_merged_statistics_without_validation_have_none() -> None:
    x = activations(np.random.default_rng(0), 24)
    assert InputStatistics.merged([accumulated((x[:99], 0)), accumulated((x[99:], 0))]).validation is None


def test_merging_changes_none_of_the_parts() -> None:
    x = activations(np.random.default_rng(0), 24)
    parts = [accumulated((x[:99], 0)), accumulated((x[99:], 0))]
    before = parts[0].second_moment.copy()
    InputStatistics.merged(parts)
    np.testing.assert_array_equal(parts[0].second_moment, before)


def test_one_part_is_merged_as_it_is() -> None:
    statistics = statistics_of(activations(np.random.default_rng(0), 24))
    assert InputStatistics.merged([statistics]) is statistics


def test_a_part_that_saw_nothing_weighs_nothing() -> None:
    x = activations(np.random.default_rng(0), 24)
    seen = accumulated((x, 0))
    found = InputStatistics.merged([InputStatistics.flat(24), seen])
    assert_sums_of(found, x)
    np.testing.assert_array_equal(found.act_max, seen.act_max)


def test_means_of_parts_that_saw_nothing_count_the_same() -> None:
    flat = InputStatistics.flat(3)
    louder = replace(flat, act_mean=np.full(3, 3, np.float32))
    assert mean_of([flat, louder]).tolist() == [2, 2, 2]
    assert mean_of([flat, replace(louder, tokens=5)]).tolist() == [3, 3, 3]


# Inputs that drift


def with_drift(*updates: tuple[Array, Array, int]) -> InputStatistics:
    """The statistics of updates (rows, what they should be, validation_rows)."""
    accumulator = Accumulator(updates[0][0].shape[1])
    for rows, wanted, validation_rows in updates:
        accumulator.update(rows, validation_rows, wanted)
    return accumulator.finish()


def test_a_drift_is_what_rows_have_in_common_with_what_they_lack() -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, 24, T=60), activations(rng, 24, T=60)
    found = with_drift((x[:40], y[:40], 0), (x[40:], y[40:], 100))
    assert_sums_of(found, x)
    assert found.drift is not None
    assert found.validation_drift is not None
    np.testing.assert_allclose(found.drift, x.T.astype(np.float64) @ (y - x) / 60, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(validation_of(found), x[40:])
    np.testing.assert_array_equal(found.validation_drift, (y - x)[40:])


@pytest.mark.parametrize("spoiled", ["rows", "wanted"])
def test_rows_count_nowhere_where_either_is_no_number(spoiled: str) -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, 24, T=60), activations(rng, 24, T=60)
    clean = with_drift((x[1:], y[1:], 7))
    (x if spoiled == "rows" else y)[0, 3] = np.nan
    found = with_drift((x, y, 7))
    for field in ("second_moment", "drift", "act_mean", "act_max"):
        np.testing.assert_allclose(getattr(found, field), getattr(clean, field), rtol=1e-4, atol=1e-5)
    assert found.tokens == clean.tokens


def test_merged_drifts_are_those_of_all_rows_together_or_none() -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, 24, T=60), activations(rng, 24, T=60)
    parts = [with_drift((x[:20], y[:20], 0)), with_drift((x[20:], y[20:], 0))]
    whole = with_drift((x, y, 0))
    merged = InputStatistics.merged(parts)
    assert merged.drift is not None
    np.testing.assert_allclose(merged.drift, whole.drift, rtol=1e-3, atol=1e-4)
    assert InputStatistics.merged([parts[0], accumulated((x, 0))]).drift is None
