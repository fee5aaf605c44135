"""Inputs made from nothing but the names, types and shapes of a graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, norm_and_readers, run, tiny_decoder
from onnx import helper

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


@pytest.mark.parametrize(("op_type", "place"), [("EmbedLayerNormalization", 0), ("GatherBlockQuantized", 1)])
def test_the_vocabulary_is_found_behind_a_fused_lookup(op_type: str, place: int) -> None:
    builder = GraphBuilder()
    ids, table = builder.input("input_ids", ["batch", "sequence"], np.int64), builder.constant(np.ones((77, 8)))
    inputs = [ids, "", table] if place == 0 else [table, ids, builder.constant(np.ones((77, 1)))]
    builder.nodes.append(helper.make_node(op_type, inputs, ["y"], domain="com.microsoft"))
    builder.output("y", ["batch", "sequence", 8])
    model = helper.make_model(
        helper.make_graph(builder.nodes, "g", builder.inputs, builder.outputs, builder.initializers)
    )
    assert signature(ir.from_proto(model).graph).vocabulary == 77


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


def test_the_batch_is_that_of_the_samples_and_not_of_a_switch() -> None:
    switch = Input("use_cache_branch", BOOL, (1,))
    assert wants(switch, TOKENS).fixed_batch is None
    assert wants(switch, Input("input_ids", INT, (3, "sequence"))).fixed_batch == 3


# Encoder-decoders

STATES = Input("encoder_hidden_states", FLOAT, ("batch", "encoded", 64))
OWN = Input("past_key_values.0.decoder.key", FLOAT, ("batch", 4, "past", 16))
READ = Input("past_key_values.0.encoder.key", FLOAT, ("batch", 4, "encoded", 16))
MERGED = Signature(
    (TOKENS, STATES, OWN, READ, Input("use_cache_branch", BOOL, (1,))),
    ("logits", "present.0.decoder.key", "present.0.encoder.key"),
    ((OWN.name, "present.0.decoder.key"), (READ.name, "present.0.encoder.key")),
    160,
)
AFTER = Signature((TOKENS, OWN, READ), ("logits", "present.0.decoder.key"), ((OWN.name, "present.0.decoder.key"),), 160)


def test_a_decoder_that_returns_no_encoder_caches_needs_a_past() -> None:
    assert (AFTER.needs_past, AFTER.grows_caches) == (True, False)
    assert (MERGED.needs_past, MERGED.grows_caches) == (False, False)
    alone = signature(ir.from_proto(tiny_decoder(layers=1)).graph)
    assert (alone.needs_past, alone.grows_caches) == (False, True)


def test_a_merged_decoder_starts_with_empty_caches_and_the_other_branch() -> None:
    feed = feeds.complete(MERGED, {"input_ids": IDS, STATES.name: np.zeros((2, 7, 64), np.float32)})
    assert feed[OWN.name].shape == feed[READ.name].shape == (2, 4, 0, 16)
    assert feed["use_cache_branch"].tolist() == [False]


@pytest.mark.parametrize("axis", ["encoded", "?", "another name"])
def test_the_encoder_mask_is_as_long_as_the_states(axis: str) -> None:
    wanted = wants(TOKENS, STATES, Input("encoder_attention_mask", INT, ("batch", axis)))
    feed = feeds.complete(wanted, {"input_ids": IDS, STATES.name: np.zeros((2, 7, 64), np.float32)})
    np.testing.assert_array_equal(feed["encoder_attention_mask"], np.ones((2, 7)))


@pytest.mark.parametrize("axis", ["encoded", "?"])
def test_the_encoder_mask_is_as_long_as_the_caches_of_the_encoder(axis: str) -> None:
    wanted = replace(AFTER, inputs=(*AFTER.inputs, Input("encoder_attention_mask", INT, ("batch", axis))))
    caches = {OWN.name: np.zeros((2, 4, 5, 16), np.float32), READ.name: np.zeros((2, 4, 9, 16), np.float32)}
    feed = feeds.complete(wanted, {"input_ids": IDS[:, :1], **caches})
    assert feed["encoder_attention_mask"].shape == (2, 9)


@pytest.mark.parametrize("axis", ["sequence", "?"])
def test_the_masks_of_an_encoder_decoder_in_one_graph_are_told_apart(axis: str) -> None:
    masks = [Input(name, INT, ("batch", axis)) for name in ("attention_mask", "decoder_attention_mask")]
    masks[1] = replace(masks[1], dims=("batch", "decoder_sequence"))
    wanted = wants(TOKENS, Input("decoder_input_ids", INT, ("batch", "decoder_sequence")), *masks)
    feed = feeds.complete(wanted, {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]})
    assert (feed["attention_mask"].shape, feed["decoder_attention_mask"].shape) == ((2, 3), (2, 2))


def test_given_caches_make_the_mask_longer_and_are_not_copied() -> None:
    wanted = wants(TOKENS, Input("attention_mask", INT, ("batch", "total")), OWN)
    long = np.zeros((2, 4, 9, 16), np.float32)
    feed = feeds.complete(wanted, {"input_ids": IDS, OWN.name: long[:, :, :5]})
    assert feed["attention_mask"].shape == (2, 8)
    assert np.shares_memory(feed[OWN.name], long)


# Less common inputs


def test_positions_of_three_axes_are_repeated() -> None:
    feed = feeds.token_feed(wants(TOKENS, Input("position_ids", INT, (3, "batch", "sequence"))), IDS)
    assert feed["position_ids"].shape == (3, 2, 3)
    assert feed["position_ids"][2, 1].tolist() == [0, 1, 2]


def test_cache_positions_have_no_batch() -> None:
    feed = feeds.token_feed(wants(TOKENS, Input("cache_position", INT, ("sequence",))), IDS)
    assert feed["cache_position"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dims", [(), (1,)])
def test_logits_of_all_tokens_are_kept(dims: tuple[int, ...]) -> None:
    feed = feeds.token_feed(wants(TOKENS, Input("num_logits_to_keep", INT, dims)), IDS)
    assert feed["num_logits_to_keep"].shape == dims
    assert feed["num_logits_to_keep"].sum() == 0


def test_a_mask_of_pixels_covers_the_picture() -> None:
    pixels = Input("pixel_values", FLOAT, ("batch", 3, "height", "width"))
    wanted = wants(pixels, Input("pixel_mask", INT, ("batch", "height", "width")))
    feed = feeds.complete(wanted, {"pixel_values": np.zeros((2, 3, 8, 6), np.float32)})
    assert feed["pixel_mask"].shape == (2, 8, 6)


def test_a_mask_that_nothing_tells_the_size_of_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"pixel_mask \(int64, shape batch x height x width\) cannot be guessed"):
        feeds.token_feed(wants(TOKENS, Input("pixel_mask", INT, ("batch", "height", "width"))), IDS)


# Shorter feeds


def test_a_feed_is_shortened_with_everything_that_follows() -> None:
    wanted = wants(TOKENS, Input("attention_mask", INT, ("batch", "total")), STATES)
    feed = feeds.complete(wanted, {"input_ids": np.ones((2, 9), int), STATES.name: np.zeros((2, 7, 64), np.float32)})
    short = feeds.shortened(feed, wanted)
    assert (short["input_ids"].shape, short["attention_mask"].shape) == ((2, 4), (2, 4))
    assert short[STATES.name] is not None
    assert short[STATES.name].shape == (2, 7, 64)


def test_a_shortened_feed_has_no_past_but_what_the_encoder_made() -> None:
    caches = {OWN.name: np.zeros((2, 4, 5, 16), np.float32), READ.name: np.zeros((2, 4, 9, 16), np.float32)}
    short = feeds.shortened(feeds.complete(AFTER, {"input_ids": IDS[:, :1], **caches}), AFTER)
    assert (short[OWN.name].shape[2], short[READ.name].shape[2]) == (0, 9)


def test_a_feed_without_tokens_stays_whole() -> None:
    feed = {"x": np.zeros((1, 9, 64), np.float32)}
    assert feeds.shortened(feed, wants(Input("x", FLOAT, ("batch", "sequence", 64)))) is feed
