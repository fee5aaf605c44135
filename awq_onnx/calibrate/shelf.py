"""The values that parts of a graph leave for those after them: in memory while they fit, else in files, mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from awq_onnx.calibrate.feeds import Feed

Values = dict[str, NDArray[np.generic]]


class Shelf:
    """For each feed the values that are alive, by name. Raises OSError where the disk is full."""

    def __init__(self, folder: Path, budget_bytes: int, feeds: Iterable[Feed]) -> None:
        """folder: for what does not fit into `budget_bytes`."""
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._numbers = count()
        self._held_bytes = 0
        self._files: dict[int, Path] = {}  # of what lies in one, by id
        self.feeds: list[Values] = []
        for feed in feeds:
            self.feeds.append({})
            self.put(self.feeds[-1], feed)

    def put(self, alive: Values, made: Feed) -> None:
        """Add what was made of one of `feeds`."""
        for name, values in made.items():
            held = self._held_bytes + values.nbytes <= self._budget_bytes or not values.nbytes
            alive[name] = values if held else self._mapped(values)
            self._held_bytes += values.nbytes if held else 0

    def drop(self, alive: Values, names: Iterable[str]) -> None:
        """Forget values that nothing reads any more."""
        for name in names:
            values = alive.pop(name, None)
            path = self._files.pop(id(values), None)
            if path is not None:
                with contextlib.suppress(OSError):  # a system that keeps mapped files: they go at the end
                    path.unlink()
            elif values is not None:
                self._held_bytes -= values.nbytes

    def _mapped(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        path = self._folder / f"value-{next(self._numbers)}.npy"
        np.save(path, values)
        mapped: NDArray[np.generic] = np.load(path, mmap_mode="r")
        self._files[id(mapped)] = path
        return mapped
