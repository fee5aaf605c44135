"""Graphs that no exporter should write and some do: right or refused, never wrong, never a crash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, norm_and_readers, run, two_linears
from folding import assert_close, assert_folding_changes_nothing, folded_at_random, random_x
from onnx import helper

from awq_onnx import Recipe, pipeline
from awq_onnx.passes import steps, walk
from awq_onnx.passes.absorb import find_groups
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.sites import Choice, Refusal, survey
from awq_onnx.passes.steps import Step

X: Array = np.random.default_rng(1).standard_normal((8, 6, 32)).astype(np.float32)


def quantized(model: onnx.ModelProto, feed: dict[str, Array], folder: Path) -> dict[str, float]:
    """How far each output is from the original's, relatively."""
    pipeline.quantize(model, folder / "out.onnx", Recipe(accuracy_level=0), calibration=feed)
    expected, actual = run(model, feed), run(folder / "out.onnx", feed)
    return {
        name: float(np.linalg.norm(actual[name].astype(np.float64) - values) / np.linalg.norm(values))
        for name, values in expected.items()
    }


# Folds


@pytest.mark.parametrize("to", [np.int32, np.uint8, np.bool_])
def test_a_cast_that_rounds_is_no_way_for_a_scale(tmp_path: Path, to: Any) -> None:
    def rounded(builder: GraphBuilder, x: str) -> str:
        five_times = builder.add("Relu", builder.add("Mul", x, builder.constant(5.0)))
        return builder.cast(builder.cast(five_times, to, "to"), np.float32, "back")

    assert assert_folding_changes_nothing(two_linears(rounded).model(), random_x(32), tmp_path).divided == set()


def test_the_mask_of_a_dropout_is_no_way_for_a_scale(tmp_path: Path) -> None:
    def masked(builder: GraphBuilder, x: str) -> str:
        builder.nodes.append(helper.make_node("Dropout", [x], ["dropped", "mask"], name="drop"))
        return builder.cast("mask", np.float32, "mask_as_float")

    assert assert_folding_changes_nothing(two_linears(masked).model(), random_x(32), tmp_path).divided == set()


@pytest.mark.parametrize("op_type", ["Gather", "Slice"])
def test_channels_that_an_input_of_the_model_chooses_are_no_way_for_a_scale(tmp_path: Path, op_type: str) -> None:
    def chosen(builder: GraphBuilder, x: str) -> str:
        if op_type == "Gather":
            return builder.add("Gather", x, builder.input("choice", [16], np.int64), axis=2)
        start, stop = builder.input("choice", [1], np.int64), builder.input("stop", [1], np.int64)
        return builder.add("Slice", x, start, stop, builder.integers(2))

    model = two_linears(chosen, arriving=16).model()

    def feed(first: int) -> dict[str, Array]:
        if op_type == "Gather":
            return {**random_x(32), "choice": np.arange(first, first + 16)}
        return {**random_x(32), "choice": np.array([first]), "stop": np.array([first + 16])}

    made = folded_at_random(model, feed(0), tmp_path)
    assert_close(run(made.model, feed(7)), run(model, feed(7)))


def named_norms(*names: str) -> GraphBuilder:
    """Norms side by side with one gain, each with a reader of its own."""
    builder = GraphBuilder()
    gain = builder.constant(np.linspace(0.5, 2, 32), "gain")
    for index, name in enumerate(names):
        x = builder.input(f"x{index}", ["batch", "sequence", 32])
        normed = builder.add("Mul", x, gain, name=name, to=f"normed_{index}")
        builder.output(builder.add("MatMul", normed, builder.weight(32, 8), name=f"reader_{index}"))
    return builder


@pytest.mark.parametrize("names", [("a", "b", "c"), ("", "", "")])
def test_norms_of_one_name_that_share_a_gain_are_divided_each(tmp_path: Path, names: tuple[str, ...]) -> None:
    feed = {f"x{index}": X + index for index in range(3)}
    assert len(assert_folding_changes_nothing(named_norms(*names).model(), feed, tmp_path).groups) == 3


