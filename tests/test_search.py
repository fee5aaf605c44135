"""The scale of an input: one that pays, or none."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from builders import FLOAT16, PLAIN, Array, activations, every_format, plain_error, read_by, statistics_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from awq_onnx import search
from awq_onnx.codec import Format
from awq_onnx.search import (
    ALPHAS,
    FINALISTS,
    FORMULAS,
    MAX,
    SAMPLED,
    SLICE,
    WEIGHTS,
    Base,
    Candidates,
    Reader,
    ScaleChoice,
    ScaleLimits,
)
from awq_onnx.statistics import InputStatistics

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outliers", [0, 3])
def test_the_estimate_chooses_nearly_what_the_full_second_moment_would(seed: int, outliers: int) -> None:
    rng = np.random.default_rng(seed)
    statistics = statistics_of(activations(rng, 128, outliers=outliers))
    w = weight(rng, 128, 48)
    choice = search.search_scale(read_by(statistics, w, fmt=PLAIN))
    candidates = [Base(statistics.act_mean).scale(alpha, ScaleLimits()) for alpha in ALPHAS]
    full = [statistics.loss(plain_error(w, scale, PLAIN)) for scale in candidates]
    assert statistics.loss(plain_error(w, choice.scale, PLAIN)) <= 1.02 * min(full)


def test_alpha_zero_is_no_scale_and_among_the_candidates() -> None:
    assert 0.0 in ALPHAS
    mean = np.array([0.1, 1, 50], np.float32)
    limits = ScaleLimits(tie=np.array([0, 0, 1]))
    assert Base(mean).scale(0.0, limits).tolist() == [1, 1, 1]


def test_alpha_one_is_proportional_to_the_mean_and_centred_on_one() -> None:
    scale = Base(np.array([1, 4, 16], np.float32)).scale(1.0, ScaleLimits())
    np.testing.assert_allclose(scale, [0.25, 1, 4], rtol=1e-6)


@every_format
@pytest.mark.parametrize("K", [64, 50])
def test_the_chosen_scale_loses_no_more_than_none(fmt: Format, K: int) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, K, outliers=1))
    choice = search.search_scale(read_by(statistics, weight(rng, K, 12), weight(rng, K, 7), fmt=fmt))
    assert len(choice.losses) == len(ALPHAS)
    assert choice.losses[ALPHAS.index(choice.alpha)] == min(choice.losses) <= choice.losses[0]
    np.testing.assert_array_equal(choice.scale, Base(statistics.act_mean).scale(choice.alpha, ScaleLimits()))


@every_format
def test_planted_outlier_channels_are_worth_a_scale(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 128, outliers=3))
    choice = search.search_scale(read_by(statistics, weight(rng, 128, 32), fmt=fmt))
    assert choice.alpha > 0
    assert min(choice.losses) < 0.4 * choice.losses[0]


def test_readers_of_one_input_are_searched_together() -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 64, outliers=2))
    weights = [weight(rng, 64, 8), weight(rng, 64, 16)]
    together = search.search_scale(read_by(statistics, *weights, fmt=PLAIN))
    apart = [search.search_scale(read_by(statistics, w, fmt=PLAIN)).losses for w in weights]
    np.testing.assert_allclose(together.losses, np.sum(apart, axis=0), rtol=1e-5)


@pytest.mark.parametrize("outliers", [0, 3])
def test_dead_channels_leave_scales_and_losses_finite(outliers: int) -> None:
    rng = np.random.default_rng(0)
    x = activations(rng, 64, outliers=outliers)
    x[:, [0, 17, 40]] = 0
    statistics = statistics_of(x)
    for alpha in ALPHAS:
        scale = Base(statistics.act_mean).scale(alpha, ScaleLimits())
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    choice = search.search_scale(read_by(statistics, weight(rng, 64, 8), fmt=PLAIN))
    assert np.isfinite(choice.losses).all()


def test_channels_that_are_all_dead_get_no_scale() -> None:
    statistics = statistics_of(np.zeros((4, 64)))
    choice = search.search_scale(read_by(statistics, weight(np.random.default_rng(0), 64, 8), fmt=PLAIN))
    assert choice.alpha == 0
    assert (choice.scale == 1).all()


def test_means_as_far_apart_as_single_precision_allows_give_finite_positive_scales() -> None:
    mean = np.array([1e-44, 1e-38, 1, 1e18], np.float32)  # squares beyond would overflow the second moment
    for alpha in ALPHAS:
        scale = Base(mean).scale(alpha, ScaleLimits())
        assert np.isfinite(scale).all()
        assert (scale > 0).all()


@property_test
@given(seed=seeds, alpha=st.sampled_from(ALPHAS))
def test_tied_channels_share_one_scale(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    tie = rng.integers(0, 5, 24) * 3  # numbers with gaps between them
    mean = (rng.exponential(size=24) * (rng.random(24) < 0.8)).astype(np.float32)
    scale = Base(mean).scale(alpha, ScaleLimits(tie=tie))
    for number in np.unique(tie):
        assert len(set(scale[tie == number].tolist())) == 1


def test_a_tie_takes_the_mean_of_its_channels() -> None:
    limits = ScaleLimits(tie=np.array([0, 1, 0]))
    scale = Base(np.array([1, 8, 3], np.float32)).scale(1.0, limits)
    np.testing.assert_allclose(scale, [0.5, 2, 0.5], rtol=1e-6)


def test_the_formula_of_smoothquant_divides_by_the_largest_weight_of_a_channel() -> None:
    """max|x|^a / max|w|^(1 - a), Xiao et al. 2022, (4); of all weights that read the input."""
    x = np.array([[1, -16], [0.5, 4]], np.float32)
    one, other = np.array([[1, -4], [1, 1]], np.float32), np.array([[2.0], [-9]], np.float32)
    base = Base.of(MAX, read_by(statistics_of(x), one, other))
    scale = base.scale(0.5, ScaleLimits())
    np.testing.assert_allclose(scale[1] / scale[0], np.sqrt(16 / 9) / np.sqrt(1 / 4), rtol=1e-6)
    assert base.scale(0.0, ScaleLimits()).tolist() == [1, 1]


def test_the_weight_aware_formula_divides_by_the_mean_share_of_a_channel_in_its_block() -> None:
    """mean|x|^a / mean(|w| / max|w| of the block)^(1 - a)."""
    x = np.array([[1, -16], [3, 2]], np.float32)
    w = np.array([[1, -4], [2, 1]], np.float32)  # one block: shares 1/2 and 1, 1 and 1/4
    base = Base.of(WEIGHTS, read_by(statistics_of(x), w))
    scale = base.scale(0.75, ScaleLimits())
    np.testing.assert_allclose(scale[1] / scale[0], (9 / 2) ** 0.75 / (0.625 / 0.75) ** 0.25, rtol=1e-6)


@every_format
def test_of_several_formulas_the_one_that_loses_least_is_taken(fmt: Format) -> None:
    rng = np.random.default_rng(2)
    readers = read_by(statistics_of(activations(rng, 96, outliers=2)), weight(rng, 96, 24) ** 3, fmt=fmt)
    alone = {one: search.search_scale(readers, candidates=Candidates((one,))) for one in FORMULAS}
    best = search.search_scale(readers, candidates=Candidates(FORMULAS))
    assert min(best.losses) == min(min(one.losses) for one in alone.values())
    np.testing.assert_array_equal(best.scale, alone[best.formula].scale)


def test_a_given_alpha_is_tried_beside_none_and_no_other() -> None:
    rng = np.random.default_rng(0)
    readers = read_by(statistics_of(activations(rng, 64, outliers=2)), weight(rng, 64, 24))
    choice = search.search_scale(readers, candidates=Candidates(alpha=0.4))
    assert len(choice.losses) == 2
    assert choice.alpha in (0, 0.4)


@property_test
@given(seed=seeds, alpha=st.sampled_from(ALPHAS[1:]))
def test_no_scale_falls_below_its_limit(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    mean, smallest = rng.exponential(size=(2, 24)).astype(np.float32)
    free = Base(mean).scale(alpha, ScaleLimits())
    limited = Base(mean).scale(alpha, ScaleLimits(smallest=smallest))
    np.testing.assert_array_equal(limited, np.maximum(free, smallest))


def test_a_scale_that_would_overflow_half_precision_is_not_chosen() -> None:
    """A step is a fifteenth of what a block spans: beyond 65504 fp16 cannot hold it."""
    rng = np.random.default_rng(0)
    w = weight(rng, 64, 4)
    w[3, 0] = 6e4
    x = activations(rng, 64)
    x[:, 3] *= 1e4
    statistics = statistics_of(x)
    candidates = [Base(statistics.act_mean).scale(alpha, ScaleLimits()) for alpha in ALPHAS]
    assert 6e4 * max(scale[3] for scale in candidates) > 15 * 65504
    choice = search.search_scale(read_by(statistics, w, fmt=Format(32, False, FLOAT16)))
    assert 6e4 * choice.scale[3] < 15 * 65504


# Weights as they are stored


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_columns_are_the_weight_in_single_precision_times_its_factor(dtype: type, factor: float) -> None:
    stored: Array = weight(np.random.default_rng(0), 9, 24).astype(dtype)
    flat = InputStatistics.flat(24)
    for some in (slice(None), slice(3, 7), slice(1, None, 4)):
        found = Reader(stored.T, flat, factor=factor, fmt=PLAIN).columns(some)
        np.testing.assert_array_equal(found, stored.T.astype(np.float32)[:, some] * np.float32(factor))
        assert found.dtype == np.float32
        assert found.flags.c_contiguous


@every_format
@pytest.mark.parametrize("N", [9, 2 * SAMPLED + 1])
def test_a_stored_weight_is_searched_like_the_same_in_single_precision(fmt: Format, N: int) -> None:
    rng = np.random.default_rng(0)
    statistics, stored = statistics_of(activations(rng, 50, outliers=1)), weight(rng, N, 50).astype(np.float16)
    stored.setflags(write=False)
    read = stored.T.astype(np.float32) * np.float32(0.25)
    for head_size in (None, N):
        found = search.search_scale([Reader(stored.T, statistics, head_size, factor=0.25, fmt=fmt)])
        expected = search.search_scale([Reader(read, statistics, head_size, fmt=fmt)])
        assert found.losses == expected.losses
        np.testing.assert_array_equal(found.scale, expected.scale)


def test_a_search_leaves_the_weight_as_it_was() -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, 64, SLICE)
    before = w.copy()
    search.search_scale([Reader(w, statistics_of(activations(rng, 64, outliers=1)), 32, fmt=PLAIN)])
    np.testing.assert_array_equal(w, before)


# Wide weights


def of_all_alphas(readers: list[Reader]) -> ScaleChoice:
    """What the search would choose if it tried every alpha on every column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SAMPLED", max(reader.N for reader in readers))
        choice = search.search_scale(readers)
    assert np.isfinite(choice.losses).all()
    return choice


