"""NVIDIA's GraphSurgeon opens what awq-onnx writes, and gives it back as it was; its graphs are taken too."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from builders import Array, decoder_feed, run, save, tiny_decoder
from rows import Row

import awq_onnx
from awq_onnx import Recipe

LITTLE = Recipe(samples=2, sequence_length=8, embedding="8")


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_an_export_without_an_edit_computes_the_same(tmp_path: Path, row: Callable[[Row], None]) -> None:
    output = tmp_path / "int4.onnx"
    awq_onnx.quantize(save(tiny_decoder(), tmp_path / "model.onnx"), output, LITTLE)
    graph = gs.import_onnx(onnx.load(output))
    assert {"MatMulNBits", "GatherBlockQuantized"} < {node.op for node in graph.nodes}
    exported = gs.export_onnx(graph)
    feed = decoder_feed(exported, np.array([[3, 4, 5, 6]]))
    assert same(run(exported, feed), run(output, feed))
    version = metadata.version("onnx-graphsurgeon")
    row(Row("onnx-graphsurgeon", version, "a decoder of two layers", "import_onnx, export_onnx", "the same outputs"))


def test_its_graphs_are_quantised_to_what_their_files_are(tmp_path: Path) -> None:
    model = tiny_decoder()
    awq_onnx.quantize(gs.import_onnx(model), tmp_path / "graph.onnx", LITTLE)
    awq_onnx.quantize(gs.export_onnx(gs.import_onnx(model)), tmp_path / "model.onnx", LITTLE)
    feed = decoder_feed(model, np.array([[3, 4, 5, 6]]))
    assert same(run(tmp_path / "graph.onnx", feed), run(tmp_path / "model.onnx", feed))
