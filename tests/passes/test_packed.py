"""Weights of several layers in one: gate and up, or q, k and v; only the part that is asked for is divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import GraphBuilder
from folding import Folded, assert_folding_changes_nothing, random_x
from onnx import helper

from awq_onnx.passes.sites import Refusal

K, HIDDEN, HEADS, HEAD_DIM = 32, 24, 4, 8
OTHERS = "something else reads the channels that would be divided"

Halves = Callable[[GraphBuilder, str], tuple[str, str]]


def by_split(builder: GraphBuilder, packed: str) -> tuple[str, str]:
    node = helper.make_node("Split", [packed, builder.integers(HIDDEN, HIDDEN)], ["gate", "up"], axis=-1)
    builder.nodes.append(node)
    return "gate", "up"


def by_slices(builder: GraphBuilder, packed: str) -> tuple[str, str]:
    axis = builder.integers(2)
    gate = builder.add("Slice", packed, builder.integers(0), builder.integers(HIDDEN), axis, to="gate")
    up = builder.add("Slice", packed, builder.integers(HIDDEN), builder.integers(2 * HIDDEN), axis, to="up")
    return gate, up


def by_gathers(builder: GraphBuilder, packed: str) -> tuple[str, str]:
    """Every other channel is one of the gate, as in gpt-oss."""
    even, odd = (builder.integers(*range(start, 2 * HIDDEN, 2)) for start in (0, 1))
    return builder.add("Gather", packed, even, axis=-1, to="gate"), builder.add("Gather", packed, odd, axis=2, to="up")


def by_reshape(builder: GraphBuilder, packed: str) -> tuple[str, str]:
    apart = builder.add("Reshape", packed, builder.integers(0, 0, 2, HIDDEN))
    first, second = (builder.constant(index, dtype=np.int64) for index in (0, 1))
    return builder.add("Gather", apart, first, axis=2, to="gate"), builder.add("Gather", apart, second, axis=2, to="up")


def packed_mlp(halves: Halves, *, bias: bool = False, up_first: bool = False) -> GraphBuilder:
    """x -> gate and up in one -> silu(gate) * up -> down -> y."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", K])
    gate, up = halves(builder, builder.linear(x, K, 2 * HIDDEN, "gate_up", bias=bias))
    acted = builder.add("Mul", gate, builder.add("Sigmoid", gate, name="sigmoid"), name="silu")
    product = builder.add("Mul", *((up, acted) if up_first else (acted, up)), name="product")
    builder.output(builder.linear(product, HIDDEN, K, "down"))
    return builder


def folded(builder: GraphBuilder, folder: Path) -> Folded:
    return assert_folding_changes_nothing(builder.model(), random_x(K), folder)


every_way = pytest.mark.parametrize("halves", [by_split, by_slices, by_gathers, by_reshape])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
@every_way
def test_down_goes_to_the_half_that_is_up(tmp_path: Path, halves: Halves, up_first: bool, bias: bool) -> None:
    made = folded(packed_mlp(halves, bias=bias, up_first=up_first), tmp_path)
    assert made.divided == {"gate_up/MatMul"}


@every_way
def test_somebody_else_who_reads_up_is_refused(tmp_path: Path, halves: Halves) -> None:
    builder = packed_mlp(halves)
    builder.output(builder.add("Relu", "up", name="spy"))
    made = folded(builder, tmp_path)
    assert made.refused["down/MatMul"] == Refusal("spy", "Relu reads what comes before, too")


def test_somebody_else_who_reads_a_slice_of_up_is_refused(tmp_path: Path) -> None:
    builder = packed_mlp(by_slices)
    bounds = [builder.integers(number) for number in (2 * HIDDEN - 1, 2 * HIDDEN, 2)]
    builder.output(builder.add("Slice", "gate_up/MatMul_output_0", *bounds, name="spy"))
    made = folded(builder, tmp_path)
    assert made.refused["down/MatMul"] == Refusal("gate_up/MatMul", OTHERS)


def test_somebody_else_who_reads_a_slice_of_the_gate_does_not_matter(tmp_path: Path) -> None:
    builder = packed_mlp(by_slices)
    bounds = [builder.integers(number) for number in (0, 3, 2)]
    builder.output(builder.add("Slice", "gate_up/MatMul_output_0", *bounds))
    assert folded(builder, tmp_path).divided == {"gate_up/MatMul"}


def test_somebody_else_who_reads_all_of_it_is_refused(tmp_path: Path) -> None:
    builder = packed_mlp(by_slices)
    builder.output(builder.add("Relu", "gate_up/MatMul_output_0", name="spy"))
    made = folded(builder, tmp_path)
    assert made.refused["down/MatMul"] == Refusal("spy", "Relu reads what comes before, too")


@pytest.mark.parametrize("returned", [False, True])
def test_a_move_before_a_slice_may_be_seen_by_nobody_else(tmp_path: Path, returned: bool) -> None:
    builder = packed_mlp(by_slices)
    moved = builder.add("Reshape", "gate_up/MatMul_output_0", builder.integers(-1, 2 * HIDDEN), name="flat")
    builder.output(builder.add("Slice", moved, *(builder.integers(one) for one in (0, 3, 1)), name="of the gate"))
    if returned:
        builder.output(moved)
    made = folded(builder, tmp_path)
    assert made.divided == (set() if returned else {"gate_up/MatMul"})


def test_one_half_that_gates_itself_is_refused(tmp_path: Path) -> None:
    """silu(gate) * gate: both readers see one half."""
    builder = packed_mlp(lambda b, packed: (by_split(b, packed)[0], "gate"))
    made = folded(builder, tmp_path)
    assert made.divided == set()
    assert "down/MatMul" in made.refused


# q, k and v in one

Thirds = Callable[[GraphBuilder, str], tuple[str, str, str]]


