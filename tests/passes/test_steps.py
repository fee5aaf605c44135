"""One step back: which input carries the channels, and whether they may have moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder
from folding import microsoft
from hypothesis import given as given_examples
from hypothesis import settings
from hypothesis import strategies as st

from awq_onnx.passes.facts import Facts, facts_of
from awq_onnx.passes.steps import Step, given, is_cache_pair, is_vector, steps_back

K = 8
Make = Callable[[GraphBuilder, str], str]


def steps_of(make: Make, *dims: int | str) -> list[Step]:
    """The steps back from what `make` makes of x."""
    builder = GraphBuilder()
    name = make(builder, builder.input("x", list(dims or ("batch", "sequence", K))))
    builder.output(name)
    model = ir.from_proto(microsoft(builder))
    (value,) = (one for node in model.graph for one in node.outputs if one.name == name)
    return list(steps_back(value, facts_of(model)))


@pytest.mark.parametrize("op_type", ["Identity", "Dropout", "Relu", "LeakyRelu", "Neg"])
def test_a_homogeneous_function_carries_its_input(op_type: str) -> None:
    assert steps_of(lambda b, x: b.add(op_type, x)) == [Step(0)]


def test_a_cast_to_another_float_carries_its_input() -> None:
    assert steps_of(lambda b, x: b.cast(x, np.float16, "cast")) == [Step(0)]


@pytest.mark.parametrize("op_type", ["Tanh", "Sigmoid", "Softmax", "Exp", "Shape", "ReduceMean", "Sqrt", "Erf", "Abs"])
def test_other_functions_carry_nothing(op_type: str) -> None:
    assert steps_of(lambda b, x: b.add(op_type, x)) == []


def test_a_node_of_an_unknown_domain_carries_nothing() -> None:
    assert steps_of(lambda b, x: b.add("Relu", x, domain="com.microsoft")) == []


MOVES: list[tuple[str, Make, bool]] = [
    ("batches joined", lambda b, x: b.add("Reshape", x, b.integers(-1, K)), False),
    ("heads apart", lambda b, x: b.add("Reshape", x, b.integers(0, 0, 2, 4)), True),
    ("an axis in front", lambda b, x: b.add("Unsqueeze", x, b.integers(0)), False),
    ("an axis at the end", lambda b, x: b.add("Unsqueeze", x, b.integers(3)), True),
    ("tokens first", lambda b, x: b.add("Transpose", x, perm=[1, 0, 2]), False),
    ("channels first", lambda b, x: b.add("Transpose", x, perm=[2, 0, 1]), True),
    ("all axes reversed", lambda b, x: b.add("Transpose", x), True),
    ("some tokens", lambda b, x: b.add("Gather", x, b.integers(0, 2), axis=1), False),
    ("some channels", lambda b, x: b.add("Gather", x, b.integers(0, 2), axis=2), True),
    ("other channels, as many", lambda b, x: b.add("Gather", x, b.integers(*range(K)), axis=-1), True),
    ("half of them", lambda b, x: b.add("Slice", x, b.integers(0), b.integers(4), b.integers(2)), True),
    ("all of them backwards", lambda b, x: b.add("Slice", x, *(b.integers(n) for n in (-1, -99, 2, -1))), True),
    ("repeated", lambda b, x: b.add("Tile", x, b.integers(1, 1, 2)), True),
    ("made wider", lambda b, x: b.add("Expand", x, b.integers(3, 1, 1, 1)), True),
    ("flattened", lambda b, x: b.add("Flatten", x, axis=2), False),
]


@pytest.mark.parametrize(("make", "moves"), [(make, moves) for _, make, moves in MOVES], ids=[n for n, _, _ in MOVES])
def test_a_move_tells_whether_channels_may_change_places(make: Make, moves: bool) -> None:
    assert steps_of(make) == [Step(0, moves=moves)]


@pytest.mark.parametrize("make", [make for _, make, _ in MOVES], ids=[name for name, _, _ in MOVES])
def test_where_no_shape_is_known_everything_may_have_moved(make: Make) -> None:
    builder = GraphBuilder()
    name = make(builder, builder.input("x", ["batch", "sequence", K]))
    builder.output(name)
    model = ir.from_proto(microsoft(builder))
    (value,) = (one for node in model.graph for one in node.outputs if one.name == name)
    assert [step.moves for step in steps_back(value, Facts({"": 18}, {}))] == [True]


def test_both_sides_of_a_product_are_ways() -> None:
    assert steps_of(lambda b, x: b.add("Mul", x, b.input("y", ["batch", "sequence", K]))) == [Step(0), Step(1)]


def test_a_known_factor_is_no_way() -> None:
    assert steps_of(lambda b, x: b.add("Mul", x, b.constant(2.0))) == [Step(0)]
    assert steps_of(lambda b, x: b.add("Mul", b.add("Exp", b.constant(2.0)), x)) == [Step(1)]


def test_only_what_is_divided_is_a_way() -> None:
    assert steps_of(lambda b, x: b.add("Div", b.constant(2.0), x)) in ([Step(0)], [])
    assert steps_of(lambda b, x: b.add("Div", x, b.input("y", [1]))) == [Step(0)]


def test_channels_of_a_product_come_from_the_right() -> None:
    made = steps_of(lambda b, x: b.add("MatMul", b.input("weights", ["batch", "sequence", "sequence"]), x))
    assert made == [Step(1, moves=True)]


@pytest.mark.parametrize("turned", [False, True])
def test_a_vector_that_is_added_is_a_bias(turned: bool) -> None:
    def biased(builder: GraphBuilder, x: str) -> str:
        pair = [x, builder.constant(np.ones(K))]
        return builder.add("Add", *(pair[::-1] if turned else pair))

    assert steps_of(biased) == [Step(1, bias=0) if turned else Step(0, bias=1)]


@pytest.mark.parametrize("shape", [(), (1,), (5, K)])
def test_what_is_no_vector_is_no_bias(shape: tuple[int, ...]) -> None:
    assert steps_of(lambda b, x: b.add("Add", x, b.constant(np.ones(shape)))) == []


def test_a_sum_of_activations_is_no_way() -> None:
    assert steps_of(lambda b, x: b.add("Add", x, b.input("y", ["batch", "sequence", K]))) == []


@pytest.mark.parametrize("past_first", [False, True])
def test_a_concat_with_a_past_leads_to_what_is_new(past_first: bool) -> None:
    def cached(builder: GraphBuilder, x: str) -> str:
        pair = [builder.input("past_key_values.0.value", ["batch", "past", K]), x]
        return builder.add("Concat", *(pair if past_first else pair[::-1]), axis=1)

    (step,) = steps_of(cached)
    assert (step.index, step.moves) == (int(past_first), True)
    assert step.past is not None
    assert step.past.name == "past_key_values.0.value"


@pytest.mark.parametrize("names", [("one", "two"), ("past.0", "past.1"), ("past.0",)])
def test_other_concats_lead_nowhere(names: tuple[str, ...]) -> None:
    def joined(builder: GraphBuilder, _: str) -> str:
        return builder.add("Concat", *(builder.input(name, ["batch", "t", K]) for name in names), axis=1)

    assert steps_of(joined) == []


def test_a_concat_of_three_leads_nowhere() -> None:
    def joined(builder: GraphBuilder, x: str) -> str:
        return builder.add("Concat", builder.input("past.0", ["batch", "t", K]), x, x, axis=1)

    assert steps_of(joined) == []


def attention(op_type: str, inputs: str, output: int = 0) -> list[Step]:
    """inputs: the names that are given, "-" for one that is left out."""
    domain = "" if op_type == "Attention" else "com.microsoft"
    given_inputs = [None if name == "-" else ir.val(name) for name in inputs.split()]
    node = ir.node(op_type, given_inputs, domain=domain, num_outputs=3)
    for index, value in enumerate(node.outputs):
        value.name = f"made_{index}"
    return list(steps_back(node.outputs[output], Facts({"": 23, "com.microsoft": 1}, {})))


@pytest.mark.parametrize(
    ("op_type", "inputs", "index"),
    [
        ("Attention", "q k v", 2),
        ("GroupQueryAttention", "q k v past_k past_v", 2),
        ("GroupQueryAttention", "qkv - - past_k past_v", 0),
        ("MultiHeadAttention", "q k v", 2),
        ("MultiHeadAttention", "q kv -", 1),
        ("MultiHeadAttention", "q kv", 1),
        ("MultiHeadAttention", "qkv - -", 0),
        ("MultiHeadAttention", "qkv", 0),
    ],
)
def test_a_fused_attention_leads_to_its_values(op_type: str, inputs: str, index: int) -> None:
    (step,) = attention(op_type, inputs)
    assert (step.index, step.moves, step.bias) == (index, True, None)


def test_the_bias_inside_an_attention_is_told() -> None:
    (step,) = attention("MultiHeadAttention", "q k v bias")
    assert (step.bias, step.inside) == (3, True)


def test_the_past_of_an_attention_is_told() -> None:
    (step,) = attention("GroupQueryAttention", "q k v past_k past_v")
    assert (step.past, step.present) != (None, None)
    assert step.past is not None
    assert step.past.name == "past_v"


@pytest.mark.parametrize("output", [1, 2])
def test_the_caches_of_an_attention_lead_nowhere(output: int) -> None:
    assert attention("GroupQueryAttention", "q k v past_k past_v", output) == []


def test_an_optional_input_may_be_missing_nameless_or_given() -> None:
    values = [ir.val("x"), None, ir.val("")]
    assert [given(values, index) is not None for index in range(4)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("values", "vector"),
    [(np.ones(K), True), (np.ones((1, 1, K)), True), (np.ones((K, 1)), False), (np.ones(1), False), (2.0, False)],
)
def test_a_vector_has_one_number_for_each_channel(values: Any, vector: bool) -> None:
    tensor = ir.Tensor(np.asarray(values, np.float32))
    value = ir.val("v", tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    ir.Graph([], [], nodes=[], initializers=[value])
    assert is_vector(value, Facts({"": 18}, {})) is vector


@pytest.mark.parametrize(
    ("past", "present", "pair"),
    [
        ("past_key_values.3.value", "present.3.value", True),
        ("past_key_values.3.value", "present_key_values.3.value", True),
        ("past_value_3", "present_value_3", True),
        ("past_key_values.3.value", "present.13.value", False),
        ("past_key_values.3.value", "present.3.key", False),
        ("value", "value", False),
        ("past_key_values.3.value", "value.3", False),
    ],
)
def test_cache_pairs_go_by_name(past: str, present: str, pair: bool) -> None:
    graph = ir.Graph([ir.val(past)], [], nodes=[])
    assert is_cache_pair(graph.inputs[0], present) is pair


def test_a_past_that_is_no_input_of_the_model_is_no_cache() -> None:
    assert not is_cache_pair(ir.val("past_key_values.3.value"), "present.3.value")


# Properties


@settings(max_examples=100, deadline=None)
@given_examples(st.data())
def test_a_move_that_keeps_its_places_keeps_them(data: st.DataObject) -> None:
    """Where `moves` is False, numpy finds channel k at place k whatever the shapes are."""
    dims = [*data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)), data.draw(st.integers(2, 4))]
    make, apply = data.draw(moves(dims))
    (step,) = steps_of(make, *dims)
    if not step.moves:
        channels = np.broadcast_to(np.arange(dims[-1]), dims)
        moved = apply(channels)
        assert moved.shape[-1] == dims[-1]
        np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(dims[-1]), moved.shape))


@st.composite
def moves(draw: st.DrawFn, dims: list[int]) -> tuple[Make, Callable[[np.ndarray], np.ndarray]]:
    kind = draw(st.sampled_from(["Transpose", "Reshape", "Gather", "Unsqueeze", "Slice"]))
    axis = draw(st.integers(0, len(dims) - 1))
    if kind == "Transpose":
        perm = draw(st.permutations(range(len(dims))))
        return (lambda b, x: b.add("Transpose", x, perm=perm)), (lambda a: a.transpose(perm))
    if kind == "Reshape":
        target = draw(st.permutations(dims))
        return (lambda b, x: b.add("Reshape", x, b.integers(*target))), (lambda a: a.reshape(target))
    if kind == "Gather":
        taken = draw(st.lists(st.integers(0, dims[axis] - 1), min_size=1, max_size=4))
        return (lambda b, x: b.add("Gather", x, b.integers(*taken), axis=axis)), (lambda a: a.take(taken, axis))
    if kind == "Unsqueeze":
        return (lambda b, x: b.add("Unsqueeze", x, b.integers(axis))), (lambda a: np.expand_dims(a, axis))
    return (lambda b, x: b.add("Slice", x, *(b.integers(n) for n in (-1, -99, axis, -1)))), (lambda a: np.flip(a, axis))
