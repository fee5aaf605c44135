"""passes/experts.py: a MatMul with a stack of weights becomes a layer for each expert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run, save
from folding import assert_close
from onnx import TensorProto, helper

import awq_onnx
from awq_onnx.passes.experts import split_experts
from awq_onnx.passes.facts import facts_of
from awq_onnx.plan import make_plan
from awq_onnx.store import open_model

E, K, N, TOKENS = 3, 16, 8, 5


def stacked(
    *,
    dims: tuple[int | str, ...] = (E, "tokens", K),
    turned: bool = False,
    weight_name: str = "w",
    name: str = "experts",
    **options: Any,
) -> GraphBuilder:
    """x -> MatMul with (E, K, N), or with (E, N, K) behind a Transpose -> y."""
    builder = GraphBuilder(**options)
    weight = builder.rng.standard_normal((E, N, K) if turned else (E, K, N)) / 4
    read = builder.constant(weight, weight_name)
    if turned:
        read = builder.add("Transpose", read, name="turn", perm=[0, 2, 1])
    builder.output(builder.add("MatMul", builder.input("x", list(dims)), read, name=name, to="y"))
    return builder


def split(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    """How many were split, and what the model is then."""
    opened = ir.from_proto(model)
    count = split_experts(opened, facts_of(opened))
    return count, ir.to_proto(opened)


def x_of(*dims: int, dtype: Any = np.float32) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal(dims).astype(dtype)}


def op_types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def assert_split(model: onnx.ModelProto, feed: dict[str, Array], count: int = 1) -> onnx.ModelProto:
    done, after = split(model)
    assert done == count
    onnx.checker.check_model(after, full_check=True)
    assert_close(run(after, feed), run(model, feed), 1e-3 if feed["x"].dtype == np.float16 else 1e-6)
    return after


@pytest.mark.parametrize("turned", [False, True], ids=["(E, K, N)", "(E, N, K) and a Transpose"])
@pytest.mark.parametrize("first", [E, 1], ids=["rows of their own", "the same rows for all"])
def test_every_expert_gets_a_matmul_that_computes_the_same(turned: bool, first: int) -> None:
    model = stacked(dims=(first, "tokens", K), turned=turned).model()
    after = assert_split(model, x_of(first, TOKENS, K))
    ops = op_types(after)
    assert (ops["MatMul"], ops["Concat"], ops["Split"]) == (E, 1, int(first == E))
    assert "w" not in {one.name for one in after.graph.initializer}  # nothing is stored twice


def test_experts_are_named_after_the_node_and_its_output_stays() -> None:
    _, after = split(stacked().model())
    assert [node.name for node in after.graph.node if node.op_type == "MatMul"] == [f"experts.{i}" for i in range(E)]
    assert [value.name for value in after.graph.output] == ["y"]


def test_a_node_without_a_name_is_split_too() -> None:
    model = stacked().model()
    model.graph.node[0].name = ""
    assert_split(model, x_of(E, TOKENS, K))


def test_a_stack_in_half_precision_stays_in_half_precision() -> None:
    after = assert_split(stacked(dtype=np.float16).model(), x_of(E, TOKENS, K, dtype=np.float16))
    kinds = {one.data_type for one in after.graph.initializer if list(one.dims) == [K, N]}
    assert kinds == {TensorProto.FLOAT16}


def test_gate_and_down_of_stacked_experts_are_both_split() -> None:
    builder = stacked()
    acted = builder.add("Relu", "y")
    down = builder.constant(builder.rng.standard_normal((E, N, K)), "down.w")
    builder.output(builder.add("MatMul", acted, down, name="down", to="z"))
    assert_split(builder.model(), x_of(E, TOKENS, K), count=2)


def test_a_stack_in_the_branch_of_an_if_is_split_there() -> None:
    builder = GraphBuilder()
    builder.input("x", [E, "tokens", K])
    builder.input("flag", [], np.bool_)
    builder.constant(builder.rng.standard_normal((E, K, N)), "w")
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [E, None, N])
    bodies = [
        helper.make_graph([helper.make_node(op, ["x", "w"], ["inner"], name="layer")], op, [], [value])
        for op in ("MatMul", "MatMul")
    ]
    builder.nodes.append(helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("y", [E, "tokens", N])
    assert_split(builder.model(), {**x_of(E, TOKENS, K), "flag": np.array(True)}, count=2)


# Names that are taken


def test_two_matmuls_with_one_stack_are_both_split() -> None:
    builder = stacked()
    builder.output(builder.add("MatMul", builder.add("Neg", "x"), "w", name="again", to="z"))
    after = assert_split(builder.model(), x_of(E, TOKENS, K), count=2)
    assert len([one for one in after.graph.initializer if list(one.dims) == [K, N]]) == E  # stored once


def test_a_name_that_an_expert_would_get_may_be_taken() -> None:
    builder = stacked()
    builder.output(builder.add("Add", "y", builder.constant(np.ones(N), "w.0"), to="z"))
    assert_split(builder.model(), x_of(E, TOKENS, K))


def test_a_value_named_as_that_of_an_expert_stays_what_it_is() -> None:
    builder = stacked()
    builder.output(builder.add("Neg", "y", to="experts.0.product"))
    assert_split(builder.model(), x_of(E, TOKENS, K))


# What is left alone


@pytest.mark.parametrize(
    ("model", "dims"),
    [
        pytest.param(stacked(dims=("tokens", K)).model(), (TOKENS, K), id="rows without a first axis"),
        pytest.param(stacked(dims=("any", "tokens", K)).model(), (E, TOKENS, K), id="a first axis of any size"),
        pytest.param(stacked(dims=(2, E, "tokens", K)).model(), (2, E, TOKENS, K), id="four axes"),
        pytest.param(stacked(opset=12).model(), (E, TOKENS, K), id="opset 12"),
    ],
)
def test_what_cannot_be_told_apart_stays(model: onnx.ModelProto, dims: tuple[int, ...]) -> None:
    done, after = split(model)
    assert done == 0
    assert op_types(after)["MatMul"] == 1
    assert_close(run(after, x_of(*dims)), run(model, x_of(*dims)))


def test_an_input_of_unknown_shape_leaves_the_stack_alone() -> None:
    model = stacked().model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert split(model)[0] == 0


def test_a_weight_that_a_caller_may_override_is_left_alone() -> None:
    builder = stacked()
    builder.input("w", [E, K, N])
    assert split(builder.model())[0] == 0


def test_a_stack_of_nothing_is_left_alone() -> None:
    builder = GraphBuilder()
    weight = builder.constant(np.zeros((E, K, 0)), "w")
    builder.output(builder.add("MatMul", builder.input("x", [E, "tokens", K]), weight, to="y"), [E, "tokens", 0])
    assert split(builder.model())[0] == 0


def test_a_left_alone_stack_is_told_with_its_reason() -> None:
    builder = stacked(dims=("tokens", K))
    builder.output(builder.linear("x", K, N, "other"))
    plan = make_plan(ir.from_proto(builder.model()))
    assert [(one.what, one.reason) for one in plan.survey.kept] == [
        ("experts", "its weight has 3 dimensions, only 2 are supported")
    ]
    assert plan.notes == ()


# Weights in files, whole runs


@pytest.mark.parametrize("external", [False, True], ids=["in the model file", "in a data file"])
@pytest.mark.parametrize("turned", [False, True])
def test_large_weights_become_references_to_their_part_of_the_file(
    tmp_path: Path, external: bool, turned: bool
) -> None:
    builder = GraphBuilder()
    builder.constant(np.arange(1000), "in the way")
    weight = builder.rng.standard_normal((E, 96, 64) if turned else (E, 64, 96)).astype(np.float32)
    read = builder.constant(weight, "w")
    if turned:
        read = builder.add("Transpose", read, perm=[0, 2, 1])
    builder.output(builder.add("MatMul", builder.input("x", [E, "tokens", 64]), read, name="experts", to="y"))
    with open_model(save(builder.model(), tmp_path / "model.onnx", external=external)) as opened:
        whole = opened.model.graph.initializers["w"].const_value
        assert isinstance(whole, ir.ExternalTensor)
        assert split_experts(opened.model, facts_of(opened.model)) == 1
        for index in range(E):
            part = opened.model.graph.initializers[f"w.{index}"].const_value
            assert isinstance(part, ir.ExternalTensor)
            assert part.offset == (whole.offset or 0) + index * weight[0].nbytes
            np.testing.assert_array_equal(opened.read(part), weight[index])
            np.testing.assert_array_equal(part.numpy(), weight[index])


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts_are_quantised_and_told(tmp_path: Path, turned: bool) -> None:
    model = stacked(turned=turned).model()
    feed = x_of(E, 40, K)
    report = awq_onnx.quantize(model, tmp_path / "out.onnx", awq_onnx.Recipe(accuracy_level=0), calibration=feed)
    assert [one.name for one in report.matmuls] == [f"experts.{index}" for index in range(E)]
    assert report.notes == ("1 stacks of experts were split into a MatMul each, with a Split and a Concat around",)
    expected, actual = run(model, feed)["y"], run(tmp_path / "out.onnx", feed)["y"]
    assert 0 < np.linalg.norm(actual - expected) < 0.12 * np.linalg.norm(expected)
