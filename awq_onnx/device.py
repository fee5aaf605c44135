"""What computes: the processor, or a GPU with the CUDA provider of onnxruntime and cupy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.arrays import Scalar, beside
from awq_onnx.errors import MissingPackageError
from awq_onnx.machine import CPU
from awq_onnx.runtime import CPU_PROVIDERS, CUDA_PROVIDERS, Providers
from awq_onnx.threads import Spread, one_by_one


@dataclass(frozen=True)
class Device:
    """like: an array on it. providers: of onnxruntime, the first runs what it can. turn: to be held by who searches:
    a GPU gains nothing by two searches at once, which would take twice the memory.
    """

    like: NDArray[Any]
    providers: Providers
    turn: AbstractContextManager[object] = field(default_factory=nullcontext)

    def map_of(self, spread: Spread) -> Spread:
        """The map for pieces of work on it: threads bring nothing where what is called returns at once."""
        return spread if isinstance(self.like, np.ndarray) else one_by_one

    def put(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """The same numbers on the device."""
        return beside(array, self.like)


PROCESSOR = Device(np.empty(0), CPU_PROVIDERS)


def device_of(name: str) -> Device:
    """One of `machine.DEVICES`. Raises MissingPackageError where the machine or its packages have no such thing."""
    if name == CPU:
        return PROCESSOR
    if not runtime.find_cuda():
        raise MissingPackageError(
            "device is cuda, but the installed onnxruntime cannot use it: pip uninstall onnxruntime, then "
            "pip install 'awq-onnx[gpu]'"
        )
    try:
        import cupy
    except ImportError as error:
        raise MissingPackageError("device is cuda, but cupy is missing: pip install 'awq-onnx[gpu]'") from error
    try:
        like = cupy.empty(0)
    except Exception as error:  # cupy's own classes: no driver, no GPU, no memory
        reason = runtime.first_line(error)
        raise MissingPackageError(f"device is cuda, but cupy finds no GPU that it can use ({reason})") from error
    return Device(like, CUDA_PROVIDERS, Lock())
