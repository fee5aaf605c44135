"""The KL of logits from a sample of the vocabulary.

The layer that makes the logits is the largest of a small model, and comparing what it makes costs as much again. With d
what an error adds to the logits, KL(p || q) is log sum p exp(d) - sum p d. A mean under p is known well from a few
thousand tokens of the vocabulary, and d has to be computed of them alone. They are drawn once for all errors that
are compared: the likelier a token is in any row, the more surely. It counts by the inverse of its chance (Horvitz and
Thompson 1952).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from awq_onnx.codec import Float32
from awq_onnx.likelihood import log_probabilities

SAMPLE_SIZE = 4096  # tokens, about
TINY = np.finfo(np.float32).tiny
MOST = 80.0  # nats: exp of more does not fit into float32


@dataclass(frozen=True)
class VocabularySample:
    """ids: the tokens drawn, int64 (S,). weights: how much each counts in a row, float32 (R, S); rows sum to 1."""

    ids: NDArray[np.int64]
    weights: Float32

    @classmethod
    def of(cls, logits: Float32, size: int) -> VocabularySample:
        """About `size` tokens for rows of logits (R, V), all where there are no more; the same whenever it is asked."""
        log_p = log_probabilities(logits)
        chances = _chances(np.exp(log_p.max(axis=0)), size)
        ids = np.flatnonzero(np.random.default_rng(0).random(len(chances)) < chances)
        log_p = np.take(log_p, ids, axis=1)  # rows in one piece, which sum faster and to more digits
        weights = np.exp(log_p) / chances[ids].astype(np.float32)
        lucky = chances[ids] < 1  # together they count as much as all that are not certain
        rest = np.maximum(1 - weights[:, ~lucky].sum(axis=1, keepdims=True), 0)
        weights[:, lucky] *= rest / np.maximum(weights[:, lucky].sum(axis=1, keepdims=True), TINY)
        return cls(ids, weights / weights.sum(axis=1, keepdims=True))

    def mean_kl(self, added: Float32) -> float:
        """The mean KL(p || q) of the rows, in nats. added: what q's logits of these tokens have more, (R, S)."""
        d = added - self._means(added)[:, None]  # a shift of a row changes nothing, and would cost digits
        d -= self._means(d)[:, None]  # which the first is out by, where it is large
        grown = self._means(np.expm1(np.minimum(d, MOST)))
        return max(0.0, float((np.log1p(grown) - self._means(d)).mean(dtype=np.float64)))

    def _means(self, values: Float32) -> Float32:
        """Of each row, under p."""
        means: Float32 = np.einsum("rs,rs->r", self.weights, values)
        return means


def _chances(sizes: Float32, wanted: int) -> NDArray[np.float64]:
    """min(1, c x sizes) with the c for which they sum to `wanted`; all 1 where there are no more."""
    if wanted >= len(sizes):
        return np.ones(len(sizes))
    descending = np.sort(sizes.astype(np.float64))[::-1]
    rests = descending[::-1].cumsum()[::-1]  # sums of each and all after it
    certain = np.arange(wanted)  # if so many of the largest are certain, the others share what is left
    factors = (wanted - certain) / np.maximum(rests[:wanted], TINY)
    factor = factors[np.argmax(factors * descending[:wanted] <= 1)]
    chances: NDArray[np.float64] = np.minimum(1.0, sizes * factor)
    return chances
