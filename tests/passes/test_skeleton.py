"""The model without its weights: small, runnable, and driven where an absorber stands."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from builders import Array, GraphBuilder, decoder_feed, run, tiny_decoder, two_linears
from folding import microsoft

from awq_onnx.passes import skeleton
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.sites import survey
from awq_onnx.passes.skeleton import Skeleton, leading_to

IDS = np.array([[3, 1, 4, 1, 5]])


def built(model: onnx.ModelProto) -> tuple[Skeleton, tuple[Group, ...]]:
    found = survey(ir.from_proto(model))
    groups = find_groups(found)
    layers = (*found.sites, *found.floats)
    return skeleton.build(copy.deepcopy(model), skeleton.traced_routes(groups), layers), groups


def reversed_heads(builder: GraphBuilder, x: str) -> str:
    return builder.add("Gather", x, builder.integers(*range(31, -1, -1)), axis=2)


def driven(made: Skeleton, feed: dict[str, Array], drive: Array) -> dict[str, Array]:
    drives = {name: drive[:size].astype(dtype.numpy()) for name, (size, dtype) in made.drives.items()}
    session = onnxruntime.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    needed = {value.name for value in session.get_inputs()}
    return run(made.model, {name: values for name, values in {**feed, **drives}.items() if name in needed})


def test_only_routes_on_which_channels_move_are_traced() -> None:
    groups = find_groups(survey(ir.from_proto(tiny_decoder())))
    routes = skeleton.traced_routes(groups)
    assert [route.absorber.name for route in routes] == [f"/layers.{layer}/v_proj/MatMul" for layer in (0, 1)]


def test_no_matrix_is_left() -> None:
    made, _ = built(tiny_decoder(layers=1))
    assert max(len(tensor.dims) for tensor in made.model.graph.initializer) <= 2
    assert not [one.name for one in made.model.graph.initializer if one.name.endswith("proj.weight")]


def test_a_drive_arrives_where_the_channels_do() -> None:
    made, _ = built(two_linears(reversed_heads).model())
    assert made.drives == {"awq_onnx.drive.32.FLOAT": (32, ir.DataType.FLOAT)}
    (arrived,) = driven(made, {"x": np.ones((2, 3, 32), np.float32)}, np.arange(32.0)).values()
    np.testing.assert_array_equal(arrived, np.broadcast_to(np.arange(32)[::-1], (2, 3, 32)))


def test_a_bias_does_not_reach_the_drive() -> None:
    made, _ = built(two_linears(reversed_heads, bias=True).model())
    (arrived,) = driven(made, {"x": np.ones((2, 3, 32), np.float32)}, np.arange(32.0)).values()
    np.testing.assert_array_equal(arrived[0, 0], np.arange(32)[::-1])


def test_every_absorber_has_the_drive_of_its_size_and_dtype() -> None:
    made, _ = built(tiny_decoder(dtype=np.float16))
    assert made.drives == {"awq_onnx.drive.32.FLOAT16": (32, ir.DataType.FLOAT16)}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_hands_a_drive_on_as_it_is(kv_heads: int) -> None:
    """Whatever the scores are, a mean of equal tokens is one of them."""
    model = tiny_decoder(layers=1, kv_heads=kv_heads)
    made, _ = built(model)
    (arrived,) = driven(made, decoder_feed(model, IDS), np.arange(64.0) + 1).values()
    heads = np.arange(kv_heads * 16).reshape(kv_heads, 16) + 1
    expected = np.repeat(heads, 4 // kv_heads, axis=0).reshape(-1)
    np.testing.assert_allclose(arrived, np.broadcast_to(expected, arrived.shape), rtol=1e-5)


def test_what_nothing_traced_needs_is_left_out() -> None:
    made, _ = built(tiny_decoder(layers=1))
    names = {node.name for node in made.model.graph.node}
    assert not names & {"/layers.0/mlp/Mul", "/lm_head/MatMul", "/norm/Mul_1"}
    assert all(value.name != "logits" for value in made.model.graph.output)


def test_inputs_stay_and_drives_come_behind_them() -> None:
    model = two_linears(reversed_heads).model()
    made, _ = built(model)
    assert [value.name for value in made.model.graph.input] == ["x", *made.drives]


def test_an_attention_with_a_bias_inside_is_driven_without_it() -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 32])
    inputs = [builder.linear(x, 32, 32, name) for name in "qkv"]
    inputs.append(builder.constant(np.arange(96.0), "bias"))
    node = onnx.helper.make_node("MultiHeadAttention", inputs, ["mixed"], domain="com.microsoft", num_heads=4)
    builder.nodes.append(node)
    builder.output(builder.linear("mixed", 32, 8, "o"))
    made, _ = built(microsoft(builder))
    (arrived,) = driven(made, {"x": np.ones((2, 3, 32), np.float32)}, np.arange(32.0)).values()
    np.testing.assert_allclose(arrived, np.broadcast_to(np.arange(32), (2, 3, 32)), atol=1e-5)


def test_the_nodes_that_lead_somewhere_are_kept_in_order() -> None:
    make = onnx.helper.make_node
    nodes = [make("A", ["x"], ["a"]), make("B", ["a"], ["b"]), make("C", ["a"], ["c"]), make("D", ["c", "x"], ["d"])]
    assert [node.op_type for node in leading_to(nodes, ["d"])] == ["A", "C", "D"]
    assert leading_to(nodes, []) == []


def test_what_a_body_reads_leads_somewhere() -> None:
    make = onnx.helper.make_node
    body = onnx.helper.make_graph([make("Neg", ["a"], ["n"])], "body", [], [onnx.ValueInfoProto(name="n")])
    nodes = [make("A", ["x"], ["a"]), make("If", ["flag"], ["y"], then_branch=body, else_branch=body)]
    assert len(leading_to(nodes, ["y"])) == 2
