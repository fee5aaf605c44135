"""A process that is killed between two renames, without a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from awq_onnx.output import OutputFiles


class Killed(BaseException):
    """The moment after which a process did nothing."""


class Renames:
    """How many were done."""

    done = 0


@contextmanager
def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renames]:
    """The renames after so many never happen: Killed is raised, and nothing is tidied up."""
    original, renames = Path.rename, Renames()

    def counted(self: Path, target: Path) -> Path:
        if renames.done == count:
            raise Killed
        renames.done += 1
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted)
        patched.setattr(OutputFiles, "_remove_work", lambda _: None)
        yield renames
