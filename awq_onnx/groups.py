"""What happens to one group of sites: limits, scale, rounding, packing. Between the graph and the arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import codec, rounding, search
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.codec import Float32, Format
from awq_onnx.errors import WeightError
from awq_onnx.passes import embedding
from awq_onnx.passes.absorb import Absorber, Gain, Group
from awq_onnx.passes.sites import Refusal, Site
from awq_onnx.recipe import Recipe
from awq_onnx.rounding import Rounded
from awq_onnx.search import Reader, ScaleChoice, ScaleLimits
from awq_onnx.statistics import InputStatistics
from awq_onnx.store import OpenedModel, OutputFiles

HEADROOM = 2  # what calibration saw may be exceeded so much before an activation overflows
LARGEST_FP16 = np.float32(np.finfo(np.float16).max / HEADROOM)
WORTH_A_MUL = 0.95  # of the loss without one: below that a node at run time is worth it


@dataclass(frozen=True)
class SiteResult:
    """One layer, its weight rounded. name: of its tensors. codes, zero_points: written already, and shared by layers
    with one weight. scales (G, N): kept, since a fold may divide them.

    loss, plain_loss, energy: see `rounding.Rounded`.
    """

    site: Site
    name: str
    codes: ir.TensorProtocol
    scales: Float32
    zero_points: ir.TensorProtocol | None
    bits: int
    loss: float
    plain_loss: float
    energy: float


@dataclass(frozen=True)
class GroupResult:
    """The scale of a group and its weights.

    scale: float32 (K,), of the inputs. folded: where it went, or why it could go nowhere. divided: what to divide each
    absorber's channels by, float32 (channels,), one for each of `folded`. mul_loss: where nothing absorbs the scale,
    the loss with a Mul for it over the loss without, None where that was not worth trying. multiplied: whether it is.
    """

    group: Group
    choice: ScaleChoice
    scale: Float32
    folded: tuple[Absorber, ...] | Refusal
    divided: tuple[Float32, ...]
    sites: tuple[SiteResult, ...]
    mul_loss: float | None = None
    multiplied: bool = False


def check_weights(sites: Iterable[Site], opened: OpenedModel) -> None:
    """Raise WeightError where a weight holds NaN, or one to be quantised Inf: before time is spent on calibration."""
    for site in sites:
        if not np.isfinite(opened.read(site.tensor)).all():
            raise WeightError(f"the weight of {site.name} holds NaN or Inf; the model is broken, export it again")
    for graph in opened.model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and np.isnan(opened.read(tensor)).any():
                raise WeightError(f"the weight {value.name} holds NaN; the model is broken, export it again")
    opened.let_go()


def quantize_group(
    group: Group,
    channels: ChannelMap | Refusal | None,
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    opened: OpenedModel,
    files: OutputFiles,
    names: dict[Site, str],
    *,
    random: bool = False,
) -> GroupResult:
    """Search, round, pack and write the weights of one group.

    channels: the absorber's channel behind each channel of the inputs; None or a Refusal where nothing absorbs.
    statistics: of the inputs that calibration has run, by name. random: on noise.
    """
    seen = {name: one for name, one in statistics.items() if one.tokens}
    layers = _layers(group.sites)
    pooled = InputStatistics.merged(list(seen.values())) if seen else InputStatistics.flat(group.K)
    formats = [_format(sites, recipe) for sites in layers]
    readers = [
        Reader(read_weight(sites[0], opened), _statistics_of(sites, seen, pooled), sites[0].head_size, fmt)
        for sites, fmt in zip(layers, formats, strict=True)
    ]
    fmt = formats[0]
    absorbers = _absorbers(group, channels, seen)
    sources = channels if isinstance(channels, np.ndarray) else np.arange(group.K)
    foldable = () if isinstance(absorbers, Refusal) else absorbers
    if any(embedding.lookups(site) for site in group.sites):
        choice = ScaleChoice(0.0, np.ones(group.K, np.float32), ())
    else:
        choice = search.search_scale(readers, fmt, _limits(group, foldable, sources, seen.values(), opened))
    round_with = partial(rounding.round_group, readers, fmt=fmt, random=random)
    mul_loss, multiplied = None, False
    if foldable:
        scale, rounded = round_with(choice.scale)
    else:
        scale, rounded = round_with(np.ones_like(choice.scale))
        if choice.gain < WORTH_A_MUL:  # of plain rounding: what refits and compensates gains less
            divided_by, scaled = round_with(choice.scale)
            mul_loss = rounding.total_loss(readers, scaled) / (rounding.total_loss(readers, rounded) or 1.0)
            multiplied = recipe.allow_mul and mul_loss < WORTH_A_MUL
            scale, rounded = (divided_by, scaled) if multiplied else (scale, rounded)
    if np.all(scale == 1):
        choice = ScaleChoice(0.0, scale, choice.losses)
    divided = tuple(divisor(one, sources, scale) for one in foldable)
    results = {
        site: result
        for sites, one, own in zip(layers, rounded, formats, strict=True)
        for site, result in zip(sites, _written(sites, one, own, files, names), strict=True)
    }
    ordered = tuple(results[site] for site in group.sites)
    return GroupResult(group, choice, scale, absorbers, divided, ordered, mul_loss, multiplied)


def _layers(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites by their weight: those that share one are rounded once."""
    layers: dict[tuple[ir.Value, bool, float, ir.DataType], list[Site]] = {}
    for site in sites:
        layers.setdefault((site.weight, site.transposed, site.factor, site.dtype), []).append(site)
    return list(layers.values())


