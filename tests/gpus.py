"""Where the CUDA kernels run in tests: on a GPU, and on an emulated one that every machine has.

Both are reached through launch.c. The emulated one is a library that has the functions of CUDA's driver, and runs the
kernels' own source on the processor (kernels/emulator/).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

import awq_onnx.kernels
from awq_onnx.kernels import compile as compiler
from awq_onnx.kernels import library
from awq_onnx.kernels.launcher import Launcher
from awq_onnx.runtime import first_line

Array = NDArray[Any]

EMULATOR = Path(__file__).parent / "kernels" / "emulator"
KERNELS = Path(awq_onnx.kernels.__file__).parent
CUBIN = compiler.cubin_name(90)
POISON = 0x7E5A  # NaN in float16, a large number in bfloat16: what an output holds before


@dataclass
class Emulated:
    """Arrays are numpy's; those that kernels read end where memory does that nobody may touch."""

    folder: Path
    name: str = "emulated"
    cublas: int = 1  # any handle will do

    @property
    def driver(self) -> Path:
        return self.folder / "libcublas.so.13"

    @property
    def launcher(self) -> Launcher:
        return Launcher(library.path(), self.folder, self.driver)

    def put(self, array: Array) -> Array:
        """The same numbers, right before a page that cannot be read; the start is a multiple of 16 bytes."""
        page = mmap.PAGESIZE
        size = -(-array.nbytes // 16) * 16
        area = mmap.mmap(-1, -(-size // page) * page + page)
        start = len(area) - page - size
        whole = np.frombuffer(area, np.uint8)
        _protect(whole[len(area) - page :], page)
        placed = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed

    def get(self, array: Array) -> Array:
        return array

    def launched(self) -> list[str]:
        """Names of the kernels that ran since the last call."""
        emulated = ctypes.CDLL(str(self.driver))
        emulated.emulated_launches.restype = ctypes.c_char_p
        return str(emulated.emulated_launches().decode()).split()


@dataclass
class Gpu:
    """Arrays are cupy's, bfloat16 as uint16."""

    launcher: Launcher
    name: str = "gpu"

    @property
    def cublas(self) -> int:
        import cupy

        return int(cupy.cuda.device.get_cublas_handle())

    def put(self, array: Array) -> Any:
        import cupy

        return cupy.asarray(array.view(np.uint16) if array.dtype == bfloat16 else array)

    def get(self, array: Any) -> Array:
        back: Array = array.get()
        return back


def emulated(folder: Path) -> Emulated:
    """Builds the emulated GPU in a folder. Skips the test without g++."""
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("there is no g++ to build the emulated GPU with")
    made = Emulated(folder)
    options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcublas.so.13"]
    include = ["-I", str(EMULATOR), "-I", str(KERNELS)]
    subprocess.run([cxx, *options, *include, str(EMULATOR / "driver.cpp"), "-o", str(made.driver)], check=True)
    (folder / CUBIN).write_bytes(b"the emulated driver has the kernels itself")
    return made


def gpu() -> Gpu:
    """The GPU of this machine. Skips the test where there is none."""
    with skipped_without_a_gpu():
        folder = compiler.cubin_folder()
        import cupy

        cupy.cuda.device.get_cublas_handle()  # loads the library, which the launcher looks for
        return Gpu(Launcher(library.path(), folder))


@contextmanager
def skipped_without_a_gpu() -> Iterator[None]:
    """An error within is no GPU: the test is skipped, but in `make gpu-test`, where it fails."""
    try:
        yield
    except Exception as error:  # cupy's own classes, and ours
        if os.environ.get("AWQ_ONNX_GPU_TESTS"):
            raise
        pytest.skip(f"no GPU: {first_line(error)}")


def _protect(page: Array, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page.ctypes.data), ctypes.c_size_t(size), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
