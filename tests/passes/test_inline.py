"""passes/inline.py: the bodies of functions that hold layers are put in the place of their calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run
from folding import assert_close, folded_at_random
from onnx import FunctionProto, helper

import awq_onnx
from awq_onnx.passes.inline import inline_functions
from awq_onnx.plan import make_plan

K, HIDDEN = 16, 24
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
X: Array = np.random.default_rng(1).standard_normal((8, 6, K)).astype(np.float32)
make = helper.make_node


def function(name: str, inputs: list[str], nodes: list[onnx.NodeProto]) -> FunctionProto:
    return helper.make_function("local", name, inputs, ["made"], nodes, OPSETS)


def linear_function(name: str = "Linear", op_type: str = "MatMul") -> FunctionProto:
    return function(name, ["x", "w"], [make(op_type, ["x", "w"], ["made"], name="layer")])


def silu_function() -> FunctionProto:
    nodes = [make("Sigmoid", ["x"], ["part"], name="sigmoid"), make("Mul", ["x", "part"], ["made"], name="mul")]
    return function("Silu", ["x"], nodes)


def mlp_function() -> FunctionProto:
    """Calls the other two."""
    nodes = [
        make("Linear", ["x", "up"], ["hidden"], domain="local", name="up"),
        make("Relu", ["hidden"], ["acted"], name="relu"),
        make("Linear", ["acted", "down"], ["made"], domain="local", name="down"),
    ]
    return function("Mlp", ["x", "up", "down"], nodes)


def model_of(builder: GraphBuilder, *functions: FunctionProto) -> onnx.ModelProto:
    graph = helper.make_graph(builder.nodes, "tiny", builder.inputs, builder.outputs, builder.initializers)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=functions)
    onnx.checker.check_model(model)
    return model


def call(builder: GraphBuilder, op_type: str, *inputs: str, name: str, to: str | None = None) -> str:
    return builder.add(op_type, *inputs, name=name, to=to, domain="local")


def two_mlps() -> onnx.ModelProto:
    """x -> LayerNormalization -> Mlp -> Silu -> Mlp -> y, the Mlps with weights of their own."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "tokens", K])
    for index in range(2):
        gain = builder.constant(builder.outlier_gain(K), f"gain_{index}")
        normed = builder.add("LayerNormalization", x, gain, name=f"norm_{index}")
        weights = builder.weight(K, HIDDEN, f"up_{index}"), builder.weight(HIDDEN, K, f"down_{index}")
        made = call(builder, "Mlp", normed, *weights, name=f"mlp_{index}")
        x = call(builder, "Silu", made, name=f"silu_{index}", to=f"y{index}")
    builder.output(x, ["batch", "tokens", K])
    return model_of(builder, linear_function(), silu_function(), mlp_function())


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    opened = ir.from_proto(model)
    inline_functions(opened)
    return ir.to_proto(opened)


def names_of(model: onnx.ModelProto, op_type: str) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == op_type]


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
def test_a_function_that_is_a_layer_is_put_in_the_place_of_its_call(op_type: str) -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["rows", K])
    builder.output(call(builder, "Linear", x, builder.weight(K, HIDDEN, "w"), name="call", to="y"), ["rows", HIDDEN])
    model = model_of(builder, linear_function(op_type=op_type))
    after = inlined(model)
    assert [node.op_type for node in after.graph.node] == [op_type]
    assert list(after.graph.node[0].input) == ["x", "w"]
    assert_close(run(after, {"x": X[0]}), run(model, {"x": X[0]}))


def test_a_function_that_calls_a_layer_is_inlined_as_well() -> None:
    model = two_mlps()
    after = inlined(model)
    assert len(names_of(after, "MatMul")) == 4
    assert not names_of(after, "Mlp")
    assert_close(run(after, {"x": X}), run(model, {"x": X}))


def test_a_function_without_a_layer_is_inlined_too() -> None:
    """A norm may be in it, which a scale goes into."""
    after = inlined(two_mlps())
    assert not after.functions
    assert names_of(after, "Silu") == []


def test_a_model_without_functions_is_not_touched() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("Relu", builder.input("x", ["rows", K]), to="y"), ["rows", K])
    model = builder.model()
    assert inlined(model).graph.node == model.graph.node


def test_layers_of_one_function_called_twice_have_different_names() -> None:
    """So that --include and --exclude, and the report, can tell them apart."""
    plan = make_plan(ir.from_proto(two_mlps()))
    names = [site.name for site in plan.survey.sites]
    assert len(set(names)) == 4


