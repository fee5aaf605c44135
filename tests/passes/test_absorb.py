"""Where the scale of an input can go, and why it sometimes can go nowhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import GraphBuilder, gated_mlp, norm_and_readers, tiny_decoder, two_linears

from awq_onnx.passes.absorb import Gain, Group, Linear, find_groups, is_cache_pair
from awq_onnx.passes.sites import Refusal, survey

INPUT = "the input is an input of the model"

Middle = Callable[[GraphBuilder, str], str]


def groups_of(model: GraphBuilder | onnx.ModelProto) -> dict[str, Group]:
    """The groups by the name of their first site."""
    proto = model.model() if isinstance(model, GraphBuilder) else model
    return {group.name: group for group in find_groups(survey(ir.from_proto(proto).graph))}


def refusal(group: Group) -> Refusal:
    assert isinstance(group.absorber, Refusal)
    return group.absorber


def linear(group: Group) -> Linear:
    assert isinstance(group.absorber, Linear)
    return group.absorber


def second(middle: Middle, *, bias: bool = False) -> Group:
    """The group of the second of two linear layers with `middle` between them."""
    return groups_of(two_linears(middle, bias=bias))["second/MatMul"]


def norm_group(builder: GraphBuilder) -> Group:
    return groups_of(builder)["reader_0"]


# Gains


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("gain_first", [False, True])
def test_the_gain_of_a_norm_is_found_on_either_side(gain_first: bool, casts: bool) -> None:
    group = norm_group(norm_and_readers(gain_first=gain_first, casts=casts))
    assert isinstance(group.absorber, Gain)
    assert (group.absorber.name, group.absorber.index) == ("norm/Mul_1", 0 if gain_first else 1)
    assert (group.absorber.tensor.name, group.absorber.channels) == ("norm.weight", 64)
    assert [site.name for site in group.sites] == ["reader_0", "reader_1"]
    assert not group.moved


def test_the_gain_of_a_half_precision_norm_is_found_behind_its_casts() -> None:
    assert isinstance(norm_group(norm_and_readers(dtype=np.float16)).absorber, Gain)


def test_a_cast_between_gain_and_reader_is_stepped_over() -> None:
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 64]), 64, "norm")
    half = builder.cast(normed, np.float16, "half")
    weight = builder.constant(np.ones((64, 8)), "w", np.float16)
    builder.output(builder.add("MatMul", half, weight, name="reader_0"), dtype=np.float16)
    assert isinstance(norm_group(builder).absorber, Gain)


def test_a_reader_of_the_shape_does_not_matter() -> None:
    builder = norm_and_readers()
    builder.output(builder.add("Shape", "norm/Mul_1_output_0"), dtype=np.int64)
    assert isinstance(norm_group(builder).absorber, Gain)


def test_a_residual_that_reads_the_norm_is_refused() -> None:
    builder = norm_and_readers()
    builder.output(builder.add("Add", "norm/Mul_1_output_0", "x", name="residual"))
    assert refusal(norm_group(builder)) == Refusal("residual", "Add reads the same input")


def test_a_router_that_is_no_site_is_refused() -> None:
    builder = norm_and_readers()
    router = builder.input("router", [64, 4])
    builder.output(builder.add("MatMul", "norm/Mul_1_output_0", router, name="route"))
    assert refusal(norm_group(builder)) == Refusal("route", "MatMul reads the same input")


def test_a_lm_head_on_the_same_input_is_refused() -> None:
    builder = norm_and_readers()
    head = builder.add("MatMul", "norm/Mul_1_output_0", builder.weight(64, 100), name="head", to="logits")
    builder.output(head)
    assert refusal(norm_group(builder)) == Refusal("head", "MatMul reads the same input")


def test_a_norm_that_is_an_output_of_the_model_is_refused() -> None:
    builder = norm_and_readers()
    builder.output("norm/Mul_1_output_0")
    expected = Refusal("norm/Mul_1_output_0", "the input is an output of the model as well")
    assert refusal(norm_group(builder)) == expected


def test_a_reader_behind_a_cast_is_seen_on_the_path() -> None:
    """The norm's own output has two readers there, the cast's only one."""
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 64]), 64, "norm")
    same = builder.add("Identity", normed, name="same")
    builder.output(builder.add("MatMul", same, builder.weight(64, 8), name="reader_0"))
    builder.output(builder.add("Add", normed, "x", name="residual"))
    assert refusal(norm_group(builder)) == Refusal("residual", "Add reads what comes before, too")


def test_an_activation_matmul_that_reads_the_norm_on_its_right_is_refused() -> None:
    """A site's other input is its weight; reading the norm there is reading it a second time."""
    builder = norm_and_readers(columns=(48,))
    mixed = builder.add("MatMul", builder.input("p", ["batch", "t", "sequence"]), "norm/Mul_1_output_0", name="mix")
    builder.output(mixed)
    assert refusal(norm_group(builder)) == Refusal("mix", "MatMul reads the same input")


