"""All cores at work: jobs side by side, as many as memory allows, each with one thread of BLAS.

BLAS's own threads wait for each other busily, which costs more than they bring where matrices are small or others
compute as well; what is large runs alone, with all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


LARGE = 4096  # rows of a matrix that is worth all threads of BLAS


class Spread(Protocol):
    """A map: results in order, work perhaps side by side."""

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]: ...


def one_by_one(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The map that needs no threads."""
    return map(work, items)


_LIMIT: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Within this, `usable_cores` is that many; None: as without it."""
    token = _LIMIT.set(threads)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limit() -> int | None:
    """What `limited` says."""
    return _LIMIT.get()


def usable_cores() -> int:
    """Cores that this process may use."""
    limited_to = limit()
    if limited_to is not None:
        return limited_to
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Use as a context manager; leaving it waits for what runs, and gives BLAS its threads back."""

    def __init__(self, threads: int, budget_bytes: int) -> None:
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._running: dict[Future[Any], int] = {}

    def __enter__(self) -> Workers:
        self._limit = _blas().limit(limits=1)
        self._jobs, self._pieces = ThreadPoolExecutor(self._threads), ThreadPoolExecutor(self._threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for pool in (self._jobs, self._pieces):
                pool.shutdown(wait=True, cancel_futures=True)
        finally:
            self._limit.restore_original_limits()

    def make_room(self, size_bytes: int) -> None:
        """Wait until so much more fits into the budget beside what runs, or nothing runs any more."""
        self._forget_done()
        while self._running and sum(self._running.values()) + size_bytes > self._budget_bytes:
            wait(self._running, return_when="FIRST_COMPLETED")
            self._forget_done()

    def submit(
        self,
        size_bytes: int,
        job: Callable[[Spread], Result],
        *,
        piece_bytes: int = 0,
        alone: bool = False,
        large: bool = False,
    ) -> Future[Result]:
        """Run a job that takes so much memory, in a thread; one that leaves no room for another at once and alone.

        The job is given a map: in a thread of its own it has nobody to share with, alone it has all the others, as many
        as there is memory for. piece_bytes: what one call of the map takes. alone: at once, whatever room there is.
        large: its matrices are, so that it runs alone, one piece after the other, and BLAS has all threads. (That may
        change a last bit: it must not depend on the budget.)
        """
        if not (large or alone) and 2 * size_bytes <= self._budget_bytes:
            self.make_room(size_bytes)
            future = self._jobs.submit(job, one_by_one)
            self._running[future] = size_bytes
            return future
        self.make_room(self._budget_bytes)
        at_once = max(1, self._budget_bytes // max(piece_bytes, 1))
        done: Future[Result] = Future()
        with _blas().limit(limits=self._threads if large else 1):
            try:
                done.set_result(job(one_by_one if large else partial(self.spread, at_once=at_once)))
            except Exception as error:
                done.set_exception(error)
        return done

    def spread(
        self, work: Callable[[Item], Result], items: Iterable[Item], at_once: int | None = None
    ) -> Iterator[Result]:
        """`work` of every item side by side, results in order; beside the jobs, behind none of them.

        at_once: how many items, where that is fewer than threads.
        """
        at_once = at_once or self._threads
        with _blas().limit(limits=1):
            for some in batched(items, at_once) if at_once < self._threads else [items]:
                yield from self._pieces.map(work, some)

    def _forget_done(self) -> None:
        """Their results are somebody else's to keep."""
        self._running = {one: size for one, size in self._running.items() if not one.done()}


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last perhaps shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process; finding them takes longer than a slice of work."""
    blas: ThreadpoolController = ThreadpoolController().select(user_api="blas")
    return blas
