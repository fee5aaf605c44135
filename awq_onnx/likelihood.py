"""Logits as probabilities, and how far they are apart. Arrays in, numbers out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 16  # of logits (rows, V) in float64
Rows = NDArray[Any]


def kl_divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row of log-probabilities (T, V), in nats: float64 (T,)."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    divergence: NDArray[np.float64] = np.where(np.isneginf(log_p), 0, terms).sum(axis=1)
    return divergence


def mean_kl(log_p: Rows, logits: Rows) -> float:
    """The mean KL(p || q) in nats, from log-probabilities of p and logits of q (T, V): faster than `kl_divergence`,
    with single precision in all but the sums.
    """
    total = 0.0
    for start in range(0, len(logits), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        p, largest = np.exp(log_p[some]), logits[some].max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits[some] - largest).sum(axis=1, dtype=np.float64)) + largest[:, 0]
        with np.errstate(invalid="ignore"):  # -inf - -inf
            terms = np.where(p > 0, p * (log_p[some] - logits[some]), 0)
        total += float((terms.sum(axis=1, dtype=np.float64) + log_sums).sum())
    return total / max(len(logits), 1)


def log_probabilities(logits: Rows) -> NDArray[np.float32]:
    """`log_softmax` in single precision, computed in double, a few rows at a time."""
    made = np.empty(logits.shape, np.float32)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        made[some] = log_softmax(logits[some])
    return made


def log_softmax(logits: Rows) -> NDArray[np.float64]:
    """Of each row of logits (T, V); NaN where one of them is NaN or infinitely large."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(axis=1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    result: NDArray[np.float64] = shifted
    return result
