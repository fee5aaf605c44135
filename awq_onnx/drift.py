"""Weights that make up for the errors of the layers before them. Knows no graph.

Let Y be what the original model feeds a layer, and X what it is fed once the layers before are rounded. The weight that
is best rounded is then not W but W + D with the least ||X (W + D) - Y W||^2, which is least squares:
D = (H + r diag H)^-1 C W, H = X'X / T, C = X'(Y - X) / T (the target of GPTAQ: Li et al. 2025, arXiv 2504.02692, there
as a term of each step of the rounding).

Most of Y - X is noise that no weight could take back, and what calibration sees of the rest is a sample: without the
ridge r this makes models worse. How strong it has to be, and whether there is any use in it, is decided for each input
on rows of sequences that are in no sum.

Shapes: K in, N out; weights are (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from awq_onnx.arrays import in_memory
from awq_onnx.codec import Float32
from awq_onnx.search import SLICE, Reader, slices
from awq_onnx.statistics import InputStatistics
from awq_onnx.threads import Spread, one_by_one

RIDGES = (0.3, 1.0, 3.0, 10.0)  # of the diagonal of H
WORTH_IT = 0.99  # of the squared error of the output on held-out rows
JUDGES = 256  # held-out rows that decide, evenly spread
STRIP = 256  # columns worked on at once, or K / 4 where that is more: every strip factors a matrix anew


def corrected(readers: Sequence[Reader], spread: Spread = one_by_one) -> list[Reader]:
    """The readers of weights, those with an input that drifts with weights that make up for it, where that helps.

    spread: a map for pieces of work.
    """
    changed = list(readers)
    for statistics in {id(reader.statistics): reader.statistics for reader in readers}.values():
        own = [at for at, reader in enumerate(readers) if reader.statistics is statistics]
        ridge = _best_ridge(statistics, [readers[at] for at in own], spread)
        if ridge is not None:
            for at in own:
                changed[at] = _corrected(readers[at], ridge, spread)
    return changed


def piece_bytes(K: int) -> int:
    """What one piece of the work takes: a matrix to solve with, and its factor."""
    return 2 * 4 * K * K


def _best_ridge(statistics: InputStatistics, readers: Sequence[Reader], spread: Spread) -> float | None:
    """None where nothing helps, or nothing tells."""
    rows, away, drift = statistics.validation, statistics.validation_drift, statistics.drift
    if rows is None or away is None or drift is None or not 0 < len(rows) < statistics.tokens:
        return None
    second_moment = _without(statistics.second_moment, statistics.tokens, rows, rows)
    others = _without(drift, statistics.tokens, rows, away)
    some = slice(None, None, -(-len(rows) // JUDGES))
    rows, away = rows[some], away[some]

    def lost(ridge: float) -> float:
        """What is left of the drift."""
        return _energy(away - _solved(_ridged(second_moment, ridge), rows.T).T @ others, readers)

    before, losses = _energy(away, readers), list(spread(lost, RIDGES))
    best = int(np.argmin(losses))
    return RIDGES[best] if losses[best] < WORTH_IT * before else None


def _without(mean: Float32, tokens: int, rows: Float32, others: Float32) -> Float32:
    """The mean of x y' over tokens, without those of which `rows` and `others` (R, K) are x and y."""
    rest = mean * np.float32(tokens)
    rest -= rows.T @ others
    rest /= np.float32(tokens - len(rows))
    return rest


def _energy(rows: Float32, readers: Sequence[Reader]) -> float:
    """|X W|^2 of rows (R, K), for all weights together."""
    return sum(
        float(np.square(in_memory(rows @ reader.columns(some)), dtype=np.float64).sum())
        for reader in readers
        for some in slices(reader.N, SLICE)
    )


def _ridged(second_moment: Float32, ridge: float) -> Float32:
    """H with its diagonal times 1 + ridge; 1 for channels that carry nothing."""
    ridged = second_moment.copy()
    diagonal = np.diagonal(second_moment) * np.float32(1 + ridge)
    np.fill_diagonal(ridged, np.where(diagonal > 0, diagonal, np.float32(1)))
    return ridged


def _solved(matrix: Float32, columns: Float32) -> Float32:
    solved: Float32 = np.linalg.solve(matrix, columns)
    return solved


def _corrected(reader: Reader, ridge: float, spread: Spread) -> Reader:
    drift, weight = reader.statistics.drift, np.empty((reader.K, reader.N), np.float32)
    assert drift is not None
    ridged = _ridged(reader.statistics.second_moment, ridge)

    def work(some: slice) -> None:
        own = reader.columns(some)
        weight[:, some] = in_memory(own + _solved(ridged, drift @ own))

    for _ in spread(work, slices(reader.N, max(STRIP, reader.K // 4))):
        pass
    return replace(reader, weight=weight, factor=1.0)
