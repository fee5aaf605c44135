"""What an error at one place costs: with a stand-in exactly that of the model that has it, with noise in proportion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import save, stand_ins_of, tiny_decoder
from onnx import numpy_helper
from test_methods import IDS

import awq_onnx
from awq_onnx import Recipe, sensitivity
from awq_onnx.calibrate.feeds import Feed, complete, signature
from awq_onnx.calibrate.parts import Piece
from awq_onnx.passes.switch import StandIn
from awq_onnx.progress import unheard
from awq_onnx.store import open_model


def measured(
    model: Path, places: list[str], stand_ins: dict[str, StandIn], advance: Callable[[float], None] = unheard
) -> dict[str, float]:
    with open_model(model) as opened:
        wanted = signature(opened.model.graph)
        windows = [complete(wanted, {"input_ids": one[None]}) for one in IDS]
        return sensitivity.measure(opened, places, stand_ins, windows, ["logits"], wanted, advance=advance)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layer", ["/layers.1/mlp/down_proj/MatMul", "/layers.0/q_proj/MatMul"])
def test_a_stand_in_costs_what_a_model_with_that_layer_costs(tmp_path: Path, dtype: type, layer: str) -> None:
    model = save(tiny_decoder(hidden=128, mlp=256, vocabulary=400, dtype=dtype), tmp_path / "model.onnx")
    recipe = Recipe(method="rtn", include=(layer,), samples=2, sequence_length=8, accuracy_level=0)
    awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration=IDS)
    wanted = awq_onnx.compare(model, tmp_path / "out.onnx", IDS).kl_mean
    assert wanted is not None
    assert wanted > 0
    rtol = 0.2 if dtype is np.float16 else 1e-3  # measured as float32
    for factor in (1, 2):
        ((place, stand_in),) = stand_ins_of(tmp_path / "out.onnx", factor).items()
        assert measured(model, [place], {place: stand_in})[place] == pytest.approx(wanted, rel=rtol)


@pytest.mark.parametrize(("stages", "batch_bytes"), [(2, 1 << 30), (1000, 1 << 30), (1, 20_000)])
def test_stand_ins_cost_in_several_stages_what_they_cost_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int, batch_bytes: int
) -> None:
    model = save(tiny_decoder(hidden=128, mlp=256, vocabulary=400), tmp_path / "model.onnx")
    awq_onnx.quantize(model, tmp_path / "out.onnx", Recipe(method="rtn", samples=2, sequence_length=8), calibration=IDS)
    layers = stand_ins_of(tmp_path / "out.onnx")
    monkeypatch.setattr(sensitivity, "STAGES", 1)
    in_one = measured(model, list(layers), layers)
    monkeypatch.setattr(sensitivity, "STAGES", stages)
    monkeypatch.setattr(sensitivity, "BATCH_BYTES", batch_bytes)
    assert measured(model, list(reversed(layers)), layers) == pytest.approx(in_one, rel=1e-3)
    assert len(in_one) == len(layers)
    assert min(in_one.values()) > 0


def test_a_stage_runs_only_what_comes_after_its_first_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    original = sensitivity.extract

    def watched(model: ir.Model, piece: Piece, alive: Feed) -> onnx.ModelProto:
        ran.append(len(piece.nodes))
        return original(model, piece, alive)

    monkeypatch.setattr(sensitivity, "extract", watched)
    model = tiny_decoder()
    places = [node.output[0] for node in model.graph.node if node.op_type == "MatMul" and node.name]
    measured(save(model, tmp_path / "model.onnx"), places, {})
    assert len(ran) > 3
    assert ran == sorted(ran, reverse=True)
    assert ran[-1] < 0.2 * ran[0]


def test_noise_costs_the_more_the_more_a_value_counts(tmp_path: Path) -> None:
    model = tiny_decoder(hidden=128, mlp=256, vocabulary=400)
    for tensor in model.graph.initializer:
        if tensor.name == "/layers.0/mlp/down_proj.weight":
            quiet = numpy_helper.to_array(tensor) * np.float32(0.01)
            tensor.CopyFrom(numpy_helper.from_array(quiet, tensor.name))
    places = {
        node.name: node.output[0] for node in model.graph.node if node.name.endswith(("down_proj/MatMul", "/Gather"))
    }
    costs = measured(save(model, tmp_path / "model.onnx"), list(places.values()), {})
    quiet, loud = (costs[places[f"/layers.{layer}/mlp/down_proj/MatMul"]] for layer in (0, 1))
    assert 0 < 100 * quiet < loud
    assert costs[places["/embed_tokens/Gather"]] > loud


def test_what_is_measured_on_has_no_padding_and_is_no_longer_than_it_has_to_be(tmp_path: Path) -> None:
    with open_model(save(tiny_decoder(), tmp_path / "model.onnx")) as opened:
        wanted = signature(opened.model.graph)
    ids, tokens = np.arange(1000).reshape(5, 2, 100) % 160, sensitivity.TOKENS
    feeds = [complete(wanted, {"input_ids": one}) for one in ids]
    feeds[4]["attention_mask"][1, tokens - 1 :] = 0
    feeds[3]["attention_mask"][1, tokens:] = 0
    np.testing.assert_array_equal(sensitivity.window_of(feeds, wanted)["input_ids"], ids[3, :, :tokens])
    assert sensitivity.window_of(feeds[4:], wanted) is feeds[4]


def test_a_place_that_no_node_makes_is_left_out(tmp_path: Path) -> None:
    model = save(tiny_decoder(), tmp_path / "model.onnx")
    assert measured(model, ["input_ids", "nothing"], {}) == {}
    done: list[float] = []
    noise = measured(model, ["nothing", "/layers.0/q_proj/MatMul_output_0"], {}, done.append)
    assert list(noise) == ["/layers.0/q_proj/MatMul_output_0"]
    assert sum(done) == pytest.approx(1)  # nor does the progress wait for it