def test_a_single_number_is_no_gain() -> None:
    builder = GraphBuilder()
    scaled = builder.add("Mul", builder.input("x", ["batch", "sequence", 64]), builder.constant(2.0), name="times")
    builder.output(builder.add("MatMul", scaled, builder.weight(64, 8), name="reader_0"))
    assert refusal(norm_group(builder)) == Refusal("x", INPUT)


def test_a_gain_along_another_axis_is_none() -> None:
    builder = GraphBuilder()
    gain = builder.constant(np.ones((64, 1)))
    scaled = builder.add("Mul", builder.input("x", ["batch", 64, 64]), gain, name="times")
    builder.output(builder.add("MatMul", scaled, builder.weight(64, 8), name="reader_0"))
    assert isinstance(norm_group(builder).absorber, Refusal)


def test_a_gain_that_callers_may_override_is_none() -> None:
    builder = norm_and_readers()
    builder.input("norm.weight", [64])
    assert isinstance(norm_group(builder).absorber, Refusal)


# Gated MLPs


def test_down_goes_up_through_the_gate() -> None:
    group = groups_of(gated_mlp())["down/MatMul"]
    assert (linear(group).name, linear(group).bias, linear(group).channels) == ("up/MatMul", None, 96)
    assert not group.moved


def test_a_bias_of_up_is_divided_as_well() -> None:
    found = linear(groups_of(gated_mlp(bias=True))["down/MatMul"])
    assert found.bias is not None
    node, index = found.bias
    assert (node.name, node.inputs[index].name) == ("up/Add", "up.bias")  # type: ignore[union-attr]
    assert found.output.name == "up/Add_output_0"


def test_a_second_reader_of_up_is_refused() -> None:
    builder = gated_mlp()
    builder.output(builder.add("Relu", "up/MatMul_output_0", name="spy"))
    expected = Refusal("spy", "Relu reads what comes before, too")
    assert refusal(groups_of(builder)["down/MatMul"]) == expected


def test_a_second_reader_of_the_product_is_refused() -> None:
    builder = gated_mlp()
    builder.output(builder.add("Relu", "product_output_0", name="spy"))
    assert refusal(groups_of(builder)["down/MatMul"]) == Refusal("spy", "Relu reads the same input")


def test_x_times_sigmoid_of_x_is_not_walked_through() -> None:
    def silu(builder: GraphBuilder, x: str) -> str:
        return builder.add("Mul", x, builder.add("Sigmoid", x, name="sigmoid"), name="silu")

    assert refusal(second(silu)).what == "sigmoid"


def test_sigmoid_of_x_times_x_is_not_walked_through_either() -> None:
    def silu(builder: GraphBuilder, x: str) -> str:
        return builder.add("Mul", builder.add("Sigmoid", x, name="sigmoid"), x, name="silu")

    assert isinstance(second(silu).absorber, Refusal)


