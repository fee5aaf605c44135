"""A sample of the vocabulary tells the KL of all of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from awq_onnx import vocabulary
from awq_onnx.likelihood import kl_divergence, log_softmax
from awq_onnx.vocabulary import VocabularySample

Float32 = NDArray[np.float32]
VOCABULARY = 30_000


def head(rows: int, K: int = 64) -> tuple[Float32, Float32, Float32]:
    """What a layer reads (R, K), its weight (K, V), and its logits: of a few tokens likely, of most hardly."""
    rng = np.random.default_rng(5)
    x, weight = rng.standard_normal((rows, K), np.float32), rng.standard_normal((K, VOCABULARY), np.float32) / 3
    return x, weight, x @ weight


def exact(logits: Float32, other: Float32) -> float:
    return float(kl_divergence(log_softmax(logits), log_softmax(other)).mean())


@pytest.mark.parametrize("size", [1e-3, 0.03, 1.0])
def test_all_tokens_tell_the_kl_exactly(size: float) -> None:
    x, weight, logits = head(20)
    added = size * np.random.default_rng(1).standard_normal(x.shape, np.float32) @ weight
    sample = VocabularySample.of(logits, VOCABULARY)
    assert len(sample.ids) == VOCABULARY
    assert sample.mean_kl(added) == pytest.approx(exact(logits, logits + added), rel=2e-3)


@pytest.mark.parametrize("size", [1e-3, 0.03, 0.3])
def test_an_eighth_of_them_tells_it_to_a_few_percent(size: float) -> None:
    x, weight, logits = head(128)
    sample = VocabularySample.of(logits, vocabulary.SAMPLE_SIZE)
    assert abs(len(sample.ids) - vocabulary.SAMPLE_SIZE) < 200
    rng, ratios = np.random.default_rng(2), []
    for _ in range(8):
        added = size * rng.standard_normal(x.shape, np.float32) @ weight
        ratios.append(sample.mean_kl(added[:, sample.ids]) / exact(logits, logits + added))
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert np.std(ratios) < 0.03


def test_a_shift_of_a_row_changes_nothing() -> None:
    x, weight, logits = head(4)
    sample = VocabularySample.of(logits, vocabulary.SAMPLE_SIZE)
    shifts = np.array([[0.0], [1.0], [-30.0], [500.0]], np.float32)
    assert sample.mean_kl(shifts + np.zeros_like(sample.weights)) == pytest.approx(0, abs=1e-8)
    added = (0.03 * np.random.default_rng(3).standard_normal(x.shape, np.float32) @ weight)[:, sample.ids]
    assert sample.mean_kl(added + shifts) == pytest.approx(sample.mean_kl(added), rel=1e-3)


def test_errors_of_any_size_have_a_finite_loss() -> None:
    _, _, logits = head(4)
    sample = VocabularySample.of(logits, vocabulary.SAMPLE_SIZE)
    losses = [sample.mean_kl(size * logits[::-1][:, sample.ids]) for size in (1, 10, 1000)]
    assert np.isfinite(losses).all()
    assert losses == sorted(losses)


def test_tokens_that_cannot_come_are_never_drawn() -> None:
    _, _, logits = head(4)
    logits[:, 1000:] = -np.inf
    sample = VocabularySample.of(logits, vocabulary.SAMPLE_SIZE)
    assert sample.ids.max() < 1000
    assert sample.weights.sum(axis=1) == pytest.approx(1, rel=1e-5)


def test_the_likeliest_token_of_every_row_is_drawn_and_counts_as_it_is() -> None:
    _, _, logits = head(128)
    sample = VocabularySample.of(logits, vocabulary.SAMPLE_SIZE)
    places = np.searchsorted(sample.ids, logits.argmax(axis=1))
    np.testing.assert_array_equal(sample.ids[places], logits.argmax(axis=1))
    p = np.exp(log_softmax(logits)).max(axis=1)
    np.testing.assert_allclose(sample.weights[np.arange(128), places], p, rtol=0.1)
