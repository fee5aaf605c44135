"""What an error costs is the same, looked at where the logits are and at what their layer reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import save, stand_ins_of, tiny_decoder
from onnx import helper, numpy_helper
from test_methods import IDS

import awq_onnx
from awq_onnx import Recipe, judges, sensitivity, vocabulary
from awq_onnx.calibrate.feeds import Feed, complete, signature
from awq_onnx.calibrate.parts import Piece
from awq_onnx.store import open_model

HEAD = "/lm_head/MatMul"


def decoder(head: str, dtype: type = np.float32) -> onnx.ModelProto:
    """With the layer that makes the logits as exporters write it."""
    model = tiny_decoder(hidden=128, mlp=256, vocabulary=400, dtype=dtype)
    node = next(node for node in model.graph.node if node.name == HEAD)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight")
    after: list[onnx.NodeProto] = []
    if head in ("bias", "soft cap", "cast"):
        node.output[0] = "product"
    if head == "bias":
        bias = np.random.default_rng(0).standard_normal(400).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(bias, "lm_head.bias"))
        after = [helper.make_node("Add", ["lm_head.bias", "product"], ["logits"])]
    elif head == "cast":
        after = [helper.make_node("Cast", ["product"], ["logits"], to=onnx.TensorProto.FLOAT)]
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif head == "soft cap":
        after = [helper.make_node("Tanh", ["product"], ["logits"])]
    elif head == "transposed":
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), "lm_head.weight"))
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at, helper.make_node("Transpose", ["lm_head.weight"], ["turned"], perm=[1, 0]))
        node.input[1] = "turned"
    model.graph.node.extend(after)
    return model


@pytest.mark.parametrize(
    ("head", "dtype", "short"),
    [
        ("plain", np.float32, True),
        ("plain", np.float16, True),
        ("bias", np.float32, True),
        ("cast", np.float16, True),
        ("transposed", np.float32, True),
        ("soft cap", np.float32, False),
    ],
)
def test_what_the_layer_of_the_logits_reads_tells_what_they_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, dtype: type, short: bool
) -> None:
    model = save(decoder(head, dtype), tmp_path / "model.onnx")
    recipe = Recipe(method="rtn", samples=2, sequence_length=8, lm_head="4")
    awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration=IDS)
    layers = stand_ins_of(tmp_path / "out.onnx")
    places = [*layers, "/embed_tokens/Gather_output_0"]  # the latter is measured with noise
    made: list[tuple[str, ...]] = []
    original = sensitivity.extract

    def watched(model: ir.Model, piece: Piece, alive: Feed) -> onnx.ModelProto:
        made.append(piece.makes)
        return original(model, piece, alive)

    monkeypatch.setattr(sensitivity, "extract", watched)
    with open_model(model) as opened:
        wanted = signature(opened.model.graph)
        windows = [complete(wanted, {"input_ids": one[None]}) for one in IDS]
        at_logits = sensitivity.measure(opened, places, layers, windows, ["logits"], wanted)
        assert all("logits" in one for one in made)
        made.clear()
        monkeypatch.setattr(vocabulary, "SAMPLE_SIZE", 300)
        assert (judges.large_head(opened, wanted) is not None) is short
        before = sensitivity.measure(opened, places, layers, windows, ["logits"], wanted)
    assert len(before) == len(places) == 2 + 2 * 7
    assert sum("logits" in one for one in made) == (2 if short else len(made))  # once for all, and for that layer
    assert before == pytest.approx(at_logits, rel=0.03 if short else 1e-6)
    assert min(before.values()) > 0
