"""Rounded layers in the place of the original ones: the graph then makes what the quantised model makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import decoder_feed, run, save, stand_ins_of, tiny_decoder
from test_methods import IDS

import awq_onnx
from awq_onnx import Recipe
from awq_onnx.passes import switch


@pytest.mark.parametrize("factor", [1, 2])
def test_with_all_layers_replaced_a_model_is_the_quantised_one(tmp_path: Path, factor: float) -> None:
    model = save(tiny_decoder(), tmp_path / "model.onnx")
    recipe = Recipe(method="rtn", samples=2, sequence_length=8, accuracy_level=0)
    awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration=IDS)
    layers = stand_ins_of(tmp_path / "out.onnx", factor)
    changed = onnx.load(model)
    feed = decoder_feed(changed, IDS)
    before = run(changed, feed)["logits"]
    switch.substitute(changed, layers)
    made = run(changed, feed)["logits"]
    assert not np.allclose(made, before, atol=1e-2)
    np.testing.assert_allclose(made, run(tmp_path / "out.onnx", feed)["logits"], rtol=1e-3, atol=1e-3)
    assert sum(node.op_type == "MatMulNBits" for node in changed.graph.node) == len(layers) > 10


def test_nothing_to_replace_leaves_a_model_as_it_is() -> None:
    model = tiny_decoder()
    before = [node.SerializeToString() for node in model.graph.node]
    switch.substitute(model, {})
    assert [node.SerializeToString() for node in model.graph.node] == before