def test_a_gain_that_is_an_output_of_the_model_is_copied(tmp_path: Path) -> None:
    builder = named_norms("norm")
    builder.output("gain", [32])
    assert_folding_changes_nothing(builder.model(), {"x0": X}, tmp_path)


def test_a_float_weight_that_is_an_output_of_the_model_is_copied(tmp_path: Path) -> None:
    builder = norm_and_readers(K=32, columns=(8, 8))
    builder.output("w0", [32, 8])
    choice = Choice(exclude=("reader_0",))
    assert_folding_changes_nothing(builder.model(), random_x(32), tmp_path, choice=choice)


def test_a_long_history_before_a_mul_is_looked_at(tmp_path: Path) -> None:
    """Whether a side of a Mul is a constant is asked of all nodes before it."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 32])
    long = x
    for _ in range(700):
        long = builder.add("Tanh", long)
    builder.output(builder.linear(builder.add("Mul", long, builder.linear(x, 32, 32, "up")), 32, 8, "down"))
    assert assert_folding_changes_nothing(builder.model(), random_x(32), tmp_path).divided == {"up/MatMul"}


def test_a_long_way_between_two_layers_is_followed(tmp_path: Path) -> None:
    def many(builder: GraphBuilder, x: str) -> str:
        for _ in range(700):
            x = builder.add("Identity", x)
        return x

    assert assert_folding_changes_nothing(two_linears(many).model(), random_x(32), tmp_path).divided == {"first/MatMul"}


def test_a_power_by_squares_is_refused_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def power(builder: GraphBuilder, x: str) -> str:
        for _ in range(10):
            x = builder.add("Mul", x, x)
        return x

    asked: list[str | None] = []
    steps_back = steps.steps_back

    def counting(value: ir.Value, facts: Facts) -> Sequence[Step]:
        asked.append(value.name)
        return steps_back(value, facts)

    monkeypatch.setattr(walk, "steps_back", counting)
    *_, last = find_groups(survey(ir.from_proto(two_linears(power).model())))
    assert isinstance(last.routes, Refusal)
    assert len(asked) < 200


# Whole runs


@pytest.mark.parametrize("second", ["bias", "beta", "none"])
def test_two_layers_with_one_weight_keep_their_own_biases(tmp_path: Path, second: str) -> None:
    builder = GraphBuilder()
    x, weight = builder.input("x", ["rows", 32]), builder.weight(32, 32, "w")
    bias = builder.constant(np.full(32, 10.0), "c")
    builder.output(builder.add("Gemm", x, weight, bias, name="first", to="y0"))
    other = [builder.constant(np.full(32, 20.0))] if second == "bias" else [bias] if second == "beta" else []
    beta = 2.0 if second == "beta" else 1.0
    builder.output(builder.add("Gemm", x, weight, *other, name="second", to="y1", beta=beta))
    assert max(quantized(builder.model(), {"x": X.reshape(-1, 32)}, tmp_path).values()) < 0.15


def test_an_input_of_one_dimension_behind_other_nodes_is_refused() -> None:
    builder = GraphBuilder()
    hidden = builder.add("Tanh", builder.input("x", [32]))
    builder.output(builder.add("MatMul", hidden, builder.weight(32, 8), name="layer"), [8])
    found = survey(ir.from_proto(builder.model()))
    assert [one.reason for one in found.kept] == ["its input has one dimension, MatMulNBits wants two or more"]


def test_a_weight_rounded_to_whole_numbers_is_rounded_or_refused(tmp_path: Path) -> None:
    builder = GraphBuilder()
    weight = builder.constant(builder.rng.standard_normal((32, 8)) * 1.2, "w")
    whole = builder.cast(builder.cast(weight, np.int8, "to_int"), np.float32, "back")
    builder.output(builder.add("MatMul", builder.input("x", ["b", "s", 32]), whole, name="layer", to="y"))
    builder.output(builder.add("MatMul", "x", builder.weight(32, 8), name="other", to="z"))
    assert quantized(builder.model(), {"x": X}, tmp_path)["y"] < 0.15


def test_one_weight_in_two_precisions_is_packed_for_each(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x, weight = builder.input("x", ["b", "s", 32]), builder.weight(32, 8, "w")
    builder.output(builder.add("MatMul", x, weight, name="single", to="y"))
    halves = [builder.cast(one, np.float16, f"{one}_half") for one in (x, weight)]
    builder.output(builder.add("MatMul", *halves, name="half", to="z"), dtype=np.float16)
    assert max(quantized(builder.model(), {"x": X}, tmp_path).values()) < 0.15


def test_a_weight_that_is_a_product_of_constants_is_packed(tmp_path: Path) -> None:
    """A LoRA that was folded in by the graph."""
    builder = GraphBuilder()
    product = builder.add("MatMul", builder.weight(32, 4), builder.weight(4, 8))
    weight = builder.add("Add", builder.weight(32, 8), product)
    builder.output(builder.add("MatMul", builder.input("x", ["b", "s", 32]), weight, name="layer", to="y"))
    assert quantized(builder.model(), {"x": X}, tmp_path)["y"] < 0.15


def test_an_initializer_that_callers_may_override_is_no_input_to_make_up(tmp_path: Path) -> None:
    builder = norm_and_readers(K=32)
    builder.input("norm.weight", [32])
    assert max(quantized(builder.model(), {"x": X}, tmp_path).values()) < 0.15


def test_a_layer_without_columns_stays(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["b", "s", 32])
    builder.output(builder.add("MatMul", x, builder.constant(np.zeros((32, 0))), name="empty", to="z"), ["b", "s", 0])
    builder.output(builder.add("MatMul", x, builder.weight(32, 8), name="layer", to="y"))
    pipeline.quantize(builder.model(), tmp_path / "out.onnx", Recipe(accuracy_level=0), calibration={"x": X})
    assert run(tmp_path / "out.onnx", {"x": X})["z"].shape == (8, 6, 0)


def test_a_weight_that_is_an_output_of_the_model_stays(tmp_path: Path) -> None:
    builder = norm_and_readers(K=32)
    builder.output("w0", [32, 48])
    assert quantized(builder.model(), {"x": X}, tmp_path)["w0"] == 0


@pytest.mark.parametrize("make", ["Where", "Tile", "Reshape", "Slice", "Neg", "DequantizeLinear"])
def test_a_computed_weight_is_packed_as_what_it_is(tmp_path: Path, make: str) -> None:
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["b", "s", 32]), 32, "norm")
    builder.output(builder.add("MatMul", normed, computed_weight(builder, make), name="layer", to="y"))
    assert quantized(builder.model(), {"x": X}, tmp_path)["y"] < 0.15
    ops = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert make not in ops
    assert ops.count("MatMulNBits") == 1


def computed_weight(builder: GraphBuilder, make: str) -> str:
    if make == "Where":
        mask = builder.constant(builder.rng.random((32, 8)) < 0.5, dtype=np.bool_)
        return builder.add("Where", mask, builder.weight(32, 8), builder.constant(0.0))
    if make == "Tile":
        return builder.add("Tile", builder.weight(32, 4), builder.integers(1, 2))
    if make == "Reshape":
        return builder.add("Reshape", builder.weight(8, 32), builder.integers(32, 8))
    if make == "Slice":
        return builder.add("Slice", builder.weight(32, 24), *(builder.integers(one) for one in (8, 16, 1)))
    if make == "Neg":
        return builder.add("Neg", builder.weight(32, 8))
    codes = builder.constant(builder.rng.integers(-100, 100, (32, 8)), dtype=np.int8)
    return builder.add("DequantizeLinear", codes, builder.constant(np.linspace(0.01, 0.1, 8)), axis=1)
