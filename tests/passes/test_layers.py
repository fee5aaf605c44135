"""Every way to write a linear layer: its rows are multiplied, its columns and biases divided, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Array, GraphBuilder
from folding import assert_folding_changes_nothing, microsoft
from onnx import helper, numpy_helper

from awq_onnx.passes.sites import Refusal

K, HIDDEN = 24, 32
Layer = Callable[[GraphBuilder, str, int, int, str], str]


def matmul(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    return builder.add("MatMul", x, builder.weight(rows, columns), name=name)


def biased(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    bias = builder.constant(builder.rng.standard_normal(columns))
    return builder.add("Add", matmul(builder, x, rows, columns, name), bias, name=f"{name}/Add")


def transposed(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    turned = builder.add("Transpose", builder.weight(columns, rows), perm=[1, 0])
    return builder.add("MatMul", x, turned, name=name)


def dequantized(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    codes = builder.constant(builder.rng.integers(-100, 100, (rows, columns)), dtype=np.int8)
    weight = builder.add("DequantizeLinear", codes, builder.constant(np.linspace(0.001, 0.01, columns)), axis=1)
    return builder.add("MatMul", x, weight, name=name)


def fused(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    weight = builder.weight(columns, rows)
    return builder.add("FusedMatMul", x, weight, name=name, domain="com.microsoft", transB=1, alpha=0.25)


def gemm(**options: Any) -> Layer:
    def layer(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
        weight = builder.weight(columns, rows) if options.get("transB") else builder.weight(rows, columns)
        bias = builder.constant(builder.rng.standard_normal(columns))
        return builder.add("Gemm", x, weight, bias, name=name, **options)

    return layer


def gemm_without_bias(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    return builder.add("Gemm", x, builder.weight(rows, columns), name=name)


def gemm_with_a_number(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    return builder.add("Gemm", x, builder.weight(rows, columns), builder.constant([0.5]), name=name, beta=3.0)


def gemm_and_more_biases(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    made = gemm()(builder, x, rows, columns, name)
    return builder.add("Add", builder.constant(builder.rng.standard_normal((1, columns))), made)


def conv1d(builder: GraphBuilder, x: str, rows: int, columns: int, name: str) -> str:
    """GPT-2's: a Gemm between two Reshapes that read the shape of its input."""
    shape = builder.add("Shape", x)
    ends = [builder.integers(one) for one in (0, -1, 0)]
    target = builder.add("Concat", builder.add("Slice", shape, *ends), builder.integers(columns), axis=0)
    flat = builder.add("Reshape", x, builder.integers(-1, rows))
    return builder.add("Reshape", gemm(transB=0)(builder, flat, rows, columns, name), target)


FLAT: list[tuple[str, Layer]] = [
    ("MatMul", matmul),
    ("MatMul, Add", biased),
    ("Transpose", transposed),
    ("int8", dequantized),
    ("FusedMatMul", fused),
    ("Gemm", gemm()),
    ("Gemm transB", gemm(transB=1)),
    ("Gemm alpha, beta", gemm(alpha=0.5, beta=-2.0)),
    ("Gemm transB alpha", gemm(transB=1, alpha=3.0)),
    ("Gemm without bias", gemm_without_bias),
    ("Gemm with a number", gemm_with_a_number),
    ("Gemm, Add", gemm_and_more_biases),
    ("Conv1D", conv1d),
]
every_layer = pytest.mark.parametrize("layer", [layer for _, layer in FLAT], ids=[name for name, _ in FLAT])


def two(layer: Layer, *, norm: bool = True, middle: str = "Relu") -> GraphBuilder:
    """x -> norm -> first -> middle -> second -> y."""
    builder = GraphBuilder()
    x = builder.input("x", ["rows", K])
    if norm:
        x = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    hidden = builder.add(middle, layer(builder, x, K, HIDDEN, "first"), name="middle")
    builder.output(layer(builder, hidden, HIDDEN, 8, "second"))
    return builder


def x_of(*dims: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(2).standard_normal((*dims, K)).astype(np.float32)}


def tolerance(layer: Layer) -> float:
    """onnxruntime itself rounds activations to eight bits where a weight is int8."""
    return 0.05 if layer is dequantized else 2e-5


