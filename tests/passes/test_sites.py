"""Which MatMuls are quantised, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import GraphBuilder, norm_and_readers
from onnx import helper, numpy_helper

from awq_onnx.passes.sites import Refusal, Site, Survey, find_site, node_name, quantized_nodes, survey

K, N = 16, 24
WeightMaker = Callable[[GraphBuilder], str]


def graph_of(builder: GraphBuilder) -> ir.Graph:
    return ir.from_proto(builder.model()).graph


def layer(make_weight: WeightMaker, *, op_type: str = "MatMul", x_dtype: type = np.float32) -> GraphBuilder:
    """x (batch, sequence, K) -> MatMul by the weight that `make_weight` makes -> an output."""
    builder = GraphBuilder(dtype=x_dtype)
    x = builder.input("x", ["rows", K] if op_type == "Gemm" else ["batch", "sequence", K])
    builder.output(builder.add(op_type, x, make_weight(builder), name="layer"))
    return builder


def surveyed(builder: GraphBuilder) -> Survey:
    return survey(graph_of(builder))


def only_site(builder: GraphBuilder) -> Site:
    found = surveyed(builder)
    assert found.kept == ()
    (site,) = found.sites
    return site


def only_refusal(builder: GraphBuilder) -> Refusal:
    found = surveyed(builder)
    assert found.sites == ()
    (refusal,) = found.kept
    return refusal


def cast(builder: GraphBuilder, value: str, to: type, name: str = "cast") -> str:
    return builder.cast(value, to, name)


def test_a_matmul_with_an_initializer_is_a_site() -> None:
    site = only_site(layer(lambda b: b.weight(K, N, "w")))
    assert (site.name, site.tensor.name, site.transposed, site.K, site.N) == ("layer", "w", False, K, N)
    assert (site.input.name, site.output.name) == ("x", "layer_output_0")
    assert site.dtype is ir.DataType.FLOAT


def test_a_weight_in_a_constant_node_is_a_site() -> None:
    def constant_node(builder: GraphBuilder) -> str:
        value = numpy_helper.from_array(np.ones((K, N), np.float32))
        builder.nodes.append(helper.make_node("Constant", [], ["w"], name="holder", value=value))
        return "w"

    site = only_site(layer(constant_node))
    assert (site.K, site.N) == (K, N)


def test_a_weight_behind_a_transpose_is_a_site_that_knows_it() -> None:
    site = only_site(layer(lambda b: b.add("Transpose", b.weight(N, K, "w"), perm=[1, 0])))
    assert (site.transposed, site.K, site.N) == (True, K, N)


def test_a_transpose_without_perm_transposes() -> None:
    assert only_site(layer(lambda b: b.add("Transpose", b.weight(N, K, "w")))).transposed


def test_two_transposes_cancel() -> None:
    def twice(builder: GraphBuilder) -> str:
        return builder.add("Transpose", builder.add("Transpose", builder.weight(K, N, "w")))

    site = only_site(layer(twice))
    assert (site.transposed, site.K, site.N) == (False, K, N)


def test_a_transpose_that_does_nothing_does_not_transpose() -> None:
    """perm [0, 1] is no (1, 0): taking it for one would swap K and N."""
    found = surveyed(layer(lambda b: b.add("Transpose", b.weight(K, N, "w"), perm=[0, 1])))
    assert all((site.transposed, site.K, site.N) == (False, K, N) for site in found.sites)


def test_a_weight_behind_a_cast_has_the_dtype_that_arrives() -> None:
    def stored_in_half(builder: GraphBuilder) -> str:
        return cast(builder, builder.constant(np.ones((K, N)), "w", np.float16), np.float32)

    site = only_site(layer(stored_in_half))
    assert site.tensor.dtype is ir.DataType.FLOAT16
    assert site.dtype is ir.DataType.FLOAT


def test_of_several_casts_the_last_one_tells_the_dtype() -> None:
    def there_and_back(builder: GraphBuilder) -> str:
        half = cast(builder, builder.weight(K, N, "w"), np.float16, "to_half")
        return cast(builder, half, np.float32, "back")

    assert only_site(layer(there_and_back)).dtype is ir.DataType.FLOAT


def test_a_weight_behind_identity_cast_and_transpose_is_a_site() -> None:
    def views(builder: GraphBuilder) -> str:
        stored = builder.constant(np.ones((N, K)), "w", np.float16)
        return builder.add("Identity", cast(builder, builder.add("Transpose", stored), np.float32))

    site = only_site(layer(views))
    assert (site.tensor.name, site.transposed, site.K, site.N) == ("w", True, K, N)


def test_a_gemm_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.weight(K, N, "w"), op_type="Gemm"))
    assert refusal == Refusal("layer", "Gemm is not supported yet, only MatMul")


def test_a_weight_of_three_dimensions_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.constant(np.ones((1, K, N)), "experts")))
    assert refusal.reason == "its weight has 3 dimensions, only 2 are supported"


def test_a_weight_in_double_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.weight(K, N, "w"), x_dtype=np.float64))
    assert refusal.reason == "its weight is DOUBLE, only FLOAT and FLOAT16 have a kernel"


def test_a_weight_in_bfloat16_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.constant(np.ones((K, N)), "w"), x_dtype=ml_dtypes.bfloat16))
    assert refusal.reason == "its weight is BFLOAT16, only FLOAT and FLOAT16 have a kernel"


def test_a_double_weight_cast_to_float_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: cast(b, b.constant(np.ones((K, N)), "w", np.float64), np.float32)))
    assert "DOUBLE" in refusal.reason


def test_an_empty_weight_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.constant(np.ones((K, 0)), "w")))
    assert refusal == Refusal("layer", "its weight is empty")


@pytest.mark.parametrize(
    "make_weight",
    [
        pytest.param(lambda b: b.input("w", ["batch", K, N]), id="activation"),
        pytest.param(lambda b: b.add("Neg", b.weight(K, N)), id="computed"),
        pytest.param(lambda b: b.constant(np.ones(K)), id="vector"),
        pytest.param(lambda b: b.add("Transpose", b.constant(np.ones((1, N, K))), perm=[0, 2, 1]), id="batched"),
    ],
)
def test_what_is_no_linear_layer_is_neither_site_nor_refusal(make_weight: WeightMaker) -> None:
    assert surveyed(layer(make_weight)) == Survey((), ())


def test_a_weight_on_the_left_is_no_site() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("MatMul", builder.weight(N, K), builder.input("x", [K, "columns"])))
    assert surveyed(builder) == Survey((), ())


def test_an_initializer_that_callers_may_override_is_no_constant() -> None:
    def overridable(builder: GraphBuilder) -> str:
        builder.input("w", [K, N])
        return builder.weight(K, N, "w")

    assert surveyed(layer(overridable)) == Survey((), ())


def test_a_matmul_of_another_domain_is_no_site() -> None:
    node = ir.node("MatMul", [ir.val("x"), ir.val("w")], domain="com.example")
    assert find_site(node) is None


def with_head(
    *,
    vocabulary: int = 40,
    columns: int | None = None,
    logits: str = "logits",
    after: Callable[[GraphBuilder, str], str] = lambda _, x: x,
) -> GraphBuilder:
    """ids -> embedding -> inner (K, vocabulary) -> wide (vocabulary, K) -> head -> `after` -> an output."""
    builder = GraphBuilder()
    table = builder.constant(np.ones((vocabulary, K)), "table")
    x = builder.add("Gather", table, builder.input("ids", ["batch", "sequence"], np.int64))
    inner = builder.linear(x, K, vocabulary, "inner")
    x = builder.linear(builder.add("Relu", inner), vocabulary, K, "wide")
    head = builder.add("MatMul", x, builder.weight(K, columns or vocabulary), name="head")
    builder.output(builder.add("Identity", after(builder, head), to=logits))
    return builder


def names(found: Survey) -> list[str]:
    return [site.name for site in found.sites]


def test_the_head_stays_and_an_inner_layer_of_the_same_width_does_not() -> None:
    found = surveyed(with_head(logits="out"))
    assert names(found) == ["inner/MatMul", "wide/MatMul"]
    assert found.kept == (Refusal("head", "it is the lm_head, which stays as it is"),)


def test_the_head_is_known_by_the_name_of_the_logits_too() -> None:
    assert "head" not in names(surveyed(with_head(columns=41, logits="logits")))


def test_an_output_that_is_neither_logits_nor_as_wide_as_the_vocabulary_is_quantised() -> None:
    assert "head" in names(surveyed(with_head(columns=41, logits="hidden_states")))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda b, x: b.add("Add", x, b.constant(np.ones(40))), id="bias"),
        pytest.param(
            lambda b, x: b.add("Mul", b.add("Tanh", b.add("Div", x, b.constant(30.0))), b.constant(30.0)), id="soft cap"
        ),
        pytest.param(lambda b, x: b.cast(b.cast(x, np.float16, "to_half"), np.float32, "back"), id="casts"),
    ],
)
def test_the_head_is_known_behind(after: Callable[[GraphBuilder, str], str]) -> None:
    assert "head" not in names(surveyed(with_head(logits="out", after=after)))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda b, x: b.add("Softmax", x), id="softmax"),
        pytest.param(lambda b, x: b.add("Add", x, b.add("Relu", x)), id="two readers"),
        pytest.param(lambda b, x: b.add("Add", x, b.input("other", ["batch", "sequence", 40])), id="sum"),
    ],
)
def test_a_layer_before_other_arithmetic_is_no_head(after: Callable[[GraphBuilder, str], str]) -> None:
    assert "head" in names(surveyed(with_head(logits="out", after=after)))


def test_matmuls_on_one_input_are_grouped_in_graph_order() -> None:
    builder = norm_and_readers(columns=(48, 32, 8))
    builder.output(builder.linear("y1", 32, 8, "later"))
    groups = surveyed(builder).by_input()
    assert [[site.name for site in sites] for sites in groups.values()] == [
        ["reader_0", "reader_1", "reader_2"],
        ["later/MatMul"],
    ]


def test_two_matmuls_with_one_weight_are_two_sites() -> None:
    builder = GraphBuilder()
    w = builder.weight(K, K)
    first = builder.add("MatMul", builder.input("x", ["rows", K]), w, name="first")
    builder.output(builder.add("MatMul", builder.add("Relu", first), w, name="second"))
    assert names(surveyed(builder)) == ["first", "second"]


def test_a_node_without_a_name_is_called_by_what_it_makes() -> None:
    node = ir.node("MatMul", [ir.val("x"), ir.val("w")], outputs=[ir.val("y")], name="")
    assert node_name(node) == "MatMul of y"


def test_matmul_nbits_is_found_as_quantised() -> None:
    builder = GraphBuilder()
    packed, scales = builder.constant(np.zeros((N, 1, 8)), dtype=np.uint8), builder.constant(np.ones((N, 1)))
    x = builder.input("x", ["rows", K])
    node = helper.make_node("MatMulNBits", [x, packed, scales], ["y"], name="quantised", domain="com.microsoft")
    builder.nodes.append(node)
    builder.output("y")
    graph = helper.make_graph(builder.nodes, "g", builder.inputs, builder.outputs, builder.initializers)
    found = quantized_nodes(ir.from_proto(helper.make_model(graph)).graph)
    assert [node.name for node in found] == ["quantised"]


def dequantized(dims: tuple[int, ...]) -> onnx.ModelProto:
    builder = GraphBuilder()
    codes = builder.constant(np.ones(dims), dtype=np.int8)
    floats = builder.add("DequantizeLinear", codes, builder.constant(0.1), name="weight")
    builder.output(builder.add("Add", builder.input("x", [*dims]), floats))
    return builder.model()


def test_a_dequantised_weight_is_found_as_quantised() -> None:
    assert [node.name for node in quantized_nodes(ir.from_proto(dequantized((K, N))).graph)] == ["weight"]


def test_a_dequantised_vector_is_not() -> None:
    assert quantized_nodes(ir.from_proto(dequantized((N,))).graph) == []


def test_an_activation_that_is_dequantised_is_not() -> None:
    builder = GraphBuilder()
    x = builder.input("x", [K, N], np.int8)
    builder.output(builder.add("DequantizeLinear", x, builder.constant(0.1)))
    assert quantized_nodes(graph_of(builder)) == []


def test_a_plain_model_holds_nothing_quantised() -> None:
    assert quantized_nodes(graph_of(norm_and_readers())) == []


def test_an_input_of_one_dimension_is_refused() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("MatMul", builder.input("x", [K]), builder.weight(K, N), name="layer"))
    assert only_refusal(builder) == Refusal("layer", "its input has one dimension, MatMulNBits wants two or more")


def test_a_product_of_two_constants_is_no_site() -> None:
    builder = GraphBuilder()
    folded = builder.add("MatMul", builder.weight(K, K), builder.weight(K, N))
    builder.output(builder.add("Add", folded, builder.input("x", [K, N])))
    assert surveyed(builder) == Survey((), ())
