"""The random models that benchmarks/scale.py measures on: their size, what onnxruntime and awq-onnx make of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

import awq_onnx

TOKENS = 12


def _script() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "random_llama.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


random_llama = _script()
SMALL = random_llama.Shape(64, 96, 2, heads=4, kv_heads=2, head_size=16, vocabulary=128)


def _ids(samples: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, SMALL.vocabulary, (samples, TOKENS))


def _run(model: Path) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ids = _ids(1)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(TOKENS)[None]}
    for one in session.get_inputs():
        if one.name.startswith("past"):
            dtype = np.float16 if "float16" in one.type else np.float32
            feed[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), dtype)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


@pytest.mark.parametrize("name", random_llama.SHAPES)
def test_a_shape_has_about_as_many_parameters_as_it_is_called_after(name: str) -> None:
    assert round(random_llama.SHAPES[name].parameters / 1e9, 1) == pytest.approx(float(name), rel=0.1)


def test_a_model_has_the_parameters_of_its_shape(tmp_path: Path) -> None:
    model = onnx.load(random_llama.build(tmp_path, SMALL))
    weights = [one for one in model.graph.initializer if "weight" in one.name]
    assert sum(int(np.prod(one.dims)) for one in weights) == SMALL.parameters


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        random_llama.build(folder, SMALL, seed=seed)
    one, again, other = ([(f / name).read_bytes() for name in ("model.onnx", "model.onnx.data")] for f in folders)
    assert one == again
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_onnxruntime_runs_both_dtypes_and_they_agree(tmp_path: Path) -> None:
    made = []
    for dtype in random_llama.DTYPES:
        (tmp_path / dtype).mkdir()
        made.append(_run(random_llama.build(tmp_path / dtype, SMALL, dtype)))
    half, full = made
    assert full["logits"].shape == (1, TOKENS, SMALL.vocabulary)
    assert 0.5 < full["logits"].std() < 5
    for name, values in full.items():
        np.testing.assert_allclose(half[name].astype(np.float32), values, atol=0.05, rtol=0.05)


def test_every_layer_but_the_lm_head_is_quantised_and_its_scale_folded(tmp_path: Path) -> None:
    model = random_llama.build(tmp_path, SMALL)
    report = awq_onnx.quantize(model, tmp_path / "int4.onnx", awq_onnx.Recipe(samples=4), calibration=_ids(5))
    assert len(report.matmuls) == 7 * SMALL.layers
    assert all(one.fold is not None for one in report.matmuls)
    assert [one.what for one in report.kept] == ["/lm_head/MatMul"]


DEEP = random_llama.Shape(768, 2304, 6, heads=12, kv_heads=6, head_size=64, vocabulary=1024)


def _cost(folder: Path, dtype: str, layers: int) -> tuple[int, int, int]:
    """Bytes of a model's weights; of private and of resident memory at the peak of quantising it in a process.

    glibc is told to give every array from 1 MiB on back at once: with its own, moving threshold it keeps what was freed
    in a heap that chance fragments, and tens of megabytes of that would hide what the tool holds.
    """
    folder.mkdir()
    shape = replace(DEEP, layers=layers)
    model = random_llama.build(folder, shape, dtype=dtype)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, shape.vocabulary, (8, 64)))
    command = [sys.executable, "-m", "awq_onnx", model, "--calibration", folder / "ids.npy", "--samples", "7"]
    command += ["--memory-budget", "32MB", "--json", "--quiet"]
    threshold = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threshold)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if report["peak_memory_bytes"] is None:
        pytest.skip("private memory cannot be measured on this system")
    return (
        shape.parameters * (2 if dtype == "fp16" else 4),
        report["peak_memory_bytes"],
        report["resident_memory_bytes"],
    )


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_of_a_deeper_model_hardly_more_is_in_memory(dtype: str, tmp_path: Path) -> None:
    """Three times the layers: a tool that held the weights or all activations would show it."""
    (few, *shallow), (many, *deep) = (_cost(tmp_path / str(layers), dtype, layers) for layers in (4, 12))
    for before, after in zip(shallow, deep, strict=True):
        assert after - before < 0.25 * (many - few)