def equally_loud(rng: np.random.Generator, K: int, N: int) -> Array:
    return weight(rng, K, N)


def of_all_kinds(rng: np.random.Generator, K: int, N: int) -> Array:
    w: Array = (weight(rng, K, N) * np.exp(rng.standard_normal(N))).astype(np.float32)
    return w


def with_three_that_decide(rng: np.random.Generator, K: int, N: int) -> Array:
    w = weight(rng, K, N)
    w[:, rng.permutation(N)[:3]] *= 30
    return w


def one_in_each_head(rng: np.random.Generator, K: int, N: int) -> Array:
    """Every 64th column is loud, and reads channels of its own."""
    w = weight(rng, K, N)
    w[:, ::64] *= 20 * np.exp(rng.standard_normal((K, 1)).astype(np.float32))
    return w


Columns = Callable[[np.random.Generator, int, int], Array]


@every_format
@pytest.mark.parametrize("N", [1, SAMPLED])
def test_every_alpha_is_tried_on_a_narrow_weight(fmt: Format, N: int) -> None:
    rng = np.random.default_rng(0)
    choice = search.search_scale(read_by(statistics_of(activations(rng, 50, outliers=1)), weight(rng, 50, N), fmt=fmt))
    assert np.isfinite(choice.losses).all()


