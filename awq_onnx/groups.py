"""What happens to one group of sites: limits, scale, rounding, packing. Between the graph and the arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import codec, search
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.codec import Float32, Format, UInt8
from awq_onnx.errors import WeightError
from awq_onnx.passes.absorb import Gain, Group, Linear
from awq_onnx.passes.sites import Refusal, Site, constant
from awq_onnx.search import InputStatistics, ScaleChoice, ScaleLimits
from awq_onnx.store import OpenedModel, OutputFiles

HEADROOM = 2  # what calibration saw may be exceeded so much before an activation overflows


@dataclass(frozen=True)
class SiteResult:
    """One weight, rounded. codes: written already. scales (G, N), zero_points: kept, since a fold may divide scales.

    loss, plain_loss, energy: see `search.Rounded`.
    """

    site: Site
    codes: ir.TensorProtocol
    scales: Float32
    zero_points: UInt8 | None
    loss: float
    plain_loss: float
    energy: float


@dataclass(frozen=True)
class GroupResult:
    """One input's scale and its weights. folded: the group's absorber, or why the scale is 1.

    absorbed: what to divide the absorber's channels by, float32 (channels,); None where nothing is folded.
    """

    group: Group
    choice: ScaleChoice
    folded: Gain | Linear | Refusal
    absorbed: Float32 | None
    sites: tuple[SiteResult, ...]


def check_weights(sites: Iterable[Site], opened: OpenedModel) -> None:
    """Raise WeightError where a weight holds NaN, or one to be quantised Inf: before time is spent on calibration."""
    for site in sites:
        if not np.isfinite(opened.read(site.tensor)).all():
            raise WeightError(f"the weight of {site.name} holds NaN or Inf; the model is broken, export it again")
    for value in opened.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and np.isnan(opened.read(tensor)).any():
            raise WeightError(f"the weight {value.name} holds NaN; the model is broken, export it again")
    opened.let_go()


def quantize_group(
    group: Group,
    channels: ChannelMap | Refusal | None,
    statistics: InputStatistics,
    fmt: Format,
    opened: OpenedModel,
    files: OutputFiles,
    names: dict[Site, str],
) -> GroupResult:
    """Search, round, pack and write the weights of one group.

    channels: the absorber's channel behind each channel of the input; None where they are the same.
    """
    weights = [read_weight(site, opened) for site in group.sites]
    folded = channels if isinstance(channels, Refusal) else group.absorber
    sources = channels if isinstance(channels, np.ndarray) else np.arange(group.K)
    if isinstance(folded, Refusal):
        choice = ScaleChoice(0.0, np.ones(group.K, np.float32), ())
    else:
        choice = search.search_scale(weights, statistics, fmt, _limits(folded, sources, statistics, opened))
    scale, rounded = search.round_group(weights, choice.scale, statistics, fmt)
    if np.all(scale == 1):
        choice = ScaleChoice(0.0, scale, choice.losses)
    absorbed = None if isinstance(folded, Refusal) else _absorbed(folded, sources, scale)
    results = [
        SiteResult(
            site=site,
            codes=files.append(f"{names[site]}.codes", codec.pack(one.centred, one.grid)),
            scales=one.grid.scales,
            zero_points=None if fmt.symmetric else codec.pack_zero_points(one.grid.zero_points),
            loss=one.loss,
            plain_loss=one.plain_loss,
            energy=one.energy,
        )
        for site, one in zip(group.sites, rounded, strict=True)
    ]
    return GroupResult(group, choice, folded, absorbed, tuple(results))


def _absorbed(folded: Gain | Linear, sources: ChannelMap, scale: Float32) -> Float32:
    """The scale of the input (K,) as the absorber's channels see it; 1 where a channel does not arrive."""
    absorbed = np.ones(folded.channels, np.float32)
    absorbed[sources] = scale
    return absorbed


def read_weight(site: Site, opened: OpenedModel) -> Float32:
    """W as float32 (K, N), contiguous."""
    stored = opened.read(site.tensor)
    return np.ascontiguousarray(stored.T if site.transposed else stored, dtype=np.float32)


def _limits(
    folded: Gain | Linear, sources: ChannelMap, statistics: InputStatistics, opened: OpenedModel
) -> ScaleLimits:
    """Ties between channels that come from one, and how small s may be before something overflows fp16."""
    tie = None if np.array_equal(sources, np.arange(sources.size)) else sources
    dtype = folded.tensor.dtype if isinstance(folded, Gain) else folded.site.dtype
    if dtype == ir.DataType.FLOAT:  # s spans 1e4 at most: far from what fp32 can hold
        return ScaleLimits(tie)
    largest = np.float32(np.finfo(dtype.numpy()).max / HEADROOM)
    smallest = np.zeros(folded.channels, np.float32)
    np.maximum.at(smallest, sources, np.maximum(statistics.act_max, _magnitude(folded, opened)[sources]) / largest)
    return ScaleLimits(tie, smallest[sources])


def _magnitude(folded: Gain | Linear, opened: OpenedModel) -> Float32:
    """The largest magnitude of each of the absorber's channels: float32 (channels,)."""
    if isinstance(folded, Gain):
        return _flat(folded.tensor)
    magnitude: Float32 = np.abs(read_weight(folded.site, opened)).max(axis=0)
    if folded.bias is not None:
        bias = constant(folded.bias[0].inputs[folded.bias[1]])
        assert bias is not None
        magnitude = np.maximum(magnitude, _flat(bias))
    return magnitude


def _flat(tensor: ir.TensorProtocol) -> Float32:
    values: NDArray[Any] = tensor.numpy()
    return np.abs(values.astype(np.float32)).reshape(-1)
