"""Streaming sums over the rows of one MatMul input: nothing of the activations is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from awq_onnx.codec import Float32
from awq_onnx.search import InputStatistics


class Accumulator:
    """H = X'X, sum|x|, max|x| and the number of rows of one input with K channels."""

    def __init__(self, K: int) -> None:
        self._second_moment = np.zeros((K, K), np.float32)
        self._sum = np.zeros(K, np.float64)
        self._max = np.zeros(K, np.float32)
        self._tokens = 0
        self.spoiled_rows = 0  # left out, for NaN or Inf

    def update(self, rows: NDArray[np.generic]) -> None:
        """Add activations (T, K) of any float dtype; rows with NaN or Inf do not count."""
        x = np.ascontiguousarray(rows, dtype=np.float32)
        total, largest = _magnitudes(x)
        if not np.isfinite(total).all():  # an overflow, or padding: such a row would spoil every sum
            self.spoiled_rows += len(x)
            x = x[np.isfinite(x).all(axis=1)]
            self.spoiled_rows -= len(x)
            total, largest = _magnitudes(x)
        self._second_moment += x.T @ x  # numpy sees the symmetry and does half the work
        self._sum += total
        np.maximum(self._max, largest, out=self._max)
        self._tokens += len(x)

    def finish(self) -> InputStatistics:
        """The means over all rows; ends the accumulation, since H is divided in place."""
        tokens = max(self._tokens, 1)
        self._second_moment /= tokens
        mean = (self._sum / tokens).astype(np.float32)
        return InputStatistics(self._second_moment, mean, self._max, self._tokens)


def _magnitudes(x: Float32) -> tuple[Float32, Float32]:
    """sum|x| and max|x| of each column: float32 (K,) each."""
    magnitude = np.abs(x)
    return magnitude.sum(axis=0), magnitude.max(axis=0, initial=0)
