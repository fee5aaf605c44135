"""A size for the whole model: reached, not missed by much, and better than one format for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from builders import save, tiny_decoder, tiny_encoder
from test_methods import IDS, distance, nodes

import awq_onnx
from awq_onnx import Recipe, Report, drift, errors, sizing
from awq_onnx.partwise import Partwise
from awq_onnx.search import Reader
from awq_onnx.threads import Spread


def quantized(folder: Path, model: onnx.ModelProto | None = None, **settings: Any) -> tuple[Report, Path]:
    source, output = folder / "model.onnx", folder / "out.onnx"
    if not source.exists():
        save(model or tiny_decoder(hidden=128, mlp=256, vocabulary=400), source)
    recipe = Recipe(samples=4, sequence_length=16, **settings)
    return awq_onnx.quantize(source, output, recipe, calibration=IDS, overwrite=True), output


def quiet_in_one_layer() -> onnx.ModelProto:
    model = tiny_decoder(hidden=128, mlp=256, vocabulary=400)
    for tensor in model.graph.initializer:
        if tensor.name == "/layers.0/mlp/down_proj.weight":
            quiet = onnx.numpy_helper.to_array(tensor) * np.float32(1e-4)
            tensor.CopyFrom(onnx.numpy_helper.from_array(quiet, tensor.name))
    return model


def tied(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the table of the embedding as the weight of the lm_head."""
    (lookup,) = (node for node in model.graph.node if node.name == "/embed_tokens/Gather")
    (head,) = (node for node in model.graph.node if node.name == "/lm_head/MatMul")
    index = list(model.graph.node).index(head)
    turned = onnx.helper.make_node("Transpose", [lookup.input[0]], ["turned"], perm=[1, 0])
    model.graph.initializer.remove(next(one for one in model.graph.initializer if one.name == head.input[1]))
    head.input[1] = "turned"
    model.graph.node.insert(index, turned)
    return model


