"""Weights make up for what earlier rounding does to their input: as far as it can be foretold, and no further."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import Array, activations, read_by, statistics_of, weight

from awq_onnx import drift
from awq_onnx.search import Reader
from awq_onnx.statistics import InputStatistics
from awq_onnx.threads import Workers

K, N = 48, 20


def drifting(rng: np.random.Generator, y: Array, wrong: Array, noise: float) -> Array:
    """What is fed to a layer in the place of y (T, K): a part of it is wrong, always in the same way, and noise."""
    x: Array = (y + y @ wrong + noise * rng.standard_normal(y.shape)).astype(np.float32)
    return x


def learned(x: Array, y: Array, kept: int = 64) -> InputStatistics:
    """The statistics of x (T, K), that should be y; the last rows are kept for validation."""
    found = statistics_of(x[:-kept], x[-kept:])
    away = y - x
    return replace(found, drift=x.T @ away / np.float32(len(x)), validation_drift=away[-kept:])


def inputs(*, wrong: float, noise: float, T: int = 600, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    y = activations(rng, K, T=T)
    return drifting(rng, y, wrong * weight(np.random.default_rng(1), K, K), noise), y


def output_error(readers: list[Reader], weights: list[Array], x: Array, y: Array) -> float:
    return sum(float(np.square(x @ r.columns() - y @ w).sum()) for r, w in zip(readers, weights, strict=True))


def test_what_is_always_wrong_in_the_same_way_is_made_up_for() -> None:
    rng = np.random.default_rng(3)
    weights = [weight(rng, K, N), weight(rng, K, N + 5)]
    readers = read_by(learned(*inputs(wrong=0.1, noise=0.01)), *weights)
    fresh = inputs(wrong=0.1, noise=0.01, seed=9)
    assert output_error(drift.corrected(readers), weights, *fresh) < 0.65 * output_error(readers, weights, *fresh)


def test_noise_changes_no_weight() -> None:
    readers = read_by(learned(*inputs(wrong=0, noise=0.05, T=200)), weight(np.random.default_rng(3), K, N))
    (found,) = drift.corrected(readers)
    assert found is readers[0]


def test_an_input_that_does_not_drift_changes_no_weight() -> None:
    x = activations(np.random.default_rng(0), K)
    w = weight(np.random.default_rng(3), K, N)
    for statistics in (statistics_of(x), statistics_of(x[:-64], x[-64:]), learned(x, x)):
        (found,) = drift.corrected(read_by(statistics, w))
        np.testing.assert_array_equal(found.columns(), w)


def test_the_readers_of_another_input_stay_as_they_are() -> None:
    w = weight(np.random.default_rng(3), K, N)
    still = statistics_of(activations(np.random.default_rng(0), K))
    readers = [*read_by(learned(*inputs(wrong=0.1, noise=0.01)), w), *read_by(still, w)]
    first, second = drift.corrected(readers)
    assert not np.array_equal(first.columns(), w)
    assert second is readers[1]


def test_the_factor_of_a_layer_is_in_what_it_gets() -> None:
    w = weight(np.random.default_rng(3), K, N)
    (plain,) = read_by(learned(*inputs(wrong=0.1, noise=0.01)), w)
    found = drift.corrected([replace(plain, weight=w / 2, factor=2.0)])
    np.testing.assert_allclose(found[0].columns(), drift.corrected([plain])[0].columns(), rtol=1e-4, atol=1e-5)


def test_work_side_by_side_finds_the_same_weights() -> None:
    rng = np.random.default_rng(3)
    readers = read_by(learned(*inputs(wrong=0.1, noise=0.01)), weight(rng, K, N), weight(rng, K, 3 * drift.STRIP + 1))
    with Workers(2, 1 << 30) as workers:
        for one, other in zip(drift.corrected(readers), drift.corrected(readers, workers.spread), strict=True):
            np.testing.assert_array_equal(one.columns(), other.columns())


@pytest.mark.parametrize("dead", [[0], [3, 4, 40]])
def test_channels_that_carry_nothing_keep_their_weights(dead: list[int]) -> None:
    x, y = inputs(wrong=0.1, noise=0.01)
    x[:, dead] = y[:, dead] = 0
    w = weight(np.random.default_rng(3), K, N)
    (found,) = drift.corrected(read_by(learned(x, y), w))
    assert np.isfinite(found.columns()).all()
    np.testing.assert_array_equal(found.columns()[dead], w[dead])
