"""Attention in one node: where its values come from, and what their scale meets on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run
from folding import Feed, assert_close, assert_folding_changes_nothing, microsoft, random_x
from onnx import helper

from awq_onnx.passes.absorb import find_groups
from awq_onnx.passes.sites import Refusal, survey

K, HEADS, HEAD_DIM, TOKENS = 32, 4, 8, 5
MS = "com.microsoft"


def projections(builder: GraphBuilder, kv_heads: int = HEADS, *, bias: bool = False) -> list[str]:
    """q, k and v of x."""
    x = builder.input("x", ["batch", "sequence", K])
    widths = (K, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM)
    return [builder.linear(x, K, width, name, bias=bias) for name, width in zip("qkv", widths, strict=True)]


def attend(builder: GraphBuilder, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
    domain = MS if op_type != "Attention" else ""
    node = helper.make_node(op_type, inputs, outputs, name="attention", domain=domain, **attributes)
    builder.nodes.append(node)
    builder.output(builder.linear(outputs[0], K, K, "o"))


# GroupQueryAttention


def grouped(*, kv_heads: int = 2, packed: bool = False, bias: bool = False, returned: bool = True) -> GraphBuilder:
    builder = GraphBuilder()
    if packed:
        x = builder.input("x", ["batch", "sequence", K])
        qkv = [builder.linear(x, K, K + 2 * kv_heads * HEAD_DIM, "qkv", bias=bias), "", ""]
    else:
        qkv = projections(builder, kv_heads, bias=bias)
    pasts = [builder.input(f"past_key_values.0.{kind}", ["b", kv_heads, "past", HEAD_DIM]) for kind in ("key", "value")]
    lengths = [builder.input("seqlens_k", ["b"], np.int32), builder.input("total", [], np.int32)]
    presents = ["present.0.key", "present.0.value"]
    attend(
        builder,
        "GroupQueryAttention",
        [*qkv, *pasts, *lengths],
        ["mixed", *presents],
        num_heads=HEADS,
        kv_num_heads=kv_heads,
    )
    for name in presents if returned else ():
        builder.output(name, ["b", kv_heads, "total", HEAD_DIM])
    return builder


def grouped_feed(kv_heads: int = 2) -> Feed:
    empty: Array = np.zeros((2, kv_heads, 0, HEAD_DIM), np.float32)
    lengths: Feed = {"seqlens_k": np.full(2, TOKENS - 1, np.int32), "total": np.array(TOKENS, np.int32)}
    return {**random_x(K), "past_key_values.0.key": empty, "past_key_values.0.value": empty, **lengths}


def next_token(model: onnx.ModelProto, feed: Feed) -> Feed:
    """What the model says of one more token after the caches of `feed`."""
    first = run(model, feed)
    caches = {name.replace("present", "past_key_values"): one for name, one in first.items() if "present" in name}
    lengths: Feed = {"seqlens_k": np.full(2, TOKENS, np.int32), "total": np.array(TOKENS + 1, np.int32)}
    made = run(model, {**feed, **caches, **lengths, "x": feed["x"][:, :1] + 1})
    return {name: one for name, one in made.items() if "present" not in name}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_hands_the_scale_to_v(tmp_path: Path, kv_heads: int, packed: bool, bias: bool) -> None:
    model, feed = microsoft(grouped(kv_heads=kv_heads, packed=packed, bias=bias)), grouped_feed(kv_heads)
    made = assert_folding_changes_nothing(model, feed, tmp_path)
    assert made.divided == {"qkv/MatMul" if packed else "v/MatMul"}
    assert made.caches == {"present.0.value"}
    assert_close(next_token(made.model, feed), next_token(model, feed))


def test_a_value_cache_that_is_not_returned_is_refused(tmp_path: Path) -> None:
    made = assert_folding_changes_nothing(microsoft(grouped(returned=False)), grouped_feed(), tmp_path)
    assert made.divided == set()
    # Two ways to say it: the model does not make the caches that it takes.
    assert made.refused["o/MatMul"].reason in (
        "the cache before it is not returned",
        "GroupQueryAttention comes before, which cannot be divided",
    )


# MultiHeadAttention


def multi_head(*, bias: bool = False, inner_bias: bool = False, cache: bool = False) -> GraphBuilder:
    builder = GraphBuilder()
    inputs = projections(builder, bias=bias)
    if inner_bias:
        inputs.append(builder.constant(builder.rng.standard_normal(3 * K), "inner_bias"))
    outputs = ["mixed"]
    if cache:
        inputs += [""] * (6 - len(inputs))
        dims: list[int | str] = ["b", HEADS, "past", HEAD_DIM]
        inputs += [builder.input(f"past_key_values.0.{kind}", dims) for kind in ("key", "value")]
        outputs += [builder.output(f"present.0.{kind}", dims) for kind in ("key", "value")]
    attend(builder, "MultiHeadAttention", inputs, outputs, num_heads=HEADS)
    return builder


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("inner_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_hands_the_scale_to_v(tmp_path: Path, bias: bool, inner_bias: bool, cache: bool) -> None:
    feed = random_x(K)
    if cache:
        empty: Array = np.zeros((2, HEADS, 0, HEAD_DIM), np.float32)
        feed = {**feed, "past_key_values.0.key": empty, "past_key_values.0.value": empty}
    made = assert_folding_changes_nothing(
        microsoft(multi_head(bias=bias, inner_bias=inner_bias, cache=cache)), feed, tmp_path
    )
    assert made.divided == {"v/MatMul"}
    assert made.caches == ({"present.0.value"} if cache else set())


def test_of_the_bias_inside_only_the_last_third_is_divided(tmp_path: Path) -> None:
    builder = multi_head(inner_bias=True)
    made = assert_folding_changes_nothing(microsoft(builder), random_x(K), tmp_path)
    before, after = (
        onnx.numpy_helper.to_array(next(one for one in tensors if one.name == "inner_bias"))
        for tensors in (builder.initializers, made.model.graph.initializer)
    )
    np.testing.assert_array_equal(after[: 2 * K], before[: 2 * K])
    assert (after[2 * K :] != before[2 * K :]).all()


def test_a_bias_inside_that_is_no_constant_is_refused(tmp_path: Path) -> None:
    builder = GraphBuilder()
    inputs = [*projections(builder), builder.input("inner_bias", [3 * K])]
    attend(builder, "MultiHeadAttention", inputs, ["mixed"], num_heads=HEADS)
    feed = {**random_x(K), "inner_bias": np.linspace(-1, 1, 3 * K, dtype=np.float32)}
    made = assert_folding_changes_nothing(microsoft(builder), feed, tmp_path)
    expected = Refusal("attention", "MultiHeadAttention comes before, which cannot be divided")
    assert made.refused["o/MatMul"] == expected


def test_two_attentions_with_one_v_and_biases_of_their_own(tmp_path: Path) -> None:
    """Layers that share their values add what they add inside: both biases are divided, or the fold is refused."""
    builder = GraphBuilder()
    inputs = projections(builder)
    for index in (0, 1):
        bias = builder.constant(builder.rng.standard_normal(3 * K), f"bias_{index}")
        node = helper.make_node("MultiHeadAttention", [*inputs, bias], [f"mixed_{index}"], domain=MS, num_heads=HEADS)
        builder.nodes.append(node)
        builder.output(builder.linear(f"mixed_{index}", K, K, f"o_{index}"))
    assert_folding_changes_nothing(microsoft(builder), random_x(K), tmp_path)


def test_two_attentions_with_one_v_of_which_one_adds_a_bias(tmp_path: Path) -> None:
    builder = GraphBuilder()
    inputs = projections(builder)
    for index in (0, 1):
        bias = [builder.constant(builder.rng.standard_normal(3 * K), f"bias_{index}")] if index == 0 else []
        node = helper.make_node("MultiHeadAttention", [*inputs, *bias], [f"mixed_{index}"], domain=MS, num_heads=HEADS)
        builder.nodes.append(node)
        builder.output(builder.linear(f"mixed_{index}", K, K, f"o_{index}"))
    assert_folding_changes_nothing(microsoft(builder), random_x(K), tmp_path)


# Attention of opset 23


def standard(*, kv_heads: int = HEADS, cache: bool = False, scores: bool = False) -> GraphBuilder:
    builder = GraphBuilder(opset=23)
    inputs = projections(builder, kv_heads, bias=True)
    outputs = ["mixed"]
    if cache:
        dims: list[int | str] = ["b", kv_heads, "past", HEAD_DIM]
        inputs += ["", *(builder.input(f"past_key_values.0.{kind}", dims) for kind in ("key", "value"))]
        outputs += [builder.output(f"present.0.{kind}", dims) for kind in ("key", "value")]
    if scores:
        outputs += ["", "", builder.output("scores")]
    attend(builder, "Attention", inputs, outputs, q_num_heads=HEADS, kv_num_heads=kv_heads)
    return builder


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_hands_the_scale_to_v(tmp_path: Path, kv_heads: int, cache: bool) -> None:
    feed = random_x(K)
    if cache:
        empty: Array = np.zeros((2, kv_heads, 0, HEAD_DIM), np.float32)
        feed = {**feed, "past_key_values.0.key": empty, "past_key_values.0.value": empty}
    made = assert_folding_changes_nothing(microsoft(standard(kv_heads=kv_heads, cache=cache)), feed, tmp_path)
    assert made.divided == {"v/MatMul"}


def test_values_that_are_keys_as_well_are_refused(tmp_path: Path) -> None:
    builder = GraphBuilder(opset=23)
    q, k, _ = projections(builder)
    attend(builder, "Attention", [q, k, k], ["mixed"], q_num_heads=HEADS, kv_num_heads=HEADS)
    made = assert_folding_changes_nothing(microsoft(builder), random_x(K), tmp_path)
    assert made.refused["o/MatMul"] == Refusal("attention", "Attention reads what comes before, too")


def test_the_scores_of_an_attention_are_no_values() -> None:
    """Output 3 holds what the queries and keys make; a layer that reads it has nothing to divide."""
    builder = standard(scores=True)
    builder.output(builder.linear("scores", TOKENS, 8, "reader"))
    groups = {group.name: group for group in find_groups(survey(ir.from_proto(microsoft(builder))))}
    expected = Refusal("attention", "Attention comes before, which cannot be divided")
    assert groups["reader/MatMul"].routes == expected


def test_a_fused_attention_with_the_weights_inside_is_refused(tmp_path: Path) -> None:
    builder = GraphBuilder()
    inputs = [builder.input("x", ["b", "s", K]), builder.weight(K, 3 * K), builder.constant(np.ones(3 * K))]
    node = helper.make_node("Attention", inputs, ["mixed"], name="attention", domain=MS, num_heads=HEADS)
    builder.nodes.append(node)
    builder.output(builder.linear("mixed", K, K, "o"))
    made = assert_folding_changes_nothing(microsoft(builder), random_x(K), tmp_path)
    expected = Refusal("attention", "Attention comes before, which cannot be divided")
    assert made.refused["o/MatMul"] == expected
