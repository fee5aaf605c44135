"""How far a quantised model is from its original, on the same inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate import data
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import Feed, Signature, signature
from awq_onnx.errors import CalibrationError
from awq_onnx.progress import Silent, unheard
from awq_onnx.recipe import Recipe
from awq_onnx.store import ModelSource, open_model

ROWS_AT_ONCE = 16  # of logits (rows, V) in float64
Rows = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. The first six are None for a model without logits.

    kl_mean: mean over tokens (samples, for a classifier of those) of KL(original || quantised) in nats; kl_se: its
    standard error over windows; kl_median: over windows. perplexity: exp of the mean negative log-likelihood of the
    given tokens, None without token ids. top1: share of tokens with the same likeliest next token.

    relative_error: ||y - y'|| / ||y|| over all compared outputs. cosine_distance: mean over tokens of 1 - cos(y, y'),
    None for a model with logits. tokens, windows: how much was compared; padding counts for nothing.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    kl: list[float]
    agreements: int = 0
    likelihood: NDArray[np.float64] | None = None
    predicted: int = 0
    error: float = 0.0
    energy: float = 0.0
    tokens: int = 0
    distance: float = 0.0
    vectors: int = 0


def compare(
    original: ModelSource,
    quantized: str | os.PathLike[str],
    calibration: Calibration = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
) -> Comparison:
    """Run both models over `calibration` (as in `quantize`), every sample a window, and compare their outputs.

    Token ids as an array are taken whole; text and self-made text are cut to `recipe.samples` windows.
    Raises ModelFileError, CalibrationError, RuntimeFailedError.
    """
    recipe = recipe or Recipe()
    with open_model(original) as opened:
        wanted = signature(opened.model.graph)
        if isinstance(calibration, np.ndarray):
            recipe = Recipe(samples=max(1, len(calibration)))
        loaded = data.load(opened, wanted, recipe, calibration, tokenizer, Silent())
        windows = [window for feed in loaded.all_feeds for window in _one_by_one(feed)]
        reference = runtime.session(opened.serialize(), opened.folder)
        return compare_sessions(reference, runtime.client_session(Path(quantized)), windows, wanted)


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
    sums = _Sums(kl=[])
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
        windows=windows,
        kl_windows=tuple(sums.kl),
    )


def _one_by_one(feed: Feed) -> list[Feed]:
    """A feed of B sequences as B feeds; whole where an input has no batch axis."""
    sizes = {values.shape[0] if values.ndim else 0 for values in feed.values()}
    if len(sizes) != 1:
        return [feed]
    return [{name: values[row : row + 1] for name, values in feed.items()} for row in range(sizes.pop())]


def _are_logits(values: Rows) -> bool:
    """Whether there are classes to choose from: of every token (B, T, V), or of every sample (B, V)."""
    return values.ndim in (2, 3) and values.shape[-1] > 1


def _row_pairs(expected: Rows, actual: Rows, window: Feed, wanted: Signature) -> tuple[Rows, Rows]:
    if expected.shape != actual.shape:
        raise CalibrationError(f"the two models return different shapes, {expected.shape} and {actual.shape}")
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
    """The squares of rows (R, C) and of their differences."""
    if expected.dtype.kind != "f":
        return
    for start in range(0, len(expected), ROWS_AT_ONCE):  # logits are large, copies of all of them larger
        one = expected[start : start + ROWS_AT_ONCE].astype(np.float32)
        with np.errstate(invalid="ignore"):  # -inf - -inf
            error = actual[start : start + ROWS_AT_ONCE] - one
        finite = np.isfinite(error)
        error, one = np.where(finite, error, 0), np.where(finite, one, 0)
        sums.error += float(np.vdot(error, error))
        sums.energy += float(np.vdot(one, one))


def _add_distance(sums: _Sums, expected: Rows, actual: Rows) -> None:
    """1 - cos of rows (R, C); a number alone has no direction, and a row of zeros none either."""
    if expected.dtype.kind != "f" or expected.shape[1] < 2:
        return
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    some = np.isfinite(lengths) & (lengths > 0)
    cosines = np.einsum("rc,rc->r", one[some], other[some]) / lengths[some]
    sums.distance += float((1 - cosines).sum())
    sums.vectors += int(some.sum())


def _add_logits(sums: _Sums, expected: Rows, actual: Rows, window: Feed, wanted: Signature) -> None:
    """One window's KL, agreement and likelihood, from logits (B, T, V) or (B, V)."""
    if expected.ndim == 2:
        expected, actual = expected[:, None], actual[:, None]
    keep = _real(expected.shape[:2], window, wanted)
    ids = window.get(wanted.text)
    if ids is not None and ids.shape != keep.shape:
        ids = None
    kl_sum = 0.0
    for sequence in range(expected.shape[0]):
        rows = np.flatnonzero(keep[sequence])
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = rows[start : start + ROWS_AT_ONCE]
            p, q = log_softmax(expected[sequence, chosen]), log_softmax(actual[sequence, chosen])
            kl_sum += float(kl_divergence(p, q).sum())
            sums.agreements += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            if ids is not None:
                _add_likelihood(sums, p, q, chosen, ids[sequence], keep[sequence])
    sums.tokens += int(keep.sum())
    sums.kl.append(kl_sum / max(1, int(keep.sum())))


def _add_likelihood(sums: _Sums, p: Rows, q: Rows, rows: NDArray[np.int64], ids: Rows, real: NDArray[np.bool_]) -> None:
    followed = np.append(real[1:], False)[rows]  # the last token, and what padding follows, predict nothing
    targets = ids[rows[followed] + 1]
    here = np.flatnonzero(followed)
    likelihood = np.array([p[here, targets].sum(), q[here, targets].sum()])
    sums.likelihood = likelihood if sums.likelihood is None else sums.likelihood + likelihood
    sums.predicted += len(here)


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
    """Of each row of logits (T, V)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    result: NDArray[np.float64] = shifted
    return result
