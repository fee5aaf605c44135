"""The grid of every block of s W, three ways: over its whole range, clipped as the AWQ paper does it, or fitted.

Clipping (section 5.1 of arXiv 2306.00978 calls it weight clipping; its code tries a range of 1.00, 0.95 .. 0.55 times
max|w|) takes the range with which the block's part of the output errs least, by the block's part of H. Fitting takes
the weighted least-squares scale for the integers that rounding gives, and a zero point near the plain one: it moves
both ends of the range, to wherever an error costs least.

Shapes: K in, N out, G blocks of b; blocks are (G, b, n).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from awq_onnx import codec
from awq_onnx.codec import Float32, Format, Grid

WHOLE, CLIPPED, FITTED = "whole", "clipped", "fitted"
CLIPS = tuple(1 - step / 20 for step in range(10))
SHRINKS = (1.0, 0.9, 0.8, 0.7)
ZERO_POINT_OFFSETS = (0, -1, 1)  # 0 first: where an input was dead all are equal, and the first one wins
POLISHES = 2


def clip(blocks: Float32, moments: Float32, fmt: Format) -> tuple[Float32, Grid]:
    """Codes (less zero points) and grid with the range that costs each block least, e' M e for its error e.

    moments: M, (G, b, b), the diagonal blocks of H over s s'.
    """
    largest = np.abs(blocks).max(axis=1)[:, None, :]  # (G, 1, n)
    best, least = None, None
    for ratio in CLIPS:
        bound = largest * np.float32(ratio)
        grid = codec.minmax_grid(np.clip(blocks, -bound, bound), fmt)
        error = codec.dequantize(codec.centred_codes(blocks, grid), grid)
        error -= blocks
        cost = (error * np.matmul(moments, error)).sum(axis=1)  # (G, n)
        if best is None or least is None:
            best, least = grid, cost
            continue
        better = cost < least
        np.copyto(least, cost, where=better)
        np.copyto(best.scales, grid.scales, where=better)
        np.copyto(best.zero_points, grid.zero_points, where=better)
    assert best is not None
    return codec.centred_codes(blocks, best), best


def fit(blocks: Float32, h: Float32, fmt: Format) -> tuple[Float32, Grid]:
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
