"""MatMulNBits on a GPU from Python: the functions of launch.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx.errors import RuntimeFailedError

FLOAT32, FLOAT16, BFLOAT16 = 1, 10, 16  # numbers of ONNX
Array = NDArray[Any]
_TYPES = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16}


class Weight(Structure):
    """`struct awq_weight`."""

    _fields_ = [("N", c_int64), ("K", c_int64), ("block_size", c_int64), ("type", c_int)]


class Call(Structure):
    """`struct awq_call`."""

    _fields_ = [
        ("M", c_int64),
        *[(name, c_void_p) for name in ("a", "codes", "scales", "zero_points", "bias", "y", "workspace")],
        ("workspace_bytes", c_size_t),
        ("cublas", c_void_p),
        ("stream", c_void_p),
    ]


class Launcher:
    """The GPU of the current context, the kernels loaded.

    library: that of `library.py`. folder: where the kernels' machine code lies. driver: a library in the place of
    CUDA's. Raises RuntimeFailedError where there is no GPU, or none that the kernels run on.
    """

    def __init__(self, library: Path, folder: Path, driver: Path | None = None) -> None:
        self._library = _declared(ctypes.CDLL(str(library)))
        error = c_char_p()
        name = None if driver is None else str(driver).encode()
        self._gpu = self._library.awq_gpu_open(name, str(folder).encode(), ctypes.byref(error))
        if not self._gpu:
            raise RuntimeFailedError((error.value or b"no reason given").decode())

    def matmul_nbits(
        self,
        a: Array,
        codes: Array,
        scales: Array,
        zero_points: Array | None = None,
        bias: Array | None = None,
        *,
        out: Array | None = None,
        workspace: Array | None = None,
        cublas: int = 0,
        stream: int = 0,
    ) -> Array:
        """A (…, K) times the weight, (…, N): what `reference.matmul_nbits` computes, on the arrays' device.

        a: float16, float32, or bfloat16 as it is or as uint16; contiguous, like all others. scales, bias: of its dtype.
        out: where the product goes. workspace: uint8, at least as large as `workspace_bytes` says. cublas: a handle,
        for products of many rows. stream: of CUDA, 0 the default one.
        """
        N, _, block_bytes = codes.shape
        K = a.shape[-1]
        weight = Weight(N, K, 2 * block_bytes, _TYPES.get(a.dtype, BFLOAT16))
        M = a.size // K
        if out is None:
            out = np.empty((*a.shape[:-1], N), a.dtype, like=a)
        if workspace is None:
            workspace = np.empty(self.workspace_bytes(weight, M, cublas != 0), np.uint8, like=a)
        tensors = [_pointer(one) for one in (a, codes, scales, zero_points, bias, out, workspace)]
        call = Call(M, *tensors, workspace.nbytes, cublas, stream)
        error = self._library.awq_refusal(weight) or self._library.awq_matmul_nbits(self._gpu, weight, call)
        if error:
            raise RuntimeFailedError(error.decode())
        return out

    def workspace_bytes(self, weight: Weight, M: int, with_cublas: bool) -> int:
        """Of scratch that a product with M rows needs."""
        return int(self._library.awq_workspace_bytes(self._gpu, weight, M, with_cublas))


def _pointer(array: Array | None) -> int | None:
    if array is None:
        return None
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.awq_gpu_open.argtypes = [c_char_p, c_char_p, POINTER(c_char_p)]
    library.awq_gpu_open.restype = c_void_p
    library.awq_refusal.argtypes = [POINTER(Weight)]
    library.awq_refusal.restype = c_char_p
    library.awq_workspace_bytes.argtypes = [c_void_p, POINTER(Weight), c_int64, c_int]
    library.awq_workspace_bytes.restype = c_size_t
    library.awq_matmul_nbits.argtypes = [c_void_p, POINTER(Weight), POINTER(Call)]
    library.awq_matmul_nbits.restype = c_char_p
    return library
