"""widen.py: a bfloat16 model as float32, to run it where there are no bfloat16 kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import Array, decoder_feed, norm_and_readers, run, save, tiny_decoder
from onnx import TensorProto, helper, numpy_helper

import awq_onnx
from awq_onnx.widen import float32_twin

BF16, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT
IDS: Array = np.random.default_rng(3).integers(0, 160, (3, 10))
make = helper.make_node


def info(name: str, dims: Sequence[int | str], kind: int = BF16) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def bf16(values: object, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, ml_dtypes.bfloat16), name)


def model_of(nodes: Sequence[onnx.NodeProto], *weights: onnx.TensorProto, kind: int = BF16) -> onnx.ModelProto:
    """x (2, 3) -> the nodes -> y"""
    graph = helper.make_graph(nodes, "tiny", [info("x", [2, 3], kind)], [info("y", [2, 3], kind)], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def twin(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto.FromString(float32_twin(model.SerializeToString()))
    onnx.checker.check_model(made, full_check=True)
    assert not computes_in_bfloat16(made.graph)
    return made


def computes_in_bfloat16(graph: onnx.GraphProto) -> bool:
    """Whether anything but what a Cast reads is bfloat16; looked at without the module."""
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    weights = any(one.data_type == BF16 and one.name not in cast for one in graph.initializer)
    values = [*graph.input, *graph.output, *graph.value_info]
    return weights or any(one.type.tensor_type.elem_type == BF16 for one in values)


def y_of(model: onnx.ModelProto, x: object = ((1, 2, 3), (-4, 5, 6))) -> list[list[float]]:
    made: list[list[float]] = run(model, {"x": np.array(x, np.float32)})["y"].tolist()
    return made


def test_a_weight_is_cast_where_it_is_stored() -> None:
    made = twin(model_of([make("Mul", ["x", "w"], ["y"])], bf16([1, 10, 100], "w")))
    assert [node.op_type for node in made.graph.node] == ["Cast", "Mul"]
    assert made.graph.initializer[0].data_type == BF16  # no copy of a large weight is made
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


def test_a_weight_that_is_a_reference_stays_one(tmp_path: Path) -> None:
    model = model_of([make("Mul", ["x", "w"], ["y"])], bf16([1, 10, 100], "w"))
    save(model, tmp_path / "model.onnx", external=True)
    made = onnx.ModelProto.FromString(float32_twin((tmp_path / "model.onnx").read_bytes()))
    (weight,) = made.graph.initializer
    assert weight.data_location == TensorProto.EXTERNAL
    onnx.save(made, tmp_path / "twin.onnx")
    assert run(tmp_path / "twin.onnx", {"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[1, 10, 100]] * 2


def test_a_cast_to_bfloat16_casts_to_float() -> None:
    nodes = [
        make("Cast", ["x"], ["half"], to=BF16),
        make("Neg", ["half"], ["minus"]),
        make("Cast", ["minus"], ["y"], to=F32),
    ]
    assert y_of(twin(model_of(nodes, kind=F32))) == [[-1, -2, -3], [4, -5, -6]]


def test_a_constant_node_is_widened() -> None:
    made = twin(model_of([make("Constant", [], ["w"], value=bf16([2, 3, 4], "")), make("Mul", ["x", "w"], ["y"])]))
    assert y_of(made) == [[2, 6, 12], [-8, 15, 24]]


def test_a_constant_of_shape_is_widened() -> None:
    nodes = [
        make("Shape", ["x"], ["dims"]),
        make("ConstantOfShape", ["dims"], ["ones"], value=bf16([1], "")),
        make("Add", ["x", "ones"], ["y"]),
    ]
    assert y_of(twin(model_of(nodes))) == [[2, 3, 4], [-3, 6, 7]]


def test_the_types_of_random_numbers_and_unit_matrices_are_widened() -> None:
    nodes = [make("EyeLike", ["x"], ["unit"], dtype=BF16), make("Add", ["x", "unit"], ["y"])]
    assert y_of(twin(model_of(nodes))) == [[2, 2, 3], [-4, 6, 6]]


def test_value_infos_are_widened() -> None:
    model = model_of([make("Neg", ["x"], ["minus"]), make("Neg", ["minus"], ["y"])])
    model.graph.value_info.append(info("minus", [2, 3]))
    made = twin(model)
    assert made.graph.value_info[0].type.tensor_type.elem_type == F32
    assert y_of(made) == [[1, 2, 3], [-4, 5, 6]]


def test_bodies_are_widened_with_weights_of_their_own() -> None:
    bodies = {}
    for kind, number in (("then_branch", 2), ("else_branch", 3)):
        nodes = [make("Mul", ["x", f"{kind}.w"], [f"{kind}.y"])]
        bodies[kind] = helper.make_graph(
            nodes, kind, [], [info(f"{kind}.y", [2, 3])], [bf16([number] * 3, f"{kind}.w")]
        )
    condition = numpy_helper.from_array(np.array(True), "yes")
    made = twin(model_of([make("If", ["yes"], ["y"], **bodies)], condition))
    assert y_of(made) == [[2, 4, 6], [-8, 10, 12]]


def test_a_weight_of_the_graph_is_seen_widened_in_a_body() -> None:
    bodies = {
        kind: helper.make_graph([make("Mul", ["x", "w"], [f"{kind}.y"])], kind, [], [info(f"{kind}.y", [2, 3])])
        for kind in ("then_branch", "else_branch")
    }
    condition = numpy_helper.from_array(np.array(True), "yes")
    made = twin(model_of([make("If", ["yes"], ["y"], **bodies)], condition, bf16([1, 10, 100], "w")))
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


def test_a_weight_that_is_an_output_too_is_widened() -> None:
    model = model_of([make("Mul", ["x", "w"], ["y"])], bf16([1, 10, 100], "w"))
    model.graph.output.append(info("w", [3]))
    made = twin(model)
    assert run(made, {"x": np.ones((2, 3), np.float32)})["w"].tolist() == [1, 10, 100]


def test_a_weight_that_a_caller_may_override_keeps_its_input() -> None:
    model = model_of([make("Mul", ["x", "w"], ["y"])], bf16([1, 10, 100], "w"))
    model.graph.input.append(info("w", [3]))
    made = twin(model)
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


def test_an_empty_weight_is_widened() -> None:
    nodes = [make("Concat", ["x", "none"], ["y"], axis=0)]
    assert y_of(twin(model_of(nodes, bf16(np.zeros((0, 3)), "none")))) == [[1, 2, 3], [-4, 5, 6]]


def test_a_function_is_widened() -> None:
    opsets = [helper.make_opsetid("", 18)]
    nodes = [make("Constant", [], ["two"], value=bf16([2], "")), make("Mul", ["a", "two"], ["b"])]
    function = helper.make_function("local", "Double", ["a"], ["b"], nodes, opsets)
    graph = helper.make_graph(
        [make("Double", ["x"], ["y"], domain="local")], "tiny", [info("x", [2, 3])], [info("y", [2, 3])]
    )
    opsets = [*opsets, helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    assert y_of(twin(model)) == [[2, 4, 6], [-8, 10, 12]]


def test_a_function_is_widened_where_only_it_has_bfloat16() -> None:
    opsets = [helper.make_opsetid("", 18)]
    nodes = [make("Cast", ["a"], ["half"], to=BF16), make("Cast", ["half"], ["b"], to=F32)]
    function = helper.make_function("local", "Rounded", ["a"], ["b"], nodes, opsets)
    graph = helper.make_graph(
        [make("Rounded", ["x"], ["y"], domain="local")], "tiny", [info("x", [2, 3], F32)], [info("y", [2, 3], F32)]
    )
    opsets = [*opsets, helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    made = onnx.ModelProto.FromString(float32_twin(model.SerializeToString()))
    assert {attribute.i for node in made.functions[0].node for attribute in node.attribute} == {F32}


def test_where_nothing_is_bfloat16_the_same_bytes_come_back() -> None:
    model = norm_and_readers(dtype=np.float16).model().SerializeToString()
    assert float32_twin(model) is model


def test_the_numbers_are_those_of_bfloat16_computed_in_float32() -> None:
    plain = norm_and_readers(casts=False).model()
    half = in_bfloat16(plain)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(plain)
    for tensor in rounded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16).astype(np.float32), tensor.name))
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)}
    made, expected = run(twin(half), x), run(rounded, x)
    for name in ("y0", "y1"):
        np.testing.assert_allclose(made[name], expected[name], rtol=1e-5, atol=1e-5)


# Whole runs


def in_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every float32 as bfloat16."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        if value.type.tensor_type.elem_type == F32:
            value.type.tensor_type.elem_type = BF16
    for tensor in made.graph.initializer:
        if tensor.data_type == F32:
            tensor.CopyFrom(bf16(numpy_helper.to_array(tensor), tensor.name))
    for node in made.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == F32:
                attribute.i = BF16
    return made


@pytest.mark.parametrize("lm_head", ["none", "8"])
def test_a_bfloat16_decoder_is_quantised_from_end_to_end(tmp_path: Path, lm_head: str) -> None:
    model = in_bfloat16(tiny_decoder())
    recipe = awq_onnx.Recipe(samples=4, sequence_length=16, accuracy_level=0, lm_head=lm_head)
    report = awq_onnx.quantize(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx", recipe)
    assert "here the models were run and compared as float32" in report.notes[0]
    assert all(one.fold for one in report.matmuls)

    after = onnx.load(tmp_path / "out.onnx")
    stored = {one.name: one for one in after.graph.initializer}
    packed = [node for node in after.graph.node if node.op_type == "MatMulNBits"]
    assert len(packed) == 14 + (lm_head == "8")
    assert {stored[node.input[2]].data_type for node in packed} == {BF16}  # the scales, as the op wants them
    assert [value.type.tensor_type.elem_type for value in after.graph.output] == [BF16] * len(after.graph.output)

    whole = onnx.ModelProto.FromString(float32_twin(after.SerializeToString()))
    feed = decoder_feed(tiny_decoder(), IDS)
    expected, actual = run(twin(model), feed)["logits"], run(whole, feed)["logits"]
    assert 0 < np.linalg.norm(actual - expected) < 0.5 * np.linalg.norm(expected)
    assert report.comparison.kl_mean is not None
