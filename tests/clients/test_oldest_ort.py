"""The oldest onnxruntime that runs each format that awq-onnx writes, found by trying.

Every version is installed into a folder of the cache, once: about 18 MB to download, 55 MB on disk and 2 seconds each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import wheels
from builders import Array, GraphBuilder, decoder_feed, norm_and_readers, run, save, tiny_decoder
from conftest import Row  # type: ignore[attr-defined]

import awq_onnx
from awq_onnx import Recipe

pytestmark = pytest.mark.clients

VERSIONS = ("1.17.3", "1.18.1", "1.19.2", "1.20.1", "1.21.1", "1.22.1", "1.23.2", "1.24.1", "1.25.1", "1.26.0", "1.27.0")
BEFORE_NUMPY_2 = ("1.17.3", "1.18.1")
NUMPY = "numpy==1.26.4"
TOLERANCE = {0: 1e-4, 4: 3e-2}  # relative to the largest output, by accuracy level: versions round activations otherwise


def layers() -> onnx.ModelProto:
    return norm_and_readers(K=64, columns=(48, 32)).model()


def layers_in_half() -> onnx.ModelProto:
    return norm_and_readers(K=64, columns=(48, 32), dtype=np.float16).model()


def gemm() -> onnx.ModelProto:
    """A layer whose bias goes into the node."""
    builder = GraphBuilder()
    x = builder.input("x", ["rows", 64])
    bias = builder.constant(builder.rng.standard_normal(32))
    builder.output(builder.add("Gemm", x, builder.weight(64, 32), bias, name="layer", to="y"), ["rows", 32])
    return builder.model()


@dataclass(frozen=True)
class Form:
    """What is written, and the oldest version of `VERSIONS` that runs it. op_type: what must be in the graph."""

    oldest: str
    model: Callable[[], onnx.ModelProto] = layers
    settings: dict[str, Any] = field(default_factory=dict)
    op_type: str = "MatMulNBits"


FORMS = {
    "MatMulNBits, 4 bits, zero points": Form("1.17.3"),
    "MatMulNBits, 4 bits, symmetric": Form("1.17.3", settings={"symmetric": True}),
    "MatMulNBits, 4 bits, float16": Form("1.17.3", layers_in_half),
    "MatMulNBits, 4 bits, bias": Form("1.17.3", gemm),
    "MatMulNBits, 8 bits": Form("1.17.3", settings={"bits": 8}),
    "MatMulNBits, 2 bits": Form("1.17.3", settings={"bits": 2}),
    "GatherBlockQuantized, 4 bits": Form("1.17.3", tiny_decoder, {"embedding": "4"}, "GatherBlockQuantized"),
    "GatherBlockQuantized, 8 bits": Form("1.17.3", tiny_decoder, {"embedding": "8"}, "GatherBlockQuantized"),
}

# Runs in a process of its own, with the onnxruntime that comes first on its path; knows nothing of awq-onnx.
SCRIPT = """
import json, sys
import numpy, onnxruntime

told = {}
for folder in sys.argv[1:]:
    try:
        session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
        made = session.run(None, dict(numpy.load(folder + "/feed.npz")))
        numpy.savez(folder + "/made.npz", **{one.name: y for one, y in zip(session.get_outputs(), made)})
        told[folder] = ""
    except Exception as error:
        told[folder] = str(error)
print(json.dumps({"version": onnxruntime.__version__, "told": told}))
"""
