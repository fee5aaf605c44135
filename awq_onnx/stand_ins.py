"""Rounded layers as files: what a graph runs in the place of the original ones, while there is no output yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec, groups, layouts
from awq_onnx.codec import Float32
from awq_onnx.groups import SiteResult, Trial
from awq_onnx.passes.sites import Site
from awq_onnx.passes.switch import StandIn

FLOAT32 = np.dtype(np.float32)


def of_trial(site: Site, trial: Trial, path: Path) -> StandIn:
    """A layer that was rounded for a trial."""
    fmt, grid = trial.fmt, trial.rounded.grid
    codes, grid = codec.as_stored(trial.rounded.codes, grid, fmt)
    zero_points = None if fmt.symmetric else codec.pack_zero_points(grid.zero_points, fmt.bits)
    return _written(site, codes, grid.scales, zero_points, trial.scale, (fmt.bits, fmt.stored_block_size), path)


def of_result(layer: SiteResult, scale: Float32, path: Path) -> StandIn:
    """A layer that is finished; scale: of its input, float32 (K,)."""
    codes, zero_points, scales, block_size = layouts.as_matmul_nbits(
        layer.codes, layer.zero_points, layer.scales.numpy(), layer.bits, layer.block_size
    )
    return _written(layer.site, codes, scales, zero_points, scale, (layer.bits, block_size), path)


def _written(
    site: Site,
    codes: NDArray[Any],
    scales: Float32,
    zero_points: NDArray[Any] | None,
    scale: Float32,
    format_: tuple[int, int],
    path: Path,
) -> StandIn:
    """format_: bits and block size. See `StandIn` for what is in the file."""
    arrays = {"codes": codes, "scales": codec.pack_scales(scales, FLOAT32)}
    if zero_points is not None:
        arrays["zero_points"] = zero_points
    if not np.all(scale == 1):
        arrays["inverse"] = np.reciprocal(scale)
    bias = groups.read_bias(site)
    if bias is not None:
        arrays["bias"] = bias.astype(np.float32)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return StandIn(site.input.name or "", path, site.K, site.N, *format_)
