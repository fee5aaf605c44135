"""CUDA kernels of our own for arrays on a GPU, where numpy's functions would launch a small one at every step.

Whoever needs a step asks for its kernel with an array at hand, as numpy's protocols do (docs/design/0008): arrays in
memory have none, and numpy's functions are then what is done, and what the kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

# Blocks, threads of a block, arguments: C-contiguous arrays of the device (their address), numbers as numpy's scalars.
Kernel: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], object]

# Products and sums are rounded one by one, as numpy rounds them; where one rounding is meant, sources say fmaf.
OPTIONS = ("--std=c++17", "--fmad=false")


def kernel_for(array: NDArray[Any], source: str, name: str) -> Kernel | None:
    """The kernel `name` of `source`.cu for arrays like this one; None where there is none for them."""
    if type(array).__module__.partition(".")[0] != "cupy":
        return None
    kernel: Kernel = _module(source).get_function(name)
    return kernel


def text_of(source: str) -> str:
    """The CUDA C++ of a source file beside this one."""
    return Path(__file__).with_name(f"{source}.cu").read_text(encoding="utf-8")


@cache
def _module(source: str) -> Any:
    """Compiled for the device at hand when the first kernel is taken from it; cupy keeps what it compiled on disk."""
    import cupy

    return cupy.RawModule(code=text_of(source), options=OPTIONS)