def test_a_square_is_refused() -> None:
    """Dividing x by s would divide x * x by s twice."""
    found = refusal(second(lambda b, x: b.add("Mul", x, x, name="square")))
    assert found == Refusal("square", "Mul reads what comes before twice")


def test_relu_passes_a_positive_scale_on() -> None:
    assert linear(second(lambda b, x: b.add("Relu", x))).name == "first/MatMul"


def test_a_constant_factor_passes_a_scale_on() -> None:
    assert linear(second(lambda b, x: b.add("Mul", x, b.constant(3.0)))).name == "first/MatMul"


@pytest.mark.parametrize("op_type", ["Tanh", "Softmax", "Sigmoid", "Erf", "Neg", "Exp"])
def test_other_functions_in_between_are_refused(op_type: str) -> None:
    found = refusal(second(lambda b, x: b.add(op_type, x, name="between")))
    assert found == Refusal("between", f"{op_type} comes before, which cannot be divided")


def test_a_layer_normalization_in_between_is_refused() -> None:
    found = refusal(second(lambda b, x: b.add("LayerNormalization", x, b.constant(np.ones(32)), name="between")))
    assert found == Refusal("between", "LayerNormalization comes before, which cannot be divided")


def test_a_sum_of_two_activations_is_refused() -> None:
    found = refusal(second(lambda b, x: b.add("Add", x, b.input("other", ["batch", "sequence", 32]), name="sum")))
    assert found == Refusal("sum", "Add comes before, which cannot be divided")


def test_a_function_between_bias_and_matmul_is_refused() -> None:
    def late_bias(builder: GraphBuilder, x: str) -> str:
        return builder.add("Add", builder.add("Relu", x, name="relu"), builder.constant(np.ones(32)), name="late")

    assert refusal(second(late_bias)) == Refusal("late", "Add comes before, which cannot be divided")


def test_two_biases_are_refused() -> None:
    def again(builder: GraphBuilder, x: str) -> str:
        return builder.add("Add", x, builder.constant(np.ones(32)), name="again")

    assert isinstance(second(again, bias=True).absorber, Refusal)


@pytest.mark.parametrize("shape", [(), (1,), (5, 32)])
def test_a_constant_that_is_no_vector_of_the_channels_is_no_bias(shape: tuple[int, ...]) -> None:
    """Divided by s it would change its shape, or need a row of s for every token."""
    found = second(lambda b, x: b.add("Add", x, b.constant(np.full(shape, 3.0)), name="shift"))
    assert refusal(found).what == "shift"


def test_an_operator_of_another_domain_is_refused() -> None:
    model = two_linears(lambda b, x: b.add("Relu", x, name="between")).model()
    next(node for node in model.graph.node if node.name == "between").domain = "com.example"
    assert isinstance(groups_of(model)["second/MatMul"].absorber, Refusal)


# What feeds the first layer


def test_a_matmul_fed_by_an_input_of_the_model_is_refused() -> None:
    found = groups_of(two_linears(lambda b, x: b.add("Tanh", x)))["first/MatMul"]
    assert refusal(found) == Refusal("x", INPUT)


def test_a_gemm_before_is_refused() -> None:
    builder = GraphBuilder()
    first = builder.add("Gemm", builder.input("x", ["rows", 32]), builder.weight(32, 32), name="gemm")
    builder.output(builder.linear(first, 32, 8, "second"))
    found = refusal(groups_of(builder)["second/MatMul"])
    assert found == Refusal("gemm", "the Gemm before it is not quantised")


def test_a_layer_with_a_weight_of_three_dimensions_before_is_refused() -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 32])
    first = builder.add("MatMul", x, builder.constant(np.ones((1, 32, 32))), name="experts")
    builder.output(builder.linear(first, 32, 8, "second"))
    found = refusal(groups_of(builder)["second/MatMul"])
    assert found == Refusal("experts", "the MatMul before it is not quantised")


# Attention


