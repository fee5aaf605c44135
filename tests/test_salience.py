"""The channels that carry most, before and after the scale."""

from __future__ import annotations

import numpy as np
import pytest

from awq_onnx.salience import BINS, LOUDEST, Channel, Salience


def made(K: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(K)
    return rng.random(K, np.float32) + np.float32(0.1), rng.random(K, np.float32) + np.float32(0.5)


@pytest.mark.parametrize("K", [1, 7, BINS, BINS + 1, 576, 1536, 8191])
def test_each_bin_has_the_largest_of_its_channels(K: int) -> None:
    mean, scale = made(K)
    salience = Salience.of(mean, scale)
    assert len(salience.before) == len(salience.after) == -(-K // salience.width) <= BINS
    for at, (before, after) in enumerate(zip(salience.before, salience.after, strict=True)):
        some = slice(at * salience.width, (at + 1) * salience.width)
        assert before == pytest.approx(mean[some].max(), rel=1e-3)
        assert after == pytest.approx((mean / scale)[some].max(), rel=1e-3)
    assert salience.median_before == pytest.approx(np.median(mean), rel=1e-3)
    assert salience.median_after == pytest.approx(np.median(mean / scale), rel=1e-3)


def test_the_loudest_channels_come_first_with_their_scales() -> None:
    mean, scale = np.full(64, 0.25, np.float32), np.ones(64, np.float32)
    mean[[40, 3]], scale[40] = (8, 2), 4
    salience = Salience.of(mean, scale)
    assert len(salience.loudest) == LOUDEST
    assert salience.loudest[:3] == (Channel(40, 8.0, 4.0), Channel(3, 2.0, 1.0), Channel(0, 0.25, 1.0))
    assert (max(salience.before), max(salience.after)) == (8, 2)


def test_a_channel_that_carries_nothing_is_nothing() -> None:
    salience = Salience.of(np.zeros(5, np.float32), np.ones(5, np.float32))
    assert salience.before == salience.after == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("bins", [1, 16, 100, 512])
def test_a_coarser_one_has_the_peaks_of_the_channels_too(bins: int) -> None:
    mean, scale = made(1536)
    coarse = Salience.of(mean, scale).coarser(bins)
    assert len(coarse.before) == len(coarse.after) == -(-1536 // coarse.width) <= bins
    for at, before in enumerate(coarse.before):
        assert before == pytest.approx(mean[at * coarse.width : (at + 1) * coarse.width].max(), rel=1e-3)
