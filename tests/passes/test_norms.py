"""Every way to write a norm: its gain, and its beta, are divided; nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder
from folding import Folded, assert_folding_changes_nothing, microsoft
from onnx import helper, numpy_helper

from awq_onnx.passes.absorb import find_groups
from awq_onnx.passes.sites import Choice, Refusal, survey

K = 32
Norm = Callable[[GraphBuilder, str], str]


def vector(builder: GraphBuilder, name: str) -> str:
    return builder.constant(builder.outlier_gain(K) if "gain" in name else builder.rng.standard_normal(K), name)


def behind(norm: Norm, *, opset: int = 18, dtype: type = np.float32, rank: int = 3) -> GraphBuilder:
    """x -> norm -> two layers."""
    builder = GraphBuilder(opset=opset, dtype=dtype)
    dims: list[int | str] = ["batch", "sequence", K]
    normed = norm(builder, builder.input("x", dims[3 - rank :]))
    for index in (0, 1):
        builder.output(builder.add("MatMul", normed, builder.weight(K, 8), name=f"reader_{index}", to=f"y{index}"))
    return builder


def x_of(dtype: type = np.float32) -> Array:
    x: Array = np.random.default_rng(2).standard_normal((2, 5, K)).astype(dtype)
    return x


def folded(builder: GraphBuilder, folder: Path, tolerance: float = 2e-5) -> Folded:
    feed = {value.name: x_of(builder.dtype.type) for value in builder.inputs}
    return assert_folding_changes_nothing(microsoft(builder), feed, folder, tolerance=tolerance)


def changed(builder: GraphBuilder, made: Folded) -> set[str]:
    """The constants of the builder that are others, or gone, in the folded model; weights aside."""
    after = {one.name: numpy_helper.to_array(one) for one in made.model.graph.initializer}
    before = {one.name: numpy_helper.to_array(one) for one in builder.initializers}
    return {
        name
        for name, values in before.items()
        if values.ndim < 2 and (name not in after or not np.array_equal(after[name], values))
    }


def layer_normalization(builder: GraphBuilder, x: str) -> str:
    return builder.add("LayerNormalization", x, vector(builder, "gain"), vector(builder, "beta"), name="norm")


def layer_normalization_without_beta(builder: GraphBuilder, x: str) -> str:
    return builder.add("LayerNormalization", x, vector(builder, "gain"), name="norm")


def layer_normalization_with_beta_left_out(builder: GraphBuilder, x: str) -> str:
    return builder.add("LayerNormalization", x, vector(builder, "gain"), "", name="norm")


def rms_normalization(builder: GraphBuilder, x: str) -> str:
    return builder.add("RMSNormalization", x, vector(builder, "gain"), name="norm")


def simplified(builder: GraphBuilder, x: str) -> str:
    return builder.add("SimplifiedLayerNormalization", x, vector(builder, "gain"), name="norm", axis=-1, epsilon=1e-5)


def standardized(builder: GraphBuilder, x: str) -> str:
    """(x - mean) / deviation, as torch takes LayerNorm apart."""
    mean = builder.add("ReduceMean", x, builder.integers(-1), keepdims=1)
    centred = builder.add("Sub", x, mean)
    variance = builder.add(
        "ReduceMean", builder.add("Pow", centred, builder.constant(2.0)), builder.integers(-1), keepdims=1
    )
    root = builder.add("Sqrt", builder.add("Add", variance, builder.constant(1e-5)))
    return builder.add("Div", centred, root)


def decomposed(builder: GraphBuilder, x: str) -> str:
    scaled = builder.add("Mul", standardized(builder, x), vector(builder, "gain"), name="norm")
    return builder.add("Add", scaled, vector(builder, "beta"), name="shift")


def decomposed_the_other_way_round(builder: GraphBuilder, x: str) -> str:
    scaled = builder.add("Mul", vector(builder, "gain"), standardized(builder, x), name="norm")
    return builder.add("Add", vector(builder, "beta"), scaled, name="shift")


def gain_of_one_plus_w(builder: GraphBuilder, x: str) -> str:
    """Gemma stores the gain less 1."""
    gain = builder.add("Add", vector(builder, "gain"), builder.constant(1.0, "one"))
    return builder.add("Mul", standardized(builder, x), gain, name="norm")


def gain_behind_a_cast(builder: GraphBuilder, x: str) -> str:
    stored = builder.constant(builder.outlier_gain(K), "gain", np.float16)
    return builder.add("Mul", builder.cast(stored, builder.dtype, "cast"), standardized(builder, x), name="norm")


def gain_with_leading_ones(builder: GraphBuilder, x: str) -> str:
    gain = builder.constant(builder.outlier_gain(K).reshape(1, 1, K), "gain")
    return builder.add("Mul", standardized(builder, x), gain, name="norm")


def two_gains(builder: GraphBuilder, x: str) -> str:
    """LayerScale behind a norm: the last one is divided."""
    inner = builder.add("Mul", standardized(builder, x), vector(builder, "inner_gain"), name="inner")
    return builder.add("Mul", inner, vector(builder, "gain"), name="norm")


FORMS: Sequence[tuple[Norm, int, set[str]]] = [
    (layer_normalization, 18, {"gain", "beta"}),
    (layer_normalization_without_beta, 18, {"gain"}),
    (rms_normalization, 23, {"gain"}),
    (simplified, 18, {"gain"}),
    (decomposed, 18, {"gain", "beta"}),
    (decomposed_the_other_way_round, 18, {"gain", "beta"}),
    (gain_of_one_plus_w, 18, {"gain", "one"}),  # both are gone: the sum is stored instead
    (gain_behind_a_cast, 18, {"gain"}),
    (two_gains, 18, {"gain"}),
]


@pytest.mark.parametrize(("norm", "opset", "divided"), FORMS, ids=[norm.__name__ for norm, _, _ in FORMS])
def test_gain_and_beta_are_divided_and_nothing_else(tmp_path: Path, norm: Norm, opset: int, divided: set[str]) -> None:
    builder = behind(norm, opset=opset)
    made = folded(builder, tmp_path)
    assert (made.divided, made.refused) == ({"norm"}, {})
    assert changed(builder, made) == divided


@pytest.mark.parametrize("norm", [layer_normalization, decomposed, gain_behind_a_cast, gain_of_one_plus_w])
def test_a_norm_in_half_precision_is_divided(tmp_path: Path, norm: Norm) -> None:
    assert folded(behind(norm, dtype=np.float16), tmp_path, 0.02).divided == {"norm"}


def test_a_beta_left_out_by_an_empty_name_is_none() -> None:
    """Not run: onnxruntime 1.31 dies of a trailing empty name here."""
    (group,) = find_groups(survey(ir.from_proto(behind(layer_normalization_with_beta_left_out).model())))
    assert not isinstance(group.routes, Refusal)
    assert [vector.index for vector in group.routes[0].absorber.vectors] == [1]


def test_a_gain_with_leading_ones_is_divided(tmp_path: Path) -> None:
    assert folded(behind(gain_with_leading_ones), tmp_path).divided == {"norm"}


def skip_norm(*, op_type: str, bias: bool, residual: bool) -> GraphBuilder:
    """x, skip -> a Skip norm -> layers; its last output is the sum that the residual stream goes on with."""
    builder = GraphBuilder()
    x, skip = (builder.input(name, ["batch", "sequence", K]) for name in ("x", "skip"))
    inputs = [x, skip, vector(builder, "gain")]
    if op_type == "SkipLayerNormalization":
        inputs.append(vector(builder, "beta"))
    if bias:
        inputs.append(vector(builder, "skip_bias"))
    outputs = ["normed", "", "", "sum"] if residual else ["normed"]
    builder.nodes.append(helper.make_node(op_type, inputs, outputs, name="norm", domain="com.microsoft", epsilon=1e-5))
    product = builder.add("MatMul", "normed", builder.weight(K, K), name="reader")
    builder.output(builder.add("Add", product, "sum", to="y") if residual else product)
    return builder


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_a_skip_norm_is_divided_but_not_its_sum_nor_the_bias_of_that(
    tmp_path: Path, op_type: str, bias: bool, residual: bool
) -> None:
    builder = skip_norm(op_type=op_type, bias=bias, residual=residual)
    made = folded(builder, tmp_path)
    assert made.divided == {"norm"}
    assert changed(builder, made) == ({"gain", "beta"} if op_type == "SkipLayerNormalization" else {"gain"})


def test_a_layer_that_reads_the_sum_of_a_skip_norm_is_refused() -> None:
    builder = skip_norm(op_type="SkipLayerNormalization", bias=False, residual=True)
    builder.output(builder.add("MatMul", "sum", builder.weight(K, 8), name="other"))
    made = folded(builder, Path())
    assert made.refused == {"other": Refusal("norm", "SkipLayerNormalization comes before, which cannot be divided")}


def test_the_norm_of_an_embedding_is_divided(tmp_path: Path) -> None:
    builder = GraphBuilder()
    ids = builder.input("ids", ["batch", "sequence"], np.int32)
    tables = [builder.weight(rows, K, name) for rows, name in ((20, "words"), (10, "places"), (2, "segments"))]
    inputs = [ids, "", *tables[:2], "", vector(builder, "gain"), vector(builder, "beta")]
    node = helper.make_node(
        "EmbedLayerNormalization", inputs, ["normed", "mask"], name="norm", domain="com.microsoft", epsilon=1e-5
    )
    builder.nodes.append(node)
    builder.output(builder.add("MatMul", "normed", builder.weight(K, 8), name="reader"))
    ids_feed: Array = np.random.default_rng(0).integers(0, 20, (2, 5)).astype(np.int32)
    made = assert_folding_changes_nothing(microsoft(builder), {"ids": ids_feed}, tmp_path)
    assert made.divided == {"norm"}


# Near misses


def near_miss(builder: GraphBuilder, folder: Path) -> Refusal:
    made = folded(builder, folder)
    assert made.divided == set()
    return made.refused["reader_0"]


@pytest.mark.parametrize("norm", [layer_normalization, decomposed])
def test_a_norm_that_is_an_output_of_the_model_is_refused(tmp_path: Path, norm: Norm) -> None:
    builder = behind(norm)
    name = next(node for node in builder.nodes if node.name == "reader_0").input[0]
    builder.output(name, ["batch", "sequence", K])
    assert near_miss(builder, tmp_path) == Refusal(name, "the input is an output of the model as well")


@pytest.mark.parametrize("norm", [layer_normalization, decomposed])
def test_a_residual_behind_the_norm_is_refused(tmp_path: Path, norm: Norm) -> None:
    builder = behind(norm)
    name = next(node for node in builder.nodes if node.name == "reader_0").input[0]
    builder.output(builder.add("Add", name, "x", name="residual"))
    assert near_miss(builder, tmp_path) == Refusal("residual", "Add reads the same input")


def test_somebody_between_gain_and_beta_is_refused(tmp_path: Path) -> None:
    builder = behind(decomposed)
    builder.output(builder.add("Relu", "norm_output_0", name="spy"))
    assert near_miss(builder, tmp_path) == Refusal("spy", "Relu reads what comes before, too")


def test_the_mean_of_a_norm_is_no_input_to_divide(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", K])
    node = helper.make_node("LayerNormalization", [x, vector(builder, "gain")], ["normed", "mean"], name="norm")
    builder.nodes.append(node)
    builder.output(builder.add("MatMul", "mean", builder.weight(1, 8), name="reader_0"))
    builder.output("normed")
    expected = Refusal("norm", "LayerNormalization comes before, which cannot be divided")
    assert near_miss(builder, tmp_path) == expected


@pytest.mark.parametrize("shape", [(1,), (5, K)], ids=str)
def test_a_gain_that_is_not_one_number_for_each_channel_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Normalised over tokens and channels there is a gain for each of both."""

    def norm(builder: GraphBuilder, x: str) -> str:
        gain = builder.constant(np.full(shape, 2.0))
        return builder.add("LayerNormalization", x, gain, name="norm", axis=-len(shape))

    expected = Refusal("norm", "LayerNormalization comes before, which cannot be divided")
    assert near_miss(behind(norm), tmp_path) == expected