def test_a_function_that_is_called_in_the_branch_of_an_if_is_inlined_there() -> None:
    builder = GraphBuilder()
    builder.input("x", ["batch", "tokens", K])
    builder.input("flag", [], np.bool_)
    bodies = []
    for kind in ("then", "else"):
        builder.weight(K, 8, kind)
        node = make("Linear", ["x", kind], [f"{kind}_y"], domain="local", name="call")
        value = helper.make_tensor_value_info(f"{kind}_y", 1, None)
        bodies.append(helper.make_graph([node], kind, [], [value]))
    builder.nodes.append(make("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("y", ["batch", "tokens", 8])
    model = model_of(builder, linear_function())
    assert len(make_plan(ir.from_proto(model)).survey.sites) == 2
    for flag in (True, False):
        feed = {"x": X, "flag": np.array(flag)}
        assert_close(run(inlined(model), feed), run(model, feed))


def test_scales_fold_from_function_to_function(tmp_path: Path) -> None:
    model = two_mlps()
    made = folded_at_random(model, {"x": X}, tmp_path)
    assert made.refused == {}
    assert len(made.divided) == 4
    assert_close(run(made.model, {"x": X}), run(model, {"x": X}))


def test_functions_are_quantised_from_end_to_end(tmp_path: Path) -> None:
    model = two_mlps()
    recipe = awq_onnx.Recipe(block_size=16, accuracy_level=0)
    report = awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration={"x": X})
    assert [one.fold for one in report.matmuls] == ["norm gain", "MatMul"] * 2
    after = onnx.load(tmp_path / "out.onnx")
    assert len(names_of(after, "MatMulNBits")) == 4
    assert not after.functions
    expected, actual = run(model, {"x": X})["y1"], run(tmp_path / "out.onnx", {"x": X})["y1"]
    assert 0 < np.linalg.norm(actual - expected) < 0.2 * np.linalg.norm(expected)


def test_a_weight_inside_a_function_is_quantised(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", 1, [K, HIDDEN], np.random.default_rng(0).standard_normal(K * HIDDEN) / 4)
    nodes = [make("Constant", [], ["w"], value=weight), make("MatMul", ["x", "w"], ["made"], name="layer")]
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "tokens", K])
    builder.output(call(builder, "Fixed", x, name="first", to="y0"), ["batch", "tokens", HIDDEN])
    builder.output(call(builder, "Fixed", builder.add("Neg", x), name="second", to="y1"), ["batch", "tokens", HIDDEN])
    model = model_of(builder, function("Fixed", ["x"], nodes))
    report = awq_onnx.quantize(model, tmp_path / "out.onnx", awq_onnx.Recipe(accuracy_level=0), calibration={"x": X})
    assert len(report.matmuls) == 2
    expected, actual = run(model, {"x": X}), run(tmp_path / "out.onnx", {"x": X})
    for name in ("y0", "y1"):
        assert np.linalg.norm(actual[name] - expected[name]) < 0.12 * np.linalg.norm(expected[name])


def test_a_1x1_conv_inside_a_function_is_a_layer_as_well() -> None:
    nodes = [
        make("Transpose", ["x"], ["first"], perm=[0, 2, 1]),
        make("Conv", ["first", "w"], ["second"], name="conv"),
        make("Transpose", ["second"], ["made"], perm=[0, 2, 1]),
    ]
    builder = GraphBuilder()
    x, weight = builder.input("x", ["batch", "tokens", K]), builder.constant(np.ones((HIDDEN, K, 1)), "w")
    builder.output(call(builder, "Conv1", x, weight, name="call", to="y"), ["batch", "tokens", HIDDEN])
    plan = make_plan(ir.from_proto(model_of(builder, function("Conv1", ["x", "w"], nodes))))
    assert [site.K for site in plan.survey.sites] == [K]


def test_an_input_that_is_left_out_of_a_call_stays_left_out() -> None:
    nodes = [make("Gemm", ["x", "w", "bias"], ["made"], name="layer")]
    builder = GraphBuilder()
    x, weight = builder.input("x", ["rows", K]), builder.weight(K, HIDDEN, "w")
    builder.output(call(builder, "Biased", x, weight, name="call", to="y"), ["rows", HIDDEN])
    model = model_of(builder, function("Biased", ["x", "w", "bias"], nodes))
    assert_close(run(inlined(model), {"x": X[0]}), {"y": X[0] @ onnx.numpy_helper.to_array(model.graph.initializer[0])})
    assert len(make_plan(ir.from_proto(model)).survey.sites) == 1
