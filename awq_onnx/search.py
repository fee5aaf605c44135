"""Arrays in, choices out: the AWQ scale of an input. Knows no graph.

AWQ (Lin et al. 2023, arXiv 2306.00978), section 3.2: X W = (X / s)(s W), and with s larger on the input channels
that carry large activations, rounding s W hurts the output less. Formula (4), (5): s = mean|x|^alpha, alpha found
on a grid by the error of the layer's output.

Where this departs from the paper:
* The error is tr(E' H E), H = X'X / T, which is ||X E||^2 / T exactly, whatever the number of tokens T; the paper
  runs the layer on the tokens. On the grid H is its diagonal plus its 8 largest eigenvectors: the same choice at a
  hundredth of the arithmetic.
* alpha runs over 0, 0.05 .. 1 with both ends; first on some columns of a wide weight, then on all of
  them from the best one downhill.
* Beside formula (4) there are others, see `FORMULAS`.
* Clipping is left to what comes after, see `awq_onnx.grids`.

Shapes: K in, N out, G blocks of b; weights are float32 (K, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.arrays import THERE_BYTES, at_once, beside, in_memory
from awq_onnx.codec import Float32, Format
from awq_onnx.statistics import InputStatistics, IntArray, mean_of
from awq_onnx.symmetric import runs
from awq_onnx.threads import Spread, one_by_one

ALPHAS = tuple(step / 20 for step in range(21))
# s = mean|x|^alpha: AWQ. max|x|^alpha / max|w|^(1 - alpha): SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, (4)).
# mean|x|^alpha / mean(|w| / max|w| of its block)^(1 - alpha): AWQ as AutoAWQ has it. alpha 0 is no scale, in all.
MEAN, MAX, WEIGHTS = FORMULAS = ("mean", "max", "weights")
SAMPLED = 256  # columns of a wider weight that every alpha is tried on
FINALISTS = 3  # alphas that are then tried on all
SLICE = 256  # columns worked on at once: they fit into a core's cache
BUFFERS = 6  # of columns in float32: what trying a scale takes at its peak
SENT_BYTES = 64 << 20  # of a weight that goes to a device at once: what that takes in memory beside the weight
SMALLEST_SCALE = 1e-4
SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
QUIETEST_HEAD = 1e-6  # of the mean energy: below, a head counts as dead

Columns: TypeAlias = "slice | IntArray"


@dataclass(frozen=True)
class Reader:
    """One weight and what is known of its input.

    weight: (K, N) of any float dtype, it may be a view of a file; times `factor`. head_size: how many neighbouring
    columns are normalised together right after (q_norm, k_norm), None where that is not so. An error then counts
    relative to what such a head carries: however small that is, the norm brings it to the size of all others. fmt: of
    its codes.
    """

    weight: NDArray[Any]
    statistics: InputStatistics
    head_size: int | None = None
    factor: float = 1.0
    fmt: Format = field(kw_only=True)

    @property
    def K(self) -> int:
        return int(self.weight.shape[0])

    @property
    def N(self) -> int:
        return int(self.weight.shape[1])

    def columns(self, columns: Columns = slice(None)) -> Float32:
        """Some columns of the weight: float32 (K, n), contiguous, beside the statistics."""
        H, stored = self.statistics.second_moment, self._stored
        if isinstance(stored, np.ndarray):
            read = beside(np.ascontiguousarray(stored[:, columns], dtype=np.float32), H)
        else:
            some = columns if isinstance(columns, slice) else beside(columns, H)
            read = np.ascontiguousarray(stored[:, some], dtype=np.float32, like=H)
        return read if self.factor == 1 else read * np.float32(self.factor)

    @cached_property
    def _stored(self) -> NDArray[Any]:
        """The weight beside the statistics: it is read several times. In memory where it would take too much there."""
        weight, H = self.weight, self.statistics.second_moment
        if isinstance(H, np.ndarray) or weight.nbytes > THERE_BYTES:
            return weight
        return _sent(weight, H) if weight.flags.c_contiguous else _sent(weight.T, H).T

    def slices(self) -> list[slice]:
        """All columns, as many at once as are well worked on where the statistics are."""
        there = THERE_BYTES // (4 * self.K * BUFFERS)
        return slices(self.N, at_once(SLICE, there, self.statistics.second_moment))

    @cached_property
    def emphasis(self) -> Float32 | None:
        """The root of mean energy / energy of its head, for each column: float32 (N,)."""
        if self.head_size is None:
            return None
        energies = [in_memory(self.statistics.column_energy(self.columns(some))) for some in self.slices()]
        heads = np.concatenate(energies).reshape(-1, self.head_size).mean(axis=1)
        live = heads > heads.mean() * QUIETEST_HEAD
        factors = np.sqrt(np.divide(heads.mean(), heads, out=np.ones_like(heads), where=live))
        emphasis: Float32 = np.repeat(factors, self.head_size)
        return emphasis

    def counts(self, columns: Columns) -> Float32 | None:
        """`emphasis` of these columns, beside the statistics: float32 (n,)."""
        return None if self.emphasis is None else beside(self.emphasis[columns], self.statistics.second_moment)

    def emphasized(self, error: Float32, columns: Columns = slice(None)) -> Float32:
        """An error (K, n) of these columns, each as much as it counts; in place."""
        counts = self.counts(columns)
        if counts is not None:
            error *= counts
        return error


@dataclass(frozen=True)
class Candidates:
    """Which scales are tried. formulas: of `FORMULAS`. alpha: the only exponent beside 0, None: all of `ALPHAS`."""

    formulas: tuple[str, ...] = (MEAN,)
    alpha: float | None = None

    @property
    def alphas(self) -> tuple[float, ...]:
        return ALPHAS if self.alpha is None else tuple(sorted({0.0, self.alpha}))


@dataclass(frozen=True)
class ScaleChoice:
    """The scale of the inputs of a group: x / s, s W.

    formula, alpha: what it was made with. scale: s, float32 (K,). losses: the estimated loss of plain rounding at each
    alpha (infinite where that was not tried), summed over all readers.
    """

    alpha: float
    scale: Float32
    losses: tuple[float, ...]
    formula: str = MEAN

    @property
    def gain(self) -> float:
        """The loss with the scale over that without; 1 where nothing was tried."""
        return min(self.losses) / self.losses[0] if self.losses and self.losses[0] > 0 else 1.0


@dataclass(frozen=True)
class ScaleLimits:
    """What keeps a scale applicable.

    tie: int64 (K,) or None: channels with the same number must share one scale (several query heads read one
    value head). smallest: float32 (K,): below this, x / s or the folded tensor would overflow its dtype.
    """

    tie: IntArray | None = None
    smallest: Float32 | None = None


def search_scale(
    readers: Sequence[Reader],
    limits: ScaleLimits | None = None,
    spread: Spread = one_by_one,
    candidates: Candidates | None = None,
) -> ScaleChoice:
    """The scale with the smallest estimated loss, summed over all `readers` by the tokens they saw.

    alpha = 0 is s = 1 and among the candidates, so no choice is worse than no scale. spread: a map for pieces of work.
    """
    limits, candidates = limits or ScaleLimits(), candidates or Candidates()
    losses = _Losses(readers, spread)
    choices = []
    for formula in candidates.formulas:
        base = Base.of(formula, readers)
        scales = [base.scale(alpha, limits) for alpha in candidates.alphas]
        found = losses.searched(scales)
        best = int(np.argmin(found))
        choices.append(ScaleChoice(candidates.alphas[best], scales[best], tuple(found.tolist()), formula))
    return min(choices, key=lambda choice: min(choice.losses))


class _Losses:
    """What scales lose, over all readers."""

    def __init__(self, readers: Sequence[Reader], spread: Spread) -> None:
        self._readers, self._spread = readers, spread

    def searched(self, scales: Sequence[Float32]) -> NDArray[np.float64]:
        """The losses of scales of which the first is 1 and neighbours lose nearly the same: float64 (len(scales),).

        Where there are many columns, infinite for those that a look at some of these ruled out.
        """
        if len(scales) < FINALISTS or all(reader.N <= SAMPLED for reader in self._readers):
            return self._of(scales)
        unscaled, readers = self._unscaled, self._readers
        rough = self._total(
            [_sampled_losses(*one, scales, self._spread) for one in zip(readers, unscaled, strict=True)]
        )
        losses = np.full(len(scales), np.inf)
        losses[0] = self._total([plain.sum() for plain in unscaled])
        starts = np.argsort(rough, kind="stable")[:FINALISTS].tolist()
        _descend(losses, starts, lambda tried: self._of([scales[index] for index in tried]))
        return losses

    @cached_property
    def _unscaled(self) -> list[NDArray[np.float64]]:
        """What each column of each reader loses without a scale."""
        ones = [np.ones(self._readers[0].K, np.float32)]
        return [_column_losses(r, ones, r.slices(), self._spread)[0] for r in self._readers]

    def _of(self, scales: Sequence[Float32]) -> NDArray[np.float64]:
        return self._total([_column_losses(r, scales, r.slices(), self._spread).sum(axis=1) for r in self._readers])

    def _total(self, parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Of what each reader loses."""
        readers = self._readers
        summed = np.sum([share(r, readers) * part for r, part in zip(readers, parts, strict=True)], axis=0)
        return np.where(np.isfinite(summed), summed, np.inf)


