"""Rounding that makes up for itself: each input channel is rounded knowing the errors of those before it.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv 2307.13304, section 3.1): with
H = L L', L lower triangular, tr(E' H E) is the sum over channels i of |L_ii e_i + sum over j > i of L_ji e_j|^2, where
e_i is row i of the error E. So, from the last channel to the first, channel i is rounded not at w_i but at
w_i - sum over j > i of (L_ji / L_ii) e_j. The grid stays as it is (static groups), so blocks stay contiguous. Channels
go in order of falling diag H: they are kept in order of rising diag H.

H comes from a sample, and what two channels seem to have in common may be chance: its off-diagonal is shrunk. By how
much, and whether to compensate at all, is decided on rows of sequences that H has not seen: rounding is about white
noise u on s W, and compensated e = u - F' e with F_ji = L_ji / L_ii, so that |x e|^2 on those rows tells what it does.

Shapes: K in, N out, G blocks of b; everything here is about s W and x / s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.arrays import THERE_BYTES, at_once, beside
from awq_onnx.codec import Float32, Grid
from awq_onnx.kernels.arrays import Kernel, kernel_for
from awq_onnx.statistics import InputStatistics
from awq_onnx.symmetric import cholesky, runs, solve

SHRINKS = (0.1, 0.3, 0.5, 0.7)  # of the off-diagonal of H
LEAST_FOR_NOISE = 0.5
WORTH_IT = 0.98  # of the loss on held-out rows
ROWS, FEW_ROWS = 128, 16  # channels rounded between two products of matrices, large ones and small ones
THREADS = 64  # of a block, each with a column of its own: COLUMNS of kernels/compensate.cu
ORDERING = 8  # of H with its channels in order: what a row takes at its peak, in rows


@dataclass(frozen=True)
class Compensation:
    """How errors pass from channel to channel.

    order: int64 (K,), the channels, in memory; the last is rounded first. feedback: float32 (K, K), of which what is
    below the diagonal counts: row j, column i is L_ji / L_ii in that order.
    """

    order: NDArray[np.int64]
    feedback: Float32


def find(statistics: InputStatistics, scale: Float32, *, random: bool = False) -> Compensation | None:
    """The best way to compensate for inputs x / s, or None where rows that H has not seen say that none helps.

    random: calibration ran on noise, of which the model's real inputs will share only some correlations.
    """
    if statistics.validation is None or not 0 < len(statistics.validation) < statistics.tokens:
        return None
    training = _Ordered.of(statistics, scale, unseen=statistics.validation)
    if not (statistics.validation.any() and training.roots.any()):
        return None
    rows = training.rows(statistics.validation, scale)
    shrink, gain = _least(
        [one for one in SHRINKS if one >= LEAST_FOR_NOISE or not random], lambda shrink: training.gain(shrink, rows)
    )
    if not gain < WORTH_IT:
        return None
    return _Ordered.of(statistics, scale, memory=training.matrix).compensation(shrink)


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
    """H of x / s in order of rising diagonal: the roots of that, float32 (K,), and a matrix (K, K) with the
    correlations above its diagonal; what is below is room for a factor.
    """

    order: NDArray[np.int64]
    roots: Float32
    matrix: Float32

    @classmethod
    def of(
        cls,
        statistics: InputStatistics,
        scale: Float32,
        *,
        unseen: Float32 | None = None,
        memory: Float32 | None = None,
    ) -> _Ordered:
        """unseen: rows (R, K) that H is taken without. memory: a matrix (K, K) to overwrite."""
        own = statistics.diagonal_without(unseen)  # of x, not yet of x / s
        live = own > 0
        diagonal = own / np.square(scale, dtype=np.float64)
        order = np.argsort(diagonal, kind="stable")
        roots = np.sqrt(np.where(live, diagonal, diagonal.mean()))[order].astype(np.float32)
        inverse = np.sqrt(np.divide(1, own, where=live, out=np.zeros(own.size)))[order].astype(np.float32)
        matrix = np.empty_like(statistics.second_moment) if memory is None else memory
        roots, inverse = beside(roots, matrix), beside(inverse, matrix)
        height = at_once(ROWS, THERE_BYTES // (ORDERING * matrix[:1].nbytes), matrix)
        for some, part in statistics.moments_without(unseen, order, height):
            part *= inverse[some, None]
            part *= inverse[some.start :]
            matrix[some, some.start :] = part
        return cls(order, roots, matrix)

    def rows(self, x: Float32, scale: Float32) -> Float32:
        """Rows of x / s in this order, over the roots: float32 (R, K)."""
        ordered: Float32 = np.take(x, beside(self.order, x), axis=1)
        ordered /= beside(scale[self.order], x) * self.roots
        return ordered

    def gain(self, shrink: float, rows: Float32) -> float:
        """|X (I + F')^-1|^2 over |X|^2: what compensating does to white noise. rows: see `rows`.

        With X = Z L' diag(roots), X (I + F')^-1 is Z times the roots and the diagonal of L.
        """
        solved = solve(self.matrix, cholesky(self.matrix, shrink), rows)
        return _energy(solved, self.roots * np.diagonal(self.matrix)) / _energy(rows, self.roots)

    def compensation(self, shrink: float) -> Compensation:
        """With the correlations shrunk; this value is used up."""
        feedback = self.matrix
        cholesky(feedback, shrink)
        columns = np.reciprocal(self.roots * np.diagonal(feedback))
        feedback *= self.roots[:, None]
        feedback *= columns
        return Compensation(self.order, feedback)


def _energy(rows: Float32, factors: Float32) -> float:
    """|X|^2 of rows (R, K), each channel by its factor."""
    return float(np.square(factors, dtype=np.float64) @ np.einsum("rk,rk->k", rows, rows))


def round_weight(scaled: Float32, grid: Grid, block_size: int, compensation: Compensation) -> Float32:
    """The codes of s W (K, n) on a grid, less their zero points: float32 integers (G, b, n)."""
    K, n = scaled.shape
    feedback, order = compensation.feedback, beside(compensation.order, scaled)
    codes = np.zeros((grid.scales.shape[0] * block_size, n), np.float32, like=scaled)
    wanted = scaled[order]  # (K, n)
    channels = _Channels(compensation, order, grid, block_size, wanted, np.empty_like(wanted), codes)
    targets = np.empty((ROWS, n), np.float32, like=scaled)
    for start, stop in reversed(list(runs(K, ROWS))):
        own = targets[: stop - start]
        own[...] = wanted[start:stop]
        if stop < K:
            own -= feedback[stop:, start:stop].T @ channels.errors[stop:]
        channels.round(start, stop, own)
    return codes.reshape(-1, block_size, n)


@dataclass(frozen=True)
class _Channels:
    """A weight on its way to codes, its channels in the order in which errors pass.

    order: that of `compensation`, where the weight is. wanted: s W, float32 (K, n). errors: of the channels that are
    rounded already, (K, n). codes: less zero points, each channel's where it belongs, (G * b, n).
    """

    compensation: Compensation
    order: NDArray[np.int64]
    grid: Grid
    block_size: int
    wanted: Float32
    errors: Float32
    codes: Float32

    def round(self, start: int, stop: int, targets: Float32) -> None:
        """Round channels from the one before `stop` down to `start`, at most `ROWS`.

        targets: what they should be, less what the errors of those from `stop` on ask for: (stop - start, n), used up.
        """
        kernel = kernel_for(self.wanted, "compensate", "round_channels")
        if kernel is None:
            self._round_one_by_one(start, stop, targets)
        else:
            self._launch(kernel, start, stop, targets)

    def _launch(self, kernel: Kernel, start: int, stop: int, targets: Float32) -> None:
        K, n = self.wanted.shape
        numbers = [np.int32(one) for one in (self.block_size, K, n, start, stop)]
        arguments = (
            self.compensation.feedback,
            self.order,
            self.wanted,
            targets,
            np.ascontiguousarray(self.grid.scales, like=targets),
            np.ascontiguousarray(self.grid.zero_points, like=targets),
            np.float32(codec.max_code(self.grid.bits)),
            *numbers,
            self.errors,
            self.codes,
        )
        kernel((-(-n // THREADS),), (THREADS,), arguments)

    def _round_one_by_one(self, start: int, stop: int, targets: Float32) -> None:
        errors, feedback, scratch = self.errors, self.compensation.feedback, self._scratch
        for first, last in reversed(list(runs(stop - start, FEW_ROWS))):
            some = targets[first:last]
            if start + last < stop:
                some -= feedback[start + last : stop, start + first : start + last].T @ errors[start + last : stop]
            for i in reversed(range(start + first, start + last)):
                at = i - start - first
                error = self._round_channel(i, some[at])
                if at:
                    np.multiply(feedback[i, i - at : i, None], error, out=scratch[:at])
                    some[:at] -= scratch[:at]

    def _round_channel(self, i: int, target: Float32) -> Float32:
        """Its error; all (n,)."""
        steps, lowest, highest = self._bounds
        channel = self.compensation.order[i]
        block, code = channel // self.block_size, self.codes[channel]
        np.rint(np.multiply(target, steps[block], out=code), out=code)
        np.minimum(np.maximum(code, lowest[block], out=code), highest[block], out=code)
        error: Float32 = np.multiply(code, self.grid.scales[block], out=self.errors[i])
        error -= self.wanted[i]
        return error

    @cached_property
    def _bounds(self) -> tuple[Float32, Float32, Float32]:
        """Of the grid: one over its scales, the lowest and the highest code less its zero point, (G, n) each."""
        zero_points = self.grid.zero_points
        return np.reciprocal(self.grid.scales), -zero_points, codec.max_code(self.grid.bits) - zero_points

    @cached_property
    def _scratch(self) -> Float32:
        return np.empty((FEW_ROWS, self.wanted.shape[1]), np.float32, like=self.wanted)
