"""One binary of the library on many versions of onnxruntime: its API is reached by index, its ops by layout.

Each version is installed into a folder of the cache, once: about 18 MB to download, 55 MB on disk and 2 seconds each.
Five stand for all; AWQ_ONNX_ALL_ORT=1 takes every one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wheels
from nbits import MICROSOFT, OURS, Node, node

from awq_onnx.kernels import library

# The oldest; the last that cannot be asked for shapes, and the first that can, see ort_op.c; some way on; a late one.
USUAL = ("1.19.2", "1.23.2", "1.24.1", "1.28.0", "1.31.1")
OTHERS = ("1.20.1", "1.21.1", "1.22.1", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.29.0", "1.30.0", "1.32.0")
VERSIONS = USUAL + OTHERS if os.environ.get("AWQ_ONNX_ALL_ORT") else USUAL

SERVED = {
    "float32": node(zero_points=True, bias=True),
    "float16": node(128, 7, 32, np.float16, bias=True),  # inputs before the bias are left out
    "ours": node(259, 9, 64, zero_points=True, domain=OURS),
}
REFUSED = {
    "its weight has 8 bits": node(bits=8),
    "it has the input g_idx": node(group_index=np.zeros(40, np.int32)),
}

# Runs in a process of its own, with the onnxruntime that comes first on its path; knows nothing of awq-onnx.
SCRIPT = """
import ctypes, json, sys
import numpy, onnxruntime

library, *folders = sys.argv[1:]
functions = ctypes.CDLL(library)
functions.awq_configure(b"CPUExecutionProvider", None, None)

def session(folder, registered):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if registered:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])

def calls(folder, registered):
    running, before = session(folder, registered), functions.awq_calls()
    y = running.run(None, {"x": numpy.load(folder + "/a.npy")})[0]
    numpy.save(folder + ("/y.npy" if registered else "/plain.npy"), y)
    return functions.awq_calls() - before

told = {"version": onnxruntime.__version__}
for folder in folders:
    try:
        told[folder] = [calls(folder, registered=True)]
    except Exception as error:
        told[folder] = str(error)
        continue
    if "own" not in folder:
        told[folder].append(calls(folder, registered=False))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with model and input for each node, their domain in its name."""
    made = {}
    for name, one in (SERVED | REFUSED).items():
        made[name] = tmp_path_factory.mktemp(one.domain if one.domain == MICROSOFT else "own")
        (made[name] / "model.onnx").write_bytes(one.model().SerializeToString())
        np.save(made[name] / "a.npy", one.activations(3))
    return made


def on_version(version: str, folders: dict[str, Path]) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, str(library.path()), *map(str, folders.values())]
    path = {"PYTHONPATH": str(wheels.installed(f"onnxruntime=={version}"))}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path)
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr}"
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def check(one: Node, folder: Path) -> None:
    expected, y = one.expected(np.load(folder / "a.npy")), np.load(folder / "y.npy")
    assert y.dtype == one.dtype
    tolerance = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}[one.dtype]
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_binary(version: str, folders: dict[str, Path]) -> None:
    """Our kernel runs each node once and makes what it should; without registration it does not run; refusals come
    with their reason."""
    told = on_version(version, folders)
    assert told["version"] == version
    for name, one in SERVED.items():
        assert told[str(folders[name])] == ([1, 0] if one.domain == MICROSOFT else [1])
        check(one, folders[name])
    for reason in REFUSED:
        assert f"cannot run the MatMulNBits node 'the/node': {reason}" in told[str(folders[reason])]
