"""A router, and experts that get the rows it chose for them: one scale for all, and the router sees none of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Array, GraphBuilder, run
from folding import Folded, assert_folding_changes_nothing, microsoft
from onnx import helper

from awq_onnx import Recipe, pipeline
from awq_onnx.passes.sites import Refusal

K, HIDDEN, EXPERTS, TOKENS = 16, 24, 4, 12


def experts(*, dims: tuple[int | str, ...] = ("tokens", K), router: str = "MatMul", spy: bool = False) -> GraphBuilder:
    """x (tokens, K) -> norm -> router -> TopK; each expert's rows by Gather -> gate, up, down -> ScatterElements."""
    builder = GraphBuilder()
    x = builder.input("x", list(dims))
    normed = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    scores = routed(builder, normed, router)
    builder.nodes.append(
        helper.make_node("TopK", [scores, builder.integers(2)], ["shares", "chosen"], name="topk", axis=-1)
    )
    for index in range(EXPERTS):
        name = f"expert_{index}"
        hit = builder.add("Equal", "chosen", builder.constant(index, dtype=np.int64))
        mine = builder.add("ReduceMax", builder.cast(hit, np.int64, f"{name}/Cast"), builder.integers(1), keepdims=0)
        rows = builder.add("Squeeze", builder.add("NonZero", mine), builder.integers(0), name=f"{name}/rows")
        picked = builder.add("Gather", normed, rows, name=f"{name}/Gather", axis=0)
        gate = builder.linear(picked, K, HIDDEN, f"{name}/gate")
        up = builder.linear(picked, K, HIDDEN, f"{name}/up")
        acted = builder.add("Mul", gate, builder.add("Sigmoid", gate))
        builder.output(builder.linear(builder.add("Mul", acted, up), HIDDEN, K, f"{name}/down"), ["rows", K])
    if spy:
        builder.output(builder.add("Relu", picked, name="spy"))
    builder.output("chosen", dtype=np.int64)
    return builder


def routed(builder: GraphBuilder, normed: str, router: str) -> str:
    if router == "MatMul":
        logits = builder.add("MatMul", normed, builder.weight(K, EXPERTS, "router.w"), name="router")
    else:
        bias = builder.constant(np.linspace(0, 1, EXPERTS))
        logits = builder.add("Gemm", normed, builder.weight(EXPERTS, K, "router.w"), bias, name="router", transB=1)
    return builder.add("Softmax", logits, axis=-1)


def folded(builder: GraphBuilder, folder: Path) -> Folded:
    x: Array = np.random.default_rng(2).standard_normal((TOKENS, K)).astype(np.float32)
    return assert_folding_changes_nothing(microsoft(builder), {"x": x}, folder)


@pytest.mark.parametrize("router", ["MatMul", "Gemm"])
def test_all_experts_share_the_scale_of_the_norm_and_the_router_is_compensated(tmp_path: Path, router: str) -> None:
    made = folded(experts(router=router), tmp_path)
    group = made.groups["expert_0/gate/MatMul"]
    assert len(group.sites) == 2 * EXPERTS
    assert len(group.inputs) == EXPERTS
    assert [site.name for site in group.compensated] == ["router"]
    assert made.divided == {"norm", *(f"expert_{index}/up/MatMul" for index in range(EXPERTS))}
    assert made.refused == {}


def test_experts_of_unknown_shape_are_folded_or_refused_but_right(tmp_path: Path) -> None:
    """Without shapes the rows have to be traced, and an expert that gets no token shows nothing."""
    builder = experts(dims=("a", "b"))
    made = folded(builder, tmp_path)
    assert {f"expert_{index}/up/MatMul" for index in range(EXPERTS)} <= made.divided


def test_somebody_else_who_reads_the_rows_of_an_expert_is_refused(tmp_path: Path) -> None:
    made = folded(experts(spy=True), tmp_path)
    assert made.refused["expert_0/gate/MatMul"] == Refusal("spy", "Relu reads the same input")


def test_somebody_else_who_picks_rows_of_the_norm_is_refused(tmp_path: Path) -> None:
    builder = experts()
    builder.output(builder.add("Gather", "norm_output_0", builder.integers(0), name="first_token", axis=0))
    made = folded(builder, tmp_path)
    expected = Refusal("norm", "something else reads the channels that would be divided")
    assert made.refused["expert_0/gate/MatMul"] == expected


def test_a_router_whose_weight_others_read_is_refused(tmp_path: Path) -> None:
    builder = experts()
    builder.output(builder.add("Transpose", "router.w", name="tied"))
    made = folded(builder, tmp_path)
    assert made.refused["expert_0/gate/MatMul"] == Refusal("router", "MatMul reads what comes before, too")


def stacked(*, rows: int) -> GraphBuilder:
    """x (rows, tokens, K) -> norm -> all experts in one MatMul (E, K, N)."""
    builder = GraphBuilder()
    x = builder.input("x", [rows, "tokens", K])
    normed = builder.add("LayerNormalization", x, builder.constant(builder.outlier_gain(K)), name="norm")
    weight = builder.constant(builder.rng.standard_normal((EXPERTS, K, HIDDEN)), "experts.w")
    builder.output(builder.add("MatMul", normed, weight, name="experts"), [EXPERTS, "tokens", HIDDEN])
    return builder


@pytest.mark.parametrize("rows", [1, EXPERTS])
def test_stacked_experts_are_quantised_one_by_one(tmp_path: Path, rows: int) -> None:
    model = microsoft(stacked(rows=rows))
    x: Array = np.random.default_rng(2).standard_normal((8, TOKENS, K)).astype(np.float32)
    pipeline.quantize(model, tmp_path / "out.onnx", Recipe(accuracy_level=0, samples=4), calibration={"x": x})
    feed = {"x": x[:rows]}
    expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
    for name, values in expected.items():
        assert np.linalg.norm(actual[name] - values) < 0.15 * np.linalg.norm(values)