def _descend(
    losses: NDArray[np.float64], starts: Sequence[int], losses_at: Callable[[Sequence[int]], NDArray[np.float64]]
) -> None:
    """Fill in the losses at `starts`, and from the best of all down to where both neighbours are worse; where nothing
    was tried they are infinite.
    """
    untried = {index for index, loss in enumerate(losses) if not np.isfinite(loss)}

    def neighbours() -> set[int]:
        best = int(np.argmin(losses))
        return untried.intersection({best - 1, best + 1})

    fresh = untried.intersection(starts) or neighbours()
    while fresh:
        untried -= fresh
        losses[sorted(fresh)] = losses_at(sorted(fresh))
        fresh = neighbours()


def _sampled_losses(
    reader: Reader, unscaled: NDArray[np.float64], scales: Sequence[Float32], spread: Spread
) -> NDArray[np.float64]:
    """About the loss at each scale: float64 (len(scales),). From the columns that lose most without one, and some more.

    unscaled: what each column loses without a scale, (N,). Few may carry most of it, so that others alone would
    mislead.
    """
    if reader.N <= SAMPLED:
        everywhere: NDArray[np.float64] = _column_losses(reader, scales, reader.slices(), spread).sum(axis=1)
        return everywhere
    order = np.argsort(-unscaled, kind="stable")
    loud, quiet = order[: SAMPLED // 2], order[SAMPLED // 2 :]
    some = quiet[:: -(-quiet.size // (SAMPLED // 2))]  # as loud as all of them
    pieces = [loud, some] if len(reader.slices()) > 1 else [np.concatenate([loud, some])]
    losses = _column_losses(reader, scales, pieces, spread)  # (scales, columns)
    rest = losses[:, loud.size :].sum(axis=1) * (quiet.size / some.size)
    estimated: NDArray[np.float64] = rest + losses[:, : loud.size].sum(axis=1)
    return estimated


def _column_losses(
    reader: Reader, scales: Sequence[Float32], columns: Iterable[Columns], spread: Spread
) -> NDArray[np.float64]:
    """The estimated loss of some columns of s W on its min-max grid, for each s: float64 (len(scales), columns)."""
    statistics, fmt = reader.statistics, reader.fmt
    _ = statistics.principal, reader.emphasis  # once, before threads ask for them

    rows = beside(np.stack([_rows(scale, fmt.block_size) for scale in scales]), statistics.second_moment)
    divided_by = beside(np.stack(scales), statistics.second_moment)  # (len(scales), K)

    def work(some: Columns) -> Float32:
        blocks = codec.to_blocks(reader.columns(some), fmt.block_size)  # (G, b, n)
        scaled, error = np.empty_like(blocks), np.empty_like(blocks)
        counts, energies = reader.counts(some), []
        for at in range(len(scales)):
            plain_error(np.multiply(blocks, rows[at], out=scaled), fmt, out=error)
            counted = codec.from_blocks(error, reader.K)
            if counts is not None:
                counted *= counts
            energies.append(statistics.column_energy(counted, divided_by[at]))
        return in_memory(np.stack(energies))

    losses: NDArray[np.float64] = np.concatenate(list(spread(work, columns)), axis=1, dtype=np.float64)
    return losses


def _sent(weight: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """A matrix where `other` is, a few rows after the other."""
    dtype = weight.dtype if weight.dtype.isbuiltin == 1 else np.dtype(np.float32)  # bfloat16 is only ml_dtypes' own
    sent: NDArray[Any] = np.empty(weight.shape, dtype, like=other)
    for start, stop in runs(len(weight), max(1, SENT_BYTES // max(weight[:1].nbytes, 1))):
        sent[start:stop] = beside(np.ascontiguousarray(weight[start:stop], dtype=dtype), other)
    return sent


def slices(columns: int, width: int) -> list[slice]:
    """range(columns) in pieces of nearly the same width, at most `width`."""
    pieces = -(-columns // width)
    even = -(-columns // pieces)
    return [slice(start, min(start + even, columns)) for start in range(0, columns, even)]


def share(reader: Reader, readers: Sequence[Reader]) -> float:
    """How much a token of `reader` counts: experts see few of them."""
    most = max(one.statistics.tokens for one in readers)
    return reader.statistics.tokens / most if most else 1.0


@dataclass(frozen=True)
class Base:
    """What a scale is made of: s = activations^alpha / weights^(1 - alpha), over the geometric middle of its range.

    activations, weights: float32 (K,); weights None: 1.
    """

    activations: Float32
    weights: Float32 | None = None

    @classmethod
    def of(cls, formula: str, readers: Sequence[Reader]) -> Base:
        """formula: of `FORMULAS`."""
        seen = list({id(reader.statistics): reader.statistics for reader in readers}.values())
        if formula == MEAN:
            return cls(mean_of(seen))
        if formula == MAX:
            largest = np.max([one.act_max for one in seen], axis=0)
            return cls(largest, np.max([_magnitudes(reader) for reader in readers], axis=0))
        assert formula == WEIGHTS
        shares = [_shares(reader) for reader in readers]
        return cls(mean_of(seen), np.average(shares, axis=0, weights=[reader.N for reader in readers]))

    def scale(self, alpha: float, limits: ScaleLimits) -> Float32:
        """float32 (K,), finite, positive; all 1 at alpha 0.

        A channel that never carried anything takes the smallest number of those that did.
        """
        if alpha == 0 or not (self.activations > 0).any():
            return np.ones(self.activations.shape, np.float32)
        scale = _tied(_live(self.activations), limits.tie) ** alpha
        if self.weights is not None and (self.weights > 0).any():
            scale /= _tied(_live(self.weights), limits.tie) ** (1 - alpha)
        scale /= np.sqrt(scale.max() * scale.min())
        scale = np.maximum(np.where(np.isfinite(scale), scale, 1), SMALLEST_SCALE)
        if limits.smallest is not None:
            scale = np.maximum(scale, limits.smallest)
        return scale.astype(np.float32)


def _live(magnitudes: Float32) -> NDArray[np.float64]:
    """Float64, the smallest positive one in the place of 0."""
    values = magnitudes.astype(np.float64)
    live = values > 0
    return np.where(live, values, values[live].min())


def _tied(values: NDArray[np.float64], tie: IntArray | None) -> NDArray[np.float64]:
    """The mean of all channels that must share one scale."""
    if tie is None:
        return values
    means: NDArray[np.float64] = (np.bincount(tie, values) / np.maximum(np.bincount(tie), 1))[tie]
    return means


def _magnitudes(reader: Reader) -> Float32:
    """max|w| of each row: float32 (K,)."""
    largest: Float32 = np.max([in_memory(np.abs(reader.columns(some)).max(axis=1)) for some in reader.slices()], axis=0)
    return largest


def _shares(reader: Reader) -> Float32:
    """mean over N of |w| / max|w| of its block: float32 (K,)."""
    total = np.zeros(reader.K, np.float64)
    for some in reader.slices():
        blocks = np.abs(codec.to_blocks(reader.columns(some), reader.fmt.block_size))
        blocks /= np.maximum(blocks.max(axis=1, keepdims=True), np.float32(SMALLEST_NORMAL))
        total += in_memory(codec.from_blocks(blocks, reader.K).sum(axis=1))
    shares: Float32 = (total / reader.N).astype(np.float32)
    return shares


def plain_error(blocks: Float32, fmt: Format, out: Float32) -> Float32:
    """E = Q(W) - W of blocks on their min-max grid; all (G, b, n)."""
    grid = codec.minmax_grid(blocks, fmt)
    codec.centred_codes(blocks, grid, out=out)
    codec.dequantize(out, grid, out=out)
    out -= blocks
    return out


def _rows(scale: Float32, block_size: int) -> Float32:
    """A factor of each row of blocks, 1 of the padding: float32 (G, b, 1)."""
    padded = np.pad(scale, (0, -scale.size % block_size), constant_values=1)
    return padded.reshape(-1, block_size, 1)
