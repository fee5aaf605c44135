"""What the comparison counts, on numbers small enough to check by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from awq_onnx.calibrate.feeds import Input, Signature
from awq_onnx.comparison import CONTEXT, WORST, Comparison, WorstToken, compare_sessions
from awq_onnx.errors import DifferentModelsError
from awq_onnx.likelihood import kl_divergence

Array = NDArray[Any]

LANGUAGE_MODEL = Signature(
    inputs=tuple(Input(name, np.dtype(np.int64), ("B", "T")) for name in ("input_ids", "attention_mask")),
    outputs=("logits",),
    caches=(),
    vocabulary=4,
)
ENCODER = Signature((Input("x", np.dtype(np.float32), ("B", 2)),), ("y", "present"), (("past", "present"),), None)


class Answers:
    """A session that answers every run with the next of its outputs."""

    def __init__(self, *outputs: Any) -> None:
        self._outputs = iter(np.asarray(output, np.float32) for output in outputs)

    def run(self, outputs: list[str], feed: dict[str, Array]) -> list[Array]:
        assert len(outputs) == 1, "caches are not compared"
        assert feed
        return [next(self._outputs)]


def window(ids: list[int], mask: list[int] | None = None) -> dict[str, Array]:
    return {"input_ids": np.array([ids]), "attention_mask": np.array([mask or [1] * len(ids)])}


def compared(original: Any, quantized: Any, *windows: dict[str, Array]) -> Comparison:
    """The comparison of two language models that answer with these logits, one array (1, T, V) for each window."""
    return compare_sessions(Answers(*original), Answers(*quantized), windows, LANGUAGE_MODEL)


def log(*probabilities: float) -> list[float]:
    with np.errstate(divide="ignore"):
        return [float(one) for one in np.log(np.array(probabilities))]


def random_logits(seed: int, T: int = 5) -> Array:
    return np.random.default_rng(seed).standard_normal((1, T, 4))


# Divergence


def test_kl_is_what_its_definition_says() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(6), size=4)
    q = np.random.default_rng(1).dirichlet(np.ones(6), size=4)
    expected = [sum(p[t, v] * np.log(p[t, v] / q[t, v]) for v in range(6)) for t in range(4)]
    np.testing.assert_allclose(kl_divergence(np.log(p), np.log(q)), expected, rtol=1e-12)


def test_kl_of_a_distribution_with_itself_is_zero() -> None:
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(6), size=4))
    assert (kl_divergence(log_p, log_p) == 0).all()


def test_tokens_that_are_impossible_add_nothing() -> None:
    log_p, log_q = np.array([log(0.5, 0.5, 0)]), np.array([log(0.25, 0.75, 0)])
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(kl_divergence(log_p, log_q), [expected], rtol=1e-12)
    np.testing.assert_allclose(kl_divergence(log_p, np.array([log(0.25, 0.5, 0.25)])), [0.5 * np.log(2)], rtol=1e-12)


def test_calling_a_possible_token_impossible_is_infinitely_wrong() -> None:
    assert kl_divergence(np.array([log(0.5, 0.5)]), np.array([log(1, 0)])).tolist() == [np.inf]


# Language models


def test_a_model_agrees_with_itself() -> None:
    logits = random_logits(0)
    result = compared([logits], [logits], window([0, 1, 2, 3, 0]))
    assert (result.kl_mean, result.kl_median, result.top1, result.relative_error) == (0, 0, 1, 0)
    assert result.perplexity_original == result.perplexity_quantized
    assert (result.tokens, result.windows, result.kl_se) == (5, 1, None)


def test_every_number_is_what_it_is_by_hand() -> None:
    original = [[log(0.5, 0.25, 0.125, 0.125), log(0.125, 0.5, 0.25, 0.125), log(0.25, 0.25, 0.25, 0.25)]]
    quantized = [[log(0.25, 0.5, 0.125, 0.125), log(0.125, 0.5, 0.25, 0.125), log(0.25, 0.25, 0.25, 0.25)]]
    result = compared([original], [quantized], window([3, 1, 2]))
    assert result.kl_mean == pytest.approx((0.5 * np.log(2) + 0.25 * np.log(0.5)) / 3, rel=1e-5)
    assert result.top1 == pytest.approx(2 / 3)
    assert result.perplexity_original == pytest.approx((0.25 * 0.25) ** -0.5, rel=1e-5)  # of tokens 1 and 2
    assert result.perplexity_quantized == pytest.approx((0.5 * 0.25) ** -0.5, rel=1e-5)
    assert result.relative_error == pytest.approx(
        np.linalg.norm(np.subtract(original, quantized)) / np.linalg.norm(original), rel=1e-5
    )


def test_a_constant_added_to_all_logits_changes_the_error_but_no_probability() -> None:
    logits = random_logits(0)
    result = compared([logits], [logits + 3], window([0, 1, 2, 3, 0]))
    assert result.kl_mean == pytest.approx(0, abs=1e-6)
    assert result.relative_error > 1


def test_windows_are_summarised_by_mean_median_and_standard_error() -> None:
    original = [random_logits(seed) for seed in range(3)]
    quantized = [logits + random_logits(seed + 9) / 9 for seed, logits in enumerate(original)]
    ids = [0, 1, 2, 3, 0]
    apart = [compared([one], [other], window(ids)).kl_mean for one, other in zip(original, quantized, strict=True)]
    result = compared(original, quantized, *[window(ids)] * 3)
    assert result.kl_windows == pytest.approx(apart)
    assert result.kl_mean == pytest.approx(np.mean(apart))
    assert result.kl_median == pytest.approx(np.median(apart))
    assert result.kl_se == pytest.approx(np.std(apart, ddof=1) / np.sqrt(3))
    assert result.tokens == 15


@pytest.mark.parametrize("T", [16, 17, 40])
def test_long_windows_are_counted_whole(T: int) -> None:
    original, quantized = random_logits(0, T), random_logits(1, T)
    ids = [token % 4 for token in range(T)]
    result = compared([original], [quantized], window(ids))
    log_p, log_q = (x[0] - np.log(np.exp(x[0]).sum(axis=1, keepdims=True)) for x in (original, quantized))
    assert result.kl_mean == pytest.approx(kl_divergence(log_p, log_q).mean(), rel=1e-5)
    targets = log_q[np.arange(T - 1), ids[1:]]
    assert result.perplexity_quantized == pytest.approx(np.exp(-targets.mean()), rel=1e-5)
    assert result.tokens == T


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_do_not_count(side: str) -> None:
    """Their logits mean nothing, and no token has to predict them."""
    original, quantized = random_logits(0), random_logits(1)
    ids = [0, 1, 2, 3, 0]
    alone = compared([original], [quantized], window(ids))

    def padded(logits: Array, seed: int) -> Array:
        padding = random_logits(seed, 3) * 5
        return np.concatenate([padding, logits] if side == "left" else [logits, padding], axis=1)

    mask = [0] * 3 + [1] * 5 if side == "left" else [1] * 5 + [0] * 3
    padded_ids = [3] * 3 + ids if side == "left" else ids + [3] * 3
    result = compared([padded(original, 2)], [padded(quantized, 3)], window(padded_ids, mask))
    assert (result.kl_mean, result.top1, result.tokens) == (alone.kl_mean, alone.top1, alone.tokens)
    assert result.perplexity_original == pytest.approx(alone.perplexity_original, rel=1e-9)
    assert result.perplexity_quantized == pytest.approx(alone.perplexity_quantized, rel=1e-9)


def test_logits_of_minus_infinity_count_for_nothing() -> None:
    original, quantized = random_logits(0), random_logits(1)
    original[..., 3] = quantized[..., 3] = -np.inf
    result = compared([original], [quantized], window([0, 1, 2, 1, 0]))
    without = compared([original[..., :3]], [quantized[..., :3]], window([0, 1, 2, 1, 0]))
    assert result.kl_mean == pytest.approx(without.kl_mean)
    assert result.relative_error == pytest.approx(without.relative_error)
    assert result.perplexity_original == pytest.approx(without.perplexity_original)


def test_different_shapes_are_no_comparison() -> None:
    with pytest.raises(DifferentModelsError, match="different shapes"):
        compared([random_logits(0, 5)], [random_logits(0, 4)], window([0, 1, 2, 3, 0]))


def test_sequences_that_run_at_once_are_windows_of_their_own() -> None:
    original, quantized = (np.concatenate([random_logits(seed), random_logits(seed + 1)]) for seed in (0, 2))
    ids = [[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]]
    both = {"input_ids": np.array(ids), "attention_mask": np.ones((2, 5), np.int64)}
    apart = compared(original[:, None], quantized[:, None], *map(window, ids))
    result = compared([original], [quantized], both)
    assert (result.kl_windows, result.worst) == (apart.kl_windows, apart.worst)
    assert (result.windows, result.tokens, result.top1) == (2, 10, apart.top1)


# The worst tokens


def test_the_worst_token_is_told_with_what_both_models_say() -> None:
    original = [[log(0.25, 0.25, 0.25, 0.25), log(0.1, 0.7, 0.1, 0.1), log(0.5, 0.25, 0.125, 0.125)]]
    quantized = [[log(0.25, 0.25, 0.25, 0.25), log(0.1, 0.1, 0.1, 0.7), log(0.25, 0.5, 0.125, 0.125)]]
    first, second = compared([original], [quantized], window([3, 1, 2])).worst
    assert first == WorstToken(
        window=0,
        position=1,
        kl=pytest.approx(0.6 * np.log(7), rel=1e-6),
        context=(3, 1),
        original=1,
        original_probability=pytest.approx(0.7, rel=1e-6),
        quantized=3,
        quantized_probability=pytest.approx(0.7, rel=1e-6),
    )
    assert (second.position, second.context) == (2, (3, 1, 2))
    assert second.kl == pytest.approx(0.25 * np.log(2), rel=1e-6)


def test_of_many_tokens_the_worst_are_kept_in_order() -> None:
    T = 40
    original, quantized = ([random_logits(seed + 10 * one, T) for one in range(3)] for seed in (0, 5))
    ids = [token % 4 for token in range(T)]
    result = compared(original, quantized, *[window(ids)] * 3)
    log_p, log_q = (
        x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (np.concatenate(original), np.concatenate(quantized))
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)  # (3, T)
    expected = [divmod(int(at), T) for at in np.argsort(-kl, axis=None)[:WORST]]
    assert [(one.window, one.position) for one in result.worst] == expected
    for one in result.worst:
        assert one.kl == pytest.approx(kl[one.window, one.position], rel=1e-5)
        assert one.context == tuple(ids[: one.position + 1][-CONTEXT:])


def test_where_models_agree_nothing_is_worst() -> None:
    assert compared([random_logits(0)], [random_logits(0)], window([0, 1, 2, 3, 0])).worst == ()


def test_padding_is_neither_among_the_worst_nor_in_their_context() -> None:
    original, quantized = random_logits(0), random_logits(0)
    quantized[0, :2] *= -5
    quantized[0, 3] *= 2
    (only,) = compared([original], [quantized], window([3, 3, 0, 1, 2], [0, 0, 1, 1, 1])).worst
    assert (only.position, only.context) == (3, (0, 1))


def test_the_worst_samples_of_a_classifier_have_no_context() -> None:
    original, quantized = [log(0.5, 0.25, 0.125, 0.125)], [log(0.25, 0.5, 0.125, 0.125)]
    (only,) = compared([original, original], [original, quantized], *[window([0, 1, 2])] * 2).worst
    assert (only.window, only.position, only.context, only.original, only.quantized) == (1, 0, (), 0, 1)


# Numbers that are none


def test_a_model_that_returns_nan_is_no_close_one() -> None:
    broken = random_logits(0)
    broken[0, 2, 1] = np.nan
    result = compared([random_logits(0)], [broken], window([0, 1, 2, 3, 0]))
    assert result.kl_mean is not None
    assert np.isnan(result.kl_mean)
    assert np.isnan(result.relative_error)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_an_encoder_that_returns_no_numbers_is_no_close_one(broken: float) -> None:
    feed = {"x": np.zeros((1, 2), np.float32)}
    result = compare_sessions(Answers([[3.0, 4.0], [1.0, 2.0]]), Answers([[3.0, broken], [1.0, 2.0]]), [feed], ENCODER)
    assert not np.isfinite(result.relative_error)
    assert result.cosine_distance is not None
    assert np.isnan(result.cosine_distance)


def test_json_holds_numbers_that_are_none_as_null() -> None:
    result = compared([[log(0.5, 0.5, 0, 0)]], [[log(1, 0, 0, 0)]], window([0]))
    assert result.kl_mean == np.inf
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (values["kl_mean"], values["kl_windows"], values["top1"]) == (None, [None], 1)
    assert values["worst"][0]["context"] == [0]


# Other models


def test_a_model_without_logits_has_a_relative_error_alone() -> None:
    feed = {"x": np.zeros((1, 2), np.float32)}
    result = compare_sessions(Answers([[[3, 0], [0, 4]]]), Answers([[[3, 0], [0, 3]]]), [feed], ENCODER)
    assert result.relative_error == pytest.approx(0.2)
    assert (result.kl_mean, result.top1, result.perplexity_original, result.kl_windows) == (None, None, None, ())
    assert (result.tokens, result.windows) == (2, 1)


def test_outputs_of_zero_have_no_error() -> None:
    feed = {"x": np.zeros((1, 2), np.float32)}
    assert compare_sessions(Answers([[0, 0]]), Answers([[0, 0]]), [feed], ENCODER).relative_error == 0


def test_a_classifier_of_whole_samples_is_compared_by_its_classes() -> None:
    original, quantized = [log(0.5, 0.25, 0.125, 0.125)], [log(0.25, 0.5, 0.125, 0.125)]
    result = compared([original], [quantized], window([0, 1, 2]))
    assert result.kl_mean == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5), rel=1e-5)
    assert (result.top1, result.tokens, result.perplexity_original, result.cosine_distance) == (0, 1, None, None)


def test_a_regression_has_no_classes() -> None:
    result = compared([[[2.0]]], [[[1.0]]], window([0, 1, 2]))
    assert (result.kl_mean, result.relative_error, result.cosine_distance) == (None, 0.5, None)


def test_the_cosine_distance_is_the_mean_over_tokens() -> None:
    feed = {"x": np.zeros((1, 3), np.float32)}
    original, quantized = [[[3, 0], [0, 4], [1, 1]]], [[[6, 0], [4, 0], [1, 0]]]
    result = compare_sessions(Answers(original), Answers(quantized), [feed], ENCODER)
    assert result.cosine_distance == pytest.approx((0 + 1 + 1 - 0.5**0.5) / 3)


def test_padded_tokens_of_an_encoder_do_not_count() -> None:
    encoder = Signature(LANGUAGE_MODEL.inputs, ("last_hidden_state",), (), 4)
    original, quantized = [[[3, 0], [0, 4], [9, 9]]], [[[3, 0], [0, 3], [-9, 9]]]
    result = compare_sessions(Answers(original), Answers(quantized), [window([0, 1, 2], [1, 1, 0])], encoder)
    assert (result.cosine_distance, result.tokens) == (0, 2)
    assert result.relative_error == pytest.approx(0.2)


def test_a_row_of_zeros_has_no_direction() -> None:
    feed = {"x": np.zeros((1, 2), np.float32)}
    result = compare_sessions(Answers([[[0, 0], [0, 4]]]), Answers([[[0, 0], [0, 3]]]), [feed], ENCODER)
    assert result.cosine_distance == 0


def test_the_tokens_of_the_decoder_are_those_that_the_logits_predict() -> None:
    """An encoder-decoder in one graph: neither the encoder's ids nor its mask belong to the logits."""
    both = tuple(Input(name, np.dtype(np.int64), ("B", "T")) for name in ("input_ids", "decoder_input_ids"))
    wanted = Signature((*both, LANGUAGE_MODEL.inputs[1]), ("logits",), (), 4)
    feed = {**window([3, 3, 3], [1, 0, 0]), "decoder_input_ids": np.array([[0, 1, 2]])}
    logits = random_logits(0, 3)
    result = compare_sessions(Answers(logits), Answers(logits), [feed], wanted)
    alone = compared([logits], [logits], window([0, 1, 2]))
    assert (result.tokens, result.perplexity_original) == (3, alone.perplexity_original)