def test_a_beta_that_is_one_number_is_refused(tmp_path: Path) -> None:
    def shifted(builder: GraphBuilder, x: str) -> str:
        scaled = builder.add("Mul", standardized(builder, x), vector(builder, "gain"), name="norm")
        return builder.add("Add", scaled, builder.constant(0.5), name="shift")

    expected = Refusal("shift", "Add comes before, which cannot be divided")
    assert near_miss(behind(shifted), tmp_path) == expected


# Layers kept in float behind the same norm


@pytest.mark.parametrize("form", ["MatMul", "Transpose", "Gemm", "Gemm transB", "FusedMatMul"])
def test_a_layer_kept_in_float_is_compensated(tmp_path: Path, form: str) -> None:
    builder = behind(layer_normalization, rank=2)
    builder.output(float_layer(builder, "norm_output_0", form))
    feed = {"x": x_of().reshape(-1, K)}
    made = assert_folding_changes_nothing(microsoft(builder), feed, tmp_path, choice=Choice(exclude=("kept",)))
    assert made.divided == {"norm"}
    assert [site.name for site in made.groups["reader_0"].compensated] == ["kept"]


def float_layer(builder: GraphBuilder, x: str, form: str) -> str:
    if form == "MatMul":
        return builder.add("MatMul", x, builder.weight(K, 8), name="kept")
    if form == "Transpose":
        return builder.add("MatMul", x, builder.add("Transpose", builder.weight(8, K), perm=[1, 0]), name="kept")
    if form == "FusedMatMul":
        weight = builder.weight(8, K)
        return builder.add("FusedMatMul", x, weight, name="kept", domain="com.microsoft", transB=1, alpha=0.5)
    turned = int(form == "Gemm transB")
    weight = builder.weight(8, K) if turned else builder.weight(K, 8)
    bias = builder.constant(np.arange(8.0))
    return builder.add("Gemm", x, weight, bias, name="kept", transB=turned, alpha=0.5, beta=2.0)


def test_a_float_layer_whose_weight_others_read_is_refused(tmp_path: Path) -> None:
    builder = behind(layer_normalization)
    builder.output(builder.add("MatMul", "norm_output_0", builder.weight(K, 8, "shared"), name="kept"))
    builder.output(builder.add("Transpose", "shared", to="tied"))
    made = assert_folding_changes_nothing(microsoft(builder), {"x": x_of()}, tmp_path, choice=Choice(exclude=("kept",)))
    assert made.refused["reader_0"] == Refusal("kept", "MatMul reads the same input")


def test_the_weights_of_the_sites_alone_were_written(tmp_path: Path) -> None:
    """The helper of these tests changes what it should: else equal outputs would show nothing."""
    builder = behind(layer_normalization)
    made = folded(builder, tmp_path)
    before = {one.name: numpy_helper.to_array(one) for one in builder.initializers if len(one.dims) == 2}
    after = {one.name: numpy_helper.to_array(one) for one in made.model.graph.initializer}
    assert all(np.abs(after[name] / values - 1).max() > 0.5 for name, values in before.items())
    assert isinstance(made.model, onnx.ModelProto)
