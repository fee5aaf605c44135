"""Whatever stands between layers: a fold that is planned changes no output of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from builders import Array, GraphBuilder
from folding import assert_folding_changes_nothing, microsoft
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

BATCH, TOKENS, K = 2, 3, 6

Step = Callable[["RandomGraph", str], str]


class RandomGraph:
    """Values of shape (BATCH, TOKENS, K), made of each other by steps that hypothesis draws."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.builder = GraphBuilder(opset=23, seed=draw(st.integers(0, 99)))
        self.values = [self.builder.input("x", [BATCH, TOKENS, K])]

    def any_value(self) -> str:
        return self.draw(st.sampled_from(self.values[-6:]))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def vector(self, size: int = K) -> str:
        return self.builder.constant(self.builder.rng.uniform(0.5, 2, size) * self.builder.rng.choice([-1, 1], size))

    def weight(self, rows: int = K, columns: int = K) -> str:
        """A new weight, or one that other layers have as well."""
        known = [one.name for one in self.builder.initializers if list(one.dims) == [rows, columns]]
        if known and self.number(0, 3) == 0:
            return self.draw(st.sampled_from(known))
        return self.builder.weight(rows, columns)


def matmul(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("MatMul", x, graph.weight())


def biased(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("Add", matmul(graph, x), graph.vector())


def gemm(graph: RandomGraph, x: str) -> str:
    rows = graph.builder.add("Reshape", x, graph.builder.integers(-1, K))
    options: dict[str, Any] = {
        "transB": graph.number(0, 1),
        "alpha": graph.draw(st.sampled_from([1.0, 0.5])),
        "beta": 2.0,
    }
    made = graph.builder.add("Gemm", rows, graph.weight(), graph.vector(), **options)
    return graph.builder.add("Reshape", made, graph.builder.integers(BATCH, -1, K))


def norm(graph: RandomGraph, x: str) -> str:
    inputs = [x, graph.vector(), *([graph.vector()] if graph.number(0, 1) else [])]
    return graph.builder.add("LayerNormalization", *inputs)


def rms(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("RMSNormalization", x, graph.vector())


def gain(graph: RandomGraph, x: str) -> str:
    pair = [x, graph.vector()]
    return graph.builder.add("Mul", *(pair if graph.number(0, 1) else pair[::-1]))


def shift(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("Add", x, graph.vector())


def gate(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("Mul", x, graph.any_value())


def residual(graph: RandomGraph, x: str) -> str:
    return graph.builder.add("Add", x, graph.any_value())


def function(graph: RandomGraph, x: str) -> str:
    return graph.builder.add(graph.draw(st.sampled_from(["Relu", "LeakyRelu", "Neg", "Identity", "Tanh", "Abs"])), x)


def number(graph: RandomGraph, x: str) -> str:
    op_type = graph.draw(st.sampled_from(["Mul", "Div", "Add", "Sub"]))
    return graph.builder.add(op_type, x, graph.builder.constant(graph.draw(st.sampled_from([0.5, 3.0]))))


def divided(graph: RandomGraph, x: str) -> str:
    by = graph.builder.add("Exp", graph.builder.add("Tanh", graph.any_value()))
    return graph.builder.add("Div", x, by)


def heads_exchanged(graph: RandomGraph, x: str) -> str:
    apart = graph.builder.add("Reshape", x, graph.builder.integers(0, 0, 2, 3))
    turned = graph.builder.add("Transpose", apart, perm=graph.draw(st.permutations(range(4))))
    return graph.builder.add("Reshape", turned, graph.builder.integers(BATCH, TOKENS, K))


def backwards(graph: RandomGraph, x: str) -> str:
    ends = [graph.builder.integers(one) for one in (-1, -99, graph.number(0, 2), -1)]
    return graph.builder.add("Slice", x, *ends)


def gathered(graph: RandomGraph, x: str) -> str:
    axis = graph.number(0, 2)
    size = (BATCH, TOKENS, K)[axis]
    indices = [graph.number(0, size - 1) for _ in range(size)]
    return graph.builder.add("Gather", x, graph.builder.integers(*indices), axis=axis)


def packed(graph: RandomGraph, x: str) -> str:
    """A wide layer whose halves gate each other, or of which only one is read."""
    wide = graph.builder.add("MatMul", x, graph.weight(K, 2 * K))
    if graph.number(0, 1):
        wide = graph.builder.add("Add", wide, graph.vector(2 * K))
    halves = [f"half_{len(graph.values)}_{index}" for index in (0, 1)]
    if graph.number(0, 1):
        sizes = graph.builder.integers(K, K)
        graph.builder.nodes.append(helper.make_node("Split", [wide, sizes], halves, name=halves[0], axis=-1))
    else:
        for index, half in enumerate(halves):
            ends = [graph.builder.integers(one) for one in (K * index, K * (index + 1), 2)]
            graph.builder.add("Slice", wide, *ends, to=half, name=half)
    graph.values.extend(halves)
    return graph.draw(st.sampled_from(halves))


def mixed(graph: RandomGraph, x: str) -> str:
    """softmax(…) @ x over tokens."""
    other = graph.any_value()
    turned = graph.builder.add("Transpose", graph.any_value(), perm=[0, 2, 1])
    weights = graph.builder.add("Softmax", graph.builder.add("MatMul", other, turned), axis=-1)
    return graph.builder.add("MatMul", weights, x)


STEPS: list[Step] = [
    matmul, matmul, biased, biased, gemm, norm, rms, gain, shift, gate, gate, residual, function, number, divided,
    heads_exchanged, backwards, gathered, packed, packed, mixed,
]  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> RandomGraph:
    graph = RandomGraph(draw)
    for _ in range(draw(st.integers(3, 12))):
        step = draw(st.sampled_from(STEPS))
        graph.values.append(step(graph, graph.any_value()))
    for value in {graph.values[-1], *draw(st.lists(st.sampled_from(graph.values[1:]), max_size=2))}:
        graph.builder.output(value, [BATCH, TOKENS, K])
    return graph


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_no_fold_changes_an_output_of_a_random_graph(graph: RandomGraph) -> None:
    x: Array = np.random.default_rng(0).standard_normal((BATCH, TOKENS, K)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        assert_folding_changes_nothing(microsoft(graph.builder), {"x": x}, Path(folder), tolerance=5e-3)
