"""Which MatMuls are quantised, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, norm_and_readers
from onnx import helper, numpy_helper

from awq_onnx.passes.sites import Choice, Refusal, Site, Survey, find_site, node_name, quantized_nodes, survey

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
    return survey(ir.from_proto(builder.model()))


def found_in(builder: GraphBuilder) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    found = surveyed(builder)
    return found.sites, found.kept


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


def gemm(*, x: tuple[int | str, int | str] = ("rows", K), bias: Array | None = None, **attributes: Any) -> GraphBuilder:
    """x -> a Gemm "layer" with the weight w -> an output."""
    builder = GraphBuilder()
    rows = builder.input("x", list(x))
    weight = builder.weight(N, K, "w") if attributes.get("transB") else builder.weight(K, N, "w")
    inputs = [rows, weight, *([] if bias is None else [builder.constant(bias, "c")])]
    builder.output(builder.add("Gemm", *inputs, name="layer", **attributes))
    return builder


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_is_a_site(trans_b: int) -> None:
    site = only_site(gemm(transB=trans_b, alpha=0.5))
    assert (site.name, site.K, site.N, site.transposed) == ("layer", K, N, bool(trans_b))
    assert (site.factor, site.bias, site.dtype) == (0.5, None, ir.DataType.FLOAT)


def test_a_gemm_behind_a_transpose_that_it_undoes_is_not_transposed() -> None:
    builder = GraphBuilder()
    turned = builder.add("Transpose", builder.weight(K, N, "w"), perm=[1, 0])
    builder.output(builder.add("Gemm", builder.input("x", ["rows", K]), turned, name="layer", transB=1))
    site = only_site(builder)
    assert (site.K, site.N, site.transposed) == (K, N, False)


@pytest.mark.parametrize("shape", [(N,), (1, N), (1,), ()])
def test_a_bias_of_a_gemm_is_known(shape: tuple[int, ...]) -> None:
    site = only_site(gemm(bias=np.ones(shape), beta=2.0))
    assert site.bias is not None
    assert (site.bias.size, site.beta) == (N if N in shape else 1, 2.0)


def test_a_gemm_that_adds_a_number_to_each_row_is_refused() -> None:
    assert only_refusal(gemm(x=(5, K), bias=np.ones((5, 1)))).reason == "what it adds is no constant vector"


def test_a_gemm_that_adds_an_activation_is_refused() -> None:
    builder = GraphBuilder()
    inputs = [builder.input("x", ["rows", K]), builder.weight(K, N), builder.input("c", [N])]
    builder.output(builder.add("Gemm", *inputs, name="layer"))
    assert only_refusal(builder) == Refusal("layer", "what it adds is no constant vector")


def test_a_gemm_that_transposes_its_input_is_refused() -> None:
    assert only_refusal(gemm(x=(K, "rows"), transA=1)) == Refusal("layer", "it transposes its input")


def test_a_gemm_whose_bias_is_left_out_by_an_empty_name_is_a_site() -> None:
    builder = GraphBuilder()
    node = helper.make_node("Gemm", [builder.input("x", ["rows", K]), builder.weight(K, N), ""], ["y"], name="layer")
    builder.nodes.append(node)
    builder.output("y")
    assert only_site(builder).bias is None


def test_a_weight_of_three_dimensions_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.constant(np.ones((1, K, N)), "experts")))
    assert refusal.reason == "its weight has 3 dimensions, only 2 are supported"


def test_a_weight_in_double_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.weight(K, N, "w"), x_dtype=np.float64))
    assert refusal.reason == "its weight is DOUBLE, only FLOAT, FLOAT16 and BFLOAT16 have a kernel"


def test_a_weight_in_bfloat16_is_a_site() -> None:
    site = only_site(layer(lambda b: b.constant(np.ones((K, N)), "w"), x_dtype=ml_dtypes.bfloat16))
    assert site.dtype is ir.DataType.BFLOAT16


@pytest.mark.parametrize("stored", [np.float64, ml_dtypes.bfloat16])
def test_a_weight_in_another_float_type_cast_to_float_is_a_site(stored: type) -> None:
    site = only_site(layer(lambda b: cast(b, b.constant(np.ones((K, N)), "w", stored), np.float32)))
    assert site.dtype is ir.DataType.FLOAT


def test_whole_numbers_cast_to_float_are_refused() -> None:
    refusal = only_refusal(layer(lambda b: cast(b, b.constant(np.ones((K, N)), "w", np.int8), np.float32)))
    assert refusal.reason == "its weight is INT8, only FLOAT, FLOAT16 and BFLOAT16 have a kernel"


def test_an_empty_weight_is_refused() -> None:
    refusal = only_refusal(layer(lambda b: b.constant(np.ones((K, 0)), "w")))
    assert refusal == Refusal("layer", "its weight is empty")


@pytest.mark.parametrize(
    "make_weight",
    [
        pytest.param(lambda b: b.input("w", ["batch", K, N]), id="activation"),
        pytest.param(lambda b: b.constant(np.ones(K)), id="vector"),
        pytest.param(lambda b: b.add("RandomNormal", shape=[K, N]), id="random"),
    ],
)
def test_what_is_no_linear_layer_is_neither_site_nor_refusal(make_weight: WeightMaker) -> None:
    assert found_in(layer(make_weight)) == ((), ())


@pytest.mark.parametrize(
    "make_weight",
    [
        pytest.param(lambda b: b.add("Neg", b.weight(K, N)), id="Neg"),
        pytest.param(lambda b: b.add("Add", b.constant(1.0), b.weight(K, N)), id="one plus"),
        pytest.param(lambda b: b.add("Reshape", b.weight(K, N), b.integers(K, N)), id="Reshape"),
        pytest.param(lambda b: dequantized_weight(b, np.int8), id="int8"),
        pytest.param(lambda b: dequantized_weight(b, np.uint8), id="uint8"),
    ],
)
def test_a_weight_that_a_few_nodes_compute_from_constants_is_a_site(make_weight: WeightMaker) -> None:
    site = only_site(layer(make_weight))
    assert (site.K, site.N, site.transposed, site.dtype) == (K, N, False, ir.DataType.FLOAT)
    assert site.tensor.numpy().shape == (K, N)


def dequantized_weight(builder: GraphBuilder, dtype: type) -> str:
    codes = builder.constant(builder.rng.integers(0, 100, (K, N)), dtype=dtype)
    return builder.add("DequantizeLinear", codes, builder.constant(np.linspace(0.1, 1, N)), axis=1)


def test_a_computed_weight_is_what_onnxruntime_makes_of_it() -> None:
    builder = layer(lambda b: dequantized_weight(b, np.int8))
    codes, scales = (numpy_helper.to_array(one) for one in builder.initializers)
    np.testing.assert_allclose(only_site(builder).tensor.numpy(), codes * scales, rtol=1e-6)


def test_a_batched_weight_behind_a_transpose_is_refused() -> None:
    weight = layer(lambda b: b.add("Transpose", b.constant(np.ones((1, N, K))), perm=[0, 2, 1]))
    assert only_refusal(weight).reason == "its weight has 3 dimensions, only 2 are supported"


def test_a_weight_on_the_left_is_refused() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("MatMul", builder.weight(N, K), builder.input("x", [K, "columns"]), name="layer"))
    assert only_refusal(builder) == Refusal("layer", "its weight stands on the left")


def test_an_initializer_that_callers_may_override_is_no_constant() -> None:
    def overridable(builder: GraphBuilder) -> str:
        builder.input("w", [K, N])
        return builder.weight(K, N, "w")

    assert found_in(layer(overridable)) == ((), ())


def test_a_matmul_of_another_domain_is_no_site() -> None:
    node = ir.node("MatMul", [ir.val("x"), ir.val("w")], domain="com.example")
    assert find_site(node, {}) is None


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
        pytest.param(lambda b, x: b.add("Softmax", x), id="softmax"),
    ],
)
def test_the_head_is_known_behind(after: Callable[[GraphBuilder, str], str]) -> None:
    assert "head" not in names(surveyed(with_head(logits="out", after=after)))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda b, x: b.add("Add", x, b.add("Relu", x)), id="two readers"),
        pytest.param(lambda b, x: b.add("Add", x, b.input("other", ["batch", "sequence", 40])), id="sum"),
    ],
)
def test_a_layer_before_other_arithmetic_is_no_head(after: Callable[[GraphBuilder, str], str]) -> None:
    assert "head" in names(surveyed(with_head(logits="out", after=after)))


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


def dequantized(dims: tuple[int, ...], dtype: Any) -> onnx.ModelProto:
    builder = GraphBuilder(opset=21)
    codes = builder.constant(np.ones(dims), dtype=dtype)
    floats = builder.add("DequantizeLinear", codes, builder.constant(0.1), name="weight")
    builder.output(builder.add("Add", builder.input("x", [*dims]), floats))
    return builder.model()


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
def test_a_weight_of_few_bits_is_found_as_quantised(dtype: Any) -> None:
    assert [node.name for node in quantized_nodes(ir.from_proto(dequantized((K, N), dtype)).graph)] == ["weight"]


@pytest.mark.parametrize(("dims", "dtype"), [((K, N), np.int8), ((K, N), np.uint8), ((N,), ml_dtypes.int4)])
def test_a_weight_of_eight_bits_or_a_vector_is_not(dims: tuple[int, ...], dtype: Any) -> None:
    assert quantized_nodes(ir.from_proto(dequantized(dims, dtype)).graph) == []


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
    assert found_in(builder) == ((), ())


def test_what_the_user_excludes_stays_and_is_told_with_the_pattern() -> None:
    model = ir.from_proto(norm_and_readers(columns=(8, 8, 8)).model())
    found = survey(model, Choice(exclude=("*_1",)))
    assert names(found) == ["reader_0", "reader_2"]
    assert found.kept == (Refusal("reader_1", "--exclude *_1 names it"),)
    assert [site.name for site in found.floats] == ["reader_1"]


def test_what_the_user_does_not_include_stays() -> None:
    model = ir.from_proto(norm_and_readers(columns=(8, 8, 8)).model())
    found = survey(model, Choice(include=("reader_[02]",), exclude=("reader_2",)))
    assert names(found) == ["reader_0"]
    assert found.kept == (
        Refusal("reader_1", "no --include names it"),
        Refusal("reader_2", "--exclude reader_2 names it"),
    )


def router(between: Callable[[GraphBuilder, str], str]) -> GraphBuilder:
    builder = GraphBuilder()
    logits = builder.add("MatMul", builder.input("x", ["rows", K]), builder.weight(K, 4), name="router")
    node = helper.make_node("TopK", [between(builder, logits), builder.integers(2)], ["shares", "chosen"])
    builder.nodes.append(node)
    builder.output(builder.cast("chosen", np.int32, "what the model does with it"), dtype=np.int32)
    return builder


def test_a_layer_whose_largest_numbers_are_the_answer_is_no_router() -> None:
    builder = router(lambda _, x: x)
    del builder.nodes[-1], builder.outputs[-1]
    builder.output("chosen", dtype=np.int64)
    assert names(surveyed(builder)) == ["router"]


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda _, x: x, id="nothing"),
        pytest.param(lambda b, x: b.add("Softmax", x), id="Softmax"),
        pytest.param(lambda b, x: b.add("Add", b.add("Sigmoid", x), b.constant(np.ones(4))), id="Sigmoid and a bias"),
        pytest.param(lambda b, x: b.cast(b.cast(x, np.float16, "half"), np.float32, "back"), id="casts"),
    ],
)
def test_a_router_stays(between: Callable[[GraphBuilder, str], str]) -> None:
    assert only_refusal(router(between)) == Refusal("router", "it chooses experts: a router stays as it is")


def test_a_layer_whose_largest_numbers_are_asked_for_behind_a_function_is_no_router() -> None:
    assert names(surveyed(router(lambda b, x: b.add("Tanh", x)))) == ["router"]


def test_layers_in_the_bodies_of_an_if_are_sites() -> None:
    builder = GraphBuilder()
    builder.input("x", ["rows", K])
    builder.weight(K, N, "w")
    node = helper.make_node("MatMul", ["x", "w"], ["inner"], name="inner")
    y = helper.make_tensor_value_info("inner", 1, None)
    bodies = {name: helper.make_graph([node], name, [], [y]) for name in ("then_branch", "else_branch")}
    builder.nodes.append(helper.make_node("If", [builder.input("flag", [], np.bool_)], ["y"], **bodies))
    builder.output("y", ["rows", N])
    assert names(surveyed(builder)) == ["inner", "inner"]


def test_a_conv_with_channels_first_is_refused_and_a_real_one_is_no_layer() -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", K, 5])
    builder.output(builder.add("Conv", x, builder.constant(np.ones((N, K, 1))), name="pointwise"))
    builder.output(builder.add("Conv", x, builder.constant(np.ones((N, K, 3))), name="real"))
    assert [one.what for one in surveyed(builder).kept] == ["pointwise"]
