"""passes/pointwise.py: 1x1 Convs between Transposes are written as linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run, save
from folding import assert_close
from onnx import helper

import awq_onnx
from awq_onnx.passes.pointwise import write_as_matmuls
from awq_onnx.plan import make_plan
from awq_onnx.store import open_model

K, HIDDEN, TOKENS = 12, 20, 5
SPACES = (1, 2)
Middle = Callable[[GraphBuilder, str], str]


def perms(space: int) -> tuple[list[int], list[int]]:
    """Channels to the front, and back to the end."""
    return [0, space + 1, *range(1, space + 1)], [0, *range(2, space + 2), 1]


def start(builder: GraphBuilder, *, space: int = 1, name: str = "start") -> str:
    x = builder.input("x", ["batch", *(f"size_{axis}" for axis in range(space)), K])
    return builder.add("Transpose", x, name=name, perm=perms(space)[0])


def end(builder: GraphBuilder, value: str, *, space: int = 1, to: str = "y", name: str = "end") -> str:
    return builder.output(builder.add("Transpose", value, name=name, to=to, perm=perms(space)[1]))


def conv(
    builder: GraphBuilder, value: str, rows: int, columns: int, name: str, *, space: int = 1, **options: Any
) -> str:
    """Conv from `rows` channels to `columns`; options: bias, kernel and the attributes of Conv."""
    bias, kernel = options.pop("bias", False), options.pop("kernel", 1)
    weight = builder.rng.standard_normal((columns, rows // options.get("group", 1), *[kernel] * space)) / np.sqrt(rows)
    inputs = [value, builder.constant(weight, f"{name}.weight")]
    if bias:
        inputs.append(builder.constant(builder.rng.standard_normal(columns), f"{name}.bias"))
    return builder.add("Conv", *inputs, name=name, **options)


def one(*, space: int = 1, seed: int = 0, **options: Any) -> onnx.ModelProto:
    """x -> Transpose -> Conv -> Transpose -> y"""
    builder = GraphBuilder(dtype=options.pop("dtype", np.float32), seed=seed)
    end(builder, conv(builder, start(builder, space=space), K, HIDDEN, "conv", space=space, **options), space=space)
    return builder.model()


def between(middle: Middle, *, space: int = 1) -> onnx.ModelProto:
    """x -> Transpose -> Conv -> what `middle` adds -> Conv -> Transpose -> y"""
    builder = GraphBuilder(opset=20)
    hidden = middle(builder, conv(builder, start(builder, space=space), K, HIDDEN, "first", space=space, bias=True))
    end(builder, conv(builder, hidden, HIDDEN, K, "second", space=space, bias=True), space=space)
    return builder.model()


def x_of(space: int = 1, dtype: Any = np.float32) -> dict[str, Array]:
    dims = [2, TOKENS, 3][: space + 1]
    return {"x": np.random.default_rng(1).standard_normal((*dims, K)).astype(dtype)}


def rewritten(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    opened = ir.from_proto(model)
    count = write_as_matmuls(opened.graph)
    return count, ir.to_proto(opened)


def op_types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def assert_linear(model: onnx.ModelProto, convs: int = 1, *, space: int = 1, left: int = 0) -> onnx.ModelProto:
    """All Convs have become layers, `left` Transposes of activations stay, outputs are equal."""
    count, after = rewritten(model)
    assert count == convs
    onnx.checker.check_model(after, full_check=True)
    ops = op_types(after)
    assert (ops["Conv"], ops["MatMul"], ops["Transpose"]) == (0, convs, convs + left)
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    feed = x_of(space, dtype)
    assert_close(run(after, feed), run(model, feed), 1e-3 if dtype == np.float16 else 1e-5)
    return after


def assert_left(model: onnx.ModelProto, *, space: int = 1) -> None:
    count, after = rewritten(model)
    assert count == 0
    assert op_types(after) == op_types(model)
    assert_close(run(after, x_of(space)), run(model, x_of(space)))


# Convs that are linear layers


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_conv_between_transposes_is_a_matmul_without_them(space: int, bias: bool, dtype: type) -> None:
    after = assert_linear(one(space=space, bias=bias, dtype=dtype), space=space)
    assert op_types(after)["Add"] == int(bias)


def test_the_matmul_has_the_name_and_the_notes_of_the_conv() -> None:
    model = one()
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.doc_string = "from conv.py"
    node.metadata_props.add(key="scope", value="/block/conv")
    after = assert_linear(model)
    (layer,) = (node for node in after.graph.node if node.op_type == "MatMul")
    assert (layer.name, layer.doc_string, layer.metadata_props[0].value) == ("conv", "from conv.py", "/block/conv")


def test_nodes_without_names_are_rewritten_too() -> None:
    model = between(lambda builder, x: builder.add("Relu", x))
    for node in model.graph.node:
        node.name = ""
    assert_linear(model, 2)


@pytest.mark.parametrize("attributes", [{"kernel_shape": [1], "pads": [0, 0], "strides": [1], "dilations": [1]}, {}])
def test_attributes_that_say_nothing_change_nothing(attributes: dict[str, Any]) -> None:
    assert_linear(one(**attributes))


@pytest.mark.parametrize("space", SPACES)
def test_shapes_that_an_exporter_noted_are_not_those_of_before(space: int) -> None:
    model = onnx.shape_inference.infer_shapes(between(relu, space=space))
    noted = {info.name: len(info.type.tensor_type.shape.dim) for info in model.graph.value_info}
    assert noted["first_output_0"] == space + 2
    after = assert_linear(model, 2, space=space)
    inferred = onnx.shape_inference.infer_shapes(after, strict_mode=True)
    sizes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in inferred.graph.value_info
    }
    assert sizes["first_output_0"] == [0, *[0] * space, HIDDEN]  # 0: free


def test_padding_to_the_same_size_is_none_for_a_kernel_of_one() -> None:
    assert_linear(one(auto_pad="SAME_UPPER"))


def relu(builder: GraphBuilder, x: str) -> str:
    return builder.add("Relu", x)


def gelu_op(builder: GraphBuilder, x: str) -> str:
    return builder.add("Gelu", x)


def gelu(builder: GraphBuilder, x: str) -> str:
    """x/2 (1 + erf(x / sqrt 2)), as exporters write it."""
    erf = builder.add("Erf", builder.add("Div", x, builder.constant(np.sqrt(2))))
    twice = builder.add("Mul", x, builder.add("Add", erf, builder.constant(1.0)))
    return builder.add("Mul", twice, builder.constant([0.5]))


def silu(builder: GraphBuilder, x: str) -> str:
    return builder.add("Mul", x, builder.add("Sigmoid", x))


def dropout_and_cast(builder: GraphBuilder, x: str) -> str:
    return builder.cast(builder.cast(builder.add("Dropout", x), np.float16, "half"), np.float32, "whole")


@pytest.mark.parametrize("middle", [relu, gelu_op, gelu, silu, dropout_and_cast])
@pytest.mark.parametrize("space", SPACES)
def test_what_treats_all_numbers_alike_may_stand_between(middle: Middle, space: int) -> None:
    if middle is dropout_and_cast:
        assert rewritten(between(middle, space=space))[0] == 2
    else:
        assert_linear(between(middle, space=space), 2, space=space)


def test_two_convs_that_gate_each_other_are_one_region() -> None:
    builder = GraphBuilder()
    x = start(builder)
    gate, up = conv(builder, x, K, HIDDEN, "gate"), conv(builder, x, K, HIDDEN, "up")
    end(builder, conv(builder, builder.add("Mul", builder.add("Sigmoid", gate), up), HIDDEN, K, "down"))
    assert_linear(builder.model(), 3)


def test_one_conv_between_many_transposes() -> None:
    builder = GraphBuilder()
    made = conv(builder, start(builder), K, HIDDEN, "conv")
    for index in range(2):
        turned = builder.add("Transpose", made, name=f"end_{index}", perm=perms(1)[1])
        builder.output(builder.add("Neg", turned, to=f"y{index}"))
    assert_linear(builder.model())


def test_convs_that_share_a_weight_keep_it() -> None:
    builder = GraphBuilder()
    first = conv(builder, start(builder), K, K, "first")
    end(builder, builder.add("Conv", builder.add("Relu", first), "first.weight", name="second"))
    assert_linear(builder.model(), 2)


def test_a_conv_inside_a_branch_is_written_there() -> None:
    inner = one()
    builder = GraphBuilder()
    builder.input("x", ["batch", "tokens", K])
    builder.input("flag", [], np.bool_)
    bodies = []
    for kind in ("then", "else"):
        body = onnx.GraphProto()
        body.CopyFrom(inner.graph)
        body.name = kind
        del body.input[:]
        bodies.append(body)
    builder.nodes.append(helper.make_node("If", ["flag"], ["z"], then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("z", ["batch", "tokens", HIDDEN])
    model = builder.model()
    count, after = rewritten(model)
    assert count == 2
    feed = {**x_of(), "flag": np.array(True)}
    assert_close(run(after, feed), run(model, feed), 1e-5)


# Others who look


def test_a_transpose_that_others_read_stays_for_them() -> None:
    builder = GraphBuilder()
    x = start(builder)
    end(builder, conv(builder, x, K, HIDDEN, "conv"))
    builder.output(builder.add("Neg", x, to="z"), ["batch", K, "tokens"])
    assert_linear(builder.model(), left=1)


def test_the_first_transpose_may_be_an_output_of_the_model() -> None:
    builder = GraphBuilder()
    x = start(builder)
    end(builder, conv(builder, x, K, HIDDEN, "conv"))
    builder.output(x, ["batch", K, "tokens"])
    assert_linear(builder.model(), left=1)


def test_the_last_transpose_may_be_read_by_others_as_well() -> None:
    builder = GraphBuilder()
    end(builder, conv(builder, start(builder), K, HIDDEN, "conv"))
    builder.output(builder.add("Neg", "y", to="z"))
    assert_linear(builder.model())


def test_one_value_that_would_have_two_names_stays() -> None:
    """Two outputs of the model that are the same numbers."""
    builder = GraphBuilder()
    made = conv(builder, start(builder), K, HIDDEN, "conv")
    end(builder, made)
    end(builder, made, to="z", name="end_1")
    assert_left(builder.model())


def test_a_start_that_reads_what_an_end_makes() -> None:
    """Two regions behind each other."""
    builder = GraphBuilder()
    first = builder.add("Transpose", conv(builder, start(builder), K, K, "first"), name="end_0", perm=[0, 2, 1])
    again = builder.add("Transpose", builder.add("Tanh", first), name="start_1", perm=[0, 2, 1])
    end(builder, conv(builder, again, K, K, "second"))
    assert_linear(builder.model(), 2)


def test_an_end_that_is_the_start_of_the_next_region() -> None:
    builder = GraphBuilder()
    first = builder.add("Transpose", conv(builder, start(builder), K, K, "first"), name="end_0", perm=[0, 2, 1])
    again = builder.add("Transpose", first, name="start_1", perm=[0, 2, 1])
    end(builder, conv(builder, again, K, K, "second"))
    assert_linear(builder.model(), 2)


@pytest.mark.parametrize("taken", ["conv.matrix", "conv.product", "conv.bias"])
def test_a_name_that_a_layer_would_get_may_be_taken(taken: str) -> None:
    builder = GraphBuilder()
    made = conv(builder, start(builder), K, HIDDEN, "conv", bias=True)
    end(builder, made)
    if taken == "conv.product":
        builder.output(builder.add("Neg", "y", to=taken))
    elif taken == "conv.matrix":
        builder.output(builder.add("Add", "y", builder.constant(np.ones(HIDDEN), taken)))
    assert_linear(builder.model())


# What is left alone


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"strides": [2]}, id="stride"),
        pytest.param({"group": 2}, id="groups"),
        pytest.param({"pads": [1, 1]}, id="padding"),
        pytest.param({"kernel": 3}, id="a kernel of three"),
    ],
)
def test_a_conv_that_is_no_linear_layer_stays(options: dict[str, Any]) -> None:
    assert_left(one(**options))


def per_channel(builder: GraphBuilder, x: str) -> str:
    return builder.add("Mul", x, builder.constant(builder.rng.standard_normal((HIDDEN, 1))))


def softmax(builder: GraphBuilder, x: str) -> str:
    return builder.add("Softmax", x, axis=1)


def wide(builder: GraphBuilder, x: str) -> str:
    return builder.add("Conv", x, builder.weight(HIDDEN, HIDDEN * 3, "wide"), kernel_shape=[3], pads=[1, 1])


@pytest.mark.parametrize("middle", [per_channel, softmax], ids=["a number for each channel", "a sum over channels"])
def test_what_knows_where_the_channels_are_keeps_the_region(middle: Middle) -> None:
    assert_left(between(middle))


def test_a_real_convolution_between_keeps_the_region() -> None:
    builder = GraphBuilder()
    hidden = conv(builder, start(builder), K, HIDDEN, "first")
    hidden = conv(builder, hidden, HIDDEN, HIDDEN, "wide", kernel=3, pads=[1, 1])
    end(builder, conv(builder, hidden, HIDDEN, K, "second"))
    assert_left(builder.model())


def test_a_transpose_on_one_side_only_is_not_enough() -> None:
    builder = GraphBuilder()
    builder.output(conv(builder, start(builder), K, HIDDEN, "conv"), ["batch", HIDDEN, "tokens"])
    assert_left(builder.model())
    builder = GraphBuilder()
    x = builder.input("x", ["batch", TOKENS, "tokens"])
    end(builder, conv(builder, x, TOKENS, HIDDEN, "conv"))
    assert_left(builder.model())


def test_a_transpose_that_does_something_else_is_not_enough() -> None:
    builder = GraphBuilder()
    made = conv(builder, start(builder), K, HIDDEN, "conv")
    builder.output(builder.add("Transpose", made, name="end", to="y", perm=[1, 0, 2]))
    assert_left(builder.model())


def test_a_reader_beside_the_last_transpose_keeps_the_region() -> None:
    builder = GraphBuilder()
    made = conv(builder, start(builder), K, HIDDEN, "conv")
    end(builder, made)
    builder.output(builder.add("ReduceMean", made, builder.integers(1), to="z"))
    assert_left(builder.model())


def test_something_of_another_rank_that_is_added_keeps_the_region() -> None:
    """(T,) beside (B, C, T) is a number for each token: with the channels last it would be one for each channel."""
    builder = GraphBuilder()
    row = builder.add("Reshape", builder.input("row", [HIDDEN]), builder.integers(HIDDEN), name="row")
    turned = builder.add("Transpose", row, name="turn", perm=[0])
    made = builder.add("Add", conv(builder, start(builder), K, HIDDEN, "conv"), turned, name="add")
    end(builder, made)
    model = builder.model()
    count, after = rewritten(model)
    feed = {"x": np.ones((2, HIDDEN, K), np.float32), "row": np.arange(HIDDEN, dtype=np.float32)}
    assert count == 0
    assert_close(run(after, feed), run(model, feed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (1,), ()])
def test_a_single_number_of_any_rank_is_no_hindrance(shape: tuple[int, ...]) -> None:
    assert_linear(between(lambda builder, x: builder.add("Mul", x, builder.constant(np.full(shape, 0.5)))), 2)


def test_a_single_number_of_a_higher_rank_keeps_the_outputs_right() -> None:
    """It gives the value a fourth axis, which the last Transpose does not turn."""
    builder = GraphBuilder()
    made = builder.add("Mul", conv(builder, start(builder), K, HIDDEN, "conv"), builder.constant([[[[2.0]]]]))
    made = builder.add("Squeeze", made, builder.integers(0))
    end(builder, made)
    assert_left(builder.model())


def test_a_weight_that_a_caller_may_override_stays() -> None:
    model = one()
    model.graph.input.append(helper.make_tensor_value_info("conv.weight", 1, [HIDDEN, K, 1]))
    assert rewritten(model)[0] == 0


def test_a_left_alone_conv_is_told_with_its_reason() -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", K, "tokens"])
    builder.output(conv(builder, x, K, HIDDEN, "conv"))
    turned = builder.add("Transpose", x, perm=[0, 2, 1])
    builder.output(builder.linear(turned, K, 8, "other"))
    plan = make_plan(ir.from_proto(builder.model()))
    assert [(one.what, one.reason) for one in plan.survey.kept] == [
        ("conv", "it is a 1x1 Conv over channels that come first")
    ]


# Whole runs


def test_large_weights_become_references_to_the_same_bytes(tmp_path: Path) -> None:
    builder = GraphBuilder()
    weight = builder.rng.standard_normal((160, 128, 1)).astype(np.float32)
    x = builder.add("Transpose", builder.input("x", ["batch", "tokens", 128]), perm=[0, 2, 1])
    end(builder, builder.add("Conv", x, builder.constant(weight, "w"), name="conv"))
    with open_model(save(builder.model(), tmp_path / "model.onnx")) as opened:
        whole = opened.model.graph.initializers["w"].const_value
        assert write_as_matmuls(opened.model.graph) == 1
        matrix = opened.model.graph.initializers["conv.matrix"].const_value
        assert isinstance(whole, ir.ExternalTensor)
        assert isinstance(matrix, ir.ExternalTensor)
        assert (matrix.offset, matrix.path) == (whole.offset, whole.path)
        np.testing.assert_array_equal(opened.read(matrix), weight[:, :, 0])


@pytest.mark.parametrize("space", SPACES)
def test_convs_are_quantised_folded_and_told(tmp_path: Path, space: int) -> None:
    model = between(relu, space=space)
    dims = [12, 6, 5][: space + 1]
    feed = {"x": np.random.default_rng(2).standard_normal((*dims, K)).astype(np.float32)}
    recipe = awq_onnx.Recipe(block_size=16, accuracy_level=0)
    report = awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration=feed)
    assert [(one.name, one.fold) for one in report.matmuls] == [("first", None), ("second", "MatMul")]
    assert report.notes == ("2 1x1 Convs were written as MatMuls, the Transposes around them removed",)
    expected, actual = run(model, feed)["y"], run(tmp_path / "out.onnx", feed)["y"]
    assert 0 < np.linalg.norm(actual - expected) < 0.12 * np.linalg.norm(expected)
    ops = op_types(onnx.load(tmp_path / "out.onnx"))
    assert (ops["MatMulNBits"], ops["Transpose"], ops["Conv"]) == (2, 0, 0)
