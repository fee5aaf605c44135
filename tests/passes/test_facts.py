"""Shapes and opsets of a model, as far as they can be known without running it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from builders import GraphBuilder, norm_and_readers, save, tiny_decoder
from folding import microsoft
from onnx import helper

from awq_onnx.passes.facts import facts_of
from awq_onnx.store import open_model


def test_shapes_are_inferred_where_the_exporter_noted_none() -> None:
    facts = facts_of(ir.from_proto(norm_and_readers(K=64).model()))
    assert facts.shapes["norm/Mul_1_output_0"] == (None, None, 64)
    assert facts.shapes["x"] == (None, None, 64)


def test_the_last_axis_is_told_where_it_is_fixed() -> None:
    model = ir.from_proto(norm_and_readers(K=64).model())
    facts, values = facts_of(model), {value.name: value for node in model.graph for value in node.outputs}
    assert facts.last_axis(values["norm/Mul_1_output_0"]) == 64
    assert facts.last_axis(ir.val("unknown")) is None
    assert facts.last_axis(None) is None
    assert facts.last_axis(ir.val(None)) is None


def test_a_number_has_no_last_axis() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("ReduceSum", builder.input("x", [4]), name="sum", keepdims=0))
    model = ir.from_proto(builder.model())
    facts = facts_of(model)
    assert facts.shapes["sum_output_0"] == ()
    assert facts.last_axis(model.graph.outputs[0]) is None


def test_opsets_go_by_domain() -> None:
    builder = GraphBuilder(opset=21)
    builder.output(builder.add("Relu", builder.input("x", [4])))
    assert facts_of(ir.from_proto(microsoft(builder))).opsets == {"": 21, "com.microsoft": 1}


def test_shapes_inside_bodies_are_known() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["inner"], name="inner")
    body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("inner", 1, [2, 8])])
    builder = GraphBuilder()
    builder.input("x", [2, 4])
    builder.weight(4, 8, "w")
    flag = builder.input("flag", [], np.bool_)
    builder.nodes.append(helper.make_node("If", [flag], ["y"], then_branch=body, else_branch=body))
    builder.output("y", [2, 8])
    assert facts_of(ir.from_proto(builder.model())).shapes["inner"] == (2, 8)


def test_a_model_that_shape_inference_refuses_has_the_shapes_it_says() -> None:
    builder = GraphBuilder()
    product = builder.add("MatMul", builder.input("x", [4, 5]), builder.weight(7, 8), name="impossible")
    builder.output(product, [4, 8])
    graph = helper.make_graph(builder.nodes, "g", builder.inputs, builder.outputs, builder.initializers)
    facts = facts_of(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])))
    assert facts.shapes["x"] == (4, 5)


def test_values_behind_nodes_of_another_domain_are_unknown() -> None:
    builder = GraphBuilder()
    odd = builder.add("Odd", builder.input("x", [4, 5]), name="odd", domain="com.example")
    builder.output(builder.add("Relu", odd, name="after"))
    facts = facts_of(ir.from_proto(microsoft(builder)))
    assert "odd_output_0" not in facts.shapes
    assert facts.last_axis(ir.val("after_output_0")) is None


def test_no_weight_is_read_and_nothing_changed(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1, hidden=192), tmp_path / "model.onnx", external=True)
    with open_model(path) as opened:
        (tmp_path / "model.onnx.data").unlink()
        assert facts_of(opened.model).shapes["/layers.0/q_proj/MatMul_output_0"] == (None, None, 192)
        made = [value for node in opened.model.graph for value in node.outputs]
        assert all(value.shape is None for value in made if not value.is_graph_output())
