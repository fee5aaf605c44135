"""Large symmetric matrices, by blocks: nothing of their size is allocated, and nearly all work is in products.

A (K, K) of a wide layer is half a gigabyte, so that every copy counts; and the Cholesky factor of LAPACK, as numpy
reaches it, takes several times as long as the products that make up the same factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from awq_onnx.arrays import at_once, in_memory
from awq_onnx.codec import Float32
from awq_onnx.kernels.arrays import kernel_for
from awq_onnx.threads import Spread, one_by_one

COLUMNS = 192  # of a product: what of it is symmetric is left out, block by block
GRAM_COLUMNS = 384  # the same of x'x, and x'y
COLUMNS_THERE = 1024  # the same of both on a device
PANEL = 64  # columns of a factor that are made together
FACTOR_THREADS = 256  # of the kernel that makes the factor of a diagonal block


def add_gram(total: Float32, x: Float32, spread: Spread = one_by_one) -> None:
    """Add x'x, x (T, K), to the upper triangle of `total` (K, K); `mirror` completes it. spread: a map for pieces."""

    def add(columns: tuple[int, int]) -> None:
        start, stop = columns
        own = x[:, start:stop]
        total[start:stop, start:stop] += own.T @ own  # which BLAS knows to be symmetric
        if start:
            total[:start, start:stop] += x[:, :start].T @ own

    columns_at_once = at_once(GRAM_COLUMNS, COLUMNS_THERE, total)
    for _ in spread(add, reversed(list(runs(len(total), columns_at_once)))):  # the longest work first
        pass


def add_product(total: Float32, x: Float32, y: Float32, spread: Spread = one_by_one) -> None:
    """Add x'y, x and y (T, K), to `total` (K, K). spread: a map for pieces."""

    def add(columns: tuple[int, int]) -> None:
        start, stop = columns
        total[:, start:stop] += x.T @ y[:, start:stop]

    for _ in spread(add, runs(len(total), at_once(GRAM_COLUMNS, COLUMNS_THERE, total))):
        pass


def mirror(upper: Float32) -> None:
    """Copy the upper triangle (K, K) to the lower one, in place."""
    for start, stop in runs(len(upper), at_once(COLUMNS, COLUMNS_THERE, upper)):
        upper[stop:, start:stop] = upper[start:stop, stop:].T
        within = upper[start:stop, start:stop]
        within[...] = np.triu(within) + np.triu(within, 1).T


def quadratic(symmetric: Float32, x: Float32) -> float:
    """tr(x' A x), A (K, K) symmetric, x (K, n): every product of two different blocks is made once."""
    parts = []
    for start, stop in runs(len(symmetric), at_once(COLUMNS, COLUMNS_THERE, symmetric)):
        product = symmetric[start:stop, start:stop] @ x[start:stop]
        if start:
            product += 2 * (symmetric[start:stop, :start] @ x[:start])
        parts.append(np.vdot(x[start:stop], product))
    return float(sum(in_memory(np.stack(parts)).tolist())) if parts else 0.0


def cholesky(matrix: Float32, shrink: float) -> list[Float32]:
    """L L' = C, L lower triangular, C the correlations in `matrix` (K, K) with all but the diagonal shrunk; in place.

    C is above the diagonal (its own is 1) and stays there, L is written to the diagonal and below it. Returns the
    inverses of L's diagonal blocks. Well conditioned as C is then, single precision is enough.
    """
    inverses: list[Float32] = []
    for start, stop in runs(len(matrix), PANEL):
        panel = matrix[start:stop, start:].T * np.float32(1 - shrink)  # (K - start, n)
        within = panel[: stop - start]  # of which the lower triangle counts
        np.fill_diagonal(within, 1)
        if start:
            panel -= matrix[start:, :start] @ matrix[start:stop, :start].T
        factor, inverse = _factor_and_inverse(within)
        inverses.append(inverse)
        diagonal_block = matrix[start:stop, start:stop]
        np.copyto(diagonal_block, factor, where=np.tri(stop - start, dtype=bool, like=factor))
        matrix[stop:, start:stop] = panel[stop - start :] @ inverses[-1].T
    return inverses


def _factor_and_inverse(block: Float32) -> tuple[Float32, Float32]:
    """L with L L' = A, L lower triangular, and its inverse, for a small A (n, n) of which the lower triangle counts."""
    kernel = kernel_for(block, "cholesky", "factor_block")
    if kernel is None:
        factor = np.linalg.cholesky(block)
        return factor, np.linalg.inv(factor).astype(np.float32, copy=False)
    block = np.ascontiguousarray(block, like=block)
    factor, inverse = np.empty_like(block), np.empty_like(block)
    kernel((1,), (FACTOR_THREADS,), (block, np.int32(len(block)), factor, inverse))
    return factor, inverse


def solve(factor: Float32, inverses: Sequence[Float32], rows: Float32) -> Float32:
    """Z with Z L' = Y, for rows Y (R, K); L and the inverses are those of `cholesky`: float32 (R, K)."""
    solved = np.empty_like(rows)
    for (start, stop), inverse in zip(runs(len(factor), PANEL), inverses, strict=True):
        left = rows[:, start:stop] - solved[:, :start] @ factor[start:stop, :start].T
        solved[:, start:stop] = left @ inverse.T
    return solved


def runs(length: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive pieces of range(length)."""
    return ((start, min(start + size, length)) for start in range(0, length, size))
