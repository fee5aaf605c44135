"""What is in the journal counts, and only that: whatever else is found there, a run begins anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from awq_onnx.journal import Journal

KEY = "key"
ENTRIES = {"one": {"at": 1, "names": ["a", None]}, "two": {}}


@contextmanager
def journal(folder: Path, key: str | None = KEY) -> Iterator[Journal]:
    """One that watches the files a and b."""
    with closing(Journal(folder / "journal", key, [folder / "a", folder / "b"])) as opened:
        yield opened


def grow(folder: Path, name: str, size_bytes: int) -> None:
    with (folder / name).open("ab") as file:
        file.write(bytes(size_bytes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a journal of two things."""
    with journal(tmp_path) as new:
        assert (new.entries, new.ends) == ({}, (0, 0))
        for at, (name, entry) in enumerate(ENTRIES.items(), 1):
            grow(tmp_path, "a", 10)
            new.record(name, entry, (10 * at, 0))
        assert new.entries == ENTRIES
    return tmp_path


def found(folder: Path, key: str | None = KEY) -> list[str]:
    """The names of what counts; opening twice finds the same."""
    with journal(folder, key) as first:
        names, ends = list(first.entries), first.ends
    with journal(folder, key) as second:
        assert (list(second.entries), second.ends) == (names, ends)
    assert ends == (10 * len(names), 0)
    return names


def test_what_was_recorded_is_there_again(folder: Path) -> None:
    with journal(folder) as again:
        assert again.entries == ENTRIES
        assert again.ends == (20, 0)
        again.record("three", {}, (20, 0))
    with journal(folder) as again:
        assert again.entries == {**ENTRIES, "three": {}}


def test_the_last_entry_of_a_name_counts(folder: Path) -> None:
    with journal(folder) as again:
        again.record("one", {"at": 2}, (20, 0))
    with journal(folder) as again:
        assert again.entries["one"] == {"at": 2}


@pytest.mark.parametrize("key", ["other", None])
def test_what_another_run_recorded_does_not_count_and_is_gone(folder: Path, key: str | None) -> None:
    with journal(folder, key) as other:
        assert (other.entries, other.ends) == ({}, (0, 0))
    assert found(folder) == []


def test_what_a_run_without_a_key_recorded_never_counts(tmp_path: Path) -> None:
    with journal(tmp_path, None) as one:
        one.record("one", {}, (0, 0))
    for key in (None, KEY):
        with journal(tmp_path, key) as again:
            assert again.entries == {}


def test_a_line_that_was_being_written_does_not_count_and_is_gone(folder: Path) -> None:
    whole = (folder / "journal").read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for missing in range(1, len(last) + 1):
        (folder / "journal").write_bytes(whole[: len(whole) - missing])
        assert found(folder) == ["one"]
        assert (folder / "journal").read_bytes() == whole[: len(whole) - len(last)]


def test_a_first_line_that_was_being_written_leaves_nothing(folder: Path) -> None:
    whole = (folder / "journal").read_bytes()
    first = whole.splitlines(keepends=True)[0]
    for size in range(len(first)):
        (folder / "journal").write_bytes(whole[:size])
        assert found(folder) == []
        assert (folder / "journal").read_bytes() == first


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_file_that_is_shorter_than_it_was_leaves_nothing(folder: Path, name: str) -> None:
    grow(folder, "b", 5)
    with journal(folder) as again:
        again.record("three", {}, (20, 5))
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert found(folder) == []


def test_a_file_that_is_missing_leaves_nothing(folder: Path) -> None:
    (folder / "a").unlink()
    assert found(folder) == []


def test_a_file_that_is_longer_is_as_it_should_be(folder: Path) -> None:
    grow(folder, "a", 5)
    assert found(folder) == ["one", "two"]


FOREIGN = [
    b"{}",
    b"[]",
    b"7",
    b"null",
    b'"text"',
    b"no json",
    b"\xff\xfe\x00",
    b"",
    b'{"name": "three"}',
    b'{"name": "three", "entry": {}}',
    b'{"name": "three", "entry": {}, "ends": [20]}',
    b'{"name": "three", "entry": {}, "ends": [20, 0, 0]}',
    b'{"name": "three", "entry": {}, "ends": 20}',
    b'{"name": "three", "entry": {}, "ends": ["x", 0]}',
    b'{"name": "three", "entry": 7, "ends": [20, 0]}',
    b'{"name": [], "entry": {}, "ends": [20, 0]}',
]


@pytest.mark.parametrize("line", FOREIGN, ids=repr)
def test_a_line_that_is_none_of_ours_ends_what_counts(folder: Path, line: bytes) -> None:
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    (folder / "journal").write_bytes(b"".join([*lines[:-1], line, b"\n", lines[-1]]))
    assert found(folder) == ["one"]


@pytest.mark.parametrize("content", [*FOREIGN, bytes(4)], ids=repr)
def test_a_file_that_is_no_journal_counts_for_nothing(folder: Path, content: bytes) -> None:
    (folder / "journal").write_bytes(content + b"\n" + (folder / "journal").read_bytes())
    assert found(folder) == []


def test_a_journal_is_a_line_of_json_for_each_thing(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    assert lines[0] == {"key": KEY}
    assert [line["name"] for line in lines[1:]] == list(ENTRIES)
