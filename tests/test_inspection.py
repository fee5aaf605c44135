"""inspect(): what would be done, and what was done, without a weight being read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import GraphBuilder, save, tiny_decoder
from onnx import helper

import awq_onnx
from awq_onnx import Recipe, errors
from awq_onnx.inspection import Findings, Forecast, inspect
from awq_onnx.store import OpenedModel

QUICK = Recipe(samples=2, sequence_length=8)


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(OpenedModel, "read", read)
    monkeypatch.setattr(OpenedModel, "_mapped", read)


def forecast(model: onnx.ModelProto | Path, recipe: Recipe | None = None) -> Forecast:
    found = inspect(model, recipe)
    assert isinstance(found, Forecast)
    return found


def findings(model: onnx.ModelProto | Path) -> Findings:
    found = inspect(model)
    assert isinstance(found, Findings)
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        QUICK,
        Recipe(samples=2, sequence_length=8, lm_head="8", embedding="4", override=("*/q_proj/*:bits=8",)),
        Recipe(samples=2, sequence_length=8, block_size=-1, symmetric=True, exclude=("*/down_proj/*",)),
        Recipe(samples=2, sequence_length=8, format="qdq", lm_head="8"),
        Recipe(samples=2, sequence_length=8, target="tensorrt"),
    ],
)
def test_what_is_foreseen_is_what_is_done(tmp_path: Path, recipe: Recipe) -> None:
    source = save(tiny_decoder(), tmp_path / "model.onnx")
    told = forecast(source, recipe)
    report = awq_onnx.quantize(source, tmp_path / "out.onnx", recipe)
    layers = [one for one in told.layers if one.op_type == "MatMul"]
    assert [(one.name, one.K, one.N, one.bits) for one in layers] == [
        (one.name, one.K, one.N, one.bits) for one in report.matmuls
    ]
    assert [one.folded_into for one in layers] == [one.folded_into for one in report.matmuls]
    assert told.kept == report.kept
    assert told.size_bytes == report.size_before_bytes


def test_the_size_that_is_foreseen_is_nearly_that_of_the_output(tmp_path: Path) -> None:
    """Of a model that is large enough for its graph not to count."""
    source = save(tiny_decoder(hidden=256, layers=1), tmp_path / "model.onnx")
    report = awq_onnx.quantize(source, tmp_path / "out.onnx", QUICK)
    assert forecast(source).predicted_bytes == pytest.approx(report.size_after_bytes, rel=0.05)


@pytest.mark.usefixtures("no_weight_is_read")
def test_no_weight_is_read(tmp_path: Path) -> None:
    source = save(tiny_decoder(hidden=256), tmp_path / "model.onnx", external=True)
    (tmp_path / "model.onnx.data").write_bytes(bytes((tmp_path / "model.onnx.data").stat().st_size))
    assert len(forecast(source).layers) == 14


def test_where_nothing_absorbs_a_scale_the_reason_is_told() -> None:
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", 32]), 32, "/norm")
    product = builder.linear(normed, 32, 32, "/q")
    builder.output(builder.add("Add", normed, product, name="/residual"), ["batch", 32])
    (layer,) = forecast(builder.model()).layers
    assert layer.folded_into is None
    assert (layer.reason, layer.blocked_by) == ("Add reads the same input", "/residual")


def test_where_calibration_would_choose_no_bits_are_told(tmp_path: Path) -> None:
    source = save(tiny_decoder(), tmp_path / "model.onnx")
    told = forecast(source, Recipe(quality="best"))
    assert {(one.bits, one.block_size) for one in told.layers} == {(None, None)}


def test_a_quantised_model_tells_how_it_was_made(tmp_path: Path) -> None:
    recipe = Recipe(samples=2, sequence_length=8, lm_head="8")
    report = awq_onnx.quantize(save(tiny_decoder(), tmp_path / "model.onnx"), tmp_path / "out.onnx", recipe)
    found = findings(tmp_path / "out.onnx")
    rows = {one.name: one for one in report.matmuls}
    layers = [one for one in found.layers if one.op_type == "MatMulNBits"]
    assert {one.name for one in layers} == set(rows)
    for one in layers:
        row = rows[one.name]
        assert (one.K, one.N, one.bits, one.block_size) == (row.K, row.N, row.bits, row.block_size)
        assert one.zero_points
        assert one.accuracy_level == 4
        assert one.label is not None
        assert one.label.folded_into == row.folded_into
        assert one.label.error == pytest.approx(row.error, abs=1e-5)
    assert found.version == awq_onnx.__version__
    assert Recipe(**(found.recipe or {})) == recipe
    assert found.size_bytes == report.size_after_bytes


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"block_size": -1, "symmetric": True}])
def test_a_model_in_standard_onnx_tells_how_it_was_made(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = replace(QUICK, format="qdq", **settings)
    report = awq_onnx.quantize(save(tiny_decoder(), tmp_path / "model.onnx"), tmp_path / "out.onnx", recipe)
    found = findings(tmp_path / "out.onnx")
    assert [(one.name, one.op_type, one.K, one.N, one.bits) for one in found.layers] == [
        (one.name, "DequantizeLinear", one.K, one.N, one.bits) for one in report.matmuls
    ]
    assert {one.zero_points for one in found.layers} == {not recipe.symmetric}
    assert [one.block_size for one in found.layers] == [
        one.K if recipe.block_size == -1 else one.block_size for one in report.matmuls
    ]
    assert all(one.label is not None for one in found.layers)
    assert found.opset == 21


def test_bytes_that_an_embedding_shares_with_the_lm_head_count_once(tmp_path: Path) -> None:
    model = tiny_decoder()
    head = next(node for node in model.graph.node if node.name == "/lm_head/MatMul")
    at = list(model.graph.node).index(head)
    model.graph.node.insert(at, helper.make_node("Transpose", ["embed_tokens.weight"], ["tied"], name="/tied"))
    head.input[1] = "tied"
    recipe = Recipe(samples=2, sequence_length=8, lm_head="4")
    awq_onnx.quantize(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx", recipe)
    found = findings(tmp_path / "out.onnx")
    (lookup,) = [one for one in found.layers if one.op_type == "GatherBlockQuantized"]
    assert (lookup.K, lookup.N, lookup.bits, lookup.size_bytes) == (64, 160, 4, 0)
    assert sum(one.size_bytes for one in found.layers) < found.size_bytes


def test_a_model_of_another_tool_tells_what_the_graph_tells() -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", 32])
    codes = builder.constant(np.zeros((8, 1, 16)), dtype=np.uint8)
    scales = builder.constant(np.ones((8, 1)))
    y = builder.add("MatMulNBits", x, codes, scales, domain="com.microsoft", K=32, N=8, block_size=32)
    builder.output(y, ["batch", 8])
    graph = helper.make_graph(builder.nodes, "theirs", builder.inputs, builder.outputs, builder.initializers)
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    found = findings(helper.make_model(graph, opset_imports=domains))
    (layer,) = found.layers
    assert (layer.K, layer.N, layer.bits, layer.block_size, layer.zero_points) == (32, 8, 4, 32, False)
    assert layer.size_bytes == 8 * 16 + 8 * 4
    assert layer.label is None
    assert found.version is found.recipe is None


def test_a_recipe_that_is_no_json_is_none(tmp_path: Path) -> None:
    awq_onnx.quantize(save(tiny_decoder(layers=1), tmp_path / "model.onnx"), tmp_path / "out.onnx", QUICK)
    model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    helper.set_model_props(model, {"awq_onnx.recipe": "{"})
    (tmp_path / "out.onnx").write_bytes(model.SerializeToString())
    assert findings(tmp_path / "out.onnx").recipe is None


@pytest.mark.parametrize("quantised", [False, True])
def test_everything_is_plain_json(tmp_path: Path, quantised: bool) -> None:
    source = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    if quantised:
        awq_onnx.quantize(source, tmp_path / "out.onnx", QUICK)
        source = tmp_path / "out.onnx"
    told = json.loads(json.dumps(inspect(source).to_dict(), allow_nan=False))
    assert told["kind"] == ("findings" if quantised else "forecast")
    assert len(told["layers"]) == 7


def test_a_model_with_nothing_to_quantise_is_refused() -> None:
    builder = GraphBuilder()
    builder.output(builder.rms_norm(builder.input("x", ["batch", 32]), 32, "/norm"))
    with pytest.raises(errors.NothingToQuantizeError):
        inspect(builder.model())
