"""How far a quantised model's outputs are from its original's, on the same inputs. `pair` runs two files for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature
from awq_onnx.errors import DifferentModelsError
from awq_onnx.likelihood import ROWS_AT_ONCE, Rows, kl_divergence, log_softmax
from awq_onnx.plain import plain
from awq_onnx.progress import unheard

WORST = 10  # tokens that are kept for people to look at
CONTEXT = 24  # tokens that show where such a token is


@dataclass(frozen=True)
class WorstToken:
    """A place where the two models disagree most.

    window: counted from 0. position: of the token in it after which they disagree, also from 0. kl: there, in nats.
    context: the last token ids up to that one, none for a classifier of samples. original, quantized: the id (class)
    that each model finds likeliest next, and with which probability.
    """

    window: int
    position: int
    kl: float
    context: tuple[int, ...]
    original: int
    original_probability: float
    quantized: int
    quantized_probability: float


@dataclass(frozen=True)
class Comparison:
    """How far the outputs are apart. The first six are None for a model without logits.

    kl_mean: mean over tokens (samples, for a classifier of those) of KL(original || quantised) in nats; kl_se: its
    standard error over windows; kl_median: over windows. perplexity: exp of the mean negative log-likelihood of the
    given tokens, None without token ids. top1: share of tokens with the same likeliest next token. kl_windows: the mean
    of each window. worst: the tokens with the largest KL, that first; none where it is 0.

    relative_error: ||y - y'|| / ||y|| over all compared outputs. cosine_distance: mean over tokens of 1 - cos(y, y'),
    None for a model with logits. tokens, windows: how much was compared; padding counts for nothing. A window is a
    sequence, or a sample of a classifier; of a model without logits, whatever ran at once.
    """

    kl_mean: float | None
    kl_se: float | None
    kl_median: float | None
    top1: float | None
    perplexity_original: float | None
    perplexity_quantized: float | None
    relative_error: float
    tokens: int
    windows: int
    kl_windows: tuple[float, ...] = ()
    cosine_distance: float | None = None
    worst: tuple[WorstToken, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: a number that is not finite is None."""
        values: dict[str, Any] = plain(self)
        return values


@dataclass
class _Sums:
    """kl: the mean of each sequence."""

    kl: list[float] = field(default_factory=list)
    worst: list[WorstToken] = field(default_factory=list)
    agreements: int = 0
    likelihood: NDArray[np.float64] | None = None
    predicted: int = 0
    error: float = 0.0
    energy: float = 0.0
    tokens: int = 0
    distance: float = 0.0
    vectors: int = 0


@dataclass(frozen=True)
class _Sequence:
    """real: which tokens (T,) are no padding. ids: of all tokens (T,), if known."""

    real: NDArray[np.bool_]
    ids: Rows | None

    def context(self, position: int) -> tuple[int, ...]:
        """The last tokens up to a position."""
        if self.ids is None:
            return ()
        until = slice(position + 1)
        return tuple(map(int, self.ids[until][self.real[until]][-CONTEXT:]))


def compare_sessions(reference: Any, quantized: Any, windows: Sequence[Feed], wanted: Signature) -> Comparison:
    """The comparison of two sessions of models with the same signature; each feed is a window."""
    outputs = compared_outputs(wanted)
    expected = (runtime.run(reference, outputs, window) for window in windows)
    return compare_outputs(outputs, expected, quantized, windows, wanted)


def compared_outputs(wanted: Signature) -> list[str]:
    """The outputs that a comparison looks at: the logits, or all but the caches."""
    caches = {present for _, present in wanted.caches}
    return [wanted.logits] if wanted.logits else [name for name in wanted.outputs if name not in caches]


def compare_outputs(
    outputs: list[str],
    reference: Iterable[Sequence[Rows]],
    quantized: Any,
    windows: Sequence[Feed],
    wanted: Signature,
    advance: Callable[[float], None] = unheard,
) -> Comparison:
    """The comparison of a session with what `outputs` should be, for each window."""
    sums = _Sums()
    for window, expected in zip(windows, reference, strict=True):
        actual = runtime.run(quantized, outputs, window)
        rows = [_row_pairs(*pair, window, wanted) for pair in zip(expected, actual, strict=True)]
        for pair in rows:
            _add_error(sums, *pair)
        if wanted.logits and _are_logits(expected[0]):
            _add_logits(sums, expected[0], actual[0], window, wanted)
        else:
            sums.tokens += len(rows[0][0])
            for pair in rows:
                _add_distance(sums, *pair)
        advance(1 / len(windows))
    return _result(sums, len(windows))


def _result(sums: _Sums, windows: int) -> Comparison:
    relative_error = float(np.sqrt(sums.error / sums.energy)) if sums.energy else 0.0
    if not sums.kl:
        distance = sums.distance / sums.vectors if sums.vectors else None
        return Comparison(
            None, None, None, None, None, None, relative_error, sums.tokens, windows, cosine_distance=distance
        )
    kl = np.array(sums.kl)
    perplexity = np.exp(-sums.likelihood / sums.predicted) if sums.likelihood is not None and sums.predicted else None
    return Comparison(
        kl_mean=float(kl.mean()),
        kl_se=float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None,
        kl_median=float(np.median(kl)),
        top1=sums.agreements / sums.tokens,
        perplexity_original=None if perplexity is None else float(perplexity[0]),
        perplexity_quantized=None if perplexity is None else float(perplexity[1]),
        relative_error=relative_error,
        tokens=sums.tokens,
        windows=len(kl),
        kl_windows=tuple(sums.kl),
        worst=tuple(sums.worst),
    )


