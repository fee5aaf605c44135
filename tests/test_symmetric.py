"""Products and factors of large symmetric matrices: block by block the same as in one piece."""

from __future__ import annotations

import numpy as np
import pytest
from builders import Array, activations
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx.symmetric import COLUMNS, PANEL, add_gram, add_product, cholesky, mirror, quadratic, runs, solve
from awq_onnx.threads import Workers, one_by_one

SHRINKS = (0.1, 0.7)
# Below a block, a whole number of blocks, and some more; so few channels that a block is never full.
gram_sizes = pytest.mark.parametrize("K", [1, 50, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 77])
factor_sizes = pytest.mark.parametrize("K", [1, 2, 50, PANEL, PANEL + 1, 3 * PANEL, 3 * PANEL + 77])


def close(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """Up to single precision of sums, of which the largest tells the size of what was added."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0))


def correlations(K: int) -> Array:
    """Of correlated channels: float32 (K, K), 1 on the diagonal."""
    x = activations(np.random.default_rng(K), K, T=64).astype(np.float64)
    x /= np.sqrt(np.square(x).sum(axis=0))
    matrix: Array = (x.T @ x).astype(np.float32)
    return matrix


def shrunk(matrix: Array, shrink: float) -> Array:
    """All but the diagonal: float64."""
    made: Array = matrix.astype(np.float64) * (1 - shrink)
    np.fill_diagonal(made, 1)
    return made


def above(matrix: Array, below: float) -> Array:
    """The matrix above its diagonal, and something that does not count on it and below."""
    made: Array = np.where(np.tri(len(matrix), dtype=bool), np.float32(below), matrix)
    return made


# Sums of products


@gram_sizes
def test_the_gram_matrix_is_that_of_all_rows_together(K: int) -> None:
    x = activations(np.random.default_rng(0), K, T=90)
    total = np.zeros((K, K), np.float32)
    for rows in (x[:1], x[1:40], x[40:40], x[40:]):
        add_gram(total, rows)
    mirror(total)
    close(total, x.astype(np.float64).T @ x)
    np.testing.assert_array_equal(total, total.T)


@gram_sizes
def test_a_product_is_that_of_all_rows_together(K: int) -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, K, T=90), activations(rng, K, T=90)
    total = np.zeros((K, K), np.float32)
    for some in (slice(0, 1), slice(1, 40), slice(40, 40), slice(40, None)):
        add_product(total, x[some], y[some])
    close(total, x.astype(np.float64).T @ y)


@gram_sizes
def test_sums_made_side_by_side_are_the_same_to_the_last_bit(K: int) -> None:
    rng = np.random.default_rng(0)
    x, y = activations(rng, K, T=50), activations(rng, K, T=50)
    one, other = np.zeros((2, 2, K, K), np.float32)
    with Workers(2, 1 << 30) as workers:
        for spread, (gram, product) in ((one_by_one, one), (workers.spread, other)):
            add_gram(gram, x, spread)
            add_product(product, x, y, spread)
    np.testing.assert_array_equal(one, other)


@gram_sizes
def test_until_it_is_mirrored_only_what_is_above_the_diagonal_counts(K: int) -> None:
    x = activations(np.random.default_rng(0), K, T=20)
    total = np.tril(np.full((K, K), np.float32(np.inf)), -1)
    with np.errstate(invalid="ignore"):
        add_gram(total, x)
    mirror(total)
    close(total, x.astype(np.float64).T @ x)


@gram_sizes
def test_a_mirror_changes_nothing_above_the_diagonal(K: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((K, K)).astype(np.float32)
    before = matrix.copy()
    mirror(matrix)
    np.testing.assert_array_equal(matrix, np.triu(before) + np.triu(before, 1).T)


@gram_sizes
@pytest.mark.parametrize("columns", [1, 9])
def test_the_quadratic_form_is_the_trace_of_the_product(K: int, columns: int) -> None:
    rng = np.random.default_rng(K)
    x = rng.standard_normal((K, columns)).astype(np.float32)
    gram = activations(rng, K, T=64).astype(np.float64)
    matrix = (gram.T @ gram).astype(np.float32)
    wide = matrix.astype(np.float64)
    assert quadratic(matrix, x) == pytest.approx(float(np.trace(x.T @ wide @ x)), rel=1e-5)


def test_a_quadratic_form_may_be_negative_or_empty() -> None:
    assert quadratic(-np.eye(3, dtype=np.float32), np.ones((3, 2), np.float32)) == -6
    assert quadratic(np.eye(3, dtype=np.float32), np.ones((3, 0), np.float32)) == 0


# Factors


@factor_sizes
@pytest.mark.parametrize("shrink", SHRINKS)
def test_the_factor_is_that_of_the_shrunk_correlations(K: int, shrink: float) -> None:
    matrix = above(correlations(K), np.inf)
    inverses = cholesky(matrix, shrink)
    expected = np.linalg.cholesky(shrunk(correlations(K), shrink))
    close(np.tril(matrix), expected)
    assert [len(inverse) for inverse in inverses] == [stop - start for start, stop in runs(K, PANEL)]
    for (start, stop), inverse in zip(runs(K, PANEL), inverses, strict=True):
        assert inverse.dtype == np.float32
        close(inverse, np.linalg.inv(expected[start:stop, start:stop]))


@factor_sizes
def test_the_next_shrink_gives_what_it_gives_on_fresh_correlations(K: int) -> None:
    """What is above the diagonal stays, bit by bit, and of the factor before nothing is left."""
    again, fresh = above(correlations(K), 0), above(correlations(K), 7)
    cholesky(again, 0.1)
    np.testing.assert_array_equal(np.triu(again, 1), np.triu(correlations(K), 1))
    first, second = cholesky(again, 0.5), cholesky(fresh, 0.5)
    np.testing.assert_array_equal(again, fresh)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_channels_without_correlations_are_their_own_factor() -> None:
    matrix = np.zeros((PANEL + 5, PANEL + 5), np.float32)
    cholesky(matrix, 0.1)
    np.testing.assert_array_equal(matrix, np.eye(PANEL + 5))


def test_correlations_of_a_single_cause_are_well_conditioned_once_shrunk() -> None:
    matrix = np.ones((300, 300), np.float32)
    cholesky(matrix, 0.1)
    close(np.tril(matrix), np.linalg.cholesky(shrunk(np.ones((300, 300)), 0.1)), 1e-4)


@factor_sizes
@pytest.mark.parametrize("rows", [1, 30])
def test_what_is_solved_gives_the_rows_back(K: int, rows: int) -> None:
    matrix = correlations(K)
    inverses = cholesky(matrix, 0.1)
    y = np.random.default_rng(1).standard_normal((rows, K)).astype(np.float32)
    before = y.copy()
    solved = solve(matrix, inverses, y)
    assert solved.dtype == np.float32
    np.testing.assert_array_equal(y, before)
    close(solved, np.linalg.solve(np.tril(matrix).astype(np.float64), y.T).T)
    close(solved @ np.tril(matrix).T, y)


# Pieces


@settings(deadline=None)
@given(length=st.integers(0, 2000), size=st.integers(1, 600))
def test_runs_are_consecutive_and_only_the_last_may_be_short(length: int, size: int) -> None:
    found = list(runs(length, size))
    assert [at for start, stop in found for at in range(start, stop)] == list(range(length))
    assert all(stop - start == size for start, stop in found[:-1])
    assert all(0 < stop - start <= size for start, stop in found[-1:])