def heads_of(builder: GraphBuilder, x: str) -> str:
    """(batch, sequence, heads, head_dim) -> (batch, heads, sequence, head_dim)"""
    return builder.add("Transpose", x, perm=[0, 2, 1, 3])


def gpt2(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
    """q of all heads, k of all heads, v of all heads."""
    sizes = builder.integers(K, K, K)
    builder.nodes.append(helper.make_node("Split", [packed, sizes], ["q", "k", "v"], name="split", axis=-1))
    q, k, v = (builder.add("Reshape", one, builder.integers(0, 0, HEADS, HEAD_DIM)) for one in ("q", "k", "v"))
    return heads_of(builder, q), heads_of(builder, k), heads_of(builder, v)


def neox(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
    """q, k and v of the first head, then of the second; taken apart by slices."""
    apart = builder.add("Reshape", packed, builder.integers(0, 0, HEADS, 3 * HEAD_DIM))
    turned = heads_of(builder, apart)
    bounds = [builder.integers(HEAD_DIM * index) for index in range(4)]
    q, k, v = (builder.add("Slice", turned, bounds[i], bounds[i + 1], builder.integers(3)) for i in range(3))
    return q, k, v


def bloom(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
    """The same, by an axis of three."""
    apart = builder.add("Reshape", packed, builder.integers(0, 0, HEADS, 3, HEAD_DIM))
    q, k, v = (builder.add("Gather", apart, builder.constant(i, dtype=np.int64), axis=3) for i in range(3))
    return heads_of(builder, q), heads_of(builder, k), heads_of(builder, v)


def falcon(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
    """All heads of q, then one k and one v for all of them."""
    apart = builder.add("Reshape", packed, builder.integers(0, 0, HEADS + 2, HEAD_DIM))
    bounds = [builder.integers(number) for number in (0, HEADS, HEADS + 1, HEADS + 2)]
    q, k, v = (builder.add("Slice", apart, bounds[i], bounds[i + 1], builder.integers(2)) for i in range(3))
    return heads_of(builder, q), heads_of(builder, k), heads_of(builder, v)


def swin(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
    """The three in front of everything, then one after the other."""
    apart = builder.add("Reshape", packed, builder.integers(0, 0, 3, HEADS, HEAD_DIM))
    turned = builder.add("Transpose", apart, perm=[2, 0, 3, 1, 4])
    q, k, v = (builder.add("Gather", turned, builder.constant(i, dtype=np.int64), axis=0) for i in range(3))
    return q, k, v


def packed_attention(thirds: Thirds, *, bias: bool = False, einsum: bool = False) -> GraphBuilder:
    """x -> q, k and v in one -> attention -> o -> y."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", K])
    width = (HEADS + 2) * HEAD_DIM if thirds is falcon else 3 * K
    q, k, v = thirds(builder, builder.linear(x, K, width, "qkv", bias=bias))
    if einsum:
        weights = builder.add("Softmax", builder.add("Einsum", q, k, equation="bhqd,bhkd->bhqk"), axis=-1)
        mixed = builder.add("Einsum", weights, v, equation="bhqk,bhkd->bhqd")
    else:
        keys = builder.add("Transpose", k, perm=[0, 1, 3, 2])
        weights = builder.add("Softmax", builder.add("MatMul", q, keys), axis=-1)
        mixed = builder.add("MatMul", weights, v, name="mix")
    merged = builder.add("Reshape", builder.add("Transpose", mixed, perm=[0, 2, 1, 3]), builder.integers(0, 0, K))
    builder.output(builder.linear(merged, K, K, "o"))
    return builder


every_layout = pytest.mark.parametrize("thirds", [gpt2, neox, bloom, falcon, swin])


@pytest.mark.parametrize("bias", [False, True])
@every_layout
def test_o_goes_to_the_third_that_is_v(tmp_path: Path, thirds: Thirds, bias: bool) -> None:
    assert folded(packed_attention(thirds, bias=bias), tmp_path).divided == {"qkv/MatMul"}


@pytest.mark.parametrize("thirds", [gpt2, neox, bloom, swin])
def test_o_goes_to_v_through_an_einsum(tmp_path: Path, thirds: Thirds) -> None:
    assert folded(packed_attention(thirds, einsum=True), tmp_path).divided == {"qkv/MatMul"}


@every_layout
def test_an_attention_whose_values_others_see_is_refused(tmp_path: Path, thirds: Thirds) -> None:
    builder = packed_attention(thirds)
    (mix,) = (node for node in builder.nodes if node.name == "mix")
    builder.output(builder.add("Relu", mix.input[1], name="spy"))
    made = folded(builder, tmp_path)
    assert made.refused["o/MatMul"] == Refusal("spy", "Relu reads what comes before, too")


def test_values_that_are_keys_as_well_are_refused(tmp_path: Path) -> None:
    """Attention over what it compares with: k is v, as in multi-head latent attention."""

    def shared(builder: GraphBuilder, packed: str) -> tuple[str, str, str]:
        q, _, v = gpt2(builder, packed)
        return q, v, v

    made = folded(packed_attention(shared), tmp_path)
    assert made.divided == set()
    assert made.refused["o/MatMul"].reason == "Transpose reads what comes before, too"


def test_an_einsum_that_sums_over_channels_is_refused(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", K])
    a, b = builder.linear(x, K, K, "a"), builder.linear(x, K, K, "b")
    scores = builder.add("Einsum", a, b, equation="bqd,bkd->bqk")
    first = builder.add("Slice", scores, builder.integers(0), builder.integers(5), builder.integers(2))
    builder.output(builder.linear(first, 5, 8, "reader"))
    made = folded(builder, tmp_path)
    assert made.refused["reader/MatMul"].what == "b/MatMul"