@every_format
@pytest.mark.parametrize("N", [2 * SAMPLED + 1, 1300])
def test_no_scale_is_always_among_the_few_that_are_tried_on_all_of_a_wide_weight(fmt: Format, N: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        readers = read_by(statistics_of(activations(rng, 50, outliers=3)), weight(rng, 50, N), fmt=fmt)
        choice, every = search.search_scale(readers), of_all_alphas(readers)
        tried, best = np.isfinite(choice.losses), ALPHAS.index(choice.alpha)
        assert tried[0]
        assert FINALISTS <= tried.sum() < len(ALPHAS)
        assert tried[max(best - 1, 0) : best + 2].all()
        np.testing.assert_allclose(np.array(choice.losses)[tried], np.array(every.losses)[tried], rtol=1e-6)
        assert choice.losses[ALPHAS.index(choice.alpha)] == min(choice.losses) <= choice.losses[0]
        np.testing.assert_array_equal(choice.scale, of_alpha(readers[0], choice.alpha))


def of_alpha(reader: Reader, alpha: float) -> Array:
    return Base(reader.statistics.act_mean).scale(alpha, ScaleLimits())


every_kind = (equally_loud, of_all_kinds, with_three_that_decide, one_in_each_head)


@cache
def excess(columns: Columns) -> Array:
    """How much is lost by a search in wide weights, over what is lost with the best of all alphas: of two dozen."""
    found = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        statistics = statistics_of(activations(rng, 64, outliers=seed % 3))
        readers = read_by(statistics, columns(rng, 64, 1300))
        every = of_all_alphas(readers)
        chosen = search.search_scale(readers).alpha
        found.append(every.losses[ALPHAS.index(chosen)] / min(every.losses))
    return np.array(found)


@pytest.mark.parametrize("columns", every_kind)
def test_of_a_wide_weight_mostly_the_best_is_found_and_never_one_far_worse(columns: Columns) -> None:
    assert (excess(columns) == 1).mean() >= 0.75
    assert excess(columns).max() <= 1.08


@pytest.mark.parametrize("columns", [equally_loud, with_three_that_decide, one_in_each_head])
def test_of_a_wide_weight_nearly_always_the_best_is_found_and_never_one_worse_by_a_hundredth(columns: Columns) -> None:
    assert (excess(columns) == 1).mean() >= 0.9
    assert excess(columns).max() <= 1.011


@property_test
@given(seed=seeds, starts=st.lists(st.integers(0, len(ALPHAS) - 1), min_size=1, max_size=4, unique=True))
def test_a_descent_ends_where_both_neighbours_are_worse_and_asks_for_no_loss_twice(
    seed: int, starts: list[int]
) -> None:
    costs = np.random.default_rng(seed).standard_normal(len(ALPHAS))
    asked: list[int] = []

    def losses_at(some: Sequence[int]) -> Array:
        asked.extend(some)
        return costs[list(some)]

    found = np.full(len(ALPHAS), np.inf)
    found[0] = costs[0]
    search._descend(found, starts, losses_at)
    tried, best = np.isfinite(found), int(np.argmin(found))
    assert sorted([0, *asked]) == np.flatnonzero(tried).tolist()
    np.testing.assert_array_equal(found[tried], costs[tried])
    assert {*starts} <= {0, *asked}
    assert tried[max(best - 1, 0) : best + 2].all()


def test_a_narrow_weight_beside_a_wide_one_counts_as_much_as_it_loses() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        statistics = statistics_of(activations(rng, 64, outliers=2))
        readers = read_by(statistics, weight(rng, 64, 1300), 100 * weight(rng, 64, 3))
        every = of_all_alphas(readers)
        chosen = search.search_scale(readers).alpha
        assert every.losses[ALPHAS.index(chosen)] <= 1.01 * min(every.losses)


@every_format
def test_a_weight_of_one_column_is_searched_beside_a_wide_one(fmt: Format) -> None:
    """The gate of a shared expert."""
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 50, outliers=1))
    readers = read_by(statistics, weight(rng, 50, 2 * SAMPLED + 1), 100 * weight(rng, 50, 1), fmt=fmt)
    every = of_all_alphas(readers)
    chosen = search.search_scale(readers).alpha
    assert every.losses[ALPHAS.index(chosen)] <= 1.01 * min(every.losses)


