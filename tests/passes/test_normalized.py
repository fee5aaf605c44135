"""Layers whose output is normalised head by head: which they are, and what the search does for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, run, statistics_of
from folding import microsoft
from onnx import helper

import awq_onnx
from awq_onnx import codec, rounding, search
from awq_onnx.codec import Format
from awq_onnx.passes.sites import survey
from awq_onnx.search import ALPHAS, Reader
from awq_onnx.statistics import InputStatistics

K, HEADS, SIZE = 32, 4, 8
N = HEADS * SIZE
PLAIN = Format(16, False, np.dtype(np.float32))
Norm = Callable[[GraphBuilder, str, int], str]


# Which layers


def layer_norm(builder: GraphBuilder, x: str, size: int) -> str:
    return builder.add("LayerNormalization", x, builder.constant(np.ones(size)), builder.constant(np.ones(size)))


def rms_normalization(builder: GraphBuilder, x: str, size: int) -> str:
    return builder.add("RMSNormalization", x, builder.constant(np.ones(size)))


def simplified(builder: GraphBuilder, x: str, size: int) -> str:
    return builder.add("SimplifiedLayerNormalization", x, builder.constant(np.ones(size)), axis=-1)


def decomposed(builder: GraphBuilder, x: str, size: int) -> str:
    return builder.rms_norm(x, size, "qk_norm")


def unit_length(builder: GraphBuilder, x: str, _: int) -> str:
    return builder.add("LpNormalization", x, axis=-1, p=2)


def divided_by_length(builder: GraphBuilder, x: str, _: int) -> str:
    return builder.add("Div", x, builder.add("ReduceL2", x, builder.integers(-1), keepdims=1))


def split(builder: GraphBuilder, made: str, size: int = SIZE) -> str:
    return builder.add("Reshape", made, builder.integers(0, 0, -1, size))


def head_size_of(builder: GraphBuilder) -> int | None:
    first = survey(ir.from_proto(microsoft(builder))).sites[0]
    return first.head_size


def projected(*, bias: bool = False) -> tuple[GraphBuilder, str]:
    builder = GraphBuilder(opset=23)
    return builder, builder.linear(builder.input("x", ["batch", 5, K]), K, N, "q_proj", bias=bias)


@pytest.mark.parametrize("norm", [layer_norm, rms_normalization, decomposed, unit_length, divided_by_length])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("turned", [False, True], ids=["norm, then turn", "turn, then norm"])
def test_a_norm_of_each_head_is_seen_in_every_writing(norm: Norm, bias: bool, turned: bool) -> None:
    builder, made = projected(bias=bias)
    heads = split(builder, made)
    if turned:
        heads = builder.add("Transpose", heads, perm=[0, 2, 1, 3])
    builder.output(norm(builder, heads, SIZE), [])
    assert head_size_of(builder) == SIZE


def test_a_simplified_norm_of_each_head_is_seen() -> None:
    """Its op has no shape inference in onnx, and none is needed."""
    builder, made = projected()
    builder.output(simplified(builder, split(builder, made), SIZE), [])
    assert head_size_of(builder) == SIZE


def test_a_norm_of_the_whole_row_is_none_of_heads() -> None:
    builder, made = projected()
    builder.output(layer_norm(builder, made, N), [])
    assert head_size_of(builder) is None


def test_an_attention_without_norms_has_none() -> None:
    builder, made = projected()
    builder.output(builder.add("Transpose", split(builder, made), perm=[0, 2, 1, 3]), [])
    assert head_size_of(builder) is None


def test_a_sum_that_is_normalised_is_not_the_layer_alone() -> None:
    builder, made = projected()
    residual = builder.add("Add", made, "x")
    builder.output(layer_norm(builder, split(builder, residual), SIZE), [])
    assert head_size_of(builder) is None


def test_a_function_before_the_norm_ends_the_search_for_one() -> None:
    builder, made = projected()
    builder.output(layer_norm(builder, split(builder, builder.add("Tanh", made)), SIZE), [])
    assert head_size_of(builder) is None


def test_a_layer_that_only_gives_the_gain_of_a_norm_is_not_normalised() -> None:
    builder = GraphBuilder(opset=23)
    made = builder.linear(builder.input("x", [1, K]), K, N, "gain_proj")
    gain = builder.add("Reshape", made, builder.integers(HEADS, SIZE))
    builder.output(builder.add("LayerNormalization", builder.input("z", ["batch", HEADS, SIZE]), gain, axis=1), [])
    assert head_size_of(builder) is None


def test_heads_of_unknown_size_are_left_as_they_are() -> None:
    builder, made = projected()
    shape = builder.input("shape", [4], np.int64)
    builder.output(layer_norm(builder, builder.add("Reshape", made, shape), SIZE), [])
    assert head_size_of(builder) is None


# What the search does


@pytest.fixture(scope="module")
def x() -> Array:
    rows: Array = np.random.default_rng(0).standard_normal((512, K))
    rows[:, [3, 17]] *= 30
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def statistics(x: Array) -> InputStatistics:
    return statistics_of(x)


@pytest.fixture(scope="module")
def weight() -> Array:
    return two_heads()


def two_heads() -> Array:
    """A loud head that hardly reads the outliers, so that room for them is lost on it; a quiet one that does."""
    loud, quiet = np.random.default_rng(1).standard_normal((2, K, SIZE)).astype(np.float32)
    loud[[3, 17]] /= 30
    both: Array = np.concatenate([100 * loud, quiet], axis=1)
    return both


def best_alpha(weight: Array, statistics: InputStatistics, head_size: int | None = None) -> float:
    return search.search_scale([Reader(weight, statistics, head_size, fmt=PLAIN)]).alpha


def relative_losses(alpha: float, weight: Array, statistics: InputStatistics) -> list[float]:
    """Of each head: its loss at this alpha over its energy."""
    losses = []
    for start in range(0, weight.shape[1], SIZE):
        head = np.ascontiguousarray(weight[:, start : start + SIZE])
        choice = search.search_scale([Reader(head, statistics, fmt=PLAIN)])
        losses.append(choice.losses[ALPHAS.index(alpha)] / statistics.loss(head))
    return losses


def test_a_quiet_head_counts_as_much_as_a_loud_one(weight: Array, statistics: InputStatistics) -> None:
    alone = [best_alpha(np.ascontiguousarray(weight[:, at : at + SIZE]), statistics) for at in (0, SIZE)]
    assert abs(alone[0] - alone[1]) >= 0.2  # they want different scales
    by_sum, by_head = best_alpha(weight, statistics), best_alpha(weight, statistics, SIZE)
    assert by_sum == pytest.approx(alone[0], abs=0.1)  # the loud head alone is heard
    assert by_head != by_sum
    assert sum(relative_losses(by_head, weight, statistics)) < sum(relative_losses(by_sum, weight, statistics))
    assert relative_losses(by_head, weight, statistics)[1] < relative_losses(by_sum, weight, statistics)[1]


def test_heads_are_nearer_to_the_original_behind_their_norm(
    x: Array, weight: Array, statistics: InputStatistics
) -> None:
    def normed(values: Array) -> Array:
        heads = values.reshape(len(values), -1, SIZE)
        made: Array = heads / np.sqrt(np.square(heads).mean(axis=2, keepdims=True))
        return made

    errors = []
    for head_size in (None, SIZE):
        readers = [Reader(weight, statistics, head_size, fmt=PLAIN)]
        scale, (rounded,) = rounding.round_group(readers, search.search_scale(readers).scale)
        codes = codec.unpack(rounded.codes).transpose(1, 2, 0) - rounded.grid.zero_points[:, None, :]  # (G, b, N)
        restored = codec.from_blocks(codec.dequantize(codes, rounded.grid), K) / scale[:, None]
        errors.append(np.square(normed(x @ restored) - normed(x @ weight)).mean())
    assert errors[1] < 0.8 * errors[0]


def test_columns_of_one_head_count_the_same_and_all_heads_together_as_before(
    weight: Array, statistics: InputStatistics
) -> None:
    emphasis = Reader(weight, statistics, SIZE, fmt=PLAIN).emphasis
    assert emphasis is not None
    per_head = emphasis.reshape(-1, SIZE)
    assert (per_head == per_head[:, :1]).all()
    energy = np.array([statistics.loss(weight[:, at : at + SIZE] * emphasis[at]) for at in (0, SIZE)])
    assert energy[0] == pytest.approx(energy[1], rel=0.1)
    assert energy.sum() == pytest.approx(statistics.loss(weight), rel=0.1)


def test_a_dead_head_counts_nothing_and_breaks_nothing(weight: Array, statistics: InputStatistics) -> None:
    dead = np.concatenate([weight, np.zeros((K, SIZE), np.float32)], axis=1)
    emphasis = Reader(dead, statistics, SIZE, fmt=PLAIN).emphasis
    assert emphasis is not None
    assert np.isfinite(emphasis).all()
    assert best_alpha(dead, statistics, SIZE) == best_alpha(weight, statistics, SIZE)


def test_without_heads_nothing_is_weighed(weight: Array, statistics: InputStatistics) -> None:
    reader = Reader(weight, statistics, fmt=PLAIN)
    assert reader.emphasis is None
    assert reader.emphasized(weight) is weight


def test_a_layer_before_a_norm_of_heads_is_quantised_by_what_its_heads_become(tmp_path: Path) -> None:
    """The loud and the quiet head in a graph: behind the norm the error is smaller than without knowing of it."""
    errors = {}
    feed = {"x": np.random.default_rng(0).standard_normal((512, K)).astype(np.float32)}
    for seen in (True, False):
        builder = GraphBuilder(opset=23)
        normed = builder.add("LayerNormalization", builder.input("x", ["rows", K]), builder.constant(outliers()))
        made = builder.add("MatMul", normed, builder.constant(two_heads(), "w"), name="q_proj")
        if not seen:  # a function that changes nothing here hides the norm
            made = builder.add("Clip", made)
        heads = builder.add("Reshape", made, builder.integers(0, 2, SIZE))
        builder.output(rms_normalization(builder, heads, SIZE), [])
        graph = helper.make_graph(builder.nodes, "tiny", builder.inputs, builder.outputs, builder.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        recipe = awq_onnx.Recipe(block_size=16, accuracy_level=0, samples=512)
        awq_onnx.quantize(model, tmp_path / f"{seen}.onnx", recipe, calibration=feed)
        (expected,), (actual,) = run(model, feed).values(), run(tmp_path / f"{seen}.onnx", feed).values()
        errors[seen] = np.square(actual - expected).mean()
    assert errors[True] < 0.8 * errors[False]


def outliers() -> Array:
    gain = np.ones(K)
    gain[[3, 17]] = 30
    return gain
