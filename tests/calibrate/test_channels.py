"""Which channel of the absorber arrives where is asked of the graph itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, save, tiny_decoder, two_linears

from awq_onnx import pipeline
from awq_onnx.calibrate import channels
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.passes import skeleton
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.sites import Refusal, survey
from awq_onnx.store import open_model

Middle = Callable[[GraphBuilder, str], str]
IDS = np.array([[3, 1, 4, 1, 5]])
LOST = "its channels do not arrive at the input one by one"


def traced(model: onnx.ModelProto, feed: dict[str, Array], folder: Path) -> dict[str, ChannelMap | Refusal]:
    """The maps by the name of the reader."""
    found = survey(ir.from_proto(model))
    groups = [group for group in find_groups(found) if skeleton.traced_routes([group])]
    return by_name(channels.trace([copy.deepcopy(model)], folder, groups, found, feed))


def by_name(maps: Mapping[Group, ChannelMap | Refusal]) -> dict[str, ChannelMap | Refusal]:
    return {group.name: one for group, one in maps.items()}


def traced_middle(middle: Middle, folder: Path, *, hidden: int = 32, arriving: int | None = None) -> Array | Refusal:
    """The map of the second of two linear layers with `middle` between them, for x of 2 sequences of 3 tokens."""
    model = two_linears(middle, hidden=hidden, arriving=arriving).model()
    return traced(model, {"x": np.ones((2, 3, 32), np.float32)}, folder)["second/MatMul"]


def as_map(found: ChannelMap | Refusal) -> list[int]:
    assert not isinstance(found, Refusal), found.reason
    return list(found)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_multi_head_attention_keeps_every_channel_in_its_place(tmp_path: Path, dtype: type, cache: bool) -> None:
    model = tiny_decoder(kv_heads=4, cache=cache, dtype=dtype)
    maps = traced(model, decoder_feed(model, IDS), tmp_path)
    assert as_map(maps["/layers.0/o_proj/MatMul"]) == list(range(64))
    assert as_map(maps["/layers.1/o_proj/MatMul"]) == list(range(64))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_grouped_query_attention_repeats_whole_heads(tmp_path: Path, dtype: type, kv_heads: int) -> None:
    model = tiny_decoder(kv_heads=kv_heads, dtype=dtype)
    found = traced(model, decoder_feed(model, IDS), tmp_path)["/layers.0/o_proj/MatMul"]
    heads = np.arange(kv_heads * 16).reshape(kv_heads, 16)
    assert as_map(found) == np.repeat(heads, 4 // kv_heads, axis=0).ravel().tolist()


def test_the_gate_changes_no_channel_and_is_not_traced(tmp_path: Path) -> None:
    model = tiny_decoder()
    assert set(traced(model, decoder_feed(model, IDS), tmp_path)) == {
        "/layers.0/o_proj/MatMul",
        "/layers.1/o_proj/MatMul",
    }
    found = survey(ir.from_proto(model))
    maps = channels.trace([model], tmp_path, find_groups(found), found, decoder_feed(model, IDS))
    assert as_map(by_name(maps)["/layers.0/mlp/down_proj/MatMul"]) == list(range(96))


def test_channels_that_a_transpose_permutes_are_followed(tmp_path: Path) -> None:
    def swapped(builder: GraphBuilder, x: str) -> str:
        """Channel 8 h + d becomes channel 4 d + h."""
        apart = builder.add("Reshape", x, builder.integers(0, 0, 4, 8))
        turned = builder.add("Transpose", apart, perm=[0, 1, 3, 2])
        return builder.add("Reshape", turned, builder.integers(0, 0, 32))

    assert as_map(traced_middle(swapped, tmp_path)) == np.arange(32).reshape(4, 8).T.ravel().tolist()


def test_channels_that_a_slice_reverses_and_drops_are_followed(tmp_path: Path) -> None:
    def sliced(builder: GraphBuilder, x: str) -> str:
        bounds = [builder.integers(one) for one in (39, 6, 2, -1)]
        return builder.add("Slice", x, bounds[0], bounds[1], bounds[2], bounds[3])

    assert as_map(traced_middle(sliced, tmp_path, hidden=40, arriving=33)) == list(range(39, 6, -1))


def test_more_channels_than_one_digit_can_number_are_followed(tmp_path: Path) -> None:
    """300 channels take three digits of base 16; the last one is number 299."""
    found = traced_middle(lambda b, x: b.add("Gather", x, b.integers(*range(300)), axis=2), tmp_path, hidden=300)
    assert as_map(found) == list(range(300))


def test_channels_of_two_tokens_side_by_side_share_their_scale(tmp_path: Path) -> None:
    def pairs(builder: GraphBuilder, x: str) -> str:
        """Two tokens of 32 channels become one of 64."""
        two = builder.add("Slice", x, builder.integers(0), builder.integers(2), builder.integers(1))
        return builder.add("Reshape", two, builder.integers(2, 1, 64))

    assert as_map(traced_middle(pairs, tmp_path, arriving=64)) == [*range(32), *range(32)]


def test_channels_that_differ_between_tokens_are_refused(tmp_path: Path) -> None:
    """32 channels cut in threes: what arrives at a channel depends on the token."""

    def torn(builder: GraphBuilder, x: str) -> str:
        return builder.add("Reshape", x, builder.integers(2, 4, 24))

    assert traced_middle(torn, tmp_path, arriving=24) == Refusal("first/MatMul", LOST)


def test_channels_and_tokens_exchanged_are_refused(tmp_path: Path) -> None:
    def exchanged(builder: GraphBuilder, x: str) -> str:
        return builder.add("Transpose", x, perm=[0, 2, 1])

    assert traced_middle(exchanged, tmp_path, arriving=3) == Refusal("first/MatMul", LOST)


def test_channels_that_are_averaged_are_refused(tmp_path: Path) -> None:
    """Attention over channels instead of tokens; the mean of channels 0, 1 and 2 must not pass for channel 1."""

    def mixed(builder: GraphBuilder, x: str) -> str:
        apart = builder.add("Reshape", x, builder.integers(0, 0, 4, 3))
        turned = builder.add("Transpose", apart, perm=[0, 2, 3, 1])  # (batch, 4, 3, tokens)
        weights = builder.constant(np.full((1, 4, 3, 3), 1 / 3))
        back = builder.add("Transpose", builder.add("MatMul", weights, turned), perm=[0, 3, 1, 2])
        return builder.add("Reshape", back, builder.integers(0, 0, 12))

    assert isinstance(traced_middle(mixed, tmp_path, hidden=12), Refusal)


def test_channels_that_a_gather_takes_backwards_are_followed(tmp_path: Path) -> None:
    def gathered(builder: GraphBuilder, x: str) -> str:
        return builder.add("Gather", x, builder.integers(*range(31, -1, -1)), axis=2)

    assert as_map(traced_middle(gathered, tmp_path)) == list(range(31, -1, -1))


def test_tokens_that_a_gather_takes_are_not_traced(tmp_path: Path) -> None:
    model = two_linears(lambda b, x: b.add("Gather", x, b.integers(0), axis=1)).model()
    assert traced(model, {"x": np.ones((2, 3, 32), np.float32)}, tmp_path) == {}


def test_a_graph_that_does_not_run_is_a_refusal_with_the_cause(tmp_path: Path) -> None:
    def impossible(builder: GraphBuilder, x: str) -> str:
        return builder.add("Reshape", x, builder.integers(7, 7, 16))

    found = traced_middle(impossible, tmp_path, arriving=16)
    assert isinstance(found, Refusal)
    assert found.reason.startswith("its channels could not be traced: onnxruntime failed")


def test_a_moved_gain_is_traced(tmp_path: Path) -> None:
    """norm -> heads exchanged -> MatMul: the gain can be divided, once it is known which number goes where."""
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 32]), 32, "norm")
    apart = builder.add("Reshape", normed, builder.integers(0, 0, 4, 8))
    turned = builder.add("Transpose", apart, perm=[0, 1, 3, 2])
    joined = builder.add("Reshape", turned, builder.integers(0, 0, 32))
    builder.output(builder.linear(joined, 32, 8, "reader"))
    maps = traced(builder.model(), {"x": np.ones((2, 3, 32), np.float32)}, tmp_path)
    assert as_map(maps["reader/MatMul"]) == np.arange(32).reshape(4, 8).T.ravel().tolist()


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Weights of more than 64 kB stay references; the file they refer to may as well be gone."""
    model = tiny_decoder(hidden=192, mlp=192, vocabulary=40, layers=1)
    path = save(model, tmp_path / "model.onnx", external=True)
    with open_model(path) as opened:
        (tmp_path / "model.onnx.data").unlink()
        found = survey(opened.model)
        groups = find_groups(found)
        maps = channels.trace([ir.to_proto(opened.model)], opened.folder, groups, found, decoder_feed(model, IDS))
    assert len(maps) == 4
    assert not any(isinstance(one, Refusal) for one in maps.values())


