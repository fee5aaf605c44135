"""Arrays in, codes out: the grid of every block, and every weight on its grid. Knows no graph.

Each block's scale and integer zero point are refitted by weighted least squares (`refit`), in the place of the AWQ
paper's clipping. Then the weights are rounded to that grid, with compensation for each other's errors where rows that
calibration kept apart show that this helps (`awq_onnx.compensate`). What is reported, and the guard against ending
worse than plain rounding, use the whole H.

Columns of a weight do not depend on each other: they are worked on in strips, and no copy of a whole weight is made.

Shapes: K in, N out, G blocks of b; weights are (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from awq_onnx import codec, compensate
from awq_onnx.arrays import beside, in_memory
from awq_onnx.codec import Float32, Format, Grid, UInt8
from awq_onnx.compensate import Compensation
from awq_onnx.search import Reader, plain_error, share, slices
from awq_onnx.threads import Spread, one_by_one

STRIP = 1024  # columns rounded together: enough to make a step of compensation worth its call, few enough for memory
PIECE = 1 << 17  # weights worked on at once: with what goes with them they fit into a core's cache
SHRINKS = (1.0, 0.9, 0.8, 0.7)
ZERO_POINT_OFFSETS = (0, -1, 1)  # 0 first: where an input was dead all are equal, and the first one wins
POLISHES = 2
# What of the mean cost in a block is added to each: what matters here may matter less elsewhere, and what an error
# costs where others make up for it is less uneven.
FLATTENING, FLATTENING_COMPENSATED = 0.3, 1.0


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid, in memory.

    codes: packed, uint8 (N, G, b * bits / 8), see `codec.pack`. grid: scales and zero points.
    loss: tr(E' H E) of what ships. plain_loss: the same of round-to-nearest without a scale.
    energy: tr(W' H W), to make both relative.
    """

    codes: UInt8
    grid: Grid
    loss: float
    plain_loss: float
    energy: float

    @classmethod
    def of(
        cls, centred: Float32, grid: Grid, loss: float = 0.0, plain_loss: float = 0.0, energy: float = 0.0
    ) -> Rounded:
        """Codes less their zero points (G, b, N), and a grid, wherever they are."""
        here = Grid(in_memory(grid.scales), in_memory(grid.zero_points), grid.bits)
        return cls(codec.pack(centred, grid), here, loss, plain_loss, energy)

    @classmethod
    def joined(cls, strips: Sequence[Rounded]) -> Rounded:
        """Strips of columns side by side."""
        if len(strips) == 1:
            return strips[0]
        grids = [strip.grid for strip in strips]
        return cls(
            np.concatenate([strip.codes for strip in strips]),
            Grid(
                np.concatenate([grid.scales for grid in grids], axis=1),
                np.concatenate([grid.zero_points for grid in grids], axis=1),
                grids[0].bits,
            ),
            sum(strip.loss for strip in strips),
            sum(strip.plain_loss for strip in strips),
            sum(strip.energy for strip in strips),
        )


def round_group(
    readers: Sequence[Reader], scale: Float32, fmt: Format, *, random: bool = False, spread: Spread = one_by_one
) -> tuple[Float32, list[Rounded]]:
    """Put s W on the best grid found for it, for the weights of all `readers`; the scale and the results.

    By the whole H no group ends worse than plain rounding without a scale: one that would gets s = 1, and a weight
    whose refitted grid is worse than its plain one keeps the plain one. random: see `compensate.find`. spread: a map
    for pieces of work.
    """
    rounded = _round_weights(readers, scale, fmt, random, spread)
    if total_loss(readers, rounded) <= total_loss(readers, rounded, plain=True):
        return scale, rounded
    unscaled = np.ones_like(scale)
    rounded = _round_weights(readers, unscaled, fmt, random, spread)
    return unscaled, [
        r if r.loss <= r.plain_loss else _plainly_rounded(reader, r, reader.fmt or fmt)
        for r, reader in zip(rounded, readers, strict=True)
    ]


def total_loss(readers: Sequence[Reader], rounded: Sequence[Rounded], *, plain: bool = False) -> float:
    """The loss of all `readers` together, by the tokens they saw. plain: of round-to-nearest without a scale."""
    losses = [one.plain_loss if plain else one.loss for one in rounded]
    return sum(share(reader, readers) * loss for reader, loss in zip(readers, losses, strict=True))


