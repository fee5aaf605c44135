"""Work on the columns of a weight with all cores: numpy lets go of the interpreter inside its loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")

COLUMNS = 384


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_columns(columns: int, work: Callable[[slice], Result]) -> list[Result]:
    """`work` of every slice of range(columns), in order. Each call may write only its own columns."""
    parts = 2 * -(-columns // (2 * COLUMNS))  # even, whatever the machine: the same sums in the same order
    width = -(-columns // parts)
    slices = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
    cores = min(usable_cores(), len(slices))
    if cores <= 1:
        return [work(part) for part in slices]
    with _blas().limit(limits=1), ThreadPoolExecutor(cores) as pool:  # a core each; BLAS must not want them all
        return list(pool.map(work, slices))


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process; finding them takes longer than a slice of work."""
    blas: ThreadpoolController = ThreadpoolController().select(user_api="blas")
    return blas