@pytest.mark.parametrize("transposed", [True, False])
def test_of_a_wide_weight_a_few_columns_are_in_memory(transposed: bool, tmp_path: Path) -> None:
    rng, K, N = np.random.default_rng(0), 512, 8192
    statistics = statistics_of(activations(rng, K, outliers=2))
    made = weight(rng, K, N).astype(np.float16)
    np.save(tmp_path / "w.npy", made.T if transposed else made)
    stored = np.load(tmp_path / "w.npy", mmap_mode="r")
    reader = Reader(stored.T if transposed else stored, statistics, head_size=64, fmt=PLAIN)
    tracemalloc.start()
    search.search_scale([reader])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * (4 * K * SAMPLED)


# Threads


@every_format
def test_two_searches_give_the_same_bits_on_any_number_of_threads(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 50, outliers=1))
    weights = [weight(rng, 50, 3 * SAMPLED + 5), weight(rng, 50, 40)]
    with threadpool_limits(1, "blas"):
        expected = search.search_scale(read_by(statistics, *weights, fmt=fmt))
        for threads in (1, 2, 3):
            with ThreadPoolExecutor(threads) as pool:
                found = search.search_scale(read_by(statistics, *weights, fmt=fmt), spread=pool.map)
            assert found.losses == expected.losses
            np.testing.assert_array_equal(found.scale, expected.scale)


@property_test
@given(columns=st.integers(1, 60000), width=st.integers(1, 1500))
def test_slices_cover_every_column_once_in_order_and_evenly(columns: int, width: int) -> None:
    sizes = [part.stop - part.start for part in search.slices(columns, width)]
    assert [part.start for part in search.slices(columns, width)] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert sum(sizes) == columns
    assert all(0 < size <= width for size in sizes)
    assert len(sizes) == -(-columns // width)
    assert len(set(sizes[:-1])) <= 1
