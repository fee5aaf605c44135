"""Arrays in, codes out: the grid of every block, and every weight on its grid. Knows no graph.

Each block's scale and integer zero point are refitted by weighted least squares (`refit`), in the place of the AWQ
paper's clipping. Then the weights are rounded to that grid, with compensation for each other's errors where rows that
calibration kept apart show that this helps (`awq_onnx.compensate`). What is reported, and the guard against ending
worse than plain rounding, use the whole H.

Shapes: K in, N out, G blocks of b; weights are float32 (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from awq_onnx import codec, compensate
from awq_onnx.codec import Float32, Format, Grid
from awq_onnx.compensate import Compensation
from awq_onnx.search import Reader, plain_error, scale_rows, share
from awq_onnx.threads import map_columns

SHRINKS = (1.0, 0.9, 0.8, 0.7)
ZERO_POINT_OFFSETS = (0, -1, 1)  # 0 first: where an input was dead all are equal, and the first one wins
POLISHES = 2
# What of the mean cost in a block is added to each: what matters here may matter less elsewhere, and what an error
# costs where others make up for it is less uneven.
FLATTENING, FLATTENING_COMPENSATED = 0.3, 1.0


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


def round_group(
    readers: Sequence[Reader], scale: Float32, fmt: Format, *, random: bool = False
) -> tuple[Float32, list[Rounded]]:
    """Put s W on the best grid found for it, for the weights of all `readers`; the scale and the results.

    By the whole H no group ends worse than plain rounding without a scale: one that would gets s = 1, and a weight
    whose refitted grid is worse than its plain one keeps the plain one. random: see `compensate.find`.
    """
    rounded = _round_weights(readers, scale, fmt, random)
    if total_loss(readers, rounded) <= total_loss(readers, rounded, plain=True):
        return scale, rounded
    unscaled = np.ones_like(scale)
    rounded = _round_weights(readers, unscaled, fmt, random)
    return unscaled, [
        r if r.loss <= r.plain_loss else _plainly_rounded(reader.weight, r, reader.fmt or fmt)
        for r, reader in zip(rounded, readers, strict=True)
    ]


def total_loss(readers: Sequence[Reader], rounded: Sequence[Rounded], *, plain: bool = False) -> float:
    """The loss of all `readers` together, by the tokens they saw. plain: of round-to-nearest without a scale."""
    losses = [one.plain_loss if plain else one.loss for one in rounded]
    return sum(share(reader, readers) * loss for reader, loss in zip(readers, losses, strict=True))


def _round_weights(readers: Sequence[Reader], scale: Float32, fmt: Format, random: bool) -> list[Rounded]:
    inputs = {id(reader.statistics): reader.statistics for reader in readers}
    found = {key: compensate.find(statistics, scale, random=random) for key, statistics in inputs.items()}
    return [_round_weight(reader, scale, reader.fmt or fmt, found[id(reader.statistics)]) for reader in readers]


def _round_weight(reader: Reader, scale: Float32, fmt: Format, compensation: Compensation | None) -> Rounded:
    weight, statistics = reader.weight, reader.statistics
    K, N = weight.shape
    cost = np.divide(statistics.diagonal, np.square(scale), dtype=np.float32)
    h = codec.to_blocks(cost[:, None], fmt.block_size)  # (G, b, 1)
    h = h + np.float32(FLATTENING_COMPENSATED if compensation else FLATTENING) * h.mean(axis=1, keepdims=True)
    unscaled = np.ones_like(scale)
    centred = np.empty((fmt.blocks_of(K), fmt.block_size, N), np.float32)
    scales, zero_points = np.empty((2, fmt.blocks_of(K), N), np.float32)
    scaled_weight, unscaled_error = np.empty((2, K, N), np.float32)

    def work(columns: slice) -> None:
        blocks = codec.to_blocks(weight[:, columns], fmt.block_size)  # (G, b, n)
        scaled, scratch = np.empty_like(blocks), np.empty_like(blocks)
        unscaled_error[:, columns] = plain_error(blocks, unscaled, fmt, scaled, scratch)
        scale_rows(blocks, scale, scaled)
        centred[:, :, columns], grid = refit(scaled, h, fmt)
        scales[:, columns], zero_points[:, columns] = grid.scales, grid.zero_points
        scaled_weight[:, columns] = codec.from_blocks(scaled, K)

    map_columns(N, work)
    grid = Grid(scales, zero_points, fmt.bits)
    if compensation is not None:
        centred = compensate.round_weight(scaled_weight, grid, fmt.block_size, compensation)
    error = codec.from_blocks(codec.dequantize(centred, grid), K)
    error -= scaled_weight
    error /= scale[:, None]
    return Rounded(
        centred=centred,
        grid=grid,
        loss=statistics.loss(reader.emphasized(error)),
        plain_loss=statistics.loss(reader.emphasized(unscaled_error)),
        energy=statistics.loss(weight if reader.emphasis is None else weight * reader.emphasis),
    )


def _plainly_rounded(weight: Float32, refitted: Rounded, fmt: Format) -> Rounded:
    blocks = codec.to_blocks(weight, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    return replace(refitted, centred=codec.centred_codes(blocks, grid), grid=grid, loss=refitted.plain_loss)


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
