"""The model writes its own calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, decoder_feed, gated_mlp, run, tiny_cross_decoder, tiny_decoder

from awq_onnx import runtime
from awq_onnx.calibrate import feeds, generate
from awq_onnx.calibrate.feeds import Signature, signature, token_feed
from awq_onnx.errors import RuntimeFailedError
from awq_onnx.progress import unheard


def running(model: onnx.ModelProto) -> tuple[Any, Signature]:
    return runtime.session(model.SerializeToString(), Path()), signature(ir.from_proto(model).graph)


def written(model: onnx.ModelProto, *, samples: int = 3, length: int = 12, seed: int = 0) -> Array:
    session, wanted = running(model)
    return generate.generate(session, wanted, samples, length, seed, unheard)


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return tiny_decoder()


@pytest.fixture(scope="module")
def decoder_without_cache() -> onnx.ModelProto:
    """The same weights as `decoder`."""
    return tiny_decoder(cache=False)


def test_the_same_seed_writes_the_same_ids(decoder: onnx.ModelProto) -> None:
    np.testing.assert_array_equal(written(decoder, seed=1), written(decoder, seed=1))


def test_another_seed_writes_other_ids(decoder: onnx.ModelProto) -> None:
    assert (written(decoder, seed=1) != written(decoder, seed=2)).mean() > 0.5


@pytest.mark.parametrize("cache", [False, True])
def test_the_ids_have_the_wanted_shape_and_are_tokens(cache: bool) -> None:
    ids = written(tiny_decoder(cache=cache, vocabulary=50), samples=5, length=9)
    assert (ids.shape, ids.dtype) == ((5, 9), np.dtype(np.int64))
    assert ids.min() >= 0
    assert ids.max() < 50
    assert len(np.unique(ids)) > 10


def test_the_sequences_differ_from_each_other(decoder: onnx.ModelProto) -> None:
    assert len(np.unique(written(decoder, samples=8), axis=0)) == 8


def test_a_half_precision_model_writes(decoder: onnx.ModelProto) -> None:
    assert written(tiny_decoder(dtype=np.float16)).shape == written(decoder).shape


def test_the_cache_changes_no_token(decoder: onnx.ModelProto, decoder_without_cache: onnx.ModelProto) -> None:
    np.testing.assert_array_equal(written(decoder, length=20), written(decoder_without_cache, length=20))


def test_logits_step_by_step_are_those_of_one_pass(decoder: onnx.ModelProto) -> None:
    session, wanted = running(decoder)
    ids = written(decoder)
    caches = generate._Caches(wanted, *ids.shape)
    steps = [caches.step(session, token_feed(wanted, ids[:, at : at + 1], caches.past())) for at in range(12)]
    expected = run(decoder, decoder_feed(decoder, ids))["logits"]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=1e-3, atol=1e-4)


def test_the_tokens_are_likely_under_the_model(decoder: onnx.ModelProto) -> None:
    """Sampled at temperature 1, the mean log-likelihood of the text is minus the mean entropy."""
    ids = written(decoder, samples=24, length=24)
    logits = run(decoder, decoder_feed(decoder, ids))["logits"][:, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_p, ids[:, 1:, None], axis=-1)
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    assert entropy.mean() < 0.95 * np.log(160)  # else any text would be as likely
    assert -chosen.mean() == pytest.approx(entropy.mean(), rel=0.1)


def test_caches_beyond_the_budget_are_written_in_groups(
    decoder: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, 2 heads of 16, key and value, two buffers: 12 tokens of one sequence are 12 kB."""
    _, wanted = running(decoder)
    monkeypatch.setattr(generate, "CACHE_BUDGET_BYTES", 2 * 12_288)
    assert generate._side_by_side(wanted, 7, 12) == 2
    ids = written(decoder, samples=7)
    assert ids.shape == (7, 12)
    assert len(np.unique(ids, axis=0)) == 7


def test_without_a_cache_the_text_is_short(decoder_without_cache: onnx.ModelProto) -> None:
    assert written(decoder_without_cache, samples=1, length=100).shape == (1, generate.LENGTH_WITHOUT_CACHE)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("samples", [4, 6, 1])
def test_a_model_with_a_fixed_batch_writes_whole_batches(cache: bool, samples: int) -> None:
    model = fixed_batch(tiny_decoder(cache=cache, layers=1), 4)
    ids = written(model, samples=samples, length=5)
    assert len(ids) >= samples
    assert ids.shape[1] == 5


