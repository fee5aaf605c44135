from __future__ import annotations

import threading

import pytest

from awq_onnx import threads
from awq_onnx.threads import COLUMNS, map_columns

COUNTS = [1, 2, 3, 5, 383, 384, 385, 767, 768, 769, 1537, 4096, 49152, 50257]


def identity(part: slice) -> slice:
    return part


@pytest.mark.parametrize("cores", [1, 2, 64])
@pytest.mark.parametrize("columns", COUNTS)
def test_slices_cover_every_column_once_and_in_order(columns: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    parts = map_columns(columns, identity)
    assert [column for part in parts for column in range(part.start, part.stop)] == list(range(columns))
    assert all(0 < part.stop - part.start <= COLUMNS for part in parts)


def test_slices_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        seen.append(map_columns(5000, identity))
    assert seen[0] == seen[1] == seen[2]


def test_two_cores_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    both_there = threading.Barrier(2, timeout=10)  # broken, and so an error, if one waits for the other to end
    assert len(map_columns(2 * COLUMNS, lambda _: both_there.wait())) == 2


@pytest.mark.parametrize("cores", [1, 2])
def test_an_error_in_one_slice_reaches_the_caller(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)

    def work(part: slice) -> None:
        if part.stop == 1000:
            raise ValueError("the last slice")

    with pytest.raises(ValueError, match="the last slice"):
        map_columns(1000, work)


def test_there_is_a_core_to_use() -> None:
    assert threads.usable_cores() >= 1
