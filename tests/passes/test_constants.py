"""What is known without running the model, and that it is what onnxruntime would make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run, save
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from awq_onnx.passes import constants
from awq_onnx.passes.constants import computed, constant, is_computed

OPSETS = {"": 18}
Make = Callable[[GraphBuilder], str]


def value_of(make: Make) -> ir.Value:
    """The value that `make` makes, as node "user" of a graph reads it."""
    builder = GraphBuilder()
    builder.input("x", [4])
    made = make(builder)
    builder.nodes.append(helper.make_node("Identity", [made], ["y"], name="user"))
    graph = helper.make_graph(builder.nodes, "g", builder.inputs, [onnx.ValueInfoProto(name="y")], builder.initializers)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    (user,) = (node for node in model.graph if node.name == "user")
    value = user.inputs[0]
    assert value is not None
    return value


def overridable(builder: GraphBuilder) -> str:
    builder.input("w", [3])
    return builder.constant(np.ones(3), "w")


def constant_node(**value: Any) -> Make:
    def make(builder: GraphBuilder) -> str:
        builder.nodes.append(helper.make_node("Constant", [], ["held"], **value))
        return "held"

    return make


# Stored constants


def test_an_initializer_is_a_constant() -> None:
    tensor = constant(value_of(lambda b: b.constant([1.0, 2.0], "w")))
    assert tensor is not None
    assert tensor.numpy().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"value": numpy_helper.from_array(np.array([1.5, 2], np.float32))}, [1.5, 2]),
        ({"value_float": 2.5}, 2.5),
        ({"value_floats": [1.0, 2.0]}, [1, 2]),
        ({"value_int": 3}, 3),
        ({"value_ints": [3, 4]}, [3, 4]),
    ],
)
def test_a_constant_node_is_a_constant_in_every_form(value: dict[str, Any], expected: Any) -> None:
    tensor = constant(value_of(constant_node(**value)))
    assert tensor is not None
    assert tensor.numpy().tolist() == expected


@pytest.mark.parametrize("make", [overridable, lambda _: "x", lambda b: b.add("Relu", "x")])
def test_what_callers_may_give_or_nodes_make_is_no_constant(make: Make) -> None:
    value = value_of(make)
    assert constant(value) is None
    assert not is_computed(value)
    assert computed(value, OPSETS) is None


def test_nothing_is_no_constant() -> None:
    assert constant(None) is None
    assert not is_computed(None)
    assert computed(None, OPSETS) is None


# Computed ones


def chain(length: int) -> Make:
    def make(builder: GraphBuilder) -> str:
        value = builder.constant(np.ones(3))
        for _ in range(length):
            value = builder.add("Neg", value)
        return value

    return make


COMPUTED: dict[str, Make] = {
    "one plus w": lambda b: b.add("Add", b.constant(1.0), b.weight(3, 4)),
    "a cast": lambda b: b.cast(b.constant(np.ones((3, 4)), dtype=np.float64), np.float32, "cast"),
    "a reshape": lambda b: b.add("Reshape", b.weight(3, 4), b.integers(2, 6)),
    "a reshape with a rest": lambda b: b.add("Reshape", b.weight(3, 4), b.integers(-1, 2)),
    "an expand": lambda b: b.add("Expand", b.weight(1, 4), b.integers(3, 4)),
    "rows": lambda b: b.add("Gather", b.weight(3, 4), b.integers(2, 0)),
    "a concat": lambda b: b.add("Concat", b.weight(3, 4), b.weight(2, 4), axis=0),
    "a product": lambda b: b.add("MatMul", b.weight(3, 4), b.weight(4, 2)),
    "zeros": lambda b: b.add("ConstantOfShape", b.integers(2, 3)),
    "a number": lambda b: b.add("ReduceSum", b.weight(3, 4), keepdims=0),
    "one value twice": lambda b: (lambda w: b.add("Mul", w, b.add("Sigmoid", w)))(b.weight(3, 4)),
    "of a constant node": lambda b: b.add("Neg", constant_node(value_floats=[1.0, 2.0])(b)),
    "nothing": lambda b: b.add("Slice", b.weight(3, 4), b.integers(0), b.integers(0)),
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_computed_constant_is_what_onnxruntime_makes_of_it(make: Make) -> None:
    value = value_of(make)
    assert is_computed(value)
    tensor = computed(value, OPSETS)
    assert tensor is not None
    builder = GraphBuilder()
    name = make(builder)
    builder.outputs.append(onnx.ValueInfoProto(name=name))
    graph = helper.make_graph(builder.nodes, "g", [], builder.outputs, builder.initializers)
    (expected,) = run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), {}).values()
    assert tuple(tensor.shape.numpy()) == expected.shape  # known before anything is computed
    assert tensor.dtype.numpy() == expected.dtype
    np.testing.assert_array_equal(tensor.numpy(), expected)


NOT_COMPUTED: dict[str, Make] = {
    "an input takes part": lambda b: b.add("Add", "x", b.constant(np.ones(4))),
    "an input takes part last": lambda b: b.add("Add", b.constant(np.ones(4)), "x"),
    "an initializer that callers may override": lambda b: b.add("Neg", overridable(b)),
    "chance": lambda b: b.add("RandomNormal", shape=[3]),
    "chance of a constant": lambda b: b.add("RandomUniformLike", b.constant(np.ones(3))),
    "chance throughout": lambda b: b.add("Neg", b.add("Bernoulli", b.constant(np.ones(3)))),
    "another domain": lambda b: b.add("Neg", b.constant(np.ones(3)), domain="com.example"),
    "too many nodes": chain(constants.MOST_NODES + 2),
}


@pytest.mark.parametrize("make", NOT_COMPUTED.values(), ids=NOT_COMPUTED.keys())
def test_what_is_no_constant_is_not_computed(make: Make) -> None:
    value = value_of(make)
    assert not is_computed(value)
    assert computed(value, OPSETS) is None


def test_a_few_nodes_are_few_enough() -> None:
    assert is_computed(value_of(chain(constants.MOST_NODES - 1)))


def test_a_value_of_unknown_shape_is_not_computed() -> None:
    assert computed(value_of(lambda b: b.add("NonZero", b.weight(3, 4))), OPSETS) is None


def test_a_node_that_makes_no_sense_is_not_computed() -> None:
    assert computed(value_of(lambda b: b.add("Add", b.weight(3, 4), b.weight(5, 6))), OPSETS) is None


def test_large_constants_stay_in_their_file_until_they_are_asked_for(tmp_path: Path) -> None:
    builder = GraphBuilder()
    weight = builder.constant(np.ones((200, 100)), "w")
    doubled = builder.add("Mul", weight, builder.constant(2.0), name="double")
    builder.output(builder.add("Add", builder.input("x", [200, 100]), doubled))
    path = save(builder.model(), tmp_path / "model.onnx", external=True)
    graph = ir.load(path).graph
    (value,) = (node.outputs[0] for node in graph if node.name == "double")
    data = tmp_path / "model.onnx.data"
    kept = data.read_bytes()
    data.unlink()
    tensor = computed(value, OPSETS)
    assert tensor is not None
    assert (tuple(tensor.shape.numpy()), tensor.dtype) == ((200, 100), ir.DataType.FLOAT)
    data.write_bytes(kept)
    np.testing.assert_array_equal(tensor.numpy(), np.full((200, 100), 2.0))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_random_expression_of_constants_is_what_numpy_makes_of_it(data: st.DataObject) -> None:
    numbers: Array = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    expected, steps = numbers, data.draw(st.lists(st.sampled_from(["add", "turn", "neg", "flat", "rows"]), max_size=6))

    def make(builder: GraphBuilder) -> str:
        nonlocal expected
        value, expected = builder.constant(numbers), numbers
        for step in steps:
            if step == "add":
                value, expected = builder.add("Add", value, builder.constant(1.0)), expected + 1
            elif step == "turn":
                value, expected = builder.add("Transpose", value, perm=[1, 0]), expected.T
            elif step == "neg":
                value, expected = builder.add("Neg", value), -expected
            elif step == "flat":
                dims = (expected.size // 2, 2)
                value, expected = builder.add("Reshape", value, builder.integers(*dims)), expected.reshape(dims)
            else:
                value, expected = builder.add("Gather", value, builder.integers(1, 0)), expected[[1, 0]]
        return value

    tensor = computed(value_of(make), OPSETS)
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), expected)