def test_no_groups_need_no_session(tmp_path: Path) -> None:
    model = tiny_decoder()
    assert channels.trace([model], tmp_path, [], survey(ir.from_proto(model)), {}) == {}


def switched(builder: GraphBuilder, x: str) -> str:
    """x times what an If makes of an initializer of the outer graph."""
    builder.input("flag", [], np.bool_)
    builder.constant(np.full(32, 2.0), "captured")

    def branch(name: str, op_type: str) -> onnx.GraphProto:
        node = onnx.helper.make_node(op_type, ["captured"], [name])
        output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [32])
        return onnx.helper.make_graph([node], name, [], [output])

    factor = builder.add("If", "flag", then_branch=branch("yes", "Relu"), else_branch=branch("no", "Abs"))
    return builder.add("Mul", x, factor)


def test_a_graph_with_an_if_that_captures_an_initializer_is_traced(tmp_path: Path) -> None:
    def switched_and_moved(builder: GraphBuilder, x: str) -> str:
        return builder.add("Gather", switched(builder, x), builder.integers(*range(32)), axis=2)

    feed = {"x": np.ones((2, 3, 32), np.float32), "flag": np.array(True)}
    assert as_map(traced(two_linears(switched_and_moved).model(), feed, tmp_path)["second/MatMul"]) == list(range(32))


def test_a_model_with_a_fixed_batch_is_traced(tmp_path: Path) -> None:
    """The pipeline traces with a feed of its calibration data, which must be as large as the model wants it."""
    model = tiny_decoder(layers=1)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    ids = np.random.default_rng(0).integers(0, 160, (8, 5))
    report = pipeline.quantize(model, tmp_path / "out.onnx", calibration=ids)
    assert {one.name: one.reason for one in report.matmuls if one.reason} == {}
