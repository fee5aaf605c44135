"""Values wait in memory while they fit, else in files; either way they come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Array

from awq_onnx.calibrate.shelf import Shelf

FOUR = np.arange(4, dtype=np.uint8)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_fits_stays_in_memory_as_it_is(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 8, [{"a": FOUR}, {"a": FOUR + 1}])
    assert shelf.feeds[0]["a"] is FOUR
    assert files(tmp_path) == []


def test_what_does_not_fit_lies_in_files_and_reads_the_same(tmp_path: Path) -> None:
    values = {str(dtype): np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("f4", "f2", "i8", "u1", "?")}
    values["not contiguous"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
    values["a number"] = np.array(3.0)
    shelf = Shelf(tmp_path, 0, [values])
    assert len(files(tmp_path)) == len(values)
    for name, one in values.items():
        found = shelf.feeds[0][name]
        assert isinstance(found, np.memmap)
        assert found.dtype == one.dtype
        np.testing.assert_array_equal(found, one)


def test_values_of_no_elements_need_no_file(tmp_path: Path) -> None:
    """An empty file cannot be mapped; the first cache of a decoder is empty."""
    empty: Array = np.zeros((1, 2, 0, 16), np.float32)
    shelf = Shelf(tmp_path, 0, [{"past": empty}])
    assert shelf.feeds[0]["past"] is empty
    assert files(tmp_path) == []


def test_a_value_that_is_dropped_makes_room_for_another(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 4, [{"a": FOUR}])
    (alive,) = shelf.feeds
    shelf.put(alive, {"b": FOUR})
    assert len(files(tmp_path)) == 1
    shelf.drop(alive, ["a"])
    shelf.put(alive, {"c": FOUR})
    assert len(files(tmp_path)) == 1
    assert alive["c"] is FOUR


def test_the_file_goes_with_its_value_and_makes_no_room(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 4, [{"a": FOUR, "b": FOUR}])
    (alive,) = shelf.feeds
    shelf.drop(alive, ["b"])
    assert files(tmp_path) == []
    shelf.put(alive, {"c": FOUR})
    assert len(files(tmp_path)) == 1


def test_the_same_name_of_another_feed_stays(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0, [{"a": FOUR}, {"a": FOUR + 1}])
    shelf.drop(shelf.feeds[0], ["a"])
    assert not shelf.feeds[0]
    np.testing.assert_array_equal(shelf.feeds[1]["a"], FOUR + 1)
    assert len(files(tmp_path)) == 1


def test_to_drop_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 4, [{"a": FOUR}])
    shelf.drop(shelf.feeds[0], ["b"])
    shelf.put(shelf.feeds[0], {"c": FOUR})
    assert len(files(tmp_path)) == 1  # no room was made


def test_one_array_may_lie_there_under_two_names(tmp_path: Path) -> None:
    """An Identity: what is dropped under one name is still there under the other."""
    for budget_bytes in (0, 100):
        shelf = Shelf(tmp_path, budget_bytes, [{"a": FOUR, "b": FOUR}])
        shelf.drop(shelf.feeds[0], ["a"])
        np.testing.assert_array_equal(shelf.feeds[0]["b"], FOUR)


def test_values_are_read_after_many_came_and_went(tmp_path: Path) -> None:
    """Files are known by the identity of an array, which another may have once it is gone."""
    shelf = Shelf(tmp_path, 16, [{}])
    (alive,) = shelf.feeds
    for number in range(200):
        shelf.put(alive, {f"{number}": np.full(8, number, np.uint8)})
        if number >= 5:
            shelf.drop(alive, [f"{number - 5}"])
        for name, values in alive.items():
            assert (values == int(name)).all()
    assert len(alive) == 5
    assert len(files(tmp_path)) <= 5


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        Shelf(tmp_path / "missing", 0, [{"a": FOUR}])
