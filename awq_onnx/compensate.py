"""Rounding that makes up for itself: each input channel is rounded knowing the errors of those before it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv 2307.13304, section 3.1): with
H = R R', R upper triangular, tr(E' H E) is the sum over channels i of |R_ii e_i + sum over j < i of R_ji e_j|^2, where
e_i is row i of the error E. So channel i is rounded not at w_i but at w_i - sum over j < i of (R_ji / R_ii) e_j.
The grid stays as it is (static groups), so blocks stay contiguous. Channels go in order of falling diag H.

H comes from a sample, and what two channels seem to have in common may be chance: its off-diagonal is shrunk. By how
much, and whether to compensate at all, is decided on rows of sequences that H has not seen: rounding is about white
noise u on s W, and compensated e = u - F' e with F_ji = R_ji / R_ii, so that |x e|^2 on those rows tells what it does.

Shapes: K in, N out, G blocks of b; everything here is about s W and x / s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.codec import Float32, Grid
from awq_onnx.statistics import InputStatistics

SHRINKS = (0.1, 0.3, 0.5, 0.7)  # of the off-diagonal of H
LEAST_FOR_NOISE = 0.5
WORTH_IT = 0.98  # of the loss on held-out rows
ROWS = 32  # channels rounded between two products of matrices
SOLVED_AT_ONCE = 128


@dataclass(frozen=True)
class Compensation:
    """How errors pass from channel to channel.

    order: int64 (K,), channels as they are rounded. feedback: float32 (K, K), strictly upper triangular: row j,
    column i is R_ji / R_ii in that order.
    """

    order: NDArray[np.int64]
    feedback: Float32


def find(statistics: InputStatistics, scale: Float32, *, random: bool = False) -> Compensation | None:
    """The best way to compensate for inputs x / s, or None where rows that H has not seen say that none helps.

    random: calibration ran on noise, of which the model's real inputs will share only some correlations.
    """
    if statistics.validation is None or not 0 < len(statistics.validation) < statistics.tokens:
        return None
    rows = statistics.validation / scale
    training = _Ordered.of(statistics.training_moment, scale)
    if not (rows.any() and training.roots.any()):
        return None
    shrink, gain = _least(
        [one for one in SHRINKS if one >= LEAST_FOR_NOISE or not random],
        lambda shrink: _gain(training.compensation(shrink), rows),
    )
    if not gain < WORTH_IT:
        return None
    return _Ordered.of(statistics.second_moment, scale).compensation(shrink)


def _least(candidates: Sequence[float], cost: Callable[[float], float]) -> tuple[float, float]:
    """The candidate with the least cost, and that cost, which falls and then rises along them."""
    at = len(candidates) // 3  # where it mostly is
    known = {at: cost(candidates[at])}
    for step in (-1, 1):
        while 0 <= at + step < len(candidates) and (at + step) not in known:
            known[at + step] = cost(candidates[at + step])
            if known[at + step] >= known[at]:
                break
            at += step
    return candidates[at], known[at]


@dataclass(frozen=True)
class _Ordered:
    """H of x / s in the order of rounding, reversed: correlations (K, K), and the roots of its diagonal (K,)."""

    order: NDArray[np.int64]
    correlations: Float32
    roots: Float32

    @classmethod
    def of(cls, second_moment: Float32, scale: Float32) -> _Ordered:
        diagonal = np.diagonal(second_moment) / np.square(scale, dtype=np.float64)
        live = diagonal > 0
        order = np.argsort(-diagonal, kind="stable")
        back = order[::-1]
        norms = np.where(live, np.sqrt(np.diagonal(second_moment), where=live, out=np.ones(scale.size)), 1)
        correlations = second_moment[back[:, None], back]
        correlations /= norms[back].astype(np.float32)
        correlations /= norms[back, None].astype(np.float32)
        roots = np.sqrt(np.where(live, diagonal, diagonal.mean()))[back]
        return cls(order, correlations, roots.astype(np.float32))

    def compensation(self, shrink: float) -> Compensation:
        """With the correlations shrunk: then they are well conditioned, and single precision is enough."""
        shrunk = self.correlations * np.float32(1 - shrink)
        np.fill_diagonal(shrunk, 1)
        R = np.linalg.cholesky(shrunk)
        R *= self.roots[:, None]
        R /= np.diagonal(R).copy()
        np.fill_diagonal(R, 0)
        return Compensation(self.order, R[::-1, ::-1])


def _gain(compensation: Compensation, rows: Float32) -> float:
    """|X (I + F')^-1|^2 over |X|^2: what compensating does to white noise, on the rows X (R, K)."""
    feedback = compensation.feedback
    ordered = rows[:, compensation.order]
    spread = ordered.copy()
    for start, stop in reversed(_runs(len(feedback), SOLVED_AT_ONCE)):
        spread[:, start:stop] -= spread[:, stop:] @ feedback[start:stop, stop:].T
        within = feedback[start:stop, start:stop] + np.eye(stop - start, dtype=np.float32)
        spread[:, start:stop] = np.linalg.solve(within, spread[:, start:stop].T).T
    return float(np.vdot(spread, spread) / np.vdot(ordered, ordered))


def round_weight(scaled: Float32, grid: Grid, block_size: int, compensation: Compensation) -> Float32:
    """The codes of s W (K, n) on a grid, less their zero points: float32 integers (G, b, n)."""
    K, n = scaled.shape
    blocks = compensation.order // block_size
    steps = np.reciprocal(grid.scales)
    lowest, highest = -grid.zero_points, codec.max_code(grid.bits) - grid.zero_points
    wanted = scaled[compensation.order]  # (K, n)
    errors = np.zeros_like(wanted)
    codes = np.zeros((grid.scales.shape[0] * block_size, n), np.float32)
    for start, stop in _runs(K, ROWS):
        targets = wanted[start:stop] - compensation.feedback[:start, start:stop].T @ errors[:start]
        for i in range(start, stop):
            block, target = blocks[i], targets[i - start]
            code = codes[compensation.order[i]]
            np.rint(np.multiply(target, steps[block], out=code), out=code)
            np.minimum(np.maximum(code, lowest[block], out=code), highest[block], out=code)
            error = np.multiply(code, grid.scales[block], out=errors[i])
            error -= wanted[i]
            targets[i - start + 1 :] -= compensation.feedback[i, i + 1 : stop, None] * error
    return codes.reshape(-1, block_size, n)


def _runs(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]
