"""CUDA kernels on the processor, for arrays of numpy and for those that stand for a GPU's (foreign.py)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import Foreign

import awq_onnx.kernels
from awq_onnx import compensate, symmetric
from awq_onnx.kernels.arrays import Kernel

HERE = Path(__file__).parent
KERNELS = Path(awq_onnx.kernels.__file__).parent


@cache
def _library() -> Any:
    """Built once for all tests of a run."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile CUDA kernels for the processor")
    folder = Path(tempfile.mkdtemp())
    built = folder / "kernels.so"
    # As the kernels are compiled for a GPU: products and sums rounded one by one.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [compiler, *options, "-I", str(KERNELS), str(HERE / "kernels" / "arrays.cpp"), "-o", str(built)]
    try:
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(folder)
    return library


def kernel_on_cpu(_: object, source: str, name: str) -> Kernel:
    """In the place of `kernel_for`: the same kernel, whatever the array."""
    assert (KERNELS / f"{source}.cu").is_file()
    library = _library()

    def launch(blocks: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        values = [_value(one) for one in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[one.ctypes.data for one in values])
        (x_blocks,), (x_threads,) = blocks, threads
        assert library.launch_on_cpu(name.encode(), x_blocks, x_threads, pointers) == 0

    return launch


def _value(argument: Any) -> np.ndarray[Any, Any]:
    """What the driver is handed: the address of an array, or a number as it is."""
    if isinstance(argument, np.generic):
        return np.array(argument)
    values = argument._values if isinstance(argument, Foreign) else argument
    assert values.flags.c_contiguous
    return np.array(values.ctypes.data, np.uint64)


def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has a kernel of its own takes it."""
    for module in (compensate, symmetric):
        monkeypatch.setattr(module, "kernel_for", kernel_on_cpu)
