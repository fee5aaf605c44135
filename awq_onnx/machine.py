"""What a run may take of the machine. The budget changes no bit of the result; nor do threads, but for layers so wide
that BLAS computes with all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil

from awq_onnx.errors import RecipeError

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
SHARE = 4  # one part in so many of the memory that is free
LEAST_BYTES, MOST_BYTES = 256 << 20, 1 << 30  # more brings nothing
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """device: what computes, "cpu" or "cuda" (which wants onnxruntime-gpu and cupy). threads: computing at the same
    time; None: a thread for each core that the process may use. memory_budget: bytes to work with, beside what the
    program itself takes; one layer's statistics and search take what they take. None: a quarter of what is free, at
    most 1 GiB.
    """

    device: str = CPU
    threads: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise RecipeError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        for name in ("threads", "memory_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RecipeError(f"{name} is {value!r}; it must be a whole number of at least 1")

    @property
    def budget_bytes(self) -> int:
        """The budget, or what it is by default."""
        free: int = psutil.virtual_memory().available
        return self.memory_budget or min(MOST_BYTES, max(LEAST_BYTES, free // SHARE))


def size_bytes(text: str) -> int:
    """2GB, 1.5GiB, 500M as bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write it like 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def size_text(size_bytes: int) -> str:
    """For people: 183 MB, or 620 kB."""
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e7 else f"{size_bytes / 1e3:.0f} kB"
