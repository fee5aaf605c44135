"""Where the bytes are: what is counted as what, and that all are counted."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import onnx
import pytest
from builders import norm_and_readers, save, tiny_decoder
from onnx import numpy_helper

import awq_onnx
from awq_onnx import Recipe, Report


def report_of(model: onnx.ModelProto, folder: Path, **settings: Any) -> Report:
    recipe = Recipe(samples=2, sequence_length=8, **settings)
    return awq_onnx.quantize(save(model, folder / "model.onnx"), folder / "out.onnx", recipe)


def stored_bytes(path: Path, *suffixes: str) -> int:
    """Of the initializers whose names end so."""
    tensors = onnx.load(path).graph.initializer
    return sum(numpy_helper.to_array(one).nbytes for one in tensors if one.name.endswith(suffixes))


def test_all_bytes_are_counted(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path)
    assert sum(astuple(report.footprint_before)) == report.size_before_bytes
    assert sum(astuple(report.footprint_after)) == report.size_after_bytes
    assert report.size_before_bytes == (tmp_path / "model.onnx").stat().st_size


def test_the_parts_of_quantised_layers_are_those_in_the_file(tmp_path: Path) -> None:
    after = report_of(tiny_decoder(), tmp_path).footprint_after
    assert after.codes == stored_bytes(tmp_path / "out.onnx", ".codes") > 0
    assert after.scales == stored_bytes(tmp_path / "out.onnx", ".scales") > 0
    assert after.zero_points == stored_bytes(tmp_path / "out.onnx", ".zero_points") > 0
    assert after.layers == 0


def test_a_symmetric_model_has_no_zero_points(tmp_path: Path) -> None:
    assert report_of(tiny_decoder(layers=1), tmp_path, symmetric=True).footprint_after.zero_points == 0


def test_what_is_left_alone_is_counted_as_before(tmp_path: Path) -> None:
    report = report_of(norm_and_readers(K=64, columns=(48, 32)).model(), tmp_path, exclude=("reader_1",))
    assert report.footprint_before.layers == 4 * 64 * (48 + 32)
    assert report.footprint_after.layers == 4 * 64 * 32
    assert report.footprint_after.codes == 64 * 48 // 2


@pytest.mark.parametrize(("lm_head", "embedding"), [("none", "none"), ("8", "none"), ("none", "8"), ("4", "8")])
def test_lm_head_and_embedding_are_counted_apart(tmp_path: Path, lm_head: str, embedding: str) -> None:
    model = tiny_decoder(layers=1)
    report = report_of(model, tmp_path, lm_head=lm_head, embedding=embedding)
    before, after = report.footprint_before, report.footprint_after
    assert before.lm_head == before.embedding > 0
    assert (after.lm_head == before.lm_head) == (lm_head == "none")
    assert (after.embedding == before.embedding) == (embedding == "none")
    least = {"none": 1.0, "8": 0.25, "4": 0.125}
    assert least[lm_head] <= after.lm_head / before.lm_head <= 1.8 * least[lm_head]
    assert least[embedding] <= after.embedding / before.embedding <= 1.8 * least[embedding]


def test_a_table_that_both_read_is_the_embedding_s(tmp_path: Path) -> None:
    report = report_of(tied(tiny_decoder(layers=1)), tmp_path, lm_head="8")
    before, after = report.footprint_before, report.footprint_after
    assert before.lm_head == after.lm_head == 0
    assert 0 < after.embedding < 0.5 * before.embedding


def tied(model: onnx.ModelProto) -> onnx.ModelProto:
    """The lm_head reads the table of the embedding, transposed."""
    gather = next(node for node in model.graph.node if node.op_type == "Gather")
    (head,) = (node for node in model.graph.node if "lm_head" in node.name and node.op_type == "MatMul")
    transpose = onnx.helper.make_node("Transpose", [gather.input[0]], ["table.T"], perm=[1, 0])
    model.graph.node.insert(0, transpose)
    unread = head.input[1]
    head.input[1] = "table.T"
    kept = [one for one in model.graph.initializer if one.name != unread]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_parts_of_layers_in_standard_onnx_are_told_too(tmp_path: Path, symmetric: bool) -> None:
    after = report_of(tiny_decoder(layers=1), tmp_path, format="qdq", symmetric=symmetric).footprint_after
    other = tmp_path / "other"
    other.mkdir()
    same = report_of(tiny_decoder(layers=1), other, symmetric=symmetric).footprint_after
    assert after.codes == same.codes > 0
    assert after.scales == same.scales > 0
    assert (after.zero_points == 0) == symmetric
    assert after.layers == 0
