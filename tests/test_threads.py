"""Jobs side by side in a budget of memory, and how many threads BLAS has meanwhile."""

from __future__ import annotations

import _thread
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from awq_onnx import threads
from awq_onnx.threads import Spread, Workers, limited, one_by_one

BUDGET = 100
FITS, TOO_LARGE = 50, 51  # beside another of its size
PATIENCE = 20  # seconds, after which a test that waits for another thread fails
ORIGINAL = 3  # threads of BLAS, whatever the machine has


@pytest.fixture(autouse=True)
def original() -> Iterator[None]:
    with threadpool_limits(ORIGINAL, "blas"):
        yield


def blas_threads() -> int:
    (number,) = {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
    return int(number)


class Busy:
    """What runs at the same time: how much memory it takes, and which jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[int] = []
        self.seen: list[list[int]] = []

    @contextmanager
    def job(self, size: int) -> Iterator[None]:
        with self._lock:
            self._running.append(size)
            self.seen.append(list(self._running))
        yield
        with self._lock:
            self._running.remove(size)


# Maps


def test_one_by_one_is_a_map_in_order_that_works_as_it_is_asked() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item**2

    results = one_by_one(work, [3, 1, 2])
    assert done == []
    assert next(results) == 9
    assert done == [3]
    assert list(results) == [1, 4]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_spread_comes_back_in_order(count: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.02 * (item % 3 == 0))
        return item**2

    with Workers(count, BUDGET) as workers:
        assert list(workers.spread(work, range(20))) == [item**2 for item in range(20)]
        assert list(workers.spread(work, [])) == []


def test_what_is_spread_is_worked_on_at_the_same_time_and_with_one_thread_of_blas_each() -> None:
    all_there = threading.Barrier(3, timeout=PATIENCE)

    def work(_: int) -> int:
        all_there.wait()
        return blas_threads()

    with Workers(3, BUDGET) as workers:
        assert list(workers.spread(work, range(6))) == [1] * 6


def test_an_error_in_what_is_spread_reaches_the_caller() -> None:
    def work(item: int) -> float:
        return 1 / item

    with Workers(2, BUDGET) as workers, pytest.raises(ZeroDivisionError):
        list(workers.spread(work, [1, 0, 2]))
    assert blas_threads() == ORIGINAL


# Jobs


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_job_has_its_own_result(count: int) -> None:
    def job_of(number: int) -> Callable[[Spread], int]:
        def job(_: Spread) -> int:
            time.sleep(0.02 * (number % 3 == 0))
            return number

        return job

    with Workers(count, BUDGET) as workers:
        futures = [workers.submit(30 + number % 4 * 10, job_of(number)) for number in range(20)]
        assert [one.result() for one in futures] == list(range(20))


def test_jobs_that_fit_run_at_the_same_time() -> None:
    both_there = threading.Barrier(2, timeout=PATIENCE)
    with Workers(2, BUDGET) as workers:
        futures = [workers.submit(FITS, lambda _: both_there.wait()) for _ in range(2)]
        assert sorted(one.result() for one in futures) == [0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_what_runs_at_the_same_time_never_takes_more_than_the_budget(seed: int) -> None:
    rng, busy = np.random.default_rng(seed), Busy()

    def job_of(size: int) -> Callable[[Spread], None]:
        def job(_: Spread) -> None:
            with busy.job(size):
                time.sleep(0.005)

        return job

    with Workers(4, BUDGET) as workers:
        for size in rng.integers(1, 60, 60).tolist():
            workers.submit(size, job_of(size))
        workers.make_room(BUDGET)
    assert len(busy.seen) == 60
    assert max(map(len, busy.seen)) > 1
    assert all(sum(together) <= BUDGET for together in busy.seen)
    assert all(len(together) == 1 for together in busy.seen if max(together) > FITS)


@pytest.mark.parametrize("size", [TOO_LARGE, 10 * BUDGET])
def test_a_job_that_leaves_no_room_runs_at_once_and_alone_and_shares_with_all_threads(size: int) -> None:
    ended: list[int] = []
    all_there = threading.Barrier(2, timeout=PATIENCE)

    def short(_: Spread) -> None:
        time.sleep(0.05)
        ended.append(1)

    def work(item: int) -> int:
        all_there.wait()
        return item

    def alone(spread: Spread) -> list[int]:
        assert len(ended) == 4
        return list(spread(work, range(4)))

    with Workers(2, BUDGET) as workers:
        for _ in range(4):
            workers.submit(25, short)
        future = workers.submit(size, alone)
        assert future.done()
        assert future.result() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, TOO_LARGE])
def test_a_large_job_runs_at_once_and_alone_its_pieces_one_after_the_other(size: int) -> None:
    ended: list[int] = []

    def short(_: Spread) -> None:
        time.sleep(0.05)
        ended.append(1)

    def alone(spread: Spread) -> object:
        assert len(ended) == 4
        return spread

    with Workers(2, BUDGET) as workers:
        for _ in range(4):
            workers.submit(25, short)
        future = workers.submit(size, alone, large=True)
        assert future.done()
        assert future.result() is one_by_one


@pytest.mark.parametrize(("piece", "expected"), [(0, 4), (1, 4), (25, 4), (26, 3), (50, 2), (51, 1), (1000, 1)])
def test_a_job_alone_shares_with_as_many_threads_as_there_is_memory_for(piece: int, expected: int) -> None:
    busy = Busy()

    def work(_: int) -> None:
        with busy.job(1):
            time.sleep(0.05)

    def alone(spread: Spread) -> None:
        assert len(list(spread(work, range(6)))) == 6

    with Workers(4, BUDGET) as workers:
        workers.submit(TOO_LARGE, alone, piece_bytes=piece).result()
    assert max(map(len, busy.seen)) == expected


def test_a_job_beside_others_has_nobody_to_share_with() -> None:
    with Workers(2, BUDGET) as workers:
        assert workers.submit(FITS, lambda spread: spread).result() is one_by_one


@pytest.mark.parametrize("size", [1, TOO_LARGE])
def test_an_error_in_a_job_reaches_who_asks_for_its_result(size: int) -> None:
    def job(_: Spread) -> None:
        raise ValueError("no such scale")

    with Workers(2, BUDGET) as workers:
        failed = workers.submit(size, job)
        with pytest.raises(ValueError, match="no such scale"):
            failed.result()
        assert blas_threads() == 1
        assert workers.submit(size, lambda _: 5).result() == 5


# Room


def test_room_is_made_by_waiting_for_what_runs() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def job(_: Spread) -> None:
        go_on.wait(PATIENCE)
        ended.set()

    with Workers(2, BUDGET) as workers:
        workers.submit(40, job)
        workers.make_room(60)  # there is some
        assert not ended.is_set()
        threading.Timer(0.1, go_on.set).start()
        workers.make_room(61)
        assert ended.is_set()


@pytest.mark.parametrize("size", [BUDGET, 3 * BUDGET])
def test_for_more_than_the_budget_nothing_else_may_run(size: int) -> None:
    ended: list[int] = []

    def job(_: Spread) -> None:
        time.sleep(0.05)
        ended.append(1)

    with Workers(2, BUDGET) as workers:
        workers.make_room(size)  # nothing runs
        for _ in range(5):
            workers.submit(20, job)
        workers.make_room(size)
        assert len(ended) == 5


def test_a_failed_job_leaves_its_room_to_others() -> None:
    with Workers(2, BUDGET) as workers:
        failed = workers.submit(FITS, lambda _: 1 / 0)
        workers.make_room(BUDGET)
        assert isinstance(failed.exception(), ZeroDivisionError)


def test_a_result_that_nobody_keeps_is_forgotten() -> None:
    """It may be large, and counts for no memory once its job is done."""

    class Result:
        pass

    with Workers(2, BUDGET) as workers:
        result = weakref.ref(workers.submit(1, lambda _: Result()).result())
        workers.make_room(1)
        gc.collect()
        assert result() is None


# Threads of BLAS


@pytest.mark.parametrize(
    ("size", "large", "expected"), [(1, False, 1), (FITS, False, 1), (TOO_LARGE, False, 1), (1, True, 4)]
)
def test_blas_has_one_thread_in_every_job_but_the_large_ones(size: int, large: bool, expected: int) -> None:
    def job(spread: Spread) -> tuple[int, list[int], int]:
        return blas_threads(), list(spread(lambda _: blas_threads(), range(3))), blas_threads()

    with Workers(4, BUDGET) as workers:
        assert workers.submit(size, job, large=large).result() == (expected, [expected] * 3, expected)
        assert blas_threads() == 1
    assert blas_threads() == ORIGINAL


# Ends


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["between jobs", "in a job", "in a job that runs alone", "in a large job"])
def test_an_error_ends_it_soon_and_gives_blas_its_threads_back(error: type[BaseException], where: str) -> None:
    """What runs is waited for; what has not begun never does."""
    begun: list[int] = []

    def slow(_: Spread) -> None:
        begun.append(1)
        time.sleep(0.1)

    def fail(_: Spread) -> None:
        raise error

    def leave_with_an_error() -> None:
        with Workers(1, BUDGET) as workers:
            size, large = (TOO_LARGE if where == "in a job that runs alone" else 1), where == "in a large job"
            failed = workers.submit(size, fail if where != "between jobs" else slow, large=large)
            for _ in range(50):
                workers.submit(1, slow)
            failed.result()
            raise error

    before = time.monotonic()
    with pytest.raises(error):
        leave_with_an_error()
    assert time.monotonic() - before < 4
    assert len(begun) < 50
    ran = len(begun)
    time.sleep(0.15)
    assert len(begun) == ran
    assert blas_threads() == ORIGINAL


def test_an_interruption_while_room_is_made_waits_for_what_runs() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def job(_: Spread) -> None:
        begun.set()
        go_on.wait(PATIENCE)
        ended.set()

    def interrupt() -> None:
        _thread.interrupt_main()
        time.sleep(0.1)
        go_on.set()

    def wait_for_room() -> None:
        with Workers(2, BUDGET) as workers:
            workers.submit(1, job)
            begun.wait(PATIENCE)
            threading.Timer(0.1, interrupt).start()
            workers.make_room(BUDGET)

    with pytest.raises(KeyboardInterrupt):
        wait_for_room()
    assert ended.is_set()
    assert blas_threads() == ORIGINAL


def test_leaving_waits_for_what_runs() -> None:
    begun, ended = threading.Event(), threading.Event()

    def job(_: Spread) -> None:
        begun.set()
        time.sleep(0.1)
        ended.set()

    with Workers(2, BUDGET) as workers:
        workers.submit(1, job)
        begun.wait(PATIENCE)
    assert ended.is_set()


# Cores


def test_there_is_a_core_to_use() -> None:
    assert threads.usable_cores() >= 1


def test_a_limit_holds_within_and_not_beyond() -> None:
    before = threads.usable_cores()
    with limited(7):
        assert threads.usable_cores() == 7
        with limited(1):
            assert threads.usable_cores() == 1
        assert threads.usable_cores() == 7
    assert threads.usable_cores() == before


def test_no_limit_is_that_of_the_machine() -> None:
    before = threads.usable_cores()
    with limited(7), limited(None):
        assert threads.usable_cores() == before


def test_a_limit_ends_with_an_error_too() -> None:
    before = threads.usable_cores()
    with pytest.raises(StopError), limited(before + 1):
        raise StopError
    assert threads.usable_cores() == before