@every_layer
def test_a_layer_takes_scales_from_before_and_from_behind(tmp_path: Path, layer: Layer) -> None:
    made = assert_folding_changes_nothing(microsoft(two(layer)), x_of(7), tmp_path, tolerance=tolerance(layer))
    assert (made.divided, made.refused) == ({"norm", "first"}, {})


@every_layer
def test_a_function_between_two_layers_keeps_them_apart(tmp_path: Path, layer: Layer) -> None:
    model = microsoft(two(layer, middle="Tanh"))
    made = assert_folding_changes_nothing(model, x_of(7), tmp_path, tolerance=tolerance(layer))
    assert made.refused == {"second": Refusal("middle", "Tanh comes before, which cannot be divided")}


def test_conv1d_between_three_dimensions_takes_scales(tmp_path: Path) -> None:
    """GPT-2's MLP with a Relu, and its norm: (batch, sequence, K) throughout."""
    builder = two(conv1d)
    builder.inputs[0].CopyFrom(helper.make_tensor_value_info("x", 1, ["batch", "sequence", K]))
    made = assert_folding_changes_nothing(microsoft(builder), x_of(2, 5), tmp_path)
    assert (made.divided, made.refused) == ({"norm", "first"}, {})


def test_three_conv1d_behind_one_norm_form_one_group(tmp_path: Path) -> None:
    """Each has a Reshape of its own: three inputs, one absorber, one scale."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", K])
    normed = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    for name in "qkv":
        builder.output(conv1d(builder, normed, K, 8, name))
    made = assert_folding_changes_nothing(microsoft(builder), x_of(2, 5), tmp_path)
    (group,) = made.groups.values()
    assert [site.name for site in group.sites] == ["q", "k", "v"]
    assert len(group.inputs) == 3
    assert made.divided == {"norm"}


def test_a_conv1d_whose_input_somebody_else_reads_flat_is_refused(tmp_path: Path) -> None:
    builder = two(conv1d)
    flat = next(node for node in builder.nodes if node.name == "first").input[0]
    builder.output(builder.add("Relu", flat, name="spy"))
    made = assert_folding_changes_nothing(microsoft(builder), x_of(7), tmp_path)
    assert made.refused["first"] == Refusal("spy", "Relu reads the same input")


def tied(*, second_norm: bool = True) -> GraphBuilder:
    """One weight behind two norms."""
    builder = GraphBuilder()
    weight = builder.weight(K, 8, "w")
    for index in (0, 1):
        x = builder.input(f"x{index}", ["batch", "sequence", K])
        if index == 0 or second_norm:
            gain = builder.constant(builder.outlier_gain(K), f"gain_{index}")
            x = builder.add("LayerNormalization", x, gain, name=f"norm_{index}")
        builder.output(builder.add("MatMul", x, weight, name=f"reader_{index}"))
    return builder


def tied_feed() -> dict[str, Array]:
    return {"x0": x_of(2, 5)["x"], "x1": x_of(2, 5)["x"] * 2 + 1}


def test_a_weight_behind_two_norms_has_one_scale_that_both_take(tmp_path: Path) -> None:
    builder = tied()
    made = assert_folding_changes_nothing(microsoft(builder), tied_feed(), tmp_path)
    assert made.divided == {"norm_0", "norm_1"}
    assert len(made.groups) == 1
    before = {one.name: numpy_helper.to_array(one) for one in builder.initializers}
    after = {one.name: numpy_helper.to_array(one) for one in made.model.graph.initializer}
    first, second = (before[f"gain_{index}"] / after[f"gain_{index}"] for index in (0, 1))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_a_weight_that_is_used_where_nothing_absorbs_is_refused(tmp_path: Path) -> None:
    made = assert_folding_changes_nothing(microsoft(tied(second_norm=False)), tied_feed(), tmp_path)
    expected = Refusal("x1", "one weight, used twice: the input is an input of the model")
    assert made.refused == {"reader_0": expected}


def test_one_weight_three_times_in_a_row_is_divided_each_time(tmp_path: Path) -> None:
    """ALBERT runs one layer again and again."""
    builder = GraphBuilder()
    x, weight = builder.input("x", ["batch", "sequence", K]), builder.weight(K, K, "w")
    x = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    for index in range(3):
        x = builder.add("Relu", builder.add("MatMul", x, weight, name=f"layer_{index}"))
    builder.output(x)
    made = assert_folding_changes_nothing(microsoft(builder), x_of(2, 5), tmp_path)
    assert made.divided == {"norm", "layer_0", "layer_1"}
