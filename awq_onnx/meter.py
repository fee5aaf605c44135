"""Measure a run: seconds by stage, peak memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.02


class Meter:
    """Use as a context manager. Peak memory is sampled; private memory leaves out what files are mapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_private_bytes: int | None = None
        self.peak_resident_bytes: int | None = None
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        if STATUS.exists():  # Linux; elsewhere memory stays unknown
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._sampler.is_alive():
            self._sampler.join()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
            self.peak_private_bytes = max(self.peak_private_bytes or 0, _bytes(lines["RssAnon"]))
            self.peak_resident_bytes = max(self.peak_resident_bytes or 0, _bytes(lines["VmRSS"]))


def _bytes(field: str) -> int:
    return int(field.split()[0]) * 1024
