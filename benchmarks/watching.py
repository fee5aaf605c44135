"""Run a command and watch from outside what it costs. Linux only: memory is read from /proc."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """Of a process and all that it starts. Memory is the most they had at one time: private is what they allocate,
    resident counts mapped files too.
    """

    seconds: float
    cpu_seconds: float
    private_bytes: int
    resident_bytes: int


def watched(command: Sequence[str], output: IO[bytes], errors: IO[bytes]) -> tuple[Cost, int]:
    """Cost and exit code of a command; what it prints goes to `output` and `errors`."""
    private, resident = 0, 0
    start, cpu = time.perf_counter(), _cpu_seconds()
    with subprocess.Popen(command, stdout=output, stderr=errors) as process:
        try:
            while (code := _ended(process)) is None:
                now = [_memory_of(one) for one in _process_tree(process.pid)]
                private = max(private, sum(one for one, _ in now))
                resident = max(resident, sum(one for _, one in now))
        finally:
            process.kill()  # where this was interrupted; one that has ended does not notice
    return Cost(time.perf_counter() - start, _cpu_seconds() - cpu, private, resident), code


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that ends within a moment."""
    try:
        return process.wait(SAMPLE_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _process_tree(root: int) -> Iterator[int]:
    """The id of a process and of all that it started."""
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        for child in _read_or_empty(children).split():
            yield from _process_tree(int(child))


def _memory_of(process: int) -> tuple[int, int]:
    """Private and resident bytes; zeros of a process that has ended."""
    lines = _read_or_empty(Path(f"/proc/{process}/status")).splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    private, resident = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return private, resident


def _read_or_empty(file: Path) -> str:
    """The text of a file of /proc, nothing where its process has ended meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
