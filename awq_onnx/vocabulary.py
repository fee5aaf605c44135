"""The KL of logits from a sample of the vocabulary.

The layer that makes the logits is the largest of a small model, and comparing what it makes costs as much again. With d
what an error adds to the logits, KL(p || q) is log sum p exp(d) - sum p d. A mean under p is known well from a few
thousand tokens of the vocabulary, and d has to be computed of them alone. They are drawn once for all errors that
are compared; the likelier a token is in any row, the more surely it is drawn and the less each of its kind counts for
others (Horvitz and Thompson 1952).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from awq_onnx.codec import Float32

SIZE = 4096  # of a sample, about
ROWS_AT_ONCE = 16  # of logits
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
        log_sums, likeliest = _softmax_facts(logits)
        chances = _chances(likeliest, size)
        ids = np.flatnonzero(np.random.default_rng(0).random(len(chances)) < chances)
        weights = np.exp(logits[:, ids] - log_sums) / chances[ids].astype(np.float32)
        lucky = chances[ids] < 1  # together they count as much as all that are not certain
        rest = np.maximum(1 - weights[:, ~lucky].sum(axis=1, keepdims=True), 0)
        weights[:, lucky] *= rest / np.maximum(weights[:, lucky].sum(axis=1, keepdims=True), TINY)
        return cls(ids, weights / weights.sum(axis=1, keepdims=True))

    def mean_kl(self, added: Float32) -> float:
        """The mean KL(p || q) of the rows, in nats. added: what q's logits of these tokens have more, (R, S)."""
        d = added - self._means(added)[:, None]  # a shift of a row changes nothing, and would cost digits
        grown = self._means(np.expm1(np.minimum(d, MOST)))
        return max(0.0, float((np.log1p(np.maximum(grown, 0)) - self._means(d)).mean(dtype=np.float64)))

    def _means(self, values: Float32) -> Float32:
        """Of each row, under p."""
        means: Float32 = np.einsum("rs,rs->r", self.weights, values)
        return means


def _softmax_facts(logits: Float32) -> tuple[Float32, Float32]:
    """log sum exp of each row, (R, 1), and the largest probability that a token has in any row, (V,)."""
    log_sums = np.empty((len(logits), 1), np.float32)
    likeliest = np.zeros(logits.shape[1], np.float32)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        some = logits[start : start + ROWS_AT_ONCE]
        largest = some.max(axis=1, keepdims=True)
        p = np.exp(some - largest)
        sums = p.sum(axis=1, keepdims=True)
        log_sums[start : start + ROWS_AT_ONCE] = np.log(sums) + largest
        np.maximum(likeliest, (p / sums).max(axis=0), out=likeliest)
    return log_sums, likeliest


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