def _round_weights(
    readers: Sequence[Reader], scale: Float32, fmt: Format, random: bool, spread: Spread
) -> list[Rounded]:
    """One input after the other: how to compensate takes as much memory as its H."""
    rounded: dict[int, Rounded] = {}
    for statistics in {id(reader.statistics): reader.statistics for reader in readers}.values():
        compensation = compensate.find(statistics, scale, random=random)
        for at, reader in enumerate(readers):
            if reader.statistics is statistics:
                rounded[at] = _round_weight(reader, scale, reader.fmt or fmt, compensation, spread)
    return [rounded[at] for at in range(len(readers))]


def _round_weight(
    reader: Reader, scale: Float32, fmt: Format, compensation: Compensation | None, spread: Spread
) -> Rounded:
    _ = reader.emphasis  # once, before threads ask for it
    strips = slices(reader.N, STRIP)
    return Rounded.joined(list(spread(lambda strip: _round_strip(reader, strip, scale, fmt, compensation), strips)))


def _round_strip(
    reader: Reader, strip: slice, scale: Float32, fmt: Format, compensation: Compensation | None
) -> Rounded:
    """Some columns of a weight."""
    weight, statistics = reader.columns(strip), reader.statistics
    energy = statistics.loss(reader.emphasized(weight.copy(), strip) if reader.emphasis is not None else weight)
    plain_loss = statistics.loss(reader.emphasized(_plain_error(weight, fmt), strip))
    factors = beside(scale[:, None], weight)
    scaled = weight * factors
    del weight
    grid, codes = _refit_columns(scaled, _costs(statistics.diagonal, scale, fmt, compensation), fmt)
    if compensation is not None:
        del codes
        codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    error = np.subtract(codec.from_blocks(codec.dequantize(codes, grid), len(scale)), scaled, out=scaled)
    error /= factors
    loss = statistics.loss(reader.emphasized(error, strip))
    return Rounded.of(codes, grid, loss, plain_loss, energy)


def _costs(diagonal: Float32, scale: Float32, fmt: Format, compensation: Compensation | None) -> Float32:
    """What an error in each row of s W costs, flattened within each block: float32 (G, b, 1)."""
    cost = np.divide(diagonal, np.square(scale), dtype=np.float32)
    h = codec.to_blocks(cost[:, None], fmt.block_size)
    flattening = np.float32(FLATTENING_COMPENSATED if compensation else FLATTENING)
    flattened: Float32 = h + flattening * h.mean(axis=1, keepdims=True)
    return flattened


def _refit_columns(scaled: Float32, h: Float32, fmt: Format) -> tuple[Grid, Float32]:
    """The grid of s W (K, n), and the codes of plain rounding on it, less their zero points: float32 (G, b, n)."""
    blocks, h = codec.to_blocks(scaled, fmt.block_size), beside(h, scaled)
    codes = np.empty_like(blocks)
    scales, zero_points = np.empty((2, blocks.shape[0], blocks.shape[2]), np.float32, like=blocks)
    for some in _pieces(blocks):
        codes[some], grid = refit(blocks[some], h[some], fmt)
        scales[some], zero_points[some] = grid.scales, grid.zero_points
    return Grid(scales, zero_points, fmt.bits), codes


def _plain_error(weight: Float32, fmt: Format) -> Float32:
    """What round-to-nearest without a scale does to a weight: (K, n)."""
    blocks = codec.to_blocks(weight, fmt.block_size)
    error = np.empty_like(blocks)
    for some in _pieces(blocks):
        plain_error(blocks[some], fmt, out=error[some])
    return codec.from_blocks(error, len(weight))


def _pieces(blocks: Float32) -> list[slice]:
    """Blocks (G, b, n) in pieces that fit into a core's cache."""
    return slices(len(blocks), max(1, PIECE // (blocks.shape[1] * blocks.shape[2])))


def _plainly_rounded(reader: Reader, refitted: Rounded, fmt: Format) -> Rounded:
    def work(strip: slice) -> Rounded:
        blocks = codec.to_blocks(reader.columns(strip), fmt.block_size)
        grid = codec.minmax_grid(blocks, fmt)
        return Rounded.of(codec.centred_codes(blocks, grid), grid)

    plain = Rounded.joined([work(strip) for strip in slices(reader.N, STRIP)])
    return replace(refitted, codes=plain.codes, grid=plain.grid, loss=refitted.plain_loss)


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
    best_gain = np.full_like(start.scales, -np.inf)  # (G, n)
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
    fitted = np.where(power > 0, along / np.where(power > 0, power, np.float32(1)), fallback)
    fitted = codec.round_scales(fitted, fmt.scale_dtype)
    return np.where(np.isfinite(fitted) & (fitted * fallback > 0), fitted, fallback)
