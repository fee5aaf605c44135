"""What a run may take of the machine: sizes as people write them, and a budget where none is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from awq_onnx.errors import RecipeError
from awq_onnx.machine import LEAST_BYTES, MOST_BYTES, Machine, size_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500", 500),
        ("500B", 500),
        ("1k", 1000),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("2GB", 2_000_000_000),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("1.5Gi", 3 << 29),
        ("1.5 GB", 1_500_000_000),
        (" 64 KiB ", 1 << 16),
        ("0", 0),
    ],
)
def test_a_size_as_people_write_it(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "1.GB", ".5GB", "1,5GB", "2TB", "2 G B", "5I", "5IB", "1 2", "0x10", "inf", "half"]
)
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write it like 500MB or 2GiB"):
        size_bytes(text)


@pytest.mark.parametrize("name", ["threads", "memory_budget"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, False], ids=repr)
def test_a_number_that_cannot_be_used_is_named(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"{name} is .*; it must be a whole number of at least 1"):
        Machine(**{name: value})


def test_a_budget_that_is_given_is_taken_as_it_is() -> None:
    assert Machine(memory_budget=1).budget_bytes == 1
    assert Machine(memory_budget=1 << 40).budget_bytes == 1 << 40


@pytest.mark.parametrize(
    ("free", "budget"),
    [(0, LEAST_BYTES), (1 << 30, 1 << 28), (2 << 30, 1 << 29), (4 << 30, 1 << 30), (1 << 40, MOST_BYTES)],
)
def test_a_budget_that_is_not_given_is_a_quarter_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, budget: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert Machine().budget_bytes == budget
