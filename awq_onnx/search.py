"""Arrays in, choices out: the AWQ scale of an input, the grid of every block. Knows no graph.

AWQ (Lin et al. 2023, arXiv 2306.00978), section 3.2: X W = (X / s)(s W), and with s larger on the input channels
that carry large activations, rounding s W hurts the output less. Formula (4), (5): s = mean|x|^alpha, alpha found
on a grid by the error of the layer's output.

Where this departs from the paper:
* The error is tr(E' H E), H = X'X / T, which is ||X E||^2 / T exactly, whatever the number of tokens T; the paper
  runs the layer on the tokens. On the grid H is its diagonal plus its 8 largest eigenvectors: the same choice at a
  hundredth of the arithmetic. What is reported, and the guard at the end, use the whole H.
* alpha runs over 0, 0.05 .. 1 with both ends.
* Instead of clipping, each block's scale and integer zero point are refitted by weighted least squares (`refit`).

Shapes: K in, N out, G blocks of b; weights are float32 (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.codec import Float32, Format, Grid
from awq_onnx.threads import map_columns

ALPHAS = tuple(step / 20 for step in range(21))
EIGENVECTORS = 8
SHRINKS = (1.0, 0.9, 0.8, 0.7)
ZERO_POINT_OFFSETS = (0, -1, 1)  # 0 first: where an input was dead all are equal, and the first one wins
POLISHES = 2
SMALLEST_SCALE = 1e-4
QUIETEST_HEAD = 1e-6  # of the mean energy: below, a head counts as dead

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned about one MatMul input X (T, K).

    second_moment: H = X'X / T, float32 (K, K). act_mean: mean|x|, act_max: max|x|, float32 (K,). tokens: T.
    """

    second_moment: Float32
    act_mean: Float32
    act_max: Float32
    tokens: int

    @cached_property
    def principal(self) -> Float32:
        """U (K, 8): H is about diag(rest) + U U', U the largest eigenvectors times the roots of their values."""
        return _principal(self.second_moment, EIGENVECTORS)

    @cached_property
    def rest(self) -> Float32:
        """The diagonal of H less that of U U': float32 (K,), not negative."""
        rest: Float32 = np.maximum(self.diagonal - np.square(self.principal).sum(axis=1), np.float32(0))
        return rest

    @property
    def diagonal(self) -> Float32:
        return np.ascontiguousarray(np.diagonal(self.second_moment))

    def loss(self, error: Float32) -> float:
        """tr(E' H E) of an error E (K, N): the mean squared error of a token's output, summed over N."""
        return float(np.vdot(error, self.second_moment @ error))

    def estimated_loss(self, error: Float32) -> float:
        """`loss` with diag(rest) + U U' in the place of H: O(8 K N) instead of O(K^2 N)."""
        spread = np.einsum("kn,kn->k", error, error, dtype=np.float32)
        along = self.principal.T @ error  # (8, N)
        return float(self.rest @ spread + np.vdot(along, along))

    def column_energy(self, weight: Float32) -> Float32:
        """About w' H w for every column w of a weight (K, N): float32 (N,)."""
        spread: Float32 = self.rest @ np.square(weight) + np.square(self.principal.T @ weight).sum(axis=0)
        return spread

    @classmethod
    def flat(cls, K: int) -> InputStatistics:
        """What to assume of an input that calibration never saw: every channel matters the same."""
        return cls(np.eye(K, dtype=np.float32), np.ones(K, np.float32), np.zeros(K, np.float32), 0)

    @classmethod
    def merged(cls, parts: Sequence[InputStatistics]) -> InputStatistics:
        """Of the rows of all `parts` together."""
        if len(parts) == 1:
            return parts[0]
        tokens = sum(part.tokens for part in parts)
        second_moment = np.zeros_like(parts[0].second_moment)
        for part in parts:
            second_moment += np.float32(part.tokens / max(tokens, 1)) * part.second_moment
        return cls(
            second_moment,
            _mean_of(parts),
            np.max([part.act_max for part in parts], axis=0),
            tokens,
        )


