"""What calibration learns about the input of a MatMul: sums over its rows, and a few rows to check choices with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from awq_onnx.arrays import beside, in_memory
from awq_onnx.codec import Float32
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.symmetric import add_gram, add_product, mirror, quadratic, runs
from awq_onnx.threads import Spread, one_by_one

IntArray = NDArray[np.int64]

EIGENVECTORS = 8
LOST_IN_ROUNDING = 0.01  # of a sum: what is left when the rest is subtracted in single precision


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned about one MatMul input X (T, K).

    second_moment: H = X'X / T, float32 (K, K). act_mean: mean|x|, act_max: max|x|, float32 (K,). tokens: T.
    validation: some rows of X, float32 (R, K), of sequences that have no other row in X; None where there are none.
    drift: X'(Y - X) / T, float32 (K, K), where X is what the layers before make that are quantised already, and Y what
    the original ones make; validation_drift: the rows of Y - X that go with `validation`. None where X is Y.
    Matrices are where the device is, vectors in memory.
    """

    second_moment: Float32
    act_mean: Float32
    act_max: Float32
    tokens: int
    validation: Float32 | None = None
    drift: Float32 | None = None
    validation_drift: Float32 | None = None

    @cached_property
    def principal(self) -> Float32:
        """U (K, 8): H is about diag(rest) + U U', U the largest eigenvectors times the roots of their values."""
        return _principal(self.second_moment, EIGENVECTORS)

    @cached_property
    def rest(self) -> Float32:
        """The diagonal of H less that of U U': float32 (K,), not negative."""
        rest: Float32 = np.diagonal(self.second_moment) - np.square(self.principal).sum(axis=1)
        return np.maximum(rest, np.float32(0))

    def moments_without(self, unseen: Float32 | None, order: IntArray, height: int) -> Iterator[tuple[slice, Float32]]:
        """H on and above its diagonal, channels in that order, of all of X but the rows `unseen` (R, K): some rows, at
        most `height`, after the other, from the diagonal block on.
        """
        placed = beside(order, self.second_moment)
        left_out = None if unseen is None else np.take(unseen, placed, axis=1)
        for start, stop in runs(len(order), height):
            part: Float32 = np.take(self.second_moment[placed[start:stop]], placed[start:], axis=1)
            if left_out is not None:
                part *= np.float32(self.tokens)
                part -= left_out[:, start:stop].T @ left_out[:, start:]
                part /= np.float32(max(self.tokens - len(left_out), 1))
            yield slice(start, stop), part

    def diagonal_without(self, unseen: Float32 | None) -> Float32:
        """The diagonal of H, of all of X but the rows `unseen`; 0 for channels that carry little but there."""
        if unseen is None:
            return self.diagonal
        rest = self.diagonal * np.float32(self.tokens) - in_memory(np.square(unseen).sum(axis=0))
        rest /= np.float32(max(self.tokens - len(unseen), 1))
        return np.where(rest < LOST_IN_ROUNDING * self.diagonal, np.float32(0), rest)

    @property
    def diagonal(self) -> Float32:
        return np.ascontiguousarray(in_memory(np.diagonal(self.second_moment)))

    def block_moments(self, scale: Float32, block_size: int) -> Float32:
        """The diagonal blocks of H over s s', 0 for the padding of the last one: float32 (G, b, b)."""
        inverse, moments = beside(np.reciprocal(scale), self.second_moment), []
        for start, stop in runs(len(scale), block_size):
            within = self.second_moment[start:stop, start:stop] * inverse[start:stop] * inverse[start:stop, None]
            moments.append(np.pad(within, (0, block_size - (stop - start))))
        return np.stack(moments)

    def loss(self, error: Float32) -> float:
        """tr(E' H E) of an error E (K, N): the mean squared error of a token's output, summed over N."""
        return quadratic(self.second_moment, error)

    def column_energy(self, weight: Float32, scale: Float32 | None = None) -> Float32:
        """About w' H w for every column w of a weight or an error (K, N), over `scale` (K,) if given: float32 (N,).
        O(8 K N) instead of O(K^2 N), with diag(rest) + U U' in the place of H. scale: in memory, or where H is.
        """
        rest, principal = self.rest, self.principal
        if scale is not None:
            inverse = beside(np.reciprocal(scale), rest)
            rest, principal = rest * np.square(inverse), principal * inverse[:, None]
        energy: Float32 = rest @ np.square(weight) + np.square(principal.T @ weight).sum(axis=0)
        return energy

    @classmethod
    def flat(cls, K: int, device: Device = PROCESSOR) -> InputStatistics:
        """What to assume of an input that calibration never saw: every channel matters the same."""
        return cls(device.put(np.eye(K, dtype=np.float32)), np.ones(K, np.float32), np.zeros(K, np.float32), 0)

    @classmethod
    def merged(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Of the rows of all `parts` together."""
        if len(parts) == 1:
            return parts[0]
        tokens = sum(part.tokens for part in parts)
        drifts = [part.drift for part in parts if part.drift is not None]
        away = [part.validation_drift for part in parts if part.validation_drift is not None]
        known = len(drifts) == len(parts)  # of all rows

        def mean(matrices: Sequence[Float32]) -> Float32:
            total = np.zeros_like(matrices[0])
            for part, matrix in zip(parts, matrices, strict=True):
                total += np.float32(part.tokens / max(tokens, 1)) * matrix
            return total

        return cls(
            mean([part.second_moment for part in parts]),
            mean_of(parts),
            np.max([part.act_max for part in parts], axis=0),
            tokens,
            _stacked([part.validation for part in parts if part.validation is not None]),
            mean(drifts) if known else None,
            _stacked(away) if known else None,
        )


def mean_of(parts: Sequence[InputStatistics]) -> Float32:
    """mean|x| over the rows of all `parts`: float32 (K,)."""
    if len(parts) == 1:
        return parts[0].act_mean
    tokens = [part.tokens for part in parts]
    mean: Float32 = np.average(
        [part.act_mean for part in parts], axis=0, weights=tokens if any(tokens) else None
    ).astype(np.float32)
    return mean


def _stacked(rows: Sequence[Float32]) -> Float32 | None:
    return np.concatenate(rows) if rows else None


def _principal(second_moment: Float32, rank: int) -> Float32:
    """The `rank` largest eigenvectors times the roots of their values, by subspace iteration: float32 (K, rank)."""
    K = second_moment.shape[0]
    rank = min(rank, K)
    start = np.random.default_rng(0).standard_normal((K, min(2 * rank, K)), dtype=np.float32)
    basis = np.linalg.qr(second_moment @ beside(start, second_moment))[0]
    for _ in range(3):
        basis = np.linalg.qr(second_moment @ basis)[0]
    values, vectors = np.linalg.eigh(basis.T @ (second_moment @ basis))
    roots = np.sqrt(np.maximum(values[-rank:], 0))
    principal: Float32 = (basis @ vectors[:, -rank:]) * roots
    return principal


class Accumulator:
    """H = X'X, sum|x|, max|x| and the number of rows of one input with K channels; of X itself few rows are kept.

    X'(Y - X) beside them where it is told what X should be, Y.
    """

    def __init__(self, K: int, device: Device = PROCESSOR) -> None:
        self._device = device
        self._drift: Float32 | None = None
        self._validation_drift: list[Float32] = []
        self._second_moment = np.zeros((K, K), np.float32, like=device.like)
        self._sum = np.zeros(K, np.float64)
        self._max = np.zeros(K, np.float32)
        self._tokens = 0
        self._validation: list[Float32] = []
        self.spoiled_rows = 0  # left out, for NaN or Inf

    def update(
        self,
        rows: NDArray[np.generic],
        validation_rows: int = 0,
        wanted: NDArray[np.generic] | None = None,
        spread: Spread = one_by_one,
    ) -> None:
        """Add activations (T, K) of any float dtype; rows with NaN or Inf do not count.

        validation_rows: if not 0, these rows are for validation, and at most so many of them count. wanted: what they
        should be, (T, K): in every update or in none. spread: a map for pieces of work.
        """
        spread = self._device.map_of(spread)
        x = self._device.put(np.ascontiguousarray(rows, dtype=np.float32))
        away = None if wanted is None else self._device.put(np.ascontiguousarray(wanted, dtype=np.float32)) - x
        largest = _largest(x)
        every = [largest] if away is None else [largest, _largest(away)]
        if not np.isfinite(every).all():  # an overflow, or padding: such a row would spoil every sum
            self.spoiled_rows += len(x)
            finite = np.isfinite(x if away is None else x + away).all(axis=1)
            x, away = x[finite], None if away is None else away[finite]
            self.spoiled_rows -= len(x)
            largest = _largest(x)
        np.maximum(self._max, largest, out=self._max)
        if validation_rows:
            some = slice(None, None, -(-len(x) // validation_rows) or 1)
            x, away = x[some].copy(), None if away is None else away[some].copy()
            self._validation += [x] if len(x) else []
            self._validation_drift += [away] if away is not None and len(away) else []
        add_gram(self._second_moment, x, spread)
        if away is not None:
            if self._drift is None:
                self._drift = np.zeros_like(self._second_moment)
            add_product(self._drift, x, away, spread)
        self._sum += in_memory(np.abs(x).sum(axis=0))
        self._tokens += len(x)

    def finish(self) -> InputStatistics:
        """The means over all rows; ends the accumulation, since H is divided in place."""
        tokens = max(self._tokens, 1)
        mirror(self._second_moment)
        self._second_moment /= tokens
        mean = (self._sum / tokens).astype(np.float32)
        if self._drift is not None:
            self._drift /= tokens
        return InputStatistics(
            self._second_moment,
            mean,
            self._max,
            self._tokens,
            _stacked(self._validation),
            self._drift,
            _stacked(self._validation_drift),
        )


def _largest(x: Float32) -> Float32:
    """max|x| of each column, NaN where there is one: float32 (K,)."""
    if not len(x):
        return np.zeros(x.shape[1], np.float32)
    return in_memory(np.maximum(x.max(axis=0), -x.min(axis=0)))