def bits_of(report: Report) -> float:
    """Of a weight on average, by what the report says of each layer."""
    bits = weights = 0.0
    for one in report.matmuls:
        blocks = -(-one.K // one.block_size)
        bits += one.N * (blocks * (one.block_size * one.bits + 32) + 8 * -(-blocks * one.bits // 8))
        weights += one.K * one.N
    for table in report.tables:
        blocks = -(-table.D // table.block_size)
        bits += table.V * (blocks * (table.block_size * table.bits + 32) + 8 * -(-blocks * table.bits // 8))
        weights += table.D * table.V
    return bits / weights


@pytest.mark.parametrize("target", [3.5, 4.5, 6.0, 8.5])
def test_the_bits_are_reached_and_not_exceeded(tmp_path: Path, target: float) -> None:
    report, output = quantized(tmp_path, target_bits=target)
    assert 0.93 * target < bits_of(report) <= target
    assert {"/lm_head/MatMul"} < set(nodes(output))
    assert [one.name for one in report.tables] == ["/embed_tokens/Gather"]


def test_the_size_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    for size in (300_000, 400_000):
        report, _ = quantized(tmp_path, target_size=size)
        assert 0.8 * size < report.size_after_bytes <= size


def test_the_gaps_between_large_tensors_are_counted(tmp_path: Path) -> None:
    model = tiny_decoder(hidden=256, mlp=1024, vocabulary=1000)
    report, _ = quantized(tmp_path, model, target_size=1_400_000)
    assert 0.95 * 1_400_000 < report.size_after_bytes <= 1_400_000


def test_more_bits_are_closer(tmp_path: Path) -> None:
    found = []
    for target in (3.0, 4.5, 7.0):
        _, output = quantized(tmp_path, target_bits=target)
        found.append(distance(tmp_path / "model.onnx", output))
    assert found[0] > found[1] > found[2]


def test_bits_go_where_they_matter(tmp_path: Path) -> None:
    """A layer whose output hardly counts gets fewer than one that counts."""
    _, output = quantized(tmp_path, quiet_in_one_layer(), target_bits=4.5)
    bits = {name: one["bits"] for name, one in nodes(output).items()}
    assert {bits[f"/layers.0/mlp/{one}_proj/MatMul"] for one in ("gate", "up", "down")} == {2}
    assert max(bits.values()) > 2


@pytest.mark.parametrize("block_size", [32, 128])
def test_the_best_quality_is_closer_at_the_size_of_one_format_for_all(tmp_path: Path, block_size: int) -> None:
    found = {}
    for quality in ("default", "best"):
        report, output = quantized(tmp_path, quiet_in_one_layer(), quality=quality, block_size=block_size)
        found[quality] = (bits_of(report), set(nodes(output)), distance(tmp_path / "model.onnx", output))
    (plain_bits, plain_nodes, plain), (best_bits, best_nodes, best) = found.values()
    assert best_bits <= plain_bits
    assert best_nodes == plain_nodes
    assert best < 0.9 * plain


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quality": "best"}, True),
        ({}, False),
        ({"quality": "best", "method": "awq"}, False),
        ({"target_bits": 5}, False),
    ],
)
def test_layers_make_up_for_those_before_with_the_best_quality_and_the_default_method_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: bool
) -> None:
    drifting: list[bool] = []
    original = drift.corrected

    def watched(readers: Sequence[Reader], spread: Spread) -> list[Reader]:
        drifting.extend(reader.statistics.drift is not None for reader in readers)
        return original(readers, spread)

    monkeypatch.setattr(drift, "corrected", watched)
    quantized(tmp_path, **settings)
    assert any(drifting) == expected


def test_an_interrupted_run_goes_on_with_the_formats_it_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = quantized(tmp_path / "whole", quality="best")[1]
    with monkeypatch.context() as patch:
        patch.setattr(Partwise, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path, quality="best")
    monkeypatch.setattr(sizing, "estimated_losses", Mock(side_effect=AssertionError))
    again = quantized(tmp_path, quality="best")[1]
    assert again.with_name("out.onnx.data").read_bytes() == whole.with_name("out.onnx.data").read_bytes()


def test_an_override_stays_what_it_says(tmp_path: Path) -> None:
    _, output = quantized(tmp_path, target_bits=4.5, override=("*q_proj*:bits=8,block_size=16",))
    for name, one in nodes(output).items():
        assert ((one["bits"], one["block_size"]) == (8, 16)) == ("q_proj" in name)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_bits": 2.0}, r"target_bits 2.0 is too small: the least that the model can have is 2\.\d\d"),
        ({"target_size": 1000}, r"target_size 1 kB is too small: the least that the model can have is \d+ kB"),
    ],
)
def test_a_target_that_cannot_be_reached_says_what_can(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(errors.RecipeError, match=told):
        quantized(tmp_path, **settings)
    assert not (tmp_path / "out.onnx").exists()


def test_a_second_run_chooses_the_same(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    one = quantized(tmp_path, target_bits=4.0)[1]
    other = quantized(tmp_path / "again", target_bits=4.0)[1]
    assert one.with_name("out.onnx.data").read_bytes() == other.with_name("out.onnx.data").read_bytes()


@pytest.mark.parametrize("target_bits", [4.4, 7.0])
def test_a_table_that_is_the_head_too_stays_one_and_is_counted(tmp_path: Path, target_bits: float) -> None:
    """Of 96 numbers in a row, which blocks of 64 or 128 would not fill."""
    model = tied(tiny_decoder(hidden=96, mlp=256, vocabulary=2000))
    report, output = quantized(tmp_path, model, target_bits=target_bits)
    (lookup,) = (node for node in onnx.load(output).graph.node if node.op_type == "GatherBlockQuantized")
    assert 96 % {one.name: one.i for one in lookup.attribute}["block_size"] == 0
    assert 0.9 * target_bits < bits_of(report) <= target_bits
    data_bits = 8 * output.with_name("out.onnx.data").stat().st_size
    assert data_bits < 1.1 * target_bits * sum(one.K * one.N for one in report.matmuls)


def test_a_size_is_reached_where_a_table_is_the_head_too(tmp_path: Path) -> None:
    model = tied(tiny_decoder(hidden=96, mlp=256, vocabulary=2000))
    report, _ = quantized(tmp_path, model, target_size=340_000)
    assert 0.85 * 340_000 < report.size_after_bytes <= 340_000


@pytest.mark.parametrize("settings", [{"target_bits": 5.0}, {"quality": "best"}])
def test_half_precision_models_are_measured_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_decoder(hidden=128, mlp=256, vocabulary=400, dtype=np.float16)
    report, output = quantized(tmp_path, model, **settings)
    assert len({(one["bits"], one["block_size"]) for one in nodes(output).values()}) > 1
    assert report.comparison.kl_mean is not None


def test_models_without_logits_are_measured_by_what_they_return(tmp_path: Path) -> None:
    source = save(tiny_encoder(hidden=128), tmp_path / "model.onnx")
    recipe = Recipe(target_bits=5.0, samples=4, sequence_length=16)
    report = awq_onnx.quantize(source, tmp_path / "out.onnx", recipe, calibration=IDS % 40)
    assert 0.9 * 5 < bits_of(report) <= 5


@pytest.mark.parametrize("block_size", [256, -1])
def test_the_best_of_the_smallest_format_is_that(tmp_path: Path, block_size: int) -> None:
    report, _ = quantized(tmp_path, quality="best", bits=2, block_size=block_size)
    plain, _ = quantized(tmp_path, bits=2, block_size=block_size)
    assert bits_of(report) <= bits_of(plain)
