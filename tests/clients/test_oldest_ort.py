"""The oldest onnxruntime that runs each format that awq-onnx writes, found by trying.

Every version is installed into a folder of the cache, once: about 18 MB to download, 55 MB on disk and 2 seconds each.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import wheels
from builders import Array, GraphBuilder, decoder_feed, norm_and_readers, run, save, tiny_decoder
from onnx import helper
from rows import Row

import awq_onnx
from awq_onnx import Recipe

pytestmark = pytest.mark.clients

MATMULNBITS, GATHER, DEQUANTIZE = "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"
VERSIONS = (
    "1.17.0",
    "1.17.3",
    "1.18.1",
    "1.19.2",
    "1.20.1",
    "1.21.1",
    "1.22.1",
    "1.23.2",
    "1.24.1",
    "1.25.1",
    "1.28.0",
)
BEFORE_NUMPY_2 = ("1.17.0", "1.17.3", "1.18.1")
NUMPY = "numpy==1.26.4"
# Relative to the largest output, by accuracy level: versions round activations in other places.
TOLERANCE = {0: 2e-3, 4: 3e-2}


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
    """What is written, and the oldest of `VERSIONS` that runs it rightly as all later ones do, by accuracy level.

    op_type: what must be in the graph. fused: the oldest version that makes a MatMulNBits of it while it loads.
    """

    oldest: Mapping[int, str]
    model: Callable[[], onnx.ModelProto] = layers
    settings: Mapping[str, Any] = field(default_factory=dict)
    op_type: str = MATMULNBITS
    fused: str | None = None


FORMS = {
    "MatMulNBits, 4 bits, zero points": Form({0: "1.17.0", 4: "1.17.0"}),
    "MatMulNBits, 4 bits, symmetric": Form({0: "1.17.0", 4: "1.17.0"}, settings={"symmetric": True}),
    "MatMulNBits, 4 bits, float16": Form({0: "1.17.0", 4: "1.20.1"}, layers_in_half),  # 1.19: wrong at level 4
    "MatMulNBits, 4 bits, bias": Form({0: "1.19.2", 4: "1.19.2"}, gemm),
    "MatMulNBits, 8 bits": Form({0: "1.23.2", 4: "1.22.1"}, settings={"bits": 8}),
    "MatMulNBits, 2 bits": Form({0: "1.24.1", 4: "1.24.1"}, settings={"bits": 2}),
    "embedding, 4 bits": Form({0: "1.23.2", 4: "1.23.2"}, tiny_decoder, {"embedding": "4"}, GATHER),
    "embedding, 8 bits": Form({0: "1.23.2", 4: "1.23.2"}, tiny_decoder, {"embedding": "8"}, GATHER),
    "QDQ, 4 bits, zero points": Form({4: "1.19.2"}, layers, {"format": "qdq"}, DEQUANTIZE, "1.19.2"),
    "QDQ, 4 bits, symmetric": Form({4: "1.19.2"}, layers, {"format": "qdq", "symmetric": True}, DEQUANTIZE, "1.19.2"),
    "QDQ, 8 bits": Form({4: "1.19.2"}, layers, {"format": "qdq", "bits": 8}, DEQUANTIZE, "1.25.1"),
    "QDQ, whole columns": Form({4: "1.19.2"}, layers, {"format": "qdq", "block_size": -1}, DEQUANTIZE, "1.25.1"),
}

# Runs in a process of its own, with the onnxruntime that comes first on its path; knows nothing of awq-onnx.
SCRIPT = """
import json, sys
import numpy, onnxruntime

told = {}
for folder in sys.argv[1:]:
    try:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = folder + "/loaded.onnx"
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
        made = session.run(None, dict(numpy.load(folder + "/feed.npz")))
        numpy.savez(folder + "/made.npz", **{one.name: y for one, y in zip(session.get_outputs(), made)})
        told[folder] = ""
    except Exception as error:
        told[folder] = str(error)