def _are_logits(values: Rows) -> bool:
    """Whether there are classes to choose from: of every token (B, T, V), or of every sample (B, V)."""
    return values.ndim in (2, 3) and values.shape[-1] > 1


def _row_pairs(expected: Rows, actual: Rows, window: Feed, wanted: Signature) -> tuple[Rows, Rows]:
    if expected.shape != actual.shape:
        raise DifferentModelsError(f"the two models return different shapes, {expected.shape} and {actual.shape}")
    return real_rows(expected, window, wanted), real_rows(actual, window, wanted)


def real_rows(values: Rows, window: Feed, wanted: Signature) -> Rows:
    """An output (…, C) as rows (R, C), without the rows of padding."""
    if values.ndim == 3:
        keep = _real(values.shape[:2], window, wanted)
        if not keep.all():
            return values[keep]
    return values.reshape(-1, max(values.shape[-1], 1) if values.ndim else 1)


def _real(shape: tuple[int, ...], window: Feed, wanted: Signature) -> NDArray[np.bool_]:
    """Which tokens (B, T) are no padding."""
    mask = window.get(wanted.text_mask)
    return mask.astype(bool) if mask is not None and mask.shape == shape else np.ones(shape, bool)


def _add_error(sums: _Sums, expected: Rows, actual: Rows) -> None:
    """The squares of rows (R, C) and of their differences, where the original is finite."""
    if expected.dtype.kind != "f":
        return
    for start in range(0, len(expected), ROWS_AT_ONCE):  # logits are large, copies of all of them larger
        one = expected[start : start + ROWS_AT_ONCE].astype(np.float32)
        with np.errstate(invalid="ignore"):  # -inf - -inf
            error = actual[start : start + ROWS_AT_ONCE] - one
        finite = np.isfinite(one)
        error, one = np.where(finite, error, 0), np.where(finite, one, 0)
        sums.error += float(np.vdot(error, error))
        sums.energy += float(np.vdot(one, one))


def _add_distance(sums: _Sums, expected: Rows, actual: Rows) -> None:
    """1 - cos of rows (R, C); a number alone has no direction, and a row of zeros none either."""
    if expected.dtype.kind != "f" or expected.shape[1] < 2:
        return
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    length, length_of_other = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    some = np.isfinite(length) & (length * length_of_other != 0)
    with np.errstate(invalid="ignore"):  # NaN or Inf where the original has numbers makes the distance NaN
        cosines = np.einsum("rc,rc->r", one[some], other[some]) / (length * length_of_other)[some]
    sums.distance += float((1 - cosines).sum())
    sums.vectors += int(some.sum())


def _add_logits(sums: _Sums, expected: Rows, actual: Rows, window: Feed, wanted: Signature) -> None:
    """The KL, agreement and likelihood of every sequence, from logits (B, T, V) or (B, V)."""
    if expected.ndim == 2:
        expected, actual = expected[:, None], actual[:, None]
    keep = _real(expected.shape[:2], window, wanted)
    ids = window.get(wanted.text)
    for number, real in enumerate(keep):
        sequence = _Sequence(real, ids[number] if ids is not None and ids.shape == keep.shape else None)
        _add_sequence(sums, expected[number], actual[number], sequence)


def _add_sequence(sums: _Sums, expected: Rows, actual: Rows, sequence: _Sequence) -> None:
    """Of logits (T, V)."""
    kl_sum, rows = 0.0, np.flatnonzero(sequence.real)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chosen = rows[start : start + ROWS_AT_ONCE]
        p, q = log_softmax(expected[chosen]), log_softmax(actual[chosen])
        kl = kl_divergence(p, q)
        kl_sum += float(kl.sum())
        sums.agreements += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        _add_likelihood(sums, p, q, chosen, sequence)
        _keep_worst(sums, kl, p, q, chosen, sequence)
    sums.tokens += len(rows)
    sums.kl.append(kl_sum / max(1, len(rows)))


def _add_likelihood(sums: _Sums, p: Rows, q: Rows, rows: NDArray[np.int64], sequence: _Sequence) -> None:
    if sequence.ids is None:
        return
    followed = np.append(sequence.real[1:], False)[rows]  # the last token, and what padding follows, predict nothing
    targets = sequence.ids[rows[followed] + 1]
    here = np.flatnonzero(followed)
    likelihood = np.array([p[here, targets].sum(), q[here, targets].sum()])
    sums.likelihood = likelihood if sums.likelihood is None else sums.likelihood + likelihood
    sums.predicted += len(here)


def _keep_worst(sums: _Sums, kl: Rows, p: Rows, q: Rows, rows: NDArray[np.int64], sequence: _Sequence) -> None:
    """Those of the rows (R,) that are among the worst; kl (R,), log-probabilities p and q (R, V)."""
    least = sums.worst[-1].kl if len(sums.worst) == WORST else 0.0
    for at in np.flatnonzero(kl > least):
        original, quantized = int(p[at].argmax()), int(q[at].argmax())
        sums.worst.append(
            WorstToken(
                window=len(sums.kl),
                position=int(rows[at]),
                kl=float(kl[at]),
                context=sequence.context(rows[at]),
                original=original,
                original_probability=float(np.exp(p[at, original])),
                quantized=quantized,
                quantized_probability=float(np.exp(q[at, quantized])),
            )
        )
    sums.worst = sorted(sums.worst, key=lambda one: -one.kl)[:WORST]