@dataclass(frozen=True)
class Reader:
    """One weight (K, N), float32, and what is known of its input.

    head_size: how many neighbouring columns are normalised together right after (q_norm, k_norm), None where that is
    not so. An error then counts relative to what such a head carries: however small that is, the norm brings it to
    the size of all others. fmt: its own, where the layers of one scale differ.
    """

    weight: Float32
    statistics: InputStatistics
    head_size: int | None = None
    fmt: Format | None = None

    @cached_property
    def emphasis(self) -> Float32 | None:
        """The root of mean energy / energy of its head, for each column: float32 (N,)."""
        if self.head_size is None:
            return None
        heads = self.statistics.column_energy(self.weight).reshape(-1, self.head_size).mean(axis=1)
        live = heads > heads.mean() * QUIETEST_HEAD
        factors = np.sqrt(np.divide(heads.mean(), heads, out=np.ones_like(heads), where=live))
        emphasis: Float32 = np.repeat(factors, self.head_size)
        return emphasis

    def emphasized(self, error: Float32, columns: slice = slice(None)) -> Float32:
        """An error (K, n) of these columns, each as much as it counts; in place."""
        if self.emphasis is not None:
            error *= self.emphasis[columns]
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


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid.

    centred: codes less zero points, float32 integers (G, b, N). grid: scales and zero points.
    loss: tr(E' H E) of what ships. plain_loss: the same of round-to-nearest without a scale.
    energy: tr(W' H W), to make both relative.
    """

    centred: Float32
    grid: Grid
    loss: float
    plain_loss: float
    energy: float


@dataclass(frozen=True)
class ScaleLimits:
    """What keeps a scale applicable.

    tie: int64 (K,) or None: channels with the same number must share one scale (several query heads read one
    value head). smallest: float32 (K,): below this, x / s or the folded tensor would overflow its dtype.
    """

    tie: IntArray | None = None
    smallest: Float32 | None = None


def search_scale(readers: Sequence[Reader], fmt: Format, limits: ScaleLimits | None = None) -> ScaleChoice:
    """The scale with the smallest estimated loss, summed over all `readers` by the tokens they saw.

    alpha = 0 is s = 1 and among the candidates, so no choice is worse than no scale.
    """
    limits = limits or ScaleLimits()
    distinct = {id(reader.statistics): reader.statistics for reader in readers}
    act_mean = _mean_of(list(distinct.values()))
    scales = [candidate_scale(act_mean, alpha, limits) for alpha in ALPHAS]
    losses = np.sum([_share(r, readers) * _plain_losses(r, scales, fmt) for r in readers], axis=0)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    best = int(np.argmin(losses))
    return ScaleChoice(ALPHAS[best], scales[best], tuple(losses.tolist()))


def _share(reader: Reader, readers: Sequence[Reader]) -> float:
    """How much a token of `reader` counts: experts see few of them."""
    most = max(one.statistics.tokens for one in readers)
    return reader.statistics.tokens / most if most else 1.0


def _mean_of(parts: Sequence[InputStatistics]) -> Float32:
    """mean|x| over the rows of all `parts`: float32 (K,)."""
    if len(parts) == 1:
        return parts[0].act_mean
    tokens = [part.tokens for part in parts]
    mean: Float32 = np.average(
        [part.act_mean for part in parts], axis=0, weights=tokens if any(tokens) else None
    ).astype(np.float32)
    return mean


def _plain_losses(reader: Reader, scales: Sequence[Float32], fmt: Format) -> NDArray[np.float64]:
    """The estimated loss of s W on its min-max grid, for each s of `scales`: float64 (len(scales),)."""
    weight, statistics, fmt = reader.weight, reader.statistics, reader.fmt or fmt

    def work(columns: slice) -> list[float]:
        blocks = codec.to_blocks(weight[:, columns], fmt.block_size)  # (G, b, n)
        scaled, error = np.empty_like(blocks), np.empty_like(blocks)
        errors = (_plain_error(blocks, scale, fmt, scaled, error) for scale in scales)
        return [statistics.estimated_loss(reader.emphasized(one, columns)) for one in errors]

    total: NDArray[np.float64] = np.sum(map_columns(weight.shape[1], work), axis=0)
    return total


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


def round_group(readers: Sequence[Reader], scale: Float32, fmt: Format) -> tuple[Float32, list[Rounded]]:
    """Put s W on the best grid found for it, for the weights of all `readers`; the scale and the results.

    By the whole H no group ends worse than plain rounding without a scale: one that would gets s = 1, and a weight
    whose refitted grid is worse than its plain one keeps the plain one.
    """
    rounded = [_round_weight(reader, scale, fmt) for reader in readers]
    if total_loss(readers, rounded) <= total_loss(readers, rounded, plain=True):
        return scale, rounded
    unscaled = np.ones_like(scale)
    rounded = [_round_weight(reader, unscaled, fmt) for reader in readers]
    return unscaled, [
        r if r.loss <= r.plain_loss else _plainly_rounded(reader.weight, r, reader.fmt or fmt)
        for r, reader in zip(rounded, readers, strict=True)
    ]


def total_loss(readers: Sequence[Reader], rounded: Sequence[Rounded], *, plain: bool = False) -> float:
    """The loss of all `readers` together, by the tokens they saw. plain: of round-to-nearest without a scale."""
    losses = [one.plain_loss if plain else one.loss for one in rounded]
    return sum(_share(reader, readers) * loss for reader, loss in zip(readers, losses, strict=True))


def _round_weight(reader: Reader, scale: Float32, fmt: Format) -> Rounded:
    weight, statistics, fmt = reader.weight, reader.statistics, reader.fmt or fmt
    K, N = weight.shape
    cost = np.divide(statistics.diagonal, np.square(scale), dtype=np.float32)
    h = codec.to_blocks(cost[:, None], fmt.block_size)  # (G, b, 1)
    unscaled = np.ones_like(scale)
    centred = np.empty((fmt.blocks_of(K), fmt.block_size, N), np.float32)
    scales, zero_points = np.empty((2, fmt.blocks_of(K), N), np.float32)
    error, plain_error = np.empty((2, K, N), np.float32)

    def work(columns: slice) -> None:
        blocks = codec.to_blocks(weight[:, columns], fmt.block_size)  # (G, b, n)
        scaled, scratch = np.empty_like(blocks), np.empty_like(blocks)
        plain_error[:, columns] = _plain_error(blocks, unscaled, fmt, scaled, scratch)
        _scale_rows(blocks, scale, scaled)
        part, grid = refit(scaled, h, fmt)
        error[:, columns] = _error_of(part, grid, scaled, scale, scratch)
        centred[:, :, columns] = part
        scales[:, columns], zero_points[:, columns] = grid.scales, grid.zero_points

    map_columns(N, work)
    return Rounded(
        centred=centred,
        grid=Grid(scales, zero_points, fmt.bits),
        loss=statistics.loss(reader.emphasized(error)),
        plain_loss=statistics.loss(reader.emphasized(plain_error)),
        energy=statistics.loss(weight if reader.emphasis is None else weight * reader.emphasis),
    )


def _plainly_rounded(weight: Float32, refitted: Rounded, fmt: Format) -> Rounded:
    blocks = codec.to_blocks(weight, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    return replace(refitted, centred=codec.centred_codes(blocks, grid), grid=grid, loss=refitted.plain_loss)


def _plain_error(blocks: Float32, scale: Float32, fmt: Format, scaled: Float32, error: Float32) -> Float32:
    """`_error_of` s W on its min-max grid; `scaled` and `error` are overwritten, (G, b, n) like `blocks`."""
    _scale_rows(blocks, scale, scaled)
    grid = codec.minmax_grid(scaled, fmt)
    codec.centred_codes(scaled, grid, out=error)
    return _error_of(error, grid, scaled, scale, out=error)


def _error_of(centred: Float32, grid: Grid, scaled: Float32, scale: Float32, out: Float32) -> Float32:
    """E = Q(s W) / s - W in `out` (G, b, n), returned as (K, n)."""
    codec.dequantize(centred, grid, out=out)
    out -= scaled
    return codec.from_blocks(_scale_rows(out, np.reciprocal(scale), out), scale.size)


def _scale_rows(blocks: Float32, scale: Float32, out: Float32) -> Float32:
    """Multiply row k by scale[k], padding rows by 1: blocks and out (G, b, n), scale (K,)."""
    padded = np.pad(scale, (0, blocks.shape[0] * blocks.shape[1] - scale.size), constant_values=1)
    scaled: Float32 = np.multiply(blocks, padded.reshape(*blocks.shape[:2], 1), out=out)
    return scaled


def refit(blocks: Float32, h: Float32, fmt: Format) -> tuple[Float32, Grid]:
    """Codes (less zero points) and grid of `blocks` (G, b, n) that minimise each block's sum of h e^2.

    h: what an error on each row costs, (G, b, 1); for s W it is diag(H) / s^2. From every pair of a shrunk range
    and a shifted integer zero point: round, take the scale that is the weighted least-squares fit to these
    integers. The best of all is rounded and fitted again, `POLISHES` times; neither can make it worse.
    """
    start = codec.minmax_grid(blocks, fmt)
    weighted = h * blocks  # (G, b, n)
    codes, scratch = np.empty_like(blocks), np.empty_like(blocks)
    best = replace(start, scales=start.scales.copy(), zero_points=start.zero_points.copy())
    best_gain = np.full(start.scales.shape, -np.inf, np.float32)  # (G, n)
    for offset in (0,) if fmt.symmetric else ZERO_POINT_OFFSETS:
        zero_points = np.clip(start.zero_points + offset, 0, codec.max_code(fmt.bits))
        for shrink in SHRINKS:
            shrunk = codec.round_scales(start.scales * np.float32(shrink), fmt.scale_dtype)
            first = Grid(shrunk, zero_points, fmt.bits)
            along, power = _moments(codec.centred_codes(blocks, first, out=codes), weighted, h, scratch)
            scales = _fitted_scales(along, power, first.scales, fmt)
            gain = scales * (2 * along - scales * power)  # how far sum h w^2 falls
            better = gain > best_gain
            np.copyto(best_gain, gain, where=better)
            np.copyto(best.scales, scales, where=better)
            np.copyto(best.zero_points, zero_points, where=better)
    for _ in range(POLISHES):
        along, power = _moments(codec.centred_codes(blocks, best, out=codes), weighted, h, scratch)
        best = replace(best, scales=_fitted_scales(along, power, best.scales, fmt))
    return codes, best


def _moments(centred: Float32, weighted: Float32, h: Float32, scratch: Float32) -> tuple[Float32, Float32]:
    """sum h t w and sum h t^2 of each block, t the centred codes: (G, n) each."""
    along = np.multiply(centred, weighted, out=scratch).sum(axis=1)
    np.multiply(centred, centred, out=scratch)
    power = np.multiply(scratch, h, out=scratch).sum(axis=1)
    return along, power


def _fitted_scales(along: Float32, power: Float32, fallback: Float32, fmt: Format) -> Float32:
    """argmin over a of sum h (w - a t)^2 = sum h t w / sum h t^2 per block; `fallback` where that is undefined."""
    fitted = np.divide(along, power, out=fallback.copy(), where=power > 0)
    fitted = codec.round_scales(fitted, fmt.scale_dtype)
    return np.where(np.isfinite(fitted) & (fitted * fallback > 0), fitted, fallback)


def _principal(second_moment: Float32, rank: int) -> Float32:
    """The `rank` largest eigenvectors times the roots of their values, by subspace iteration: float32 (K, rank)."""
    K = second_moment.shape[0]
    rank = min(rank, K)
    start = np.random.default_rng(0).standard_normal((K, min(2 * rank, K)), dtype=np.float32)
    basis = np.linalg.qr(second_moment @ start)[0]
    for _ in range(3):
        basis = np.linalg.qr(second_moment @ basis)[0]
    values, vectors = np.linalg.eigh(basis.T @ (second_moment @ basis))
    roots = np.sqrt(np.maximum(values[-rank:], 0))
    principal: Float32 = (basis @ vectors[:, -rank:]) * roots
    return principal
