"""The oldest onnxruntime that runs each format that awq-onnx writes, found by trying.

Every version is installed into a folder of the cache, once: about 18 MB to download, 55 MB on disk and 2 seconds each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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

    op_type: what must be in the graph.
    """

    oldest: Mapping[int, str]
    model: Callable[[], onnx.ModelProto] = layers
    settings: Mapping[str, Any] = field(default_factory=dict)
    op_type: str = "MatMulNBits"


GATHER = "GatherBlockQuantized"
FORMS = {
    "MatMulNBits, 4 bits, zero points": Form({0: "1.17.0", 4: "1.17.0"}),
    "MatMulNBits, 4 bits, symmetric": Form({0: "1.17.0", 4: "1.17.0"}, settings={"symmetric": True}),
    "MatMulNBits, 4 bits, float16": Form({0: "1.17.0", 4: "1.20.1"}, layers_in_half),  # 1.19: wrong at level 4
    "MatMulNBits, 4 bits, bias": Form({0: "1.19.2", 4: "1.19.2"}, gemm),
    "MatMulNBits, 8 bits": Form({0: "1.23.2", 4: "1.22.1"}, settings={"bits": 8}),
    "MatMulNBits, 2 bits": Form({0: "1.24.1", 4: "1.24.1"}, settings={"bits": 2}),
    "embedding, 4 bits": Form({0: "1.23.2", 4: "1.23.2"}, tiny_decoder, {"embedding": "4"}, GATHER),
    "embedding, 8 bits": Form({0: "1.23.2", 4: "1.23.2"}, tiny_decoder, {"embedding": "8"}, GATHER),
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


@pytest.fixture(scope="module")
def right(written: list[Written]) -> dict[str, set[tuple[str, int]]]:
    """The forms that each version runs rightly, by version."""
    return {version: run_on(version, written) for version in VERSIONS}


def run_on(version: str, written: list[Written]) -> set[tuple[str, int]]:
    needed = [f"onnxruntime=={version}", *([NUMPY] if version in BEFORE_NUMPY_2 else [])]
    path = {"PYTHONPATH": os.pathsep.join(str(wheels.installed(one)) for one in needed)}
    command = [sys.executable, "-c", SCRIPT, *(str(one.folder) for one in written)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path)
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr}"
    answer = json.loads(ended.stdout.splitlines()[-1])
    assert answer["version"] == version
    ran = (one for one in written if not answer["told"][str(one.folder)])
    return {(one.form, one.accuracy_level) for one in ran if one.is_right()}


@pytest.mark.parametrize("form", FORMS)
def test_the_oldest_onnxruntime_that_runs_it(
    right: dict[str, set[tuple[str, int]]], form: str, row: Callable[[Row], None]
) -> None:
    """It and all that came after it, not the one before it."""
    for level, oldest in FORMS[form].oldest.items():
        start = VERSIONS.index(oldest)
        assert all((form, level) in right[version] for version in VERSIONS[start:])
        assert start == 0 or (form, level) not in right[VERSIONS[start - 1]]
    told = " and ".join(f"{oldest} (accuracy level {level})" for level, oldest in FORMS[form].oldest.items())
    ran = f"outputs of the newest; tried {VERSIONS[0]} to {VERSIONS[-1]}"
    row(Row("onnxruntime, oldest", ", ".join(sorted(set(FORMS[form].oldest.values()))), form, ran, f"from {told} on"))


def test_opset_and_ir_version_are_those_of_the_original(written: list[Written]) -> None:
    """So that they ask for no newer onnxruntime than the original does."""
    for one in written:
        before, after = (onnx.load(one.folder / name) for name in ("source.onnx", "model.onnx"))
        assert after.ir_version == before.ir_version
        opsets = {opset.domain: opset.version for opset in after.opset_import}
        assert opsets == {opset.domain: opset.version for opset in before.opset_import} | {"com.microsoft": 1}
