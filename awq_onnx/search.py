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
* Clipping is left to what comes after, see `awq_onnx.rounding`.

Shapes: K in, N out, G blocks of b; weights are float32 (K, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.arrays import beside, in_memory
from awq_onnx.codec import Float32, Format
from awq_onnx.statistics import InputStatistics, IntArray, mean_of
from awq_onnx.threads import Spread, one_by_one

ALPHAS = tuple(step / 20 for step in range(21))
SAMPLED = 256  # columns of a wider weight that every alpha is tried on
FINALISTS = 3  # alphas that are then tried on all
SLICE = 256  # columns worked on at once: they fit into a core's cache
SMALLEST_SCALE = 1e-4
QUIETEST_HEAD = 1e-6  # of the mean energy: below, a head counts as dead

Columns: TypeAlias = "slice | IntArray"


@dataclass(frozen=True)
class Reader:
    """One weight and what is known of its input.

    weight: (K, N) of any float dtype, it may be a view of a file; times `factor`. head_size: how many neighbouring
    columns are normalised together right after (q_norm, k_norm), None where that is not so. An error then counts
    relative to what such a head carries: however small that is, the norm brings it to the size of all others. fmt: its
    own, where the layers of one scale differ.
    """

    weight: NDArray[Any]
    statistics: InputStatistics
    head_size: int | None = None
    fmt: Format | None = None
    factor: float = 1.0

    @property
    def N(self) -> int:
        return int(self.weight.shape[1])

    def columns(self, columns: Columns = slice(None)) -> Float32:
        """Some columns of the weight: float32 (K, n), contiguous, beside the statistics."""
        read = beside(np.ascontiguousarray(self.weight[:, columns], dtype=np.float32), self.statistics.second_moment)
        return read if self.factor == 1 else read * np.float32(self.factor)

    @cached_property
    def emphasis(self) -> Float32 | None:
        """The root of mean energy / energy of its head, for each column: float32 (N,)."""
        if self.head_size is None:
            return None
        energies = [in_memory(self.statistics.column_energy(self.columns(some))) for some in slices(self.N, SLICE)]
        heads = np.concatenate(energies).reshape(-1, self.head_size).mean(axis=1)
        live = heads > heads.mean() * QUIETEST_HEAD
        factors = np.sqrt(np.divide(heads.mean(), heads, out=np.ones_like(heads), where=live))
        emphasis: Float32 = np.repeat(factors, self.head_size)
        return emphasis

    def emphasized(self, error: Float32, columns: Columns = slice(None)) -> Float32:
        """An error (K, n) of these columns, each as much as it counts; in place."""
        if self.emphasis is not None:
            error *= beside(self.emphasis[columns], error)
        return error


@dataclass(frozen=True)
class ScaleChoice:
    """The scale of the inputs of a group: x / s, s W.

    alpha: the exponent. scale: s, float32 (K,). losses: the estimated loss of plain rounding at each of `ALPHAS`
    (infinite where a candidate was not tried), summed over all readers.
    """

    alpha: float
    scale: Float32
    losses: tuple[float, ...]

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
    readers: Sequence[Reader], fmt: Format, limits: ScaleLimits | None = None, spread: Spread = one_by_one
) -> ScaleChoice:
    """The scale with the smallest estimated loss, summed over all `readers` by the tokens they saw.

    alpha = 0 is s = 1 and among the candidates, so no choice is worse than no scale. spread: a map for pieces of work.
    """
    limits = limits or ScaleLimits()
    distinct = {id(reader.statistics): reader.statistics for reader in readers}
    act_mean = mean_of(list(distinct.values()))
    scales = [candidate_scale(act_mean, alpha, limits) for alpha in ALPHAS]

    def losses_at(tried: Sequence[int]) -> NDArray[np.float64]:
        some = [scales[index] for index in tried]
        return total([_column_losses(r, some, fmt, _all(r.N), spread).sum(axis=1) for r in readers])

    def total(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Of what each reader loses."""
        summed = np.sum([share(r, readers) * part for r, part in zip(readers, parts, strict=True)], axis=0)
        return np.where(np.isfinite(summed), summed, np.inf)

    if all(reader.N <= SAMPLED for reader in readers):
        losses = losses_at(range(len(ALPHAS)))
    else:
        unscaled = [_column_losses(r, scales[:1], fmt, _all(r.N), spread)[0] for r in readers]
        rough = total([_sampled_losses(*one, scales, fmt, spread) for one in zip(readers, unscaled, strict=True)])
        losses = np.full(len(ALPHAS), np.inf)
        losses[0] = total([plain.sum() for plain in unscaled])
        _descend(losses, np.argsort(rough, kind="stable")[:FINALISTS].tolist(), losses_at)
    best = int(np.argmin(losses))
    return ScaleChoice(ALPHAS[best], scales[best], tuple(losses.tolist()))


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
    reader: Reader, unscaled: NDArray[np.float64], scales: Sequence[Float32], fmt: Format, spread: Spread
) -> NDArray[np.float64]:
    """About the loss at each scale: float64 (len(scales),). From the columns that lose most without one, and some more.

    unscaled: what each column loses without a scale, (N,). Few may carry most of it, so that others alone would
    mislead.
    """
    if reader.N <= SAMPLED:
        everywhere: NDArray[np.float64] = _column_losses(reader, scales, fmt, _all(reader.N), spread).sum(axis=1)
        return everywhere
    order = np.argsort(-unscaled, kind="stable")
    loud, quiet = order[: SAMPLED // 2], order[SAMPLED // 2 :]
    some = quiet[:: -(-quiet.size // (SAMPLED // 2))]  # as loud as all of them
    losses = _column_losses(reader, scales, fmt, [loud, some], spread)  # (scales, columns)
    rest = losses[:, loud.size :].sum(axis=1) * (quiet.size / some.size)
    estimated: NDArray[np.float64] = rest + losses[:, : loud.size].sum(axis=1)
    return estimated


def _column_losses(
    reader: Reader, scales: Sequence[Float32], fmt: Format, columns: Iterable[Columns], spread: Spread
) -> NDArray[np.float64]:
    """The estimated loss of some columns of s W on its min-max grid, for each s: float64 (len(scales), columns)."""
    statistics, fmt = reader.statistics, reader.fmt or fmt
    _ = statistics.principal, reader.emphasis  # once, before threads ask for them

    rows = [beside(_rows(scale, fmt.block_size), statistics.second_moment) for scale in scales]

    def work(some: Columns) -> Float32:
        blocks = codec.to_blocks(reader.columns(some), fmt.block_size)  # (G, b, n)
        scaled, error = np.empty_like(blocks), np.empty_like(blocks)
        energies = []
        for scale, factors in zip(scales, rows, strict=True):
            plain_error(np.multiply(blocks, factors, out=scaled), fmt, out=error)
            counted = reader.emphasized(codec.from_blocks(error, scale.size), some)
            energies.append(statistics.column_energy(counted, scale))
        return in_memory(np.stack(energies))

    losses: NDArray[np.float64] = np.concatenate(list(spread(work, columns)), axis=1, dtype=np.float64)
    return losses


def _all(columns: int) -> list[slice]:
    return slices(columns, SLICE)


def slices(columns: int, width: int) -> list[slice]:
    """range(columns) in pieces of nearly the same width, at most `width`."""
    pieces = -(-columns // width)
    even = -(-columns // pieces)
    return [slice(start, min(start + even, columns)) for start in range(0, columns, even)]


def share(reader: Reader, readers: Sequence[Reader]) -> float:
    """How much a token of `reader` counts: experts see few of them."""
    most = max(one.statistics.tokens for one in readers)
    return reader.statistics.tokens / most if most else 1.0


def candidate_scale(act_mean: Float32, alpha: float, limits: ScaleLimits) -> Float32:
    """s = mean|x|^alpha over the geometric middle of its range: float32 (K,), finite, positive; all 1 at alpha 0.

    A channel that never carried anything takes the smallest mean of those that did.
    """
    mean = act_mean.astype(np.float64)
    live = mean > 0
    if alpha == 0 or not live.any():
        return np.ones(act_mean.shape, np.float32)
    mean = np.where(live, mean, mean[live].min())
    if limits.tie is not None:
        mean = (np.bincount(limits.tie, mean) / np.maximum(np.bincount(limits.tie), 1))[limits.tie]
    scale = mean**alpha
    scale /= np.sqrt(scale.max() * scale.min())
    scale = np.maximum(np.where(np.isfinite(scale), scale, 1), SMALLEST_SCALE)
    if limits.smallest is not None:
        scale = np.maximum(scale, limits.smallest)
    return scale.astype(np.float32)


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
