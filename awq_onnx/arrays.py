"""Arrays of numpy, and of cupy on a GPU: the arithmetic does not care which.

Statistics, search and rounding are written once, in numpy's functions, which hand cupy's arrays to cupy (NEP 13 and
18); what they make anew they make `like` an array that they were given (NEP 35). What is small and decides about the
order of things stays in memory. Neither package converts an array on its own: here are the ways from one to the other.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

THERE_BYTES = 2 << 30  # of a device's memory for what is worked on at once


def beside(array: NDArray[Scalar], other: NDArray[Any]) -> NDArray[Scalar]:
    """The same numbers where `other` is."""
    placed: NDArray[Scalar] = np.asarray(array, like=other)
    return placed


def in_memory(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """The same numbers as an array of numpy, wherever they are."""
    return array if isinstance(array, np.ndarray) else array.get()


def at_once(here: int, there: int, array: NDArray[Any]) -> int:
    """How many items of such an array to work on at once: `here` in memory, where they should fit into a core's cache,
    `there` on a device, where every call costs the same and few items leave most of it idle.
    """
    return here if isinstance(array, np.ndarray) else max(1, there)
