"""How fast a model runs: the unit, and what is timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import bigrams, norm_and_readers, save, tiny_decoder, tiny_encoder

from awq_onnx import runtime, speed
from awq_onnx.calibrate.feeds import Feed, Signature, complete, signature
from awq_onnx.speed import Speed
from awq_onnx.store import open_model


def measured(model: Any, path: Path, given: Feed) -> Speed | None:
    with open_model(save(model, path)) as opened:
        wanted: Signature = signature(opened.model.graph)
        session = runtime.session(opened.serialize(), opened.folder)
    outputs = [wanted.logits or wanted.outputs[0]]
    return speed.measure(session, wanted, outputs, complete(wanted, given))


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "FORWARD_SECONDS", 0.01)


IDS = np.arange(8)[None]


@pytest.mark.parametrize(
    ("model", "given", "unit", "decoding"),
    [
        pytest.param(tiny_decoder(layers=1), {"input_ids": IDS}, "tokens", True, id="cache"),
        pytest.param(tiny_decoder(layers=1, cache=False), {"input_ids": IDS}, "tokens", False, id="no cache"),
        pytest.param(tiny_encoder(), {"input_ids": IDS}, "tokens", False, id="encoder"),
        pytest.param(norm_and_readers().model(), {"x": np.ones((1, 3, 64), np.float32)}, "samples", False, id="floats"),
    ],
)
def test_the_unit_is_that_of_what_the_model_does(
    model: Any, given: Feed, unit: str, decoding: bool, tmp_path: Path
) -> None:
    found = measured(model, tmp_path / "model.onnx", given)
    assert found is not None
    assert (found.unit, found.decoding) == (unit, decoding)
    assert found.per_second > 0


class Slow:
    """A session that takes its time for whatever it runs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.runs = 0

    def run(self, outputs: list[str], _: Feed) -> list[Any]:
        self.runs += 1
        time.sleep(self.seconds)
        return [np.zeros(1) for _ in outputs]


def test_a_forward_pass_counts_all_of_its_tokens(tmp_path: Path) -> None:
    with open_model(save(bigrams(np.ones((8, 8))), tmp_path / "model.onnx")) as opened:
        wanted = signature(opened.model.graph)
    session = Slow(0.02)
    found = speed.measure(session, wanted, ["logits"], {"input_ids": IDS})
    assert found is not None
    assert 100 < found.per_second < 8 / 0.02
    assert session.runs == 1


def test_a_cache_of_another_shape_than_promised_is_not_measured(tmp_path: Path) -> None:
    """Where text cannot be written token by token, there is no number rather than an error."""
    model = tiny_decoder(layers=1)
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[3].dim_value = 8
    assert measured(model, tmp_path / "model.onnx", {"input_ids": IDS}) is None
