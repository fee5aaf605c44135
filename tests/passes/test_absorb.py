"""Where the scale of an input can go, and why it sometimes can go nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import GraphBuilder, gated_mlp, norm_and_readers, tiny_decoder, two_linears

from awq_onnx.passes.absorb import Absorber, Gain, Group, Linear, find_groups
from awq_onnx.passes.sites import Choice, Refusal, survey

INPUT = "the input is an input of the model"

Middle = Callable[[GraphBuilder, str], str]


def groups_of(model: GraphBuilder | onnx.ModelProto) -> dict[str, Group]:
    """The groups by the name of their first site."""
    proto = model.model() if isinstance(model, GraphBuilder) else model
    return {group.name: group for group in find_groups(survey(ir.from_proto(proto)))}


def absorber(group: Group) -> Absorber | Refusal:
    """The only one, or why there is none."""
    if isinstance(group.routes, Refusal):
        return group.routes
    (route,) = group.routes
    return route.absorber


def refusal(group: Group) -> Refusal:
    assert isinstance(group.routes, Refusal)
    return group.routes


def linear(group: Group) -> Linear:
    found = absorber(group)
    assert isinstance(found, Linear)
    return found


def gain(group: Group) -> Gain:
    found = absorber(group)
    assert isinstance(found, Gain)
    return found


def moved(group: Group) -> bool:
    """Whether its channels have to be traced."""
    assert not isinstance(group.routes, Refusal)
    return any(route.needs_tracing for route in group.routes)


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
    found = gain(group)
    (vector,) = found.vectors
    assert (found.name, vector.node.name, vector.index) == ("norm/Mul_1", "norm/Mul_1", 0 if gain_first else 1)
    assert (vector.tensor.name, found.channels) == ("norm.weight", 64)
    assert [site.name for site in group.sites] == ["reader_0", "reader_1"]
    assert not moved(group)


def test_the_gain_of_a_half_precision_norm_is_found_behind_its_casts() -> None:
    assert isinstance(absorber(norm_group(norm_and_readers(dtype=np.float16))), Gain)


def test_a_cast_between_gain_and_reader_is_stepped_over() -> None:
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 64]), 64, "norm")
    half = builder.cast(normed, np.float16, "half")
    weight = builder.constant(np.ones((64, 8)), "w", np.float16)
    builder.output(builder.add("MatMul", half, weight, name="reader_0"), dtype=np.float16)
    assert isinstance(absorber(norm_group(builder)), Gain)


def test_a_reader_of_the_shape_does_not_matter() -> None:
    builder = norm_and_readers()
    builder.output(builder.add("Shape", "norm/Mul_1_output_0"), dtype=np.int64)
    assert isinstance(absorber(norm_group(builder)), Gain)


def test_a_residual_that_reads_the_norm_is_refused() -> None:
    builder = norm_and_readers()
    builder.output(builder.add("Add", "norm/Mul_1_output_0", "x", name="residual"))
    assert refusal(norm_group(builder)) == Refusal("residual", "Add reads the same input")


def test_a_router_that_is_no_site_is_refused() -> None:
    builder = norm_and_readers()
    router = builder.input("router", [64, 4])
    builder.output(builder.add("MatMul", "norm/Mul_1_output_0", router, name="route"))
    assert refusal(norm_group(builder)) == Refusal("route", "MatMul reads the same input")


def norm_and_head() -> GraphBuilder:
    """Two layers and a head behind one norm."""
    builder = norm_and_readers()
    head = builder.add("MatMul", "norm/Mul_1_output_0", builder.weight(64, 100, "head.w"), name="head", to="logits")
    builder.output(head)
    return builder


def test_a_lm_head_on_the_same_input_is_compensated() -> None:
    group = norm_group(norm_and_head())
    assert isinstance(absorber(group), Gain)
    assert [site.name for site in group.compensated] == ["head"]


def test_a_lm_head_whose_weight_others_read_is_refused() -> None:
    builder = norm_and_head()
    builder.output(builder.add("Transpose", "head.w"))
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
    assert isinstance(absorber(norm_group(builder)), Refusal)


def test_a_gain_that_callers_may_override_is_none() -> None:
    builder = norm_and_readers()
    builder.input("norm.weight", [64])
    assert isinstance(absorber(norm_group(builder)), Refusal)


def test_the_rows_of_a_table_are_no_input_of_the_model() -> None:
    builder = GraphBuilder()
    x = builder.add("Gather", builder.weight(40, 64, "table"), builder.input("ids", ["b", "s"], np.int64), name="look")
    builder.output(builder.add("MatMul", x, builder.weight(64, 8), name="reader_0"))
    assert refusal(norm_group(builder)).reason != INPUT


# Gated MLPs


def test_down_goes_up_through_the_gate() -> None:
    group = groups_of(gated_mlp())["down/MatMul"]
    assert (linear(group).name, linear(group).vectors, linear(group).channels) == ("up/MatMul", (), 96)
    assert not moved(group)


def test_a_bias_of_up_is_divided_as_well() -> None:
    found = linear(groups_of(gated_mlp(bias=True))["down/MatMul"])
    (bias,) = found.vectors
    assert (bias.node.name, bias.tensor.name) == ("up/Add", "up.bias")
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

    assert isinstance(absorber(second(silu)), Refusal)


def test_a_square_is_refused() -> None:
    """Dividing x by s would divide x * x by s twice."""
    found = refusal(second(lambda b, x: b.add("Mul", x, x, name="square")))
    assert found == Refusal("square", "Mul reads what comes before, too")


@pytest.mark.parametrize("op_type", ["Relu", "LeakyRelu", "Neg", "Identity", "Dropout"])
def test_a_homogeneous_function_passes_a_positive_scale_on(op_type: str) -> None:
    assert linear(second(lambda b, x: b.add(op_type, x))).name == "first/MatMul"


def test_a_constant_factor_passes_a_scale_on() -> None:
    assert linear(second(lambda b, x: b.add("Mul", x, b.constant(3.0)))).name == "first/MatMul"


@pytest.mark.parametrize("op_type", ["Tanh", "Softmax", "Sigmoid", "Erf", "Exp"])
def test_other_functions_in_between_are_refused(op_type: str) -> None:
    found = refusal(second(lambda b, x: b.add(op_type, x, name="between")))
    assert found == Refusal("between", f"{op_type} comes before, which cannot be divided")


def test_a_layer_normalization_in_between_absorbs_itself() -> None:
    group = second(lambda b, x: b.add("LayerNormalization", x, b.constant(np.ones(32)), name="between"))
    assert gain(group).name == "between"


def test_a_normalization_without_a_gain_is_refused() -> None:
    def normalized(builder: GraphBuilder, x: str) -> str:
        return builder.add("LayerNormalization", x, builder.input("gain", [32]), name="between")

    expected = Refusal("between", "LayerNormalization comes before, which cannot be divided")
    assert refusal(second(normalized)) == expected


def test_a_sum_of_two_activations_is_refused() -> None:
    found = refusal(second(lambda b, x: b.add("Add", x, b.input("other", ["batch", "sequence", 32]), name="sum")))
    assert found == Refusal("sum", "Add comes before, which cannot be divided")


def test_a_function_between_bias_and_matmul_is_refused() -> None:
    def late_bias(builder: GraphBuilder, x: str) -> str:
        return builder.add("Add", builder.add("Tanh", x, name="tanh"), builder.constant(np.ones(32)), name="late")

    assert refusal(second(late_bias)) == Refusal("tanh", "Tanh comes before, which cannot be divided")


def test_two_biases_are_both_divided() -> None:
    def again(builder: GraphBuilder, x: str) -> str:
        return builder.add("Add", x, builder.constant(np.ones(32)), name="again")

    found = linear(second(again, bias=True))
    assert [vector.node.name for vector in found.vectors] == ["again", "first/Add"]


@pytest.mark.parametrize("shape", [(), (1,), (5, 32)])
def test_a_constant_that_is_no_vector_of_the_channels_is_no_bias(shape: tuple[int, ...]) -> None:
    """Divided by s it would change its shape, or need a row of s for every token."""
    found = second(lambda b, x: b.add("Add", x, b.constant(np.full(shape, 3.0)), name="shift"))
    assert refusal(found).what == "shift"


def test_an_operator_of_another_domain_is_refused() -> None:
    model = two_linears(lambda b, x: b.add("Relu", x, name="between")).model()
    next(node for node in model.graph.node if node.name == "between").domain = "com.example"
    assert isinstance(absorber(groups_of(model)["second/MatMul"]), Refusal)


# What feeds the first layer


def test_a_matmul_fed_by_an_input_of_the_model_is_refused() -> None:
    found = groups_of(two_linears(lambda b, x: b.add("Tanh", x)))["first/MatMul"]
    assert refusal(found) == Refusal("x", INPUT)


def two_layers(op_type: str, **attributes: Any) -> GraphBuilder:
    """x (32, 32) -> a Gemm "gemm" -> a MatMul "second"."""
    builder = GraphBuilder()
    first = builder.add(op_type, builder.input("x", [32, 32]), builder.weight(32, 32), name="gemm", **attributes)
    builder.output(builder.linear(first, 32, 8, "second"))
    return builder


def test_a_gemm_before_is_divided() -> None:
    assert linear(groups_of(two_layers("Gemm"))["second/MatMul"]).name == "gemm"


def test_a_gemm_that_transposes_its_input_is_refused() -> None:
    found = refusal(groups_of(two_layers("Gemm", transA=1))["second/MatMul"])
    assert found == Refusal("gemm", "the Gemm before it is not quantised")


def excluded(builder: GraphBuilder, pattern: str) -> Group:
    """The only group of the layers that `pattern` does not name."""
    (group,) = find_groups(survey(ir.from_proto(builder.model()), Choice(exclude=(pattern,))))
    return group


def test_a_layer_before_that_the_user_excludes_is_divided_in_float() -> None:
    assert linear(excluded(two_layers("Gemm"), "gemm")).name == "gemm"


def test_an_excluded_layer_before_whose_weight_others_read_is_refused() -> None:
    builder = two_layers("Gemm")
    builder.output(builder.add("Transpose", "constant_0"))
    expected = Refusal("gemm", "the Gemm before it has a weight that others read")
    assert refusal(excluded(builder, "gemm")) == expected


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
    assert moved(group)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_o_goes_to_v_through_the_cache(kv_heads: int, bias: bool) -> None:
    groups = groups_of(tiny_decoder(kv_heads=kv_heads, bias=bias))
    for layer in (0, 1):
        found = linear(groups[f"/layers.{layer}/o_proj/MatMul"])
        assert found.name == f"/layers.{layer}/v_proj/MatMul"
        assert groups[f"/layers.{layer}/o_proj/MatMul"].caches == (f"present.{layer}.value",)
        assert [one.node.name for one in found.vectors] == ([f"/layers.{layer}/v_proj/Add"] if bias else [])


def test_without_a_cache_no_output_is_scaled() -> None:
    group = groups_of(tiny_decoder(cache=False))["/layers.0/o_proj/MatMul"]
    assert (linear(group).name, group.caches) == ("/layers.0/v_proj/MatMul", ())


def test_every_matmul_of_a_decoder_has_an_absorber() -> None:
    groups = groups_of(tiny_decoder(layers=1)).values()
    found = {group.name: one.name for group in groups if not isinstance(one := absorber(group), Refusal)}
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
    assert refusal(found) == Refusal("/layers.0/value/Concat", "Concat comes before, which cannot be divided")


def test_a_past_that_is_never_returned_is_refused() -> None:
    model = tiny_decoder(layers=1)
    (present,) = (value for value in model.graph.output if value.name == "present.0.value")
    model.graph.output.remove(present)
    found = groups_of(model)["/layers.0/o_proj/MatMul"]
    assert refusal(found) == Refusal("/layers.0/value/Concat", "Concat comes before, which cannot be divided")


def test_caches_that_another_model_has_begun_are_not_scaled() -> None:
    """A decoder of one token at a time goes on with what its twin has made."""
    model = tiny_decoder(layers=1)
    for value in model.graph.input:
        if value.name == "input_ids":
            value.type.tensor_type.shape.dim[1].dim_value = 1
    found = groups_of(model)["/layers.0/o_proj/MatMul"]
    assert refusal(found) == Refusal("/layers.0/value/Concat", "Concat comes before, which cannot be divided")
    assert isinstance(absorber(groups_of(model)["/layers.0/q_proj/MatMul"]), Gain)


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


def test_widths_that_do_not_agree_are_refused() -> None:
    """A layer with one column, broadcast by a Mul: its one channel cannot absorb 32 scales."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 32])
    narrow = builder.linear(x, 32, 1, "narrow")
    wide = builder.add("Mul", builder.add("Tanh", builder.input("factor", ["batch", "sequence", 32])), narrow)
    builder.output(builder.linear(wide, 32, 8, "second"))
    found = refusal(groups_of(builder)["second/MatMul"])
    assert found.reason == "what comes before has 1 channels, the input 32"
