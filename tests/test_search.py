"""The scale of an input: one that pays, or none."""

from __future__ import annotations

import numpy as np
import pytest
from builders import FLOAT16, PLAIN, activations, every_format, plain_error, read_by, statistics_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx import search, threads
from awq_onnx.codec import Format
from awq_onnx.search import ALPHAS, ScaleLimits

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


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
    """A step is a fifteenth of what a block spans: beyond 65504 fp16 cannot hold it."""
    rng = np.random.default_rng(0)
    w = weight(rng, 64, 4)
    w[3, 0] = 6e4
    x = activations(rng, 64)
    x[:, 3] *= 1e4
    statistics = statistics_of(x)
    candidates = [search.candidate_scale(statistics.act_mean, alpha, ScaleLimits()) for alpha in ALPHAS]
    assert 6e4 * max(scale[3] for scale in candidates) > 15 * 65504
    choice = search.search_scale(read_by(statistics, w), Format(32, False, FLOAT16))
    assert 6e4 * choice.scale[3] < 15 * 65504


def searched_with_cores(cores: int, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, ...]:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    rng = np.random.default_rng(0)
    statistics = statistics_of(activations(rng, 50, outliers=1))
    choice = search.search_scale(read_by(statistics, weight(rng, 50, 901)), fmt)
    return np.array(choice.losses).tobytes(), choice.scale.tobytes()


@every_format
def test_two_searches_give_the_same_bytes_on_any_number_of_cores(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    one = searched_with_cores(1, fmt, monkeypatch)
    assert searched_with_cores(1, fmt, monkeypatch) == one
    assert searched_with_cores(2, fmt, monkeypatch) == one
    assert searched_with_cores(3, fmt, monkeypatch) == one
