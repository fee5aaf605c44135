"""Layers in the branches of an If, as exporters merge the first step of a decoder and its later ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run
from folding import Feed, Folded, assert_close, folded_at_random, microsoft
from onnx import TensorProto, helper

from awq_onnx import Recipe, pipeline
from awq_onnx.passes.branches import conditions, separate_names
from awq_onnx.passes.sites import Refusal, survey

K, HIDDEN = 16, 24
make = helper.make_node


def branch(name: str, nodes: Sequence[onnx.NodeProto], *outputs: str) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(list(nodes), name, [], values)


def mlp(prefix: str) -> list[onnx.NodeProto]:
    """norm -> up -> Relu -> down, of weights of the outer graph."""
    return [
        make("LayerNormalization", ["x", "gain", "beta"], [f"{prefix}.normed"], name=f"{prefix}.norm"),
        make("MatMul", [f"{prefix}.normed", "up.w"], [f"{prefix}.hidden"], name=f"{prefix}.up"),
        make("Relu", [f"{prefix}.hidden"], [f"{prefix}.acted"]),
        make("MatMul", [f"{prefix}.acted", "down.w"], [f"{prefix}.out"], name=f"{prefix}.down"),
    ]


def merged(*, one_prefix: bool = False, extra: Sequence[onnx.NodeProto] = (), spied: str | None = None) -> GraphBuilder:
    """If flag: an MLP of x, else the same of other nodes, with the same weights."""
    builder = GraphBuilder()
    builder.input("x", ["batch", "sequence", K])
    builder.input("flag", [], np.bool_)
    builder.constant(builder.outlier_gain(K), "gain")
    builder.constant(builder.rng.standard_normal(K), "beta")
    builder.weight(K, HIDDEN, "up.w")
    builder.weight(HIDDEN, K, "down.w")
    names = ("same", "same") if one_prefix else ("yes", "no")
    spies = [[spied]] * 2 if spied else [[], []]
    branches = [
        branch(kind, [*mlp(name), *(extra if kind == "then" else ())], f"{name}.out", *(f"{name}.{s}" for s in spy))
        for kind, name, spy in zip(("then", "else"), names, spies, strict=True)
    ]
    outputs = ["y", *(["seen"] if spied else [])]
    builder.nodes.append(make("If", ["flag"], outputs, name="if", then_branch=branches[0], else_branch=branches[1]))
    for output in outputs:
        builder.output(output, ["batch", "sequence", K])
    return builder


def feed_of(flag: bool) -> Feed:
    x: Array = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float32)
    return {"x": x, "flag": np.array(flag)}


def folded_both_ways(builder: GraphBuilder, folder: Path) -> Folded:
    """Folded as for one branch; nothing may have changed in either."""
    model = microsoft(builder)
    made = folded_at_random(model, feed_of(True), folder)
    for flag in (True, False):
        assert_close(run(made.model, feed_of(flag)), run(model, feed_of(flag)))
    return made


def test_branches_that_share_weights_share_their_scales(tmp_path: Path) -> None:
    made = folded_both_ways(merged(), tmp_path)
    assert made.divided == {"yes.norm", "no.norm", "yes.up", "no.up"}
    assert (len(made.groups), made.refused) == (2, {})


def test_branches_may_use_the_same_names(tmp_path: Path) -> None:
    assert folded_both_ways(merged(one_prefix=True), tmp_path).divided == {"same.norm", "same.up"}


def test_a_norm_that_a_branch_returns_is_refused(tmp_path: Path) -> None:
    made = folded_both_ways(merged(spied="normed"), tmp_path)
    assert made.refused["no.up"].reason == "one weight, used twice: what comes before is an output of the model as well"


def test_another_reader_in_one_branch_is_enough(tmp_path: Path) -> None:
    made = folded_both_ways(merged(extra=[make("Tanh", ["yes.normed"], ["spy"], name="spy")]), tmp_path)
    assert made.refused["no.up"] == Refusal("spy", "one weight, used twice: Tanh reads the same input")


def test_a_value_that_branches_return_twice_is_known_by_both_names(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.input("x", ["batch", "sequence", K])
    builder.input("flag", [], np.bool_)
    for name in ("v.w", "o.w"):
        builder.weight(K, K, name)
    bodies = []
    for kind in ("then", "else"):
        nodes = [make("MatMul", ["x", "v.w"], [f"{kind}.v"]), make("MatMul", [f"{kind}.v", "o.w"], [f"{kind}.o"])]
        bodies.append(branch(kind, nodes, f"{kind}.o", f"{kind}.v", f"{kind}.v"))
    node = make("If", ["flag"], ["y", "seen", "unread"], then_branch=bodies[0], else_branch=bodies[1])
    builder.nodes.append(node)
    for name in ("y", "seen"):
        builder.output(name, ["batch", "sequence", K])
    assert folded_both_ways(builder, tmp_path).divided == set()


def test_a_reader_in_a_branch_of_a_norm_outside_is_seen(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.input("flag", [], np.bool_)
    x = builder.input("x", ["batch", "sequence", K])
    normed = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    builder.output(builder.add("MatMul", normed, builder.weight(K, 8), name="reader"))
    yes = branch("then", [make("Tanh", [normed], ["tanh"], name="captured")], "tanh")
    no = branch("else", [make("Abs", ["x"], ["abs"])], "abs")
    builder.nodes.append(make("If", ["flag"], ["y"], then_branch=yes, else_branch=no))
    builder.output("y", ["batch", "sequence", K])
    made = folded_both_ways(builder, tmp_path)
    assert made.refused == {"reader": Refusal("captured", "Tanh reads the same input")}


def test_layers_in_branches_that_read_a_norm_outside_are_divided(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.input("flag", [], np.bool_)
    x = builder.input("x", ["batch", "sequence", K])
    normed = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    bodies = []
    for kind in ("then", "else"):
        builder.weight(K, 8, f"{kind}.w")
        bodies.append(branch(kind, [make("MatMul", [normed, f"{kind}.w"], [f"{kind}.y"], name=kind)], f"{kind}.y"))
    builder.nodes.append(make("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("y", ["batch", "sequence", 8])
    made = folded_both_ways(builder, tmp_path)
    assert made.divided == {"norm"}
    assert [site.name for site in made.groups["else"].sites] == ["else", "then"]  # in the order of the file


# Caches of a merged decoder


def merged_cache(*, undivided: bool = False) -> GraphBuilder:
    """Two ways to make one value cache: v alone, or behind the past; o reads it."""
    builder = GraphBuilder()
    builder.input("x", ["batch", "sequence", K])
    builder.input("flag", [], np.bool_)
    builder.input("past_key_values.0.value", ["batch", "past", K])
    builder.weight(K, K, "v.w")
    builder.weight(K, K, "o.w")
    first = [
        make("MatMul", ["x", "v.w"], ["first.v"], name="first.v"),
        make("MatMul", ["first.v", "o.w"], ["first.out"], name="first.o"),
    ]
    joined = [
        make("MatMul", ["x", "v.w"], ["later.new"], name="later.v"),
        make("Concat", ["past_key_values.0.value", "later.new"], ["later.v"], axis=1),
        make("MatMul", ["later.v", "o.w"], ["later.out"], name="later.o"),
    ]
    if undivided:
        joined.append(make("Identity", ["past_key_values.0.value"], ["later.other"]))
    bodies = [
        branch("then", first, "first.out", "first.v"),
        branch("else", joined, "later.out", "later.other" if undivided else "later.v"),
    ]
    node = make("If", ["flag"], ["y", "present.0.value"], then_branch=bodies[0], else_branch=bodies[1])
    builder.nodes.append(node)
    for name in ("y", "present.0.value"):
        builder.output(name, ["batch", "any", K])
    return builder


def test_the_cache_of_a_merged_decoder_is_scaled_in_both_branches(tmp_path: Path) -> None:
    model = microsoft(merged_cache())
    past: Array = np.zeros((2, 0, K), np.float32)
    made = folded_at_random(model, {**feed_of(True), "past_key_values.0.value": past}, tmp_path)
    assert made.caches == {"present.0.value"}
    assert made.divided == {"first.v", "later.v"}
    for flag in (True, False):  # the first step by either branch, then one more token
        outputs = []
        for one in (model, made.model):
            first = run(one, {**feed_of(flag), "past_key_values.0.value": past})
            second = run(one, {**feed_of(False), "past_key_values.0.value": first["present.0.value"]})
            outputs.append({"first": first["y"], "second": second["y"]})
        assert_close(outputs[1], outputs[0])


def test_a_branch_that_returns_the_past_as_it_came_is_refused(tmp_path: Path) -> None:
    model = microsoft(merged_cache(undivided=True))
    past: Array = np.zeros((2, 0, K), np.float32)
    made = folded_at_random(model, {**feed_of(True), "past_key_values.0.value": past}, tmp_path)
    assert made.caches == set()
    assert made.refused["later.o"].reason in (
        "the other branch of an If returns it undivided",
        "one weight, used twice: the cache before it is not returned",
    )


# Whole runs


def decided_by_length(builder: GraphBuilder) -> onnx.ModelProto:
    """The model with a flag of its own: whether x has fewer than seven tokens."""
    del builder.inputs[1]
    dims = make("Shape", ["x"], ["dims"])
    tokens = make("Gather", ["dims", builder.integers(1)], ["tokens"])
    builder.nodes[:0] = [dims, tokens, make("Less", ["tokens", builder.integers(7)], ["flag"])]
    return microsoft(builder)


def own_weights(*, names: Sequence[str] = ("then", "else")) -> GraphBuilder:
    """Weights inside the bodies, perhaps under one name."""
    builder = GraphBuilder()
    builder.input("x", ["batch", "sequence", K])
    builder.input("flag", [], np.bool_)
    bodies = []
    for kind, name in zip(("then", "else"), names, strict=True):
        weight = onnx.numpy_helper.from_array(builder.rng.standard_normal((K, 8)).astype(np.float32), f"{name}.w")
        body = branch(kind, [make("MatMul", ["x", f"{name}.w"], [f"{name}.y"], name=f"{name}.layer")], f"{name}.y")
        body.initializer.append(weight)
        bodies.append(body)
    builder.nodes.append(make("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("y", ["batch", "sequence", 8])
    return builder


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: merged(), id="shared weights"),
        pytest.param(lambda: merged(one_prefix=True), id="shared weights, the same names"),
        pytest.param(lambda: own_weights(), id="weights of their own"),
        pytest.param(lambda: own_weights(names=("same", "same")), id="weights of their own, the same names"),
    ],
)
def test_both_branches_are_quantised(tmp_path: Path, build: Callable[[], GraphBuilder]) -> None:
    model = decided_by_length(build())
    x: Array = np.random.default_rng(1).standard_normal((4, 9, K)).astype(np.float32)
    pipeline.quantize(model, tmp_path / "out.onnx", Recipe(accuracy_level=0), calibration={"x": x[:, :5]})
    for tokens in (5, 9):  # calibration has seen one branch only
        feed = {"x": x[:, :tokens]}
        expected, actual = run(model, feed)["y"], run(tmp_path / "out.onnx", feed)["y"]
        assert np.linalg.norm(actual - expected) < 0.25 * np.linalg.norm(expected)
    graph = ir.load(tmp_path / "out.onnx").graph
    assert {node.op_type for node in graph.all_nodes()} & {"MatMul", "MatMulNBits"} == {"MatMulNBits"}


def test_names_of_bodies_are_told_apart_and_those_of_the_model_stay() -> None:
    model = ir.from_proto(microsoft(own_weights(names=("same", "same"))))
    separate_names(model.graph)
    names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
    assert len(set(names)) == len(names)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "flag", "y"]


def test_the_conditions_are_those_of_ifs_with_layers() -> None:
    model = ir.from_proto(microsoft(merged()))
    layers = [site.node for site in survey(model).sites]
    assert conditions(model.graph, layers) == ["flag"]
    assert conditions(model.graph, []) == []
