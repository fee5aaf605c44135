"""Sessions of onnxruntime as `runtime` makes them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import GraphBuilder

from awq_onnx import runtime
from awq_onnx.meter import SAMPLE_SECONDS, Meter

K, LAYERS = 1024, 48
RUNS = 10  # long enough for a few samples of memory


def test_weights_of_half_precision_are_cast_one_after_the_other(tmp_path: Path) -> None:
    """All of them as float32 would be twice the model."""
    builder = GraphBuilder(dtype=np.float16)
    x = builder.input("x", ["rows", K])
    for layer in range(LAYERS):
        x = builder.add("MatMul", x, builder.constant(np.eye(K), f"w{layer}"), name=f"layer {layer}")
    builder.output(x, ["rows", K])
    path = tmp_path / "model.onnx"
    onnx.save(builder.model(), path, save_as_external_data=True, location="model.data")
    graph = onnx.load(path, load_external_data=False).SerializeToString()
    rows = np.random.default_rng(0).standard_normal((4, K)).astype(np.float16)
    with Meter() as before:
        session = runtime.session(graph, tmp_path, fuse=False)
        time.sleep(4 * SAMPLE_SECONDS)
    with Meter() as meter:
        for _ in range(RUNS):
            (y,) = runtime.run(session, None, {"x": rows})
    np.testing.assert_array_equal(y, rows)
    if meter.peak_private_bytes is None or before.peak_private_bytes is None:
        pytest.skip("private memory cannot be measured on this system")
    assert meter.peak_private_bytes - before.peak_private_bytes < 0.25 * (LAYERS * 4 * K * K)
