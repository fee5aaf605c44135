"""A fold changes no output: what is divided in one place is multiplied in another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, norm_and_readers, run, tiny_decoder, two_linears
from folding import assert_close, assert_folding_changes_nothing, folded_at_random, random_x

from awq_onnx.passes import fold
from awq_onnx.passes.absorb import Vector


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("gain_first", [False, True])
def test_folding_into_a_gain_changes_nothing(tmp_path: Path, gain_first: bool, casts: bool) -> None:
    model, feed = norm_and_readers(gain_first=gain_first, casts=casts).model(), random_x(64)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert folded.divided == {"norm/Mul_1"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_folding_a_gated_mlp_changes_nothing(tmp_path: Path, activation: str, bias: bool) -> None:
    model, feed = gated_mlp(activation=activation, bias=bias).model(), random_x(64)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert "norm/Mul_1" in folded.divided
    assert len(folded.divided) == 2


def test_folding_through_relu_changes_nothing(tmp_path: Path) -> None:
    model, feed = two_linears(lambda b, x: b.add("Relu", x), bias=True).model(), random_x(32)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert folded.divided == {"first/MatMul"}


def in_two_steps(model: onnx.ModelProto, ids: Array) -> list[Array]:
    """The logits of a prefill of five tokens, and of one more token after its caches."""
    first = run(model, decoder_feed(model, ids[:, :5]))
    cached = {name.replace("present", "past_key_values"): values for name, values in first.items() if name != "logits"}
    mask = np.ones((len(ids), 6), np.int64)
    second = run(model, {"input_ids": ids[:, 5:6], "attention_mask": mask, **cached})
    return [first["logits"], second["logits"]]


IDS = np.random.default_rng(3).integers(0, 160, (2, 6))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_a_decoder_changes_no_logit_of_prefill_or_decode(tmp_path: Path, bias: bool, kv_heads: int) -> None:
    model = tiny_decoder(kv_heads=kv_heads, bias=bias)
    folded = folded_at_random(model, decoder_feed(model, IDS[:1]), tmp_path)
    assert len(folded.divided) == 8  # two norms, v and up, in each of two layers
    for actual, expected in zip(in_two_steps(folded.model, IDS), in_two_steps(model, IDS), strict=True):
        assert_close({"logits": actual}, {"logits": expected})


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_a_decoder_without_caches_changes_no_logit(tmp_path: Path, bias: bool, kv_heads: int) -> None:
    model = tiny_decoder(kv_heads=kv_heads, bias=bias, cache=False)
    feed = decoder_feed(model, IDS)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert len(folded.divided) == 8


def test_only_the_value_cache_is_scaled(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    feed = decoder_feed(model, IDS)
    folded = folded_at_random(model, feed, tmp_path)
    before, after = run(model, feed), run(folded.model, feed)
    assert folded.caches == {"present.0.value"}
    np.testing.assert_allclose(after["present.0.key"], before["present.0.key"], rtol=1e-3, atol=1e-5)
    assert np.abs(after["present.0.value"] / before["present.0.value"] - 1).max() > 0.5


# Which tensor is divided


def two_norms_with_one_gain(*, node_names: tuple[str, ...] = ("one", "two")) -> ir.Graph:
    """x * gain -> MatMul and x * gain -> MatMul: one initializer, two nodes."""
    builder = GraphBuilder()
    x, gain = builder.input("x", ["rows", 4]), builder.constant(np.array([1.0, 2.0, 4.0, 8.0]), "gain")
    for index, name in enumerate(node_names):
        normed = builder.add("Mul", x, gain, name=name, to=f"normed_{index}")
        builder.output(builder.add("MatMul", normed, builder.weight(4, 4), name=f"reader_{index}"))
    return ir.from_proto(builder.model()).graph


def gain_values(graph: ir.Graph) -> list[list[float]]:
    """What each Mul of the graph multiplies by."""
    constants = [node.inputs[1].const_value for node in graph if node.op_type == "Mul"]  # type: ignore[union-attr]
    return [tensor.numpy().tolist() for tensor in constants if tensor is not None]


def divide_gain(graph: ir.Graph, node: int, scale: list[float]) -> None:
    found = [one for one in graph if one.op_type == "Mul"][node]
    fold.divide_vector(graph, vector_of(found), np.array(scale, np.float32))


def vector_of(node: ir.Node, index: int = 1) -> Vector:
    tensor = ir.convenience.get_const_tensor(node.inputs[index])  # type: ignore[arg-type]
    assert tensor is not None
    return Vector(node, index, tensor)


def test_a_gain_is_divided_in_place() -> None:
    graph = ir.from_proto(norm_and_readers(gain_first=False).model()).graph
    before = graph.initializers["norm.weight"].const_value
    assert before is not None
    count, values = len(graph.initializers), before.numpy().copy()
    node = next(node for node in graph if node.name == "norm/Mul_1")
    fold.divide_vector(graph, vector_of(node), np.full(64, 4, np.float32))
    after = graph.initializers["norm.weight"].const_value
    assert after is not None
    assert len(graph.initializers) == count
    np.testing.assert_array_equal(after.numpy(), values / 4)


def test_of_two_norms_that_share_a_gain_only_one_is_divided() -> None:
    graph = two_norms_with_one_gain()
    divide_gain(graph, 0, [1, 2, 4, 8])
    assert gain_values(graph) == [[1, 1, 1, 1], [1, 2, 4, 8]]


def test_two_norms_that_share_a_gain_are_divided_each_by_its_own_scale() -> None:
    graph = two_norms_with_one_gain()
    divide_gain(graph, 0, [1, 2, 4, 8])
    divide_gain(graph, 1, [2, 2, 2, 2])
    assert gain_values(graph) == [[1, 1, 1, 1], [0.5, 1, 2, 4]]


def test_norms_without_names_get_gains_of_their_own() -> None:
    graph = two_norms_with_one_gain(node_names=("", "", ""))
    for node in (0, 1, 2):
        divide_gain(graph, node, [2.0**node] * 4)
    assert gain_values(graph) == [[1, 2, 4, 8], [0.5, 1, 2, 4], [0.25, 0.5, 1, 2]]


def test_a_gain_in_a_constant_node_is_divided_and_the_node_goes() -> None:
    builder = GraphBuilder()
    builder.nodes.append(onnx.helper.make_node("Constant", [], ["gain"], name="holder", value=half_gain()))
    normed = builder.add("Mul", builder.input("x", ["rows", 4], np.float16), "gain", name="norm")
    builder.output(normed, dtype=np.float16)
    graph = ir.from_proto(builder.model()).graph
    divide_gain(graph, 0, [1, 2, 4, 8])
    assert gain_values(graph) == [[1, 1, 1, 1]]
    assert [node.op_type for node in graph] == ["Mul"]


def half_gain() -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.array([1, 2, 4, 8], np.float16))


def test_a_number_that_other_nodes_read_is_not_touched(tmp_path: Path) -> None:
    """Exporters share one scalar between many nodes; the fold steps over it."""
    builder = GraphBuilder()
    x, number = builder.input("x", ["batch", "sequence", 64]), builder.constant(0.5, "number")
    normed = builder.add("Mul", builder.rms_norm(x, 64, "norm"), number)
    builder.output(builder.add("MatMul", normed, builder.weight(64, 8)))
    builder.output(builder.add("Mul", x, number))
    model, feed = builder.model(), random_x(64)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert folded.divided == {"norm/Mul_1"}
    (kept,) = (tensor for tensor in folded.model.graph.initializer if tensor.name == "number")
    assert onnx.numpy_helper.to_array(kept) == 0.5


def test_a_bias_that_another_layer_reads_is_copied(tmp_path: Path) -> None:
    """Two up projections with one bias initializer: each is divided by the scale of its own reader."""
    builder = GraphBuilder()
    x, bias = builder.input("x", ["batch", "sequence", 32]), builder.constant(np.arange(32.0), "bias")
    for name in ("a", "b"):
        up = builder.add("Add", builder.linear(x, 32, 32, f"{name}.up"), bias, name=f"{name}.bias")
        builder.output(builder.linear(up, 32, 8, f"{name}.down"))
    model, feed = builder.model(), random_x(32)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert folded.divided == {"a.up/MatMul", "b.up/MatMul"}


def test_a_bias_with_leading_ones_is_divided(tmp_path: Path) -> None:
    def biased(builder: GraphBuilder, x: str) -> str:
        return builder.add("Add", x, builder.constant(np.arange(32.0).reshape(1, 1, 32), "bias"))

    model, feed = two_linears(biased).model(), random_x(32)
    folded = assert_folding_changes_nothing(model, feed, tmp_path)
    assert folded.divided == {"first/MatMul"}


def test_dividing_rounds_once() -> None:
    """In fp16 throughout, 1 / 3 would be rounded before it is multiplied."""
    values, scale = np.arange(1, 200, dtype=np.float16), np.full(199, 3, np.float32)
    np.testing.assert_array_equal(fold.divide(values, scale), (values.astype(np.float64) / 3).astype(np.float16))


def test_what_nothing_reads_any_more_goes_with_what_only_it_read() -> None:
    builder = GraphBuilder()
    shared = builder.constant(np.ones((4, 4)), "shared")
    turned = builder.add("Transpose", builder.cast(builder.weight(4, 4, "own"), np.float32, "cast"), name="turn")
    summed = builder.add("Add", turned, shared, name="sum")
    builder.output(builder.add("Mul", builder.input("x", [4, 4]), shared))
    builder.output(summed)
    graph = ir.from_proto(builder.model()).graph
    (value,) = (node.outputs[0] for node in graph if node.name == "sum")
    graph.outputs.remove(value)
    fold.remove_unread(value)
    assert [node.op_type for node in graph] == ["Mul"]
    assert list(graph.initializers) == ["shared"]


def test_what_is_an_output_of_the_model_stays() -> None:
    graph = ir.from_proto(norm_and_readers().model()).graph
    count = len(list(graph))
    fold.remove_unread(graph.outputs[0])
    assert len(list(graph)) == count