print(json.dumps({"version": onnxruntime.__version__, "told": told}))
"""


@dataclass(frozen=True)
class Written:
    """One form at one accuracy level, in a folder of its own."""

    form: str
    accuracy_level: int
    folder: Path
    expected: dict[str, Array]

    def is_right(self) -> bool:
        """What the version that ran last has made."""
        made = np.load(self.folder / "made.npz")
        return all(self._is_near(made[name], values) for name, values in self.expected.items())

    def is_fused(self) -> bool:
        """Whether the version that ran last has made MatMulNBits of all weights."""
        types = {node.op_type for node in onnx.load(self.folder / "loaded.onnx", load_external_data=False).graph.node}
        return MATMULNBITS in types and DEQUANTIZE not in types

    def _is_near(self, made: Array, expected: Array) -> bool:
        difference = np.abs(made.astype(np.float64) - expected).max() / np.abs(expected).max()
        return bool(difference < TOLERANCE[self.accuracy_level])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Written]:
    levels = [(form, level) for form in FORMS for level in FORMS[form].oldest]
    return [write(form, level, tmp_path_factory.mktemp("form")) for form, level in levels]


def write(form: str, accuracy_level: int, folder: Path) -> Written:
    settings = {"samples": 2, "sequence_length": 8, "accuracy_level": accuracy_level, **FORMS[form].settings}
    source = save(FORMS[form].model(), folder / "source.onnx")
    awq_onnx.quantize(source, folder / "model.onnx", Recipe(**settings))
    model = onnx.load(folder / "model.onnx")
    assert FORMS[form].op_type in {node.op_type for node in model.graph.node}
    feed = inputs_of(model)
    np.savez(folder / "feed.npz", **feed)  # type: ignore[arg-type]
    return Written(form, accuracy_level, folder, run(folder / "model.onnx", feed))


def inputs_of(model: onnx.ModelProto) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    first = model.graph.input[0]
    if first.name == "input_ids":
        return decoder_feed(model, rng.integers(0, 160, (2, 5)))
    *free, K = first.type.tensor_type.shape.dim
    dtype = helper.tensor_dtype_to_np_dtype(first.type.tensor_type.elem_type)
    return {first.name: rng.standard_normal((3,) * len(free) + (K.dim_value,)).astype(dtype)}


@dataclass(frozen=True)
class Tried:
    """What one version does: forms and accuracy levels that it runs rightly, and forms that it fuses."""

    right: set[tuple[str, int]]
    fused: set[str]


@pytest.fixture(scope="module")
def tried(written: list[Written]) -> dict[str, Tried]:
    """By version, from the oldest on."""
    return {version: run_on(version, written) for version in VERSIONS}


def run_on(version: str, written: list[Written]) -> Tried:
    needed = [f"onnxruntime=={version}", *([NUMPY] if version in BEFORE_NUMPY_2 else [])]
    path = {"PYTHONPATH": os.pathsep.join(str(wheels.installed(one)) for one in needed)}
    command = [sys.executable, "-c", SCRIPT, *(str(one.folder) for one in written)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path)
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr}"
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert answer["version"] == version
    right = [one for one in written if not answer["told"][str(one.folder)] and one.is_right()]
    return Tried({(one.form, one.accuracy_level) for one in right}, {one.form for one in right if one.is_fused()})


def oldest(does: Callable[[Tried], bool], tried: Mapping[str, Tried]) -> str:
    """The version from which on all do it."""
    *_, first = itertools.takewhile(lambda version: does(tried[version]), reversed(VERSIONS))
    return first


@pytest.mark.parametrize("form", FORMS)
def test_the_oldest_onnxruntime_that_runs_it(tried: dict[str, Tried], form: str, row: Callable[[Row], None]) -> None:
    """It and all that came after it, not the one before it."""
    expected = FORMS[form]
    for level, version in expected.oldest.items():
        assert version == oldest(partial(runs_rightly, form, level), tried)
    told = ", ".join(f"{version} at level {level}" for level, version in expected.oldest.items())
    if len(set(expected.oldest.values())) == 1:
        told = next(iter(expected.oldest.values()))
    if expected.fused:
        assert expected.fused == oldest(partial(fuses, form), tried)
        told += f"; made into MatMulNBits from {expected.fused} on"
    row(Row("onnxruntime, oldest", f"{VERSIONS[0]} to {VERSIONS[-1]}", form, "outputs of the newest", f"from {told}"))


def runs_rightly(form: str, accuracy_level: int, tried: Tried) -> bool:
    return (form, accuracy_level) in tried.right


def fuses(form: str, tried: Tried) -> bool:
    return form in tried.fused


def test_opset_and_ir_version_are_those_of_the_original(written: list[Written]) -> None:
    """So that they ask for no newer onnxruntime than the original does; QDQ for none newer than its 4 bits do."""
    for one in written:
        before, after = (onnx.load(one.folder / name) for name in ("source.onnx", "model.onnx"))
        qdq = FORMS[one.form].op_type == DEQUANTIZE
        assert after.ir_version == (10 if qdq else before.ir_version)
        assert opsets(after) == opsets(before) | ({"": 21} if qdq else {"com.microsoft": 1})


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in model.opset_import}