def moves(builder: GraphBuilder, x: str) -> str:
    """(batch, sequence, 32) -> heads apart -> every head twice -> together again: (batch, sequence, 64)."""
    apart = builder.add("Reshape", x, builder.integers(0, 0, 4, 8))
    turned = builder.add("Unsqueeze", builder.add("Transpose", apart, perm=[0, 2, 1, 3]), builder.integers(2))
    wide = builder.add("Expand", turned, builder.integers(1, 1, 2, 1, 1))
    together = builder.add("Transpose", wide, perm=[0, 3, 1, 2, 4])
    return builder.add("Reshape", together, builder.integers(0, 0, 64))


def test_heads_are_followed_through_reshape_transpose_and_expand() -> None:
    group = groups_of(two_linears(moves, arriving=64))["second/MatMul"]
    assert (linear(group).name, linear(group).channels, group.K) == ("first/MatMul", 32, 64)
    assert group.moved


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_o_goes_to_v_through_the_cache(kv_heads: int, bias: bool) -> None:
    groups = groups_of(tiny_decoder(kv_heads=kv_heads, bias=bias))
    for layer in (0, 1):
        found = linear(groups[f"/layers.{layer}/o_proj/MatMul"])
        assert found.name == f"/layers.{layer}/v_proj/MatMul"
        assert found.caches == (f"present.{layer}.value",)
        assert (found.bias is not None) == bias
        assert found.bias is None or found.bias[0].name == f"/layers.{layer}/v_proj/Add"


def test_without_a_cache_no_output_is_scaled() -> None:
    assert linear(groups_of(tiny_decoder(cache=False))["/layers.0/o_proj/MatMul"]).caches == ()


def test_every_matmul_of_a_decoder_has_an_absorber() -> None:
    groups = groups_of(tiny_decoder(layers=1)).values()
    found = {group.name: group.absorber.name for group in groups if not isinstance(group.absorber, Refusal)}
    assert found == {
        "/layers.0/q_proj/MatMul": "/layers.0/input_layernorm/Mul_1",
        "/layers.0/o_proj/MatMul": "/layers.0/v_proj/MatMul",
        "/layers.0/mlp/gate_proj/MatMul": "/layers.0/post_attention_layernorm/Mul_1",
        "/layers.0/mlp/down_proj/MatMul": "/layers.0/mlp/up_proj/MatMul",
    }
    assert [len(group.sites) for group in groups] == [3, 1, 2, 1]


def renamed_past(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    for value in model.graph.input:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return model


def test_a_past_whose_name_does_not_pair_is_refused() -> None:
    model = renamed_past(tiny_decoder(layers=1), "past_key_values.0.value", "past_key_values.7.value")
    found = groups_of(model)["/layers.0/o_proj/MatMul"]
    assert refusal(found) == Refusal("present.0.value", "what comes before is an output of the model as well")


def test_a_concat_of_two_activations_is_no_cache() -> None:
    def joined(builder: GraphBuilder, x: str) -> str:
        return builder.add("Concat", builder.input("other", ["batch", "more", 32]), x, name="join", axis=1)

    assert refusal(second(joined)) == Refusal("join", "Concat comes before, which cannot be divided")


def test_a_cache_that_is_read_by_something_else_too_is_refused() -> None:
    model = tiny_decoder(layers=1)
    model.graph.node.append(onnx.helper.make_node("Relu", ["present.0.value"], ["seen"], name="spy"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("seen", 1, None))
    found = refusal(groups_of(model)["/layers.0/o_proj/MatMul"])
    assert found == Refusal("spy", "Relu reads what comes before, too")


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


def test_widths_that_do_not_agree_are_refused() -> None:
    """A layer with one column, broadcast by a Mul: its one channel cannot absorb 32 scales."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 32])
    narrow = builder.linear(x, 32, 1, "narrow")
    wide = builder.add("Mul", narrow, builder.input("factor", ["batch", "sequence", 32]))
    builder.output(builder.linear(wide, 32, 8, "second"))
    found = refusal(groups_of(builder)["second/MatMul"])
    assert found.reason == "what comes before has 1 channels, the input 32"
