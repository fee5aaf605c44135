"""Arrays in, codes out: the grid of every block, and every weight on its grid. Knows no graph.

Each block gets its grid (`awq_onnx.grids`). Then the weights are rounded to it, with compensation for each other's
errors where rows that calibration kept apart show that this helps (`awq_onnx.compensate`). What is reported, and the
guard against ending worse than plain rounding, use the whole H.

Columns of a weight do not depend on each other: they are worked on in strips, and no copy of a whole weight is made.

Shapes: K in, N out, G blocks of b; weights are (K, N).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from awq_onnx import codec, compensate, grids
from awq_onnx.arrays import THERE_BYTES, at_once, beside, in_memory
from awq_onnx.codec import Float32, Format, Grid, UInt8
from awq_onnx.compensate import Compensation
from awq_onnx.grids import CLIPPED, FITTED, WHOLE
from awq_onnx.search import Reader, plain_error, share, slices
from awq_onnx.statistics import InputStatistics
from awq_onnx.threads import Spread, one_by_one

STRIP = 1024  # columns rounded together: enough to make a step of compensation worth its call, few enough for memory
STRIPS = 8  # of columns, in float32: what rounding holds of a weight at its peak
SAMPLED = 128  # columns of a wider weight that several formats are tried on
PIECE = 1 << 17  # weights worked on at once: with what goes with them they fit into a core's cache
# What of the mean cost in a block is added to each: what matters here may matter less elsewhere, and what an error
# costs where others make up for it is less uneven.
FLATTENING, FLATTENING_COMPENSATED = 0.3, 1.0


@dataclass(frozen=True)
class Rounding:
    """How weights get onto a grid.

    ranges: of the blocks, see `awq_onnx.grids`. compensate: whether errors are made up for, where that helps.
    random: calibration ran on noise, see `compensate.find`.
    """

    ranges: str = FITTED
    compensate: bool = True
    random: bool = False


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
    readers: Sequence[Reader], scale: Float32, how: Rounding | None = None, spread: Spread = one_by_one
) -> tuple[Float32, list[Rounded]]:
    """Put s W on the best grid found for it, for the weights of all `readers`; the scale and the results.

    By the whole H no group ends worse than plain rounding without a scale: one that would gets s = 1, and a weight
    whose grid is worse than its plain one keeps the plain one. how: by default fitted and compensated. spread: a map
    for pieces of work.
    """
    how = how or Rounding()
    rounded = _round_weights(readers, scale, how, spread)
    if total_loss(readers, rounded) <= total_loss(readers, rounded, plain=True):
        return scale, rounded
    unscaled = np.ones_like(scale)
    rounded = _round_weights(readers, unscaled, how, spread)
    return unscaled, [
        r if r.loss <= r.plain_loss else _plainly_rounded(reader, r) for r, reader in zip(rounded, readers, strict=True)
    ]


def total_loss(readers: Sequence[Reader], rounded: Sequence[Rounded], *, plain: bool = False) -> float:
    """The loss of all `readers` together, by the tokens they saw. plain: of round-to-nearest without a scale."""
    losses = [one.plain_loss if plain else one.loss for one in rounded]
    return sum(share(reader, readers) * loss for reader, loss in zip(readers, losses, strict=True))


def _round_weights(readers: Sequence[Reader], scale: Float32, how: Rounding, spread: Spread) -> list[Rounded]:
    """One input after the other: how to compensate takes as much memory as its H."""
    rounded: dict[int, Rounded] = {}
    for statistics in {id(reader.statistics): reader.statistics for reader in readers}.values():
        compensation = compensate.find(statistics, scale, random=how.random) if how.compensate else None
        own = {at: reader for at, reader in enumerate(readers) if reader.statistics is statistics}
        rounded.update(zip(own, _round_readers(list(own.values()), scale, how, compensation, spread), strict=True))
    return [rounded[at] for at in range(len(readers))]


def _round_readers(
    readers: Sequence[Reader], scale: Float32, how: Rounding, compensation: Compensation | None, spread: Spread
) -> Iterator[Rounded]:
    """Of one input."""
    _ = [reader.emphasis for reader in readers]  # once, before threads ask for it
    compensated = compensation is not None
    grids_of = [_Grids(how.ranges, one.statistics, scale, one.fmt, compensated=compensated) for one in readers]
    pieces = [(at, strip) for at, reader in enumerate(readers) for strip in _strips(reader)]

    def work(piece: tuple[int, slice]) -> Rounded:
        at, strip = piece
        return _round_strip(readers[at], strip, scale, grids_of[at], compensation)

    made = list(spread(work, pieces))
    for at in range(len(readers)):
        yield Rounded.joined([one for (of, _), one in zip(pieces, made, strict=True) if of == at])


def _round_strip(
    reader: Reader, strip: slice, scale: Float32, grids_of: _Grids, compensation: Compensation | None
) -> Rounded:
    """Some columns of a weight."""
    weight, statistics, fmt = reader.columns(strip), reader.statistics, reader.fmt
    energy = statistics.loss(reader.emphasized(weight.copy(), strip) if reader.emphasis is not None else weight)
    plain_loss = statistics.loss(reader.emphasized(_plain_error(weight, fmt), strip))
    factors = beside(scale[:, None], weight)
    scaled = weight * factors
    del weight
    grid, codes = grids_of.find(scaled)
    if compensation is not None:
        del codes
        codes = compensate.round_weight(scaled, grid, fmt.block_size, compensation)
    error = np.subtract(codec.from_blocks(codec.dequantize(codes, grid), len(scale)), scaled, out=scaled)
    error /= factors
    loss = statistics.loss(reader.emphasized(error, strip))
    return Rounded.of(codes, grid, loss, plain_loss, energy)


def sampled_losses(reader: Reader, scale: Float32, formats: Sequence[Format], ranges: str) -> tuple[float, ...]:
    """About what rounding to the nearest loses in each format: squared error over energy, from some columns."""
    some = np.arange(0, reader.N, -(-reader.N // SAMPLED))
    weight, statistics = reader.columns(some), reader.statistics
    energy = float(statistics.column_energy(weight).sum())
    losses = []
    for fmt in formats:
        scaled = weight * beside(scale[:, None], weight)
        grid, codes = _Grids(ranges, statistics, scale, fmt, compensated=False).find(scaled)
        error = codec.from_blocks(codec.dequantize(codes, grid), reader.K) - scaled
        losses.append(float(statistics.column_energy(error, scale).sum()) / energy if energy > 0 else 0.0)
    return tuple(losses)


class _Grids:
    """Finds the grid of some columns of s W."""

    def __init__(
        self, ranges: str, statistics: InputStatistics, scale: Float32, fmt: Format, *, compensated: bool
    ) -> None:
        self.fmt = fmt
        self._ranges = ranges
        if ranges == FITTED:
            cost = np.divide(statistics.diagonal, np.square(scale), dtype=np.float32)
            h = codec.to_blocks(cost[:, None], fmt.block_size)
            flattening = np.float32(FLATTENING_COMPENSATED if compensated else FLATTENING)
            self._weights = beside(h + flattening * h.mean(axis=1, keepdims=True), statistics.second_moment)
        elif ranges == CLIPPED:
            self._weights = statistics.block_moments(scale, fmt.block_size)

    def find(self, scaled: Float32) -> tuple[Grid, Float32]:
        """The grid of s W (K, n), and the codes of plain rounding on it, less their zero points: (G, b, n)."""
        blocks = codec.to_blocks(scaled, self.fmt.block_size)
        codes = np.empty_like(blocks)
        scales, zero_points = np.empty((2, blocks.shape[0], blocks.shape[2]), np.float32, like=blocks)
        for some in _pieces(blocks):
            codes[some], grid = self._find(blocks[some], some)
            scales[some], zero_points[some] = grid.scales, grid.zero_points
        return Grid(scales, zero_points, self.fmt.bits), codes

    def _find(self, blocks: Float32, which: slice) -> tuple[Float32, Grid]:
        if self._ranges == FITTED:
            return grids.fit(blocks, self._weights[which], self.fmt)
        if self._ranges == CLIPPED:
            return grids.clip(blocks, self._weights[which], self.fmt)
        assert self._ranges == WHOLE
        grid = codec.minmax_grid(blocks, self.fmt)
        return codec.centred_codes(blocks, grid), grid


def _plain_error(weight: Float32, fmt: Format) -> Float32:
    """What round-to-nearest without a scale does to a weight: (K, n)."""
    blocks = codec.to_blocks(weight, fmt.block_size)
    error = np.empty_like(blocks)
    for some in _pieces(blocks):
        plain_error(blocks[some], fmt, out=error[some])
    return codec.from_blocks(error, len(weight))


def _strips(reader: Reader) -> list[slice]:
    there = THERE_BYTES // (4 * reader.K * STRIPS)
    return slices(reader.N, at_once(STRIP, there, reader.statistics.second_moment))


def _pieces(blocks: Float32) -> list[slice]:
    """Blocks (G, b, n) of a strip in pieces that fit into a core's cache."""
    here = max(1, PIECE // (blocks.shape[1] * blocks.shape[2]))
    return slices(len(blocks), at_once(here, len(blocks), blocks))


def _plainly_rounded(reader: Reader, refitted: Rounded) -> Rounded:
    fmt = reader.fmt

    def work(strip: slice) -> Rounded:
        blocks = codec.to_blocks(reader.columns(strip), fmt.block_size)
        grid = codec.minmax_grid(blocks, fmt)
        return Rounded.of(codec.centred_codes(blocks, grid), grid)

    plain = Rounded.joined([work(strip) for strip in _strips(reader)])
    return replace(refitted, codes=plain.codes, grid=plain.grid, loss=refitted.plain_loss)
