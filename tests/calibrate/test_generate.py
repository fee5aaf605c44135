"""The model writes its own calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, run, tiny_cross_decoder, tiny_decoder

from awq_onnx import runtime
from awq_onnx.calibrate import feeds, generate
from awq_onnx.calibrate.feeds import Signature, signature, token_feed
from awq_onnx.calibrate.generate import UNBOUNDED, Bounds, written_well
from awq_onnx.errors import RuntimeFailedError
from awq_onnx.progress import unheard


def running(model: onnx.ModelProto) -> tuple[Any, Signature]:
    return runtime.session(model.SerializeToString(), Path()), signature(ir.from_proto(model).graph)


def written(
    model: onnx.ModelProto, *, samples: int = 3, length: int = 12, seed: int = 0, bounds: Bounds = UNBOUNDED
) -> Array:
    session, wanted = running(model)
    return generate.generate(session, wanted, samples, length, seed, unheard, bounds=bounds)


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


# Where texts start and end


def counting(vocabulary: int) -> onnx.ModelProto:
    """A language model that surely writes t + 1 after t, and 0 after the last token."""
    builder = GraphBuilder()
    ids = builder.input("input_ids", ["batch", "sequence"], np.int64)
    table = builder.constant(200.0 * np.roll(np.eye(vocabulary), 1, axis=1))
    builder.output(builder.add("Gather", table, ids, to="logits"), ["batch", "sequence", vocabulary])
    return builder.model()


def counted_on(ids: Array, vocabulary: int) -> Array:
    """The tokens (samples, length - 1) that the model `counting` would write after these."""
    return (ids[:, :-1] + 1) % vocabulary


@pytest.mark.parametrize("cache", [False, True])
def test_every_text_starts_with_the_start_token_and_goes_on_with_any(cache: bool) -> None:
    ids = written(tiny_decoder(cache=cache, layers=1), samples=12, length=4, bounds=Bounds(start=7))
    assert set(ids[:, 0].tolist()) == {7}
    assert len(set(ids[:, 1].tolist())) > 6


def test_the_token_after_the_start_is_any_of_the_vocabulary_whatever_the_model_would_write() -> None:
    ids = written(counting(5), samples=200, length=2, bounds=Bounds(start=3))
    assert sorted(set(ids[:, 1].tolist())) == [0, 1, 2, 3, 4]
    assert np.bincount(ids[:, 1]).min() > 20  # 40 are expected


def test_after_these_two_the_model_chooses() -> None:
    ids = written(counting(9), samples=8, length=20, bounds=Bounds(start=3, ends=(100,)))
    np.testing.assert_array_equal(ids[:, 2:], counted_on(ids[:, 1:], 9))


def test_where_a_text_ends_the_next_one_starts_and_the_model_goes_on_from_there() -> None:
    """The tokens 6, 7 and 8 are for nobody: the model never gets there."""
    ids = written(counting(9), samples=8, length=20, bounds=Bounds(start=2, ends=(5,)))
    after_end = ids[:, 1:-1] == 5
    assert after_end.sum() > 8
    np.testing.assert_array_equal(ids[:, 2:], np.where(after_end, 2, counted_on(ids[:, 1:], 9)))


def test_any_of_several_tokens_ends_a_text() -> None:
    ids = written(counting(9), samples=20, length=20, bounds=Bounds(start=2, ends=(5, 8)))
    after_end = np.isin(ids[:, 1:-1], (5, 8))
    assert {5, 8} <= set(ids[:, 1:-1].ravel().tolist())
    np.testing.assert_array_equal(ids[:, 2:], np.where(after_end, 2, counted_on(ids[:, 1:], 9)))


@pytest.mark.parametrize("ends", [(3,), (3, 6)])
def test_where_the_start_token_ends_texts_too_the_model_goes_on_from_the_end_itself(ends: tuple[int, ...]) -> None:
    ids = written(counting(9), samples=8, length=20, bounds=Bounds(start=3, ends=ends))
    assert set(ids[:, 0].tolist()) == {3}
    np.testing.assert_array_equal(ids[:, 2:], counted_on(ids[:, 1:], 9))


def test_a_decoder_with_a_cache_starts_texts_after_ends_too(decoder: onnx.ModelProto) -> None:
    ends = tuple(range(100, 140))
    ids = written(decoder, samples=6, length=20, bounds=Bounds(start=7, ends=ends))
    ended = np.isin(ids[:, 1:-1], ends)
    assert ended.sum() > 6
    assert set(ids[:, 2:][ended].tolist()) == {7}
    assert len(set(ids[:, 2:][~ended].tolist())) > 20


def test_the_cache_changes_no_token_of_bounded_texts(
    decoder: onnx.ModelProto, decoder_without_cache: onnx.ModelProto
) -> None:
    bounds = Bounds(start=7, ends=tuple(range(40, 60)))
    expected = written(decoder_without_cache, length=20, bounds=bounds)
    np.testing.assert_array_equal(written(decoder, length=20, bounds=bounds), expected)


def test_every_group_of_sequences_is_bounded(decoder: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CACHE_BUDGET_BYTES", 2 * 12_288)
    ids = written(decoder, samples=7, bounds=Bounds(start=7))
    assert ids[:, 0].tolist() == [7] * 7
    assert len(set(ids[:, 1].tolist())) > 3


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(ends=(5, 6))])
def test_without_a_start_token_every_token_but_the_first_is_the_models_choice(bounds: Bounds) -> None:
    ids = written(counting(9), samples=40, length=20, bounds=bounds)
    assert set(ids[:, 0].tolist()) == set(range(9))
    np.testing.assert_array_equal(ids[:, 1:], counted_on(ids, 9))


def test_ends_without_a_start_change_nothing(decoder: onnx.ModelProto) -> None:
    np.testing.assert_array_equal(written(decoder, bounds=Bounds(ends=tuple(range(100)))), written(decoder))


def test_one_token_is_the_start() -> None:
    assert written(counting(9), samples=3, length=1, bounds=Bounds(start=3)).tolist() == [[3]] * 3


# What to use of it

START, WORD, END, OTHER_END = 0, 1, 2, 3
BOUNDS = Bounds(START, (END,))
ENDS_AT_ONCE = [0] * 20


def sample(*words: int, length: int = 64, end: int = END) -> Array:
    """Texts of so many words, each after a start and before an end, the last one cut off or gone on with."""
    ids = [token for count in words for token in [START, *[WORD] * count, end]]
    return np.array((ids + [WORD] * length)[:length])


def used(*samples: Array, bounds: Bounds = BOUNDS) -> list[list[bool]]:
    answer: list[list[bool]] = written_well(np.stack(samples), bounds).tolist()
    return answer


def first_only(tokens: int, length: int = 64) -> list[bool]:
    return [True] * tokens + [False] * (length - tokens)


@pytest.mark.parametrize("later", [[14, 14, 14], [9, 9, 9, 9], [30]])
def test_later_texts_that_are_about_as_long_are_used(later: list[int]) -> None:
    assert used(sample(14, *later)) == [[True] * 64]


def test_later_texts_that_are_shorter_and_yet_texts_are_used() -> None:
    assert used(sample(46, 14), sample(46, 14)) == [[True] * 64] * 2


@pytest.mark.parametrize("later", [0, 1])
def test_of_texts_that_end_at_once_after_the_first_only_that_one_is_used(later: int) -> None:
    assert used(sample(14, *[later] * 20)) == [first_only(16)]  # its start and its end are in


def test_what_is_used_ends_with_the_first_end_of_each_sample() -> None:
    """The last one did not end."""
    samples = [sample(words, *ENDS_AT_ONCE) for words in (14, 30)]
    assert used(*samples, sample(100)) == [first_only(16), first_only(32), [True] * 64]


def test_a_few_texts_that_end_at_once_among_many_that_do_not_take_nothing_away() -> None:
    samples = [sample(14, 14, 14, 14) for _ in range(7)]
    assert used(*samples, sample(14, 0, 14, 14)) == [[True] * 64] * 8


@pytest.mark.parametrize("bounds", [BOUNDS, Bounds(START), Bounds()])
def test_all_is_used_where_nothing_ended(bounds: Bounds) -> None:
    assert used(sample(100), sample(100), bounds=bounds) == [[True] * 64] * 2


def test_the_first_of_several_ends_counts() -> None:
    bounds = Bounds(START, (END, OTHER_END))
    other = sample(20, *ENDS_AT_ONCE, end=OTHER_END)
    assert used(sample(14, *ENDS_AT_ONCE), other, bounds=bounds) == [first_only(16), first_only(22)]


def test_long_texts_are_used_whichever_token_ends_them() -> None:
    bounds = Bounds(START, (END, OTHER_END))
    samples = [sample(14, 14, 14, 14, end=end) for end in bounds.ends]
    assert used(*samples, bounds=bounds) == [[True] * 64] * 2


@pytest.mark.parametrize("tokens", [[END, WORD], [START, END], [END, END]])
def test_the_tokens_that_the_model_did_not_choose_end_no_text(tokens: list[int]) -> None:
    ids = sample(14, *ENDS_AT_ONCE)
    ids[:2] = tokens
    assert used(ids) == [first_only(16)]


def test_a_token_that_starts_and_ends_texts_may_come_over_and_over() -> None:
    """As from a model that writes nothing but that token after the end of its text."""
    ids = np.array([END] + [WORD] * 20 + [END] * 43)
    assert used(ids, bounds=Bounds(END, (END,))) == [first_only(22)]


def test_a_token_between_texts_that_goes_on_is_used() -> None:
    ids = np.array([[END] + [WORD] * 15] * 4).reshape(-1)
    assert used(ids, bounds=Bounds(END, (END,))) == [[True] * 64]


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
