"""What an interrupted run had finished: a file with a line for each thing, written once that is on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]  # what JSON can hold


class Journal:
    """entries: what is finished, by name. ends: how long each of the files was then that the run writes."""

    def __init__(self, path: Path, key: str | None, files: Sequence[Path]) -> None:
        """Read what is there, if that is of a run with the same `key` (None never is); else begin a new one.

        files: those that the run writes.
        """
        self.entries: dict[str, Entry] = {}
        self.ends = (0,) * len(files)
        whole = self._read(path, key)
        if any(end > _size(file) for file, end in zip(files, self.ends, strict=True)):
            whole, self.entries, self.ends = 0, {}, (0,) * len(files)
        self._file = path.open("ab")
        self._file.truncate(whole)  # not a line that was being written, nor those of another run
        if not whole:
            self._write({"key": key})

    def record(self, name: str, entry: Entry, ends: Sequence[int]) -> None:
        """`name` is finished, and the files are on the disk as far as `ends`."""
        self._write({"name": name, "entry": entry, "ends": list(ends)})
        self.entries[name] = entry

    def close(self) -> None:
        self._file.close()

    def _read(self, path: Path, key: str | None) -> int:
        """How many bytes of the file hold what is to be gone on with."""
        if key is None or not path.exists():
            return 0
        whole = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            try:
                read = json.loads(line)
                if not line.endswith(b"\n") or (number == 0 and read != {"key": key}):
                    break
                if number:
                    name, entry, ends = read["name"], dict(read["entry"]), tuple(map(int, read["ends"]))
                    if len(ends) != len(self.ends) or min(ends) < 0:
                        break
                    self.entries[name], self.ends = entry, ends
            except (
                ArithmeticError,
                ValueError,
                TypeError,
                KeyError,
                RecursionError,
            ):  # whatever it is, no line of ours
                break
            whole += len(line)
        return whole

    def _write(self, line: Entry) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
