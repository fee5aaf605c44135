"""Every setting of the method and the format, from the recipe to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Array, decoder_feed, run, save, tiny_decoder
from onnx import helper, numpy_helper

import awq_onnx
from awq_onnx import Recipe, Report, codec, errors, methods
from awq_onnx.kernels import reference
from awq_onnx.recipe import METHODS, QUALITIES, SCALES_FROM, parse_override
from awq_onnx.search import FORMULAS

IDS = np.random.default_rng(7).integers(0, 160, (6, 24))
QUICK: dict[str, Any] = {"samples": 4, "sequence_length": 16}


def quantized(folder: Path, model: onnx.ModelProto | None = None, **settings: Any) -> tuple[Report, Path]:
    """Quantise a tiny decoder with a recipe; the report and the output."""
    source = save(model or tiny_decoder(), folder / "model.onnx")
    output = folder / "out.onnx"
    return awq_onnx.quantize(source, output, Recipe(**QUICK, **settings), calibration=IDS, overwrite=True), output


def nodes(path: Path) -> dict[str, dict[str, Any]]:
    """The attributes of every MatMulNBits, by its name."""
    return {
        node.name: {one.name: helper.get_attribute_value(one) for one in node.attribute}
        for node in onnx.load(path, load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
    }


def distance(one: Path, other: Path) -> float:
    """Relative, of the logits."""
    logits = []
    for path in (one, other):
        feed = decoder_feed(onnx.load(path, load_external_data=False), IDS)
        logits.append(run(path, feed)["logits"])
    return float(np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0]))


def weights_of(path: Path) -> dict[str, Array]:
    """What each MatMulNBits multiplies by, float32 (N, K), by its name."""
    model = onnx.load(path)
    tensors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            codes, scales, zero_points = (*(tensors[name] for name in node.input[1:4] if name), None)[:3]
            found[node.name] = reference.dequantize(codes, scales, zero_points, settings["K"], settings["bits"])
    return found


# Bits and blocks


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_are_closer(tmp_path: Path, symmetric: bool) -> None:
    errors_at = {}
    for bits in (2, 4, 8):
        report, output = quantized(tmp_path, bits=bits, symmetric=symmetric)
        assert {one["bits"] for one in nodes(output).values()} == {bits}
        assert {one.bits for one in report.matmuls} == {bits}
        errors_at[bits] = distance(tmp_path / "model.onnx", output)
    assert errors_at[8] < 0.2 * errors_at[4] < 0.2 * 0.5 * errors_at[2]


@pytest.mark.parametrize("hidden", [64, 96])
def test_a_block_of_a_whole_column_has_one_scale(tmp_path: Path, hidden: int) -> None:
    _, output = quantized(tmp_path, tiny_decoder(hidden=hidden), block_size=-1)
    model = onnx.load(output)
    tensors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for name in node.input[2:4]:
                values = tensors[name]
                if name.endswith("zero_points"):
                    values = codec.unpack_zero_points(values, tensors[node.input[2]].shape[1])
                np.testing.assert_array_equal(values, np.broadcast_to(values[:, :1], values.shape))
    assert 0 < distance(tmp_path / "model.onnx", output) < 0.5


def test_an_override_changes_the_layers_it_names_and_no_others(tmp_path: Path) -> None:
    overrides = ("*/layers.0/*:bits=8", "*/layers.0/mlp/down*:bits=2, block_size=16", "*v_proj*:block_size=64")
    report, output = quantized(tmp_path, override=overrides)
    for name, settings in nodes(output).items():
        first, down, value = "layers.0" in name, "down" in name, "v_proj" in name
        assert settings["bits"] == (2 if first and down else 8 if first else 4), name
        assert settings["block_size"] == (16 if first and down else 64 if value else 32), name
    (summary,) = (text for label, text in report.rows() if label == "Quantised")
    assert "to 4 bits" in summary
    assert "to 8 bits, 1 more to 2 bits, block sizes 16, 32, 64, " in summary


@pytest.mark.parametrize(
    "text",
    ["", "*", "*:", ":bits=8", "*:bits", "*:bits=3", "*:bits=8,", "*:block_size=31", "*:alpha=1", "*:bits=x"],
)
def test_an_override_that_says_nothing_sensible_is_refused(text: str) -> None:
    with pytest.raises(errors.RecipeError, match="override"):
        Recipe(override=(text,))


def test_a_pattern_may_hold_colons() -> None:
    assert parse_override("scope:0/*:bits=8") == ("scope:0/*", {"bits": 8})


def test_an_override_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.RecipeError, match=r"override '\*nothing\*:bits=8' fits no layer"):
        quantized(tmp_path, override=("*nothing*:bits=8",))


# Methods


def test_the_methods_are_what_they_are_called(tmp_path: Path) -> None:
    found = {}
    for method in METHODS:
        report, _ = quantized(tmp_path, method=method)
        found[method] = {one.name: one for one in report.matmuls}
        scaled = [one.alpha > 0 for one in report.matmuls]
        assert any(scaled) == ("awq" in method)
    for name, plain in found["rtn"].items():
        assert plain.error == pytest.approx(plain.plain_error, rel=1e-5)
        for method in METHODS:
            assert found[method][name].plain_error == pytest.approx(plain.plain_error, rel=1e-5)
    mean = {method: np.mean([one.error for one in rows.values()]) for method, rows in found.items()}
    assert mean["awq"] < mean["rtn"]
    assert mean["awq+gptq"] < mean["rtn"]


def test_round_to_nearest_is_that(tmp_path: Path) -> None:
    _, output = quantized(tmp_path, method="rtn")
    original = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    node = next(n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.name == "/layers.0/q_proj/MatMul")
    weight = original[node.input[1]]
    fmt = codec.Format(32, False, np.dtype(weight.dtype))
    blocks = codec.to_blocks(weight.astype(np.float32), 32)
    grid = codec.minmax_grid(blocks, fmt)
    rounded = codec.from_blocks(codec.dequantize(codec.centred_codes(blocks, grid), grid), len(weight))
    np.testing.assert_allclose(weights_of(output)["/layers.0/q_proj/MatMul"].T, rounded, rtol=1e-6)


def test_a_given_alpha_is_the_only_one_beside_none(tmp_path: Path) -> None:
    report, _ = quantized(tmp_path, alpha=0.37)
    assert {one.alpha for one in report.matmuls} <= {0.0, 0.37}
    assert any(one.alpha == 0.37 for one in report.matmuls)


@pytest.mark.parametrize("scale_from", SCALES_FROM)
def test_every_formula_gives_a_model_that_is_better_than_plain_rounding(tmp_path: Path, scale_from: str) -> None:
    report, output = quantized(tmp_path, scale_from=scale_from, method="awq")
    assert any(one.alpha > 0 for one in report.matmuls)
    assert distance(tmp_path / "model.onnx", output) < 0.5
    told = {one.scale_from for one in report.matmuls if one.alpha > 0}
    assert told <= set(FORMULAS) if scale_from == "all" else told == {scale_from}
    assert ("; from " in dict(report.rows())["Scales"]) == (scale_from == "all")


def test_formulas_differ(tmp_path: Path) -> None:
    written = set()
    for scale_from in ("mean", "max", "weights"):
        _, output = quantized(tmp_path, scale_from=scale_from, method="awq")
        written.add(output.with_name(f"{output.name}.data").read_bytes())
    assert len(written) == 3


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_made_up_for_by_methods_with_gptq_unless_it_shall_be_fast(method: str) -> None:
    for quality in QUALITIES[method == "gptq" :]:
        how = methods.rounding_of(Recipe(method=method, quality=quality))
        assert how.compensate == ("gptq" in method and quality != "fast")
