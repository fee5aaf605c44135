"""Inputs made from nothing but the names, types and shapes of a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, norm_and_readers, run, tiny_decoder

from awq_onnx.calibrate import feeds
from awq_onnx.calibrate.feeds import Input, Signature, signature
from awq_onnx.errors import CalibrationError

INT, FLOAT, HALF, BOOL = (np.dtype(kind) for kind in (np.int64, np.float32, np.float16, np.bool_))
IDS = np.array([[3, 1, 4], [1, 5, 9]])


def wants(*inputs: Input, vocabulary: int | None = 160, outputs: tuple[str, ...] = ("logits",)) -> Signature:
    return Signature(inputs, outputs, (), vocabulary)


TOKENS = Input("input_ids", INT, ("batch", "sequence"))


def test_the_signature_of_a_decoder() -> None:
    wanted = signature(ir.from_proto(tiny_decoder(layers=1)).graph)
    assert wanted.inputs == (
        Input("input_ids", INT, ("batch_size", "sequence_length")),
        Input("attention_mask", INT, ("batch_size", "past_sequence_length + sequence_length")),
        Input("past_key_values.0.key", FLOAT, ("batch_size", 2, "past_sequence_length", 16)),
        Input("past_key_values.0.value", FLOAT, ("batch_size", 2, "past_sequence_length", 16)),
    )
    assert wanted.outputs == ("logits", "present.0.key", "present.0.value")
    assert wanted.caches == (
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.value", "present.0.value"),
    )
    assert (wanted.vocabulary, wanted.logits, wanted.takes_tokens) == (160, "logits", True)


def test_the_signature_of_a_model_without_tokens() -> None:
    wanted = signature(ir.from_proto(norm_and_readers().model()).graph)
    assert (wanted.vocabulary, wanted.logits, wanted.takes_tokens, wanted.caches) == (None, None, False, ())
    assert wanted.inputs == (Input("x", FLOAT, ("batch", "sequence", 64)),)


def test_an_input_with_a_default_need_not_be_given() -> None:
    builder = norm_and_readers()
    builder.input("norm.weight", [64])
    wanted = signature(ir.from_proto(builder.model()).graph)
    assert [one.name for one in wanted.inputs] == ["x"]


def test_the_vocabulary_is_found_behind_a_cast() -> None:
    builder = GraphBuilder()
    ids = builder.cast(builder.input("input_ids", ["batch", "sequence"], np.int32), np.int64, "cast")
    builder.output(builder.add("Gather", builder.constant(np.ones((77, 8))), ids))
    assert signature(ir.from_proto(builder.model()).graph).vocabulary == 77


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_decoder_runs_on_the_feed_made_for_it(dtype: type) -> None:
    model = tiny_decoder(dtype=dtype)
    feed = feeds.token_feed(signature(ir.from_proto(model).graph), IDS)
    assert feed["past_key_values.0.key"].shape == (2, 2, 0, 16)
    assert feed["past_key_values.0.key"].dtype == dtype
    assert run(model, feed)["logits"].shape == (2, 3, 160)


def test_the_mask_is_ones_over_past_and_new_tokens() -> None:
    wanted = wants(TOKENS, Input("attention_mask", INT, ("batch", "total")))
    past = {"past_key_values.0.key": np.zeros((2, 4, 5, 16), np.float32)}
    assert feeds.token_feed(wanted, IDS)["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert feeds.token_feed(wanted, IDS, past)["attention_mask"].tolist() == [[1] * 8] * 2


def test_positions_go_on_after_the_past() -> None:
    wanted = wants(TOKENS, Input("position_ids", INT, ("batch", "sequence")))
    past = {"past_key_values.0.key": np.zeros((2, 4, 5, 16), np.float32)}
    assert feeds.token_feed(wanted, IDS)["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feeds.token_feed(wanted, IDS, past)["position_ids"].tolist() == [[5, 6, 7]] * 2


def test_segments_are_zeros() -> None:
    feed = feeds.token_feed(wants(TOKENS, Input("token_type_ids", INT, ("batch", "sequence"))), IDS)
    np.testing.assert_array_equal(feed["token_type_ids"], np.zeros((2, 3)))


def test_the_cache_branch_is_used_once_there_is_a_cache() -> None:
    wanted = wants(TOKENS, Input("use_cache_branch", BOOL, (1,)))
    past = {"past_key_values.0.key": np.zeros((2, 4, 5, 16), np.float32)}
    empty = {"past_key_values.0.key": np.zeros((2, 4, 0, 16), np.float32)}
    assert feeds.token_feed(wanted, IDS)["use_cache_branch"].tolist() == [False]
    assert feeds.token_feed(wanted, IDS, empty)["use_cache_branch"].tolist() == [False]
    assert feeds.token_feed(wanted, IDS, past)["use_cache_branch"].tolist() == [True]


def test_what_was_given_is_taken_in_the_type_the_model_wants() -> None:
    wanted = wants(Input("input_ids", np.dtype(np.int32), ("batch", "sequence")), Input("attention_mask", INT, None))
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    feed = feeds.complete(wanted, {"input_ids": IDS, "attention_mask": mask})
    assert feed["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(feed["attention_mask"], mask)


def test_the_past_that_was_given_is_passed_on() -> None:
    wanted = wants(TOKENS, Input("past_key_values.0.key", FLOAT, ("batch", 4, "past", 16)))
    past = {"past_key_values.0.key": np.zeros((2, 4, 5, 16), np.float32)}
    assert feeds.token_feed(wanted, IDS, past)["past_key_values.0.key"] is past["past_key_values.0.key"]


def test_a_cache_of_fixed_length_is_as_long_as_the_graph_says() -> None:
    wanted = wants(TOKENS, Input("past_key_values.0.key", HALF, ("batch", 4, 7, 16)))
    assert feeds.token_feed(wanted, IDS)["past_key_values.0.key"].shape == (2, 4, 7, 16)


@pytest.mark.parametrize(
    "one",
    [
        Input("pixel_values", FLOAT, ("batch", 3, 8, 8)),
        Input("encoder_hidden_states", FLOAT, ("batch", "sequence", 64)),
        Input("past_state", FLOAT, ("batch", 64)),
        Input("mystery", INT, None),
    ],
)
def test_an_input_that_cannot_be_guessed_is_named(one: Input) -> None:
    with pytest.raises(CalibrationError, match=f"input {one.name} .* cannot be guessed: give inputs with --cal"):
        feeds.token_feed(wants(TOKENS, one), IDS)


def test_a_cache_without_fixed_heads_is_named() -> None:
    one = Input("past_key_values.0.key", FLOAT, ("batch", "heads", "past", 16))
    with pytest.raises(CalibrationError, match=r"past_key_values\.0\.key .* does not fix its heads"):
        feeds.token_feed(wants(TOKENS, one), IDS)


# Sizes


def test_fixed_sizes_win_over_wishes() -> None:
    fixed = wants(Input("input_ids", INT, (2, 16)))
    assert (fixed.batch_size(5), fixed.sequence_length(256)) == (2, 16)
    assert (wants(TOKENS).batch_size(5), wants(TOKENS).sequence_length(256)) == (5, 256)


def test_the_length_is_free_where_there_are_no_tokens() -> None:
    assert wants(Input("x", FLOAT, ("batch", 7, 64))).sequence_length(256) == 256


def random_feed(*inputs: Input, **options: Any) -> feeds.Feed:
    return feeds.random_feed(wants(*inputs, **options), 3, 5, np.random.default_rng(0))


def test_random_tokens_are_in_the_vocabulary() -> None:
    ids = random_feed(TOKENS, vocabulary=7)["input_ids"]
    assert ids.shape == (3, 5)
    assert set(ids.ravel().tolist()) <= set(range(7))
    assert len(set(ids.ravel().tolist())) > 3


def test_random_feeds_respect_fixed_sizes() -> None:
    feed = random_feed(Input("input_ids", INT, (2, 9)), Input("attention_mask", INT, (2, 9)))
    assert {name: values.shape for name, values in feed.items()} == {"input_ids": (2, 9), "attention_mask": (2, 9)}


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (("batch", "sequence", 64), (3, 5, 64)),
        (("batch_size", "num_tokens", 64), (3, 5, 64)),
        (("n", "m", 64), (3, 5, 64)),
        (("batch", 3, 8, 8), (3, 3, 8, 8)),
        ((1, "sequence_length", 64), (1, 5, 64)),
        (("batch", "encoder_length"), (3, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_random_numbers_have_the_shape_of_their_input(
    dims: tuple[int | str, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    values = random_feed(Input("x", dtype, dims), vocabulary=None)["x"]
    assert (values.shape, values.dtype) == (shape, dtype)
    assert np.std(values.astype(np.float32)) > 0.5


@pytest.mark.parametrize("dims", [None, ("batch", 3, "height", "width"), ("batch", "sequence", "features")])
def test_a_size_that_cannot_be_guessed_is_named(dims: tuple[int | str, ...] | None) -> None:
    with pytest.raises(CalibrationError, match="the model's input x "):
        random_feed(Input("x", FLOAT, dims), vocabulary=None)


def test_the_same_seed_gives_the_same_numbers() -> None:
    one, other = (random_feed(Input("x", FLOAT, ("batch", "sequence", 8)))["x"] for _ in range(2))
    np.testing.assert_array_equal(one, other)