def _format(sites: Sequence[Site], recipe: Recipe) -> Format:
    bits = recipe.lm_head_bits if all(site.is_head for site in sites) else None
    return Format(recipe.block_size, recipe.symmetric, np.dtype(sites[0].dtype.numpy()), bits or 4)


def _statistics_of(
    sites: Sequence[Site], seen: Mapping[str, InputStatistics], pooled: InputStatistics
) -> InputStatistics:
    """What is known of the inputs of one weight; where these were never seen, of the whole group's, and no token."""
    own = {id(one): one for site in sites if (one := seen.get(site.input.name or "")) is not None}
    return InputStatistics.merged(list(own.values())) if own else replace(pooled, tokens=0)


def _absorbers(
    group: Group, channels: ChannelMap | Refusal | None, seen: Mapping[str, InputStatistics]
) -> tuple[Absorber, ...] | Refusal:
    if isinstance(group.routes, Refusal):
        return group.routes
    if isinstance(channels, Refusal):
        return channels
    if not seen:
        return Refusal(group.name, "calibration does not run it")
    if any(embedding.lookups(site) for site in group.sites):
        return Refusal(group.name, "its weight is the table of the embedding as well")
    return tuple(route.absorber for route in group.routes)


def _written(
    sites: Sequence[Site], rounded: Rounded, fmt: Format, files: OutputFiles, names: dict[Site, str]
) -> list[SiteResult]:
    """The codes of one weight in the data file, for every site that has it."""
    name, grid = names[sites[0]], rounded.grid
    codes = files.append(f"{name}.codes", codec.pack(rounded.centred, grid))
    zero_points = None
    if not fmt.symmetric:
        zero_points = files.append(f"{name}.zero_points", codec.pack_zero_points(grid.zero_points, fmt.bits))
    return [
        SiteResult(
            site=site,
            name=names[site],
            codes=codes,
            scales=grid.scales,
            zero_points=zero_points,
            bits=fmt.bits,
            loss=rounded.loss,
            plain_loss=rounded.plain_loss,
            energy=rounded.energy,
        )
        for site in sites
    ]


def divisor(absorber: Absorber, sources: ChannelMap, scale: Float32) -> Float32:
    """The scale of the inputs (K,) as the absorber's channels see it; 1 where a channel does not arrive."""
    divided = np.ones(absorber.channels, np.float32)
    divided[sources] = scale
    return divided


def read_weight(site: Site, opened: OpenedModel) -> Float32:
    """W as float32 (K, N), contiguous, with the layer's factor."""
    stored = opened.read(site.tensor)
    weight = np.ascontiguousarray(stored.T if site.transposed else stored, dtype=np.float32)
    return weight if site.factor == 1 else weight * np.float32(site.factor)


def read_bias(site: Site) -> NDArray[np.float64] | None:
    """What the layer itself adds: float64 (N,)."""
    if site.bias is None:
        return None
    return np.broadcast_to(site.bias.numpy().astype(np.float64).reshape(-1) * site.beta, (site.N,))


def _limits(
    group: Group,
    absorbers: Sequence[Absorber],
    sources: ChannelMap,
    seen: Iterable[InputStatistics],
    opened: OpenedModel,
) -> ScaleLimits:
    """Ties between channels that come from one, and how small s may be before something overflows fp16."""
    tie = None if np.array_equal(sources, np.arange(sources.size)) else sources
    act_max = np.max([np.zeros(group.K, np.float32), *(one.act_max for one in seen)], axis=0)
    smallest = [
        _smallest(absorber, sources, act_max, opened) for absorber in absorbers if absorber.dtype == ir.DataType.FLOAT16
    ]
    if any(site.dtype == ir.DataType.FLOAT16 for site in group.sites):  # x / s itself
        smallest.append(act_max / LARGEST_FP16)
    return ScaleLimits(tie, np.max(smallest, axis=0) if smallest else None)


def _smallest(absorber: Absorber, sources: ChannelMap, act_max: Float32, opened: OpenedModel) -> Float32:
    """How small s may be, float32 (K,), before x / s or what is divided for it overflows fp16."""
    smallest = np.zeros(absorber.channels, np.float32)
    np.maximum.at(smallest, sources, np.maximum(act_max, _magnitude(absorber, opened)[sources]) / LARGEST_FP16)
    limits: Float32 = smallest[sources]
    return limits


def _magnitude(absorber: Absorber, opened: OpenedModel) -> Float32:
    """The largest magnitude of what is divided for each of the absorber's channels: float32 (channels,)."""
    channels = absorber.channels
    parts = [np.abs(vector.tensor.numpy().astype(np.float32)).reshape(-1)[-channels:] for vector in absorber.vectors]
    if not isinstance(absorber, Gain):
        parts.append(np.abs(read_weight(absorber.site, opened)).max(axis=0))
        bias = read_bias(absorber.site)
        parts += [] if bias is None else [np.abs(bias).astype(np.float32)]
    magnitude: Float32 = np.max(parts, axis=0)
    return magnitude
