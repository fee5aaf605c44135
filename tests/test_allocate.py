"""Where the bits go: within the budget, and nothing better was to be had."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx.allocate import Option, allocate

options = st.builds(Option, size_bytes=st.integers(1, 40), loss=st.floats(0, 100))
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4)


def totals(items: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [one[at] for one, at in zip(items, chosen, strict=True)]
    return sum(one.size_bytes for one in taken), sum(one.loss for one in taken)


@settings(max_examples=200, deadline=None)
@given(items=problems, budget_bytes=st.integers(1, 160))
def test_it_loses_at_most_one_step_of_one_item_more_than_the_best_choice(
    items: list[list[Option]], budget_bytes: int
) -> None:
    every = [totals(items, choice) for choice in product(*(range(len(one)) for one in items))]
    possible = [loss for size, loss in every if size <= budget_bytes]
    chosen = allocate(items, budget_bytes)
    if chosen is None:
        assert not possible
        return
    size, loss = totals(items, chosen)
    assert size <= budget_bytes
    largest_step = max(max(one.loss for one in options) - min(one.loss for one in options) for options in items)
    assert min(possible) - 1e-9 <= loss <= min(possible) + largest_step + 1e-9


@settings(max_examples=100, deadline=None)
@given(items=problems, budget_bytes=st.integers(1, 160))
def test_no_single_change_that_fits_would_lose_less(items: list[list[Option]], budget_bytes: int) -> None:
    chosen = allocate(items, budget_bytes)
    if chosen is None:
        return
    size, _ = totals(items, chosen)
    for one, at in zip(items, chosen, strict=True):
        left = budget_bytes - size + one[at].size_bytes
        assert all(other.loss >= one[at].loss for other in one if other.size_bytes <= left)


def test_bits_go_where_they_save_most_per_byte() -> None:
    cheap, dear = [Option(10, 8.0), Option(20, 2.0)], [Option(10, 8.0), Option(20, 7.0)]
    assert allocate([dear, cheap], 30) == [0, 1]
    assert allocate([dear, cheap], 40) == [1, 1]


def test_an_option_off_the_hull_is_taken_where_it_is_what_fits() -> None:
    assert allocate([[Option(10, 10.0), Option(15, 9.0), Option(20, 0.0)]], 16) == [1]


@pytest.mark.parametrize("budget_bytes", [0, 19])
def test_too_small_a_budget_has_no_answer(budget_bytes: int) -> None:
    assert allocate([[Option(10, 1.0)], [Option(10, 1.0)]], budget_bytes) is None
