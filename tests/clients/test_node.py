"""onnxruntime-node loads what awq-onnx writes, its file of weights beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import npm
import numpy as np
import pytest
from rows import Row
from trained import last_logits, prompt_ids

pytestmark = pytest.mark.clients

LOGITS = Path(__file__).with_name("logits.cjs")
TOLERANCE = 0.01  # of logits of 20 and more: other versions may add in another order


def test_node_gives_the_logits_of_pythons_onnxruntime(
    smollm2: Path, int4_smollm2: Path, row: Callable[[Row], None]
) -> None:
    ids = prompt_ids(smollm2.parent)
    modules = npm.installed(npm.ORT_NODE)
    in_node = np.array(npm.run(LOGITS, int4_smollm2, json.dumps(ids), modules=modules))
    difference = float(np.abs(in_node - last_logits(int4_smollm2, ids)).max())
    assert difference < TOLERANCE
    assert in_node.argmax() == last_logits(smollm2, ids).argmax()
    row(
        Row(
            client="onnxruntime-node",
            version=npm.version(npm.ORT_NODE),
            model="SmolLM2-135M",
            ran="InferenceSession.create(FILE), weights beside it, a prompt",
            result=f"the logits of plain onnxruntime (largest difference {difference:.1g})",
        )
    )
