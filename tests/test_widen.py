"""widen.py: a half-precision model as float32, to run it where there are no half-precision kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import Array, decoder_feed, norm_and_readers, run, save, tiny_decoder
from onnx import TensorProto, helper, numpy_helper

import awq_onnx
from awq_onnx.codec import FINFO
from awq_onnx.widen import BFLOAT16, HALF, HALVES, Types, float32_twin

BF16, F16, F32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
IDS: Array = np.random.default_rng(3).integers(0, 160, (3, 10))
make = helper.make_node


@dataclass(frozen=True)
class Half:
    """A type of half precision, and the types that are widened."""

    kind: int
    dtype: Any
    types: Types

    def info(self, name: str, dims: Sequence[int | str], kind: int | None = None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind or self.kind, dims)

    def tensor(self, values: object, name: str = "") -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(values, self.dtype), name)

    def model_of(
        self, nodes: Sequence[onnx.NodeProto], *weights: onnx.TensorProto, kind: int | None = None
    ) -> onnx.ModelProto:
        """x (2, 3) -> the nodes -> y"""
        return checked(nodes, [self.info("x", [2, 3], kind)], [self.info("y", [2, 3], kind)], weights)

    def twin(self, model: onnx.ModelProto) -> onnx.ModelProto:
        made: onnx.ModelProto = onnx.ModelProto.FromString(float32_twin(model.SerializeToString(), self.types))
        onnx.checker.check_model(made, full_check=True)
        assert not computes_in(made.graph, self.types)
        return made


every_half = pytest.mark.parametrize(
    "half",
    [
        pytest.param(Half(BF16, ml_dtypes.bfloat16, BFLOAT16), id="bfloat16"),
        pytest.param(Half(BF16, ml_dtypes.bfloat16, HALF), id="bfloat16 of both"),
        pytest.param(Half(F16, np.float16, HALF), id="float16 of both"),
    ],
)


def checked(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 22), *([helper.make_opsetid("local", 1)] if functions else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.checker.check_model(model, full_check=True)
    return model


def computes_in(graph: onnx.GraphProto, types: Types) -> bool:
    """Whether anything but what a Cast reads, and a table of which it reads rows, is of these types; looked at without
    the module.
    """
    cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    cast |= {node.input[0] for node in graph.node if node.op_type == "Gather" and node.output[0] in cast}
    cast |= {node.input[0] for node in graph.node if node.op_type == "Gather" and node.output[0] in cast}
    weights = any(one.data_type in types and one.name not in cast for one in graph.initializer)
    values = [*graph.input, *graph.output, *graph.value_info]
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    bodies = [body for one in attributes for body in [*([one.g] if one.HasField("g") else []), *one.graphs]]
    return (
        weights
        or any(one.type.tensor_type.elem_type in types for one in values)
        or any(one.t.data_type in types for one in attributes if one.HasField("t"))
        or any(one.name in ("to", "dtype") and one.i in types for one in attributes)
        or any(computes_in(body, types) for body in bodies)
    )


def y_of(model: onnx.ModelProto, x: object = ((1, 2, 3), (-4, 5, 6))) -> list[list[float]]:
    made: list[list[float]] = run(model, {"x": np.array(x, np.float32)})["y"].tolist()
    return made


@every_half
def test_a_weight_is_cast_where_it_is_stored(half: Half) -> None:
    made = half.twin(half.model_of([make("Mul", ["x", "w"], ["y"])], half.tensor([1, 10, 100], "w")))
    assert [node.op_type for node in made.graph.node] == ["Cast", "Mul"]
    assert made.graph.initializer[0].data_type == half.kind  # no copy of a large weight is made
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


@every_half
def test_a_weight_that_is_a_reference_stays_one(half: Half, tmp_path: Path) -> None:
    model = half.model_of([make("Mul", ["x", "w"], ["y"])], half.tensor([1, 10, 100], "w"))
    save(model, tmp_path / "model.onnx", external=True)
    made = onnx.ModelProto.FromString(float32_twin((tmp_path / "model.onnx").read_bytes(), half.types))
    (weight,) = made.graph.initializer
    assert weight.data_location == TensorProto.EXTERNAL
    onnx.save(made, tmp_path / "twin.onnx")
    assert run(tmp_path / "twin.onnx", {"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[1, 10, 100]] * 2


@every_half
def test_a_cast_to_half_precision_casts_to_float(half: Half) -> None:
    nodes = [
        make("Cast", ["x"], ["half"], to=half.kind),
        make("Neg", ["half"], ["minus"]),
        make("Cast", ["minus"], ["y"], to=F32),
    ]
    assert y_of(half.twin(half.model_of(nodes, kind=F32))) == [[-1, -2, -3], [4, -5, -6]]


@every_half
def test_casts_to_other_types_stay(half: Half) -> None:
    nodes = [make("Cast", ["x"], ["whole"], to=TensorProto.INT32), make("Cast", ["whole"], ["y"], to=half.kind)]
    assert y_of(half.twin(half.model_of(nodes)), [[1.6, -2.7, 3]] * 2) == [[1, -2, 3]] * 2


@every_half
def test_a_constant_node_is_widened(half: Half) -> None:
    nodes = [make("Constant", [], ["w"], value=half.tensor([2, 3, 4])), make("Mul", ["x", "w"], ["y"])]
    assert y_of(half.twin(half.model_of(nodes))) == [[2, 6, 12], [-8, 15, 24]]


@every_half
def test_a_constant_beyond_all_numbers_stays_so(half: Half) -> None:
    """Attention masks: what is added is minus infinity, or the least there is."""
    least = float(FINFO(half.dtype).min)
    nodes = [make("Constant", [], ["mask"], value=half.tensor([0, -np.inf, least])), make("Add", ["x", "mask"], ["y"])]
    assert y_of(half.twin(half.model_of(nodes)), np.zeros((2, 3))) == [[0, -np.inf, least]] * 2


@every_half
def test_a_constant_of_shape_is_widened(half: Half) -> None:
    nodes = [
        make("Shape", ["x"], ["dims"]),
        make("ConstantOfShape", ["dims"], ["ones"], value=half.tensor([1])),
        make("Add", ["x", "ones"], ["y"]),
    ]
    assert y_of(half.twin(half.model_of(nodes))) == [[2, 3, 4], [-3, 6, 7]]


@every_half
def test_the_types_of_random_numbers_and_unit_matrices_are_widened(half: Half) -> None:
    nodes = [make("EyeLike", ["x"], ["unit"], dtype=half.kind), make("Add", ["x", "unit"], ["y"])]
    assert y_of(half.twin(half.model_of(nodes))) == [[2, 2, 3], [-4, 6, 6]]


@every_half
def test_value_infos_are_widened(half: Half) -> None:
    model = half.model_of([make("Neg", ["x"], ["minus"]), make("Neg", ["minus"], ["y"])])
    model.graph.value_info.append(half.info("minus", [2, 3]))
    made = half.twin(model)
    assert made.graph.value_info[0].type.tensor_type.elem_type == F32
    assert y_of(made) == [[1, 2, 3], [-4, 5, 6]]


def test_value_infos_of_sequences_are_widened() -> None:
    half = Half(F16, np.float16, HALF)  # no op makes sequences of bfloat16
    nodes = [make("SplitToSequence", ["x"], ["rows"], axis=0), make("ConcatFromSequence", ["rows"], ["y"], axis=0)]
    model = half.model_of(nodes)
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("rows", half.kind, [1, 3]))
    assert y_of(half.twin(model)) == [[1, 2, 3], [-4, 5, 6]]


@every_half
def test_the_types_of_windows_are_widened(half: Half) -> None:
    nodes = [make("HannWindow", ["size"], ["window"], output_datatype=half.kind), make("Mul", ["x", "window"], ["y"])]
    made = half.twin(half.model_of(nodes, numpy_helper.from_array(np.array(3), "size")))
    assert np.allclose(y_of(made), [[0, 1.5, 2.25], [0, 3.75, 4.5]])


@every_half
def test_a_weight_that_is_an_output_too_is_widened(half: Half) -> None:
    model = half.model_of([make("Mul", ["x", "w"], ["y"])], half.tensor([1, 10, 100], "w"))
    model.graph.output.append(half.info("w", [3]))
    made = half.twin(model)
    assert run(made, {"x": np.ones((2, 3), np.float32)})["w"].tolist() == [1, 10, 100]


@every_half
def test_a_weight_that_a_caller_may_override_keeps_its_input(half: Half) -> None:
    model = half.model_of([make("Mul", ["x", "w"], ["y"])], half.tensor([1, 10, 100], "w"))
    model.graph.input.append(half.info("w", [3]))
    made = half.twin(model)
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


@every_half
def test_an_empty_weight_is_widened(half: Half) -> None:
    nodes = [make("Concat", ["x", "none"], ["y"], axis=0)]
    made = half.twin(half.model_of(nodes, half.tensor(np.zeros((0, 3)), "none")))
    assert y_of(made) == [[1, 2, 3], [-4, 5, 6]]


# Tables


def branches(half: Half, first: onnx.NodeProto | None = None, name: str = "") -> dict[str, onnx.GraphProto]:
    """The bodies of an If: x times weights of their own, 2 and 3; `first` in the place of the first product."""
    bodies = {}
    for number, branch in enumerate(("then_branch", "else_branch"), start=2):
        w, y = f"{name}{branch}.w", f"{name}{branch}.y"
        node = first if first is not None and number == 2 else make("Mul", ["x", w], [y])
        bodies[branch] = helper.make_graph([node], branch, [], [half.info(y, [2, 3])], [half.tensor([number] * 3, w)])
    return bodies


TABLE = [[1, 2, 3], [10, 20, 30], [-1, -2, -3]]


def rows_of(table: str, made: str, first: int, second: int) -> list[onnx.NodeProto]:
    """Two rows of a table."""
    numbers = numpy_helper.from_array(np.array([first, second]))
    return [make("Constant", [], [f"{made}.rows"], value=numbers), make("Gather", [table, f"{made}.rows"], [made])]


@every_half
def test_of_a_table_only_the_rows_that_are_looked_up_are_cast(half: Half) -> None:
    nodes = [*rows_of("table", "first", 0, 1), *rows_of("table", "second", 2, 2)]
    nodes += [make("Sum", ["x", "first", "second"], ["y"])]
    made = half.twin(half.model_of(nodes, half.tensor(TABLE, "table")))
    assert [node.op_type for node in made.graph.node if node.op_type in ("Cast", "Gather")] == ["Gather", "Cast"] * 2
    assert {node.input[0] for node in made.graph.node if node.op_type == "Gather"} == {"table"}
    assert made.graph.initializer[0].data_type == half.kind
    assert y_of(made, np.ones((2, 3))) == [[1, 1, 1], [10, 19, 28]]


@every_half
def test_a_row_that_is_an_output_too_is_widened(half: Half) -> None:
    model = half.model_of([*rows_of("table", "y", 1, 0)], half.tensor(TABLE, "table"))
    assert y_of(half.twin(model)) == [TABLE[1], TABLE[0]]


@every_half
@pytest.mark.parametrize("reader", ["node", "body", "output"])
def test_a_table_that_something_else_reads_is_cast_whole(half: Half, reader: str) -> None:
    outputs = [half.info("y", [2, 3])]
    if reader == "node":
        last = make("MatMul", ["rows", "table"], ["y"])
    elif reader == "body":
        product = make("MatMul", ["rows", "table"], ["then_branch.y"])
        last = make("If", ["yes"], ["y"], **branches(half, product))
    else:
        last = make("Identity", ["rows"], ["y"])
        outputs.append(half.info("table", [3, 3]))
    weights = [half.tensor(TABLE, "table"), numpy_helper.from_array(np.array(True), "yes")]
    made = half.twin(checked([*rows_of("table", "rows", 1, 0), last], [half.info("x", [2, 3])], outputs, weights))
    assert made.graph.node[0].op_type == "Cast"
    expected = np.array([TABLE[1], TABLE[0]]) @ (np.eye(3) if reader == "output" else TABLE)
    assert y_of(made) == expected.tolist()


@every_half
def test_a_table_of_a_body_is_looked_up_in_it(half: Half) -> None:
    bodies = {}
    for kind in ("then_branch", "else_branch"):
        nodes, made = rows_of(f"{kind}.table", f"{kind}.y", 2, 1), half.info(f"{kind}.y", [2, 3])
        bodies[kind] = helper.make_graph(nodes, kind, [], [made], [half.tensor(TABLE, f"{kind}.table")])
    condition = numpy_helper.from_array(np.array(True), "yes")
    assert y_of(half.twin(half.model_of([make("If", ["yes"], ["y"], **bodies)], condition))) == [TABLE[2], TABLE[1]]


@every_half
def test_a_table_of_the_graph_may_be_looked_up_in_a_body(half: Half) -> None:
    bodies = {}
    for kind in ("then_branch", "else_branch"):
        nodes, made = rows_of("table", f"{kind}.y", 2, 1), half.info(f"{kind}.y", [2, 3])
        bodies[kind] = helper.make_graph(nodes, kind, [], [made])
    condition, table = numpy_helper.from_array(np.array(True), "yes"), half.tensor(TABLE, "table")
    nodes = [*rows_of("table", "rows", 0, 0), make("If", ["yes"], ["z"], **bodies), make("Add", ["z", "rows"], ["y"])]
    assert y_of(half.twin(half.model_of(nodes, condition, table))) == [[0, 0, 0], [11, 22, 33]]


# Bodies


@every_half
def test_bodies_are_widened_with_weights_of_their_own(half: Half) -> None:
    condition = numpy_helper.from_array(np.array(True), "yes")
    made = half.twin(half.model_of([make("If", ["yes"], ["y"], **branches(half))], condition))
    assert y_of(made) == [[2, 4, 6], [-8, 10, 12]]


@every_half
def test_bodies_in_bodies_are_widened(half: Half) -> None:
    inner = make("If", ["yes"], ["then_branch.y"], **branches(half, name="inner."))
    outer = branches(half, inner)
    condition = numpy_helper.from_array(np.array(True), "yes")
    made = half.twin(half.model_of([make("If", ["yes"], ["y"], **outer)], condition))
    assert y_of(made) == [[2, 4, 6], [-8, 10, 12]]


@every_half
def test_a_loop_carries_what_is_widened(half: Half) -> None:
    nodes = [make("Identity", ["on"], ["still"]), make("Mul", ["carried", "two"], ["next"])]
    ends = [helper.make_tensor_value_info("at", TensorProto.INT64, []), helper.make_tensor_value_info("on", 9, [])]
    body = helper.make_graph(
        nodes,
        "body",
        [*ends, half.info("carried", [2, 3])],
        [helper.make_tensor_value_info("still", 9, []), half.info("next", [2, 3])],
        [half.tensor([2], "two")],
    )
    times = numpy_helper.from_array(np.array(3), "times")
    made = half.twin(half.model_of([make("Loop", ["times", "", "x"], ["y"], body=body)], times))
    assert y_of(made) == [[8, 16, 24], [-32, 40, 48]]


@every_half
def test_a_weight_of_the_graph_is_seen_widened_in_a_body(half: Half) -> None:
    bodies = {
        kind: helper.make_graph([make("Mul", ["x", "w"], [f"{kind}.y"])], kind, [], [half.info(f"{kind}.y", [2, 3])])
        for kind in ("then_branch", "else_branch")
    }
    condition = numpy_helper.from_array(np.array(True), "yes")
    weight = half.tensor([1, 10, 100], "w")
    made = half.twin(half.model_of([make("If", ["yes"], ["y"], **bodies)], condition, weight))
    assert y_of(made) == [[1, 20, 300], [-4, 50, 600]]


# Functions


def function_of(nodes: Sequence[onnx.NodeProto], inputs: Sequence[str] = ("a",)) -> onnx.FunctionProto:
    """The inputs -> the nodes -> b"""
    return helper.make_function("local", "Called", inputs, ["b"], nodes, [helper.make_opsetid("", 22)])


@every_half
def test_a_function_is_widened(half: Half) -> None:
    function = function_of([make("Constant", [], ["two"], value=half.tensor([2])), make("Mul", ["a", "two"], ["b"])])
    call = make("Called", ["x"], ["y"], domain="local")
    model = checked([call], [half.info("x", [2, 3])], [half.info("y", [2, 3])], functions=[function])
    assert y_of(half.twin(model)) == [[2, 4, 6], [-8, 10, 12]]


@every_half
def test_a_function_is_widened_where_only_it_has_half_precision(half: Half) -> None:
    nodes = [make("Cast", ["a"], ["half"], to=half.kind), make("Cast", ["half"], ["b"], to=F32)]
    call = make("Called", ["x"], ["y"], domain="local")
    model = checked(
        [call], [half.info("x", [2, 3], F32)], [half.info("y", [2, 3], F32)], functions=[function_of(nodes)]
    )
    made = onnx.ModelProto.FromString(float32_twin(model.SerializeToString(), half.types))
    assert {attribute.i for node in made.functions[0].node for attribute in node.attribute} == {F32}


def bodies_in_a_function(half: Half) -> tuple[onnx.FunctionProto, onnx.NodeProto, onnx.TensorProto]:
    """a rounded to half precision in both branches of an If; the function, a call, and its condition."""
    bodies = {}
    for kind in ("then_branch", "else_branch"):
        nodes = [make("Cast", ["a"], [f"{kind}.h"], to=half.kind), make("Cast", [f"{kind}.h"], [f"{kind}.y"], to=F32)]
        made = helper.make_tensor_value_info(f"{kind}.y", F32, None)
        bodies[kind] = helper.make_graph(nodes, kind, [], [made])
    function = function_of([make("If", ["c"], ["b"], **bodies)], ["a", "c"])
    call = make("Called", ["x", "yes"], ["y"], domain="local")
    return function, call, numpy_helper.from_array(np.array(True), "yes")


@every_half
@pytest.mark.parametrize("alone", [False, True])
def test_the_bodies_in_a_function_are_widened(half: Half, alone: bool) -> None:
    """alone: no other place has half precision."""
    function, call, condition = bodies_in_a_function(half)
    nodes = [call] if alone else [make("Cast", ["z"], ["x"], to=F32), call]
    given = half.info("x", [2, 3], F32) if alone else half.info("z", [2, 3])
    model = checked(nodes, [given], [half.info("y", [2, 3], F32)], [condition], [function])
    made = onnx.ModelProto.FromString(float32_twin(model.SerializeToString(), half.types))
    (branch,) = [node for node in made.functions[0].node if node.op_type == "If"]
    assert not any(computes_in(attribute.g, half.types) for attribute in branch.attribute)
    assert run(made, {given.name: np.full((2, 3), 1 + 2.0**-20, np.float32)})["y"].tolist() == [[1 + 2.0**-20] * 3] * 2


# Which types


@pytest.mark.parametrize(
    ("dtype", "types"), [(np.float16, BFLOAT16), (np.float32, BFLOAT16), (np.float32, HALF)], ids=str
)
def test_where_nothing_is_to_be_widened_the_same_bytes_come_back(dtype: type, types: Types) -> None:
    model = norm_and_readers(dtype=dtype).model().SerializeToString()
    assert float32_twin(model, types) is model
    assert float32_twin(model) is model


def test_both_types_of_half_precision_are_known() -> None:
    assert {helper.np_dtype_to_tensor_dtype(dtype) for dtype in HALVES} == set(HALF)
    assert set(BFLOAT16) < set(HALF)


def of_both_types() -> onnx.ModelProto:
    """x in float16, times a weight of it; from there on bfloat16."""
    nodes = [
        make("Mul", ["x", "w"], ["half"]),
        make("Cast", ["half"], ["brain"], to=BF16),
        make("Constant", [], ["v"], value=numpy_helper.from_array(np.array([1, 1, 2], ml_dtypes.bfloat16))),
        make("Mul", ["brain", "v"], ["product"]),
        make("Cast", ["product"], ["y"], to=F16),
    ]
    weight = numpy_helper.from_array(np.array([1, 10, 100], np.float16), "w")
    x, y = (helper.make_tensor_value_info(name, F16, [2, 3]) for name in "xy")
    return checked(nodes, [x], [y], [weight])


def test_widening_bfloat16_leaves_float16_as_it_is() -> None:
    made = onnx.ModelProto.FromString(float32_twin(of_both_types().SerializeToString(), BFLOAT16))
    onnx.checker.check_model(made, full_check=True)
    assert not computes_in(made.graph, BFLOAT16)
    assert [node.op_type for node in made.graph.node] == ["Mul", "Cast", "Constant", "Mul", "Cast"]
    assert made.graph.initializer[0].data_type == F16
    assert [value.type.tensor_type.elem_type for value in (*made.graph.input, *made.graph.output)] == [F16, F16]
    assert made.graph.node[-1].attribute[0].i == F16
    x = np.ones((2, 3), np.float16)
    assert run(made, {"x": x})["y"].tolist() == [[1, 10, 200]] * 2


def test_both_types_of_half_precision_are_widened_together() -> None:
    half = Half(F16, np.float16, HALF)
    assert y_of(half.twin(of_both_types())) == [[1, 20, 600], [-4, 50, 1200]]


# Numbers


@every_half
def test_the_numbers_are_those_of_half_precision_weights_computed_in_float32(half: Half) -> None:
    plain = norm_and_readers(casts=False).model()
    rounded = onnx.ModelProto()
    rounded.CopyFrom(plain)
    for tensor in rounded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(half.dtype).astype(np.float32), tensor.name))
    x = {"x": np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)}
    made, expected = run(half.twin(in_half(plain, half)), x), run(rounded, x)
    for name in ("y0", "y1"):
        np.testing.assert_allclose(made[name], expected[name], rtol=1e-5, atol=1e-5)


@every_half
@pytest.mark.parametrize("casts", [True, False])
def test_the_numbers_are_those_of_numpy_in_double_precision(half: Half, casts: bool) -> None:
    model = in_half(norm_and_readers(casts=casts).model(), half)
    weights = {one.name: numpy_helper.to_array(one).astype(np.float64) for one in model.graph.initializer}
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    epsilon = float(half.dtype(1e-5))
    normed = x / np.sqrt(np.square(x, dtype=np.float64).mean(axis=-1, keepdims=True) + epsilon)
    made = run(half.twin(model), {"x": x})
    for index in (0, 1):
        expected = (normed * weights["norm.weight"]) @ weights[f"w{index}"]
        np.testing.assert_allclose(made[f"y{index}"], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_what_overflows_in_float16_does_not_in_its_twin() -> None:
    half = Half(F16, np.float16, HALF)
    model = half.model_of([make("Mul", ["x", "w"], ["y"])], half.tensor([1000], "w"))
    assert y_of(half.twin(model), np.full((2, 3), 1000)) == [[1e6] * 3] * 2


# Whole runs


def in_half(model: onnx.ModelProto, half: Half) -> onnx.ModelProto:
    """The model with every float32 in half precision."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        if value.type.tensor_type.elem_type == F32:
            value.type.tensor_type.elem_type = half.kind
    for tensor in made.graph.initializer:
        if tensor.data_type == F32:
            tensor.CopyFrom(half.tensor(numpy_helper.to_array(tensor), tensor.name))
    for node in made.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == F32:
                attribute.i = half.kind
    return made


@pytest.mark.parametrize("lm_head", ["none", "8"])
def test_a_bfloat16_decoder_is_quantised_from_end_to_end(tmp_path: Path, lm_head: str) -> None:
    half = Half(BF16, ml_dtypes.bfloat16, BFLOAT16)
    model = in_half(tiny_decoder(), half)
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
    expected, actual = run(half.twin(model), feed)["logits"], run(whole, feed)["logits"]
    assert 0 < np.linalg.norm(actual - expected) < 0.5 * np.linalg.norm(expected)
    assert report.comparison.kl_mean is not None