@pytest.mark.parametrize("length", [9, 100])
def test_a_model_of_a_fixed_length_without_a_cache_gets_ids_as_long(length: int) -> None:
    model = tiny_decoder(cache=False, layers=1)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = length
    ids = written(model, samples=2, length=length)
    assert ids.shape == (2, length)
    most = generate.LENGTH_WITHOUT_CACHE
    np.testing.assert_array_equal(ids[:, most:], ids[:, : max(0, length - most)])  # then its text comes again
    free = written(tiny_decoder(cache=False, layers=1), samples=2, length=length)
    np.testing.assert_array_equal(ids[:, :most], free)


def test_every_sequence_is_written_after_its_own_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences, two at once, each three steps long; the sixth of the last batch starts again at the first."""
    session, wanted = running(fixed_batch(tiny_cross_decoder(past=False), 2))
    states = np.random.default_rng(0).standard_normal((5, 3, 32)).astype(np.float32)
    seen: list[Array] = []

    def complete(wanted: Signature, given: dict[str, Array]) -> dict[str, Array]:
        seen.append(given["encoder_hidden_states"])
        return feeds.complete(wanted, given)

    monkeypatch.setattr(generate, "complete", complete)
    ids = generate.generate(session, wanted, 5, 4, 0, unheard, {"encoder_hidden_states": states})
    assert ids.shape == (5, 4)
    np.testing.assert_array_equal(np.concatenate(seen[::3]), states[[0, 1, 2, 3, 4, 0]])


def fixed_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return model


@pytest.mark.parametrize("cache", [False, True])
def test_progress_adds_up_to_one(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CACHE_BUDGET_BYTES", 2 * 12_288)
    session, wanted = running(tiny_decoder(cache=cache))
    fractions: list[float] = []
    generate.generate(session, wanted, 7, 12, 0, fractions.append)
    assert sum(fractions) == pytest.approx(1)


def test_a_failure_of_onnxruntime_is_told(decoder: onnx.ModelProto) -> None:
    session, wanted = running(decoder)
    caches = generate._Caches(wanted, 1, 4)
    feed = token_feed(wanted, np.array([[10_000]]), caches.past())
    with pytest.raises(RuntimeFailedError, match="while generating text"):
        caches.step(session, feed)


# What can write


def causal(model: onnx.ModelProto) -> bool:
    return generate.is_causal(*running(model))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_decoder_is_causal(cache: bool, dtype: type) -> None:
    assert causal(tiny_decoder(cache=cache, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_decoder_with_a_fixed_batch_is_causal(batch: int) -> None:
    assert causal(fixed_batch(tiny_decoder(layers=1), batch))


@pytest.mark.parametrize("cache", [False, True])
def test_an_encoder_is_not_causal(cache: bool) -> None:
    assert not causal(tiny_decoder(causal=False, cache=cache))


def test_a_model_without_logits_is_not_causal() -> None:
    assert not causal(gated_mlp().model())


# Sampling


def test_samples_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, -2.0, 3.0, 0.5], np.float32)
    draws = generate._sample(np.tile(logits, (20_000, 1)), np.random.default_rng(0))
    expected = 20_000 * np.exp(logits) / np.exp(logits).sum()
    chi_square = ((np.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 20  # 4 degrees of freedom: exceeded once in 2000


def test_every_row_is_sampled_by_its_own_logits() -> None:
    logits = np.full((3, 4), -50, np.float16)
    logits[[0, 1, 2], [2, 0, 3]] = 50
    assert generate._sample(logits, np.random.default_rng(0)).tolist() == [2, 0, 3]


class FixedNoise:
    """In the place of a random generator: noise that was chosen beforehand."""

    def __init__(self, noise: list[list[float]]) -> None:
        self._noise = np.array(noise, np.float32)

    def standard_exponential(self, shape: tuple[int, ...], dtype: type) -> Array:
        assert (shape, dtype) == (self._noise.shape, np.float32)
        return self._noise.copy()


@pytest.mark.parametrize("impossible", [-np.inf, -200.0])
def test_a_token_of_no_probability_is_never_picked(impossible: float) -> None:
    """numpy's fp32 exponential is exactly 0 once in a while, which would be a Gumbel noise of infinity."""
    logits = np.array([[impossible, 0.0, -1.0]], np.float32)
    noise: Any = FixedNoise([[0.0, 1.0, 1.0]])
    assert generate._sample(logits, noise).tolist() == [1]


def test_noise_of_zero_everywhere_picks_the_likeliest() -> None:
    noise: Any = FixedNoise([[0.0, 0.0, 0.0]])
    assert generate._sample(np.array([[0.0, 2.0, 1.0]], np.float32), noise).tolist() == [1]
