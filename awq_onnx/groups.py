"""What happens to one group of sites: limits, scale, rounding, packing. Between the graph and the arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import drift, layouts, methods, rounding, search
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.codec import Float32, Format
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import WeightError
from awq_onnx.journal import Entry
from awq_onnx.output import OutputFiles
from awq_onnx.passes import embedding
from awq_onnx.passes.absorb import Absorber, Gain, Group
from awq_onnx.passes.sites import Refusal, Site
from awq_onnx.plain import built, plain
from awq_onnx.recipe import UNSCALED, Recipe
from awq_onnx.rounding import Rounded
from awq_onnx.salience import Salience
from awq_onnx.search import Reader, ScaleChoice, ScaleLimits
from awq_onnx.statistics import InputStatistics, mean_of
from awq_onnx.store import OpenedModel, describe, described
from awq_onnx.threads import Spread, one_by_one

HEADROOM = 2  # what calibration saw may be exceeded so much before an activation overflows
LARGEST_FP16 = np.float32(np.finfo(np.float16).max / HEADROOM)
ROUNDED_BYTES = 0.75  # of a weight with its grid, at block size 32
WORTH_A_MUL = 0.95  # of the loss without one: below that a node at run time is worth it


@dataclass(frozen=True)
class SiteResult:
    """One layer, its weight rounded. name: of its tensors. codes, scales, zero_points: written already, and shared by
    layers with one weight. scales: float32 (G, N), kept aside, since a fold may divide them. per_axis: whether they are
    read as (N,), one for each column.

    loss, plain_loss, energy: see `rounding.Rounded`.
    """

    site: Site
    name: str
    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    bits: int
    block_size: int
    per_axis: bool
    loss: float
    plain_loss: float
    energy: float


@dataclass(frozen=True)
class GroupResult:
    """The scale of a group and its weights.

    formula, alpha: what the scale was made with, see `search.FORMULAS`. scale: float32 (K,), of the inputs. folded:
    where it went, or why it could go nowhere. divided: what to divide each absorber's channels by, float32 (channels,),
    one for each of `folded`. mul_loss: where nothing absorbs the scale, the loss with a Mul for it over the loss
    without, None where that was not worth trying. multiplied: whether it is. losses: see `search.ScaleChoice`, None
    where an alpha was not tried. salience: of the inputs' channels, None where calibration did not run the group.
    """

    group: Group
    formula: str
    alpha: float
    scale: Float32
    folded: tuple[Absorber, ...] | Refusal
    divided: tuple[Float32, ...]
    sites: tuple[SiteResult, ...]
    losses: tuple[float | None, ...]
    salience: Salience | None
    mul_loss: float | None = None
    multiplied: bool = False


@dataclass(frozen=True)
class Found:
    """What the search found for a group: a `GroupResult` before it is written.

    layers: the sites of each weight. salience: None where calibration did not run it.
    """

    group: Group
    formula: str
    alpha: float
    scale: Float32
    layers: tuple[tuple[Site, ...], ...]
    formats: tuple[Format, ...]
    rounded: tuple[Rounded, ...]
    losses: tuple[float, ...]
    salience: Salience | None
    mul_loss: float | None
    multiplied: bool


def memory_bytes(group: Group) -> int:
    """About what `search_group` takes at its peak: H of every input and of all, a factor, a strip, what is rounded."""
    inputs = len({value.name for value in group.inputs})
    columns = sum(site.N for site in group.sites)
    rounded = columns + max(site.N for site in group.sites)  # one is joined of its strips
    moments = 4 * group.K**2 * (1 + inputs + (inputs > 1))
    return moments + _strip_bytes(group) + int(ROUNDED_BYTES * group.K * rounded)


def piece_bytes(group: Group, *, drifts: bool) -> int:
    """About what one call of the map takes that `search_group` is given. drifts: whether inputs do."""
    return max(_strip_bytes(group), drift.piece_bytes(group.K) if drifts else 0)


def _strip_bytes(group: Group) -> int:
    """About what rounding a strip of columns takes."""
    return 4 * group.K * rounding.STRIPS * min(rounding.STRIP, max(site.N for site in group.sites))


def check_weights(sites: Iterable[Site], opened: OpenedModel) -> None:
    """Raise WeightError where a weight holds NaN, or one to be quantised Inf: before time is spent on calibration."""
    checked = set()
    for site in sites:
        if not np.isfinite(opened.read(site.tensor)).all():
            raise WeightError(f"the weight of {site.name} holds NaN or Inf; the model is broken, export it again")
        checked.add(id(site.tensor))
        opened.let_go()
    for graph in opened.model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or id(tensor) in checked or not tensor.dtype.is_floating_point():
                continue
            if np.isnan(opened.read(tensor)).any():
                raise WeightError(f"the weight {value.name} holds NaN; the model is broken, export it again")
            opened.let_go()


def search_group(
    group: Group,
    channels: ChannelMap | Refusal | None,
    statistics: Mapping[str, InputStatistics],
    formats: Mapping[Site, Format],
    recipe: Recipe,
    opened: OpenedModel,
    *,
    random: bool = False,
    spread: Spread = one_by_one,
    device: Device = PROCESSOR,
) -> Found:
    """Search the scale of one group and round its weights; nothing is written.

    channels: the absorber's channel behind each channel of the inputs; None or a Refusal where nothing absorbs.
    statistics: of the inputs that calibration has run, by name. formats: of every site; those of one weight have one.
    random: on noise. spread: a map for pieces of work. device: where the statistics are.
    """
    spread = device.map_of(spread)
    layers = layers_of(group)
    seen, readers = _readers(layers, statistics, formats, opened, device, spread)
    absorbers = absorbers_of(group, channels, bool(seen))
    choice = _choice(group, channels, seen, readers, recipe, opened, spread)
    how = methods.rounding_of(recipe, random=random)
    round_with = partial(rounding.round_group, readers, how=how, spread=spread)
    mul_loss, multiplied = None, False
    if not isinstance(absorbers, Refusal):
        scale, rounded = round_with(choice.scale)
    else:
        scale, rounded = round_with(np.ones_like(choice.scale))
        if choice.gain < WORTH_A_MUL:  # of plain rounding: what refits and compensates gains less
            divided_by, scaled = round_with(choice.scale)
            mul_loss = rounding.total_loss(readers, scaled) / (rounding.total_loss(readers, rounded) or 1.0)
            multiplied = recipe.allow_mul and mul_loss < WORTH_A_MUL
            scale, rounded = (divided_by, scaled) if multiplied else (scale, rounded)
    alpha = 0.0 if np.all(scale == 1) else choice.alpha
    return Found(
        group=group,
        formula=choice.formula,
        alpha=alpha,
        scale=scale,
        layers=layers,
        formats=tuple(reader.fmt for reader in readers),
        rounded=tuple(rounded),
        losses=choice.losses,
        salience=Salience.of(mean_of(list(seen.values())), scale) if seen else None,
        mul_loss=mul_loss,
        multiplied=multiplied,
    )


@dataclass(frozen=True)
class Trial:
    """A layer, rounded on few data: to see what each of several formats loses, and what that costs the output.

    losses: about what each format loses, squared error over energy of what the layer makes. scale: float32 (K,), of
    its input. rounded: in the first of the formats, `fmt`.
    """

    losses: tuple[float, ...]
    scale: Float32
    rounded: Rounded
    fmt: Format


def try_group(
    group: Group,
    channels: ChannelMap | Refusal | None,
    statistics: Mapping[str, InputStatistics],
    formats: Mapping[Site, Sequence[Format]],
    recipe: Recipe,
    opened: OpenedModel,
    *,
    random: bool = False,
    spread: Spread = one_by_one,
    device: Device = PROCESSOR,
) -> dict[Site, Trial]:
    """Round the weights of a group in the first format of each, with the scale that is best for that.

    The other arguments are those of `search_group`.
    """
    spread = device.map_of(spread)
    layers = layers_of(group)
    first = {site: some[0] for site, some in formats.items()}
    seen, readers = _readers(layers, statistics, first, opened, device, spread)
    choice = _choice(group, channels, seen, readers, recipe, opened, spread)
    folded = not isinstance(absorbers_of(group, channels, bool(seen)), Refusal)
    how = methods.rounding_of(recipe, random=random)
    scale, rounded = rounding.round_group(readers, choice.scale if folded else np.ones_like(choice.scale), how, spread)
    return {
        site: Trial(rounding.sampled_losses(reader, scale, formats[site], how.ranges), scale, one, reader.fmt)
        for sites, reader, one in zip(layers, readers, rounded, strict=True)
        for site in sites
    }


def _readers(
    layers: Sequence[Sequence[Site]],
    statistics: Mapping[str, InputStatistics],
    formats: Mapping[Site, Format],
    opened: OpenedModel,
    device: Device,
    spread: Spread,
) -> tuple[dict[str, InputStatistics], list[Reader]]:
    """The statistics of inputs that calibration has run; each weight with those of its own."""
    seen = {name: one for name, one in statistics.items() if one.tokens}
    pooled = InputStatistics.merged(list(seen.values())) if seen else InputStatistics.flat(layers[0][0].K, device)
    readers = [_reader(sites[0], _statistics_of(sites, seen, pooled), formats[sites[0]], opened) for sites in layers]
    if any(embedding.lookups(site) for sites in layers for site in sites):
        return seen, readers  # a table says what tokens are
    return seen, drift.corrected(readers, spread)


def _choice(
    group: Group,
    channels: ChannelMap | Refusal | None,
    seen: Mapping[str, InputStatistics],
    readers: Sequence[Reader],
    recipe: Recipe,
    opened: OpenedModel,
    spread: Spread,
) -> ScaleChoice:
    if recipe.method in UNSCALED or any(embedding.lookups(site) for site in group.sites):
        return ScaleChoice(0.0, np.ones(group.K, np.float32), ())
    absorbers = absorbers_of(group, channels, bool(seen))
    foldable = () if isinstance(absorbers, Refusal) else absorbers
    limits = _limits(group, foldable, _sources(group, channels), seen.values(), opened)
    return search.search_scale(readers, limits, spread, methods.candidates_of(recipe))


def _reader(site: Site, statistics: InputStatistics, fmt: Format, opened: OpenedModel) -> Reader:
    return Reader(_stored_weight(site, opened), statistics, site.head_size, site.factor, fmt=fmt)


def write_group(found: Found, files: OutputFiles, names: Mapping[Site, str], recipe: Recipe) -> Entry:
    """Put the packed weights of one group into the output, its scales aside: what `result_of` makes a result of."""
    layers = [
        _write_layer(names[sites[0]], sites[0], rounded, fmt, files, recipe)
        for sites, rounded, fmt in zip(found.layers, found.rounded, found.formats, strict=True)
    ]
    return {
        "formula": found.formula,
        "alpha": found.alpha,
        "scale": describe(files.keep("scale", found.scale)),
        "losses": plain(found.losses),
        "salience": plain(found.salience),
        "mul_loss": found.mul_loss,
        "multiplied": found.multiplied,
        "layers": layers,
    }


def _write_layer(name: str, site: Site, rounded: Rounded, fmt: Format, files: OutputFiles, recipe: Recipe) -> Entry:
    return {
        **layouts.write(name, rounded, fmt, (site.K, site.N), files, recipe),
        "bits": fmt.bits,
        "loss": rounded.loss,
        "plain_loss": rounded.plain_loss,
        "energy": rounded.energy,
    }


def result_of(
    entry: Entry, group: Group, channels: ChannelMap | Refusal | None, folder: Path, names: Mapping[Site, str]
) -> GroupResult:
    """What was written of a group. folder: where the files are."""
    scale = described(entry["scale"], folder).numpy()
    salience = built(Salience | None, entry["salience"])
    folded = absorbers_of(group, channels, salience is not None)
    sources = _sources(group, channels)
    results = {
        one.site: one
        for sites, layer in zip(layers_of(group), entry["layers"], strict=True)
        for one in _layer_results(sites, layer, folder, names)
    }
    return GroupResult(
        group=group,
        formula=entry["formula"],
        alpha=entry["alpha"],
        scale=scale,
        folded=folded,
        divided=() if isinstance(folded, Refusal) else tuple(divisor(one, sources, scale) for one in folded),
        sites=tuple(results[site] for site in group.sites),
        losses=tuple(entry["losses"]),
        salience=salience,
        mul_loss=entry["mul_loss"],
        multiplied=entry["multiplied"],
    )


def _layer_results(sites: Sequence[Site], layer: Entry, folder: Path, names: Mapping[Site, str]) -> list[SiteResult]:
    """What was written of one weight, for every site that has it."""
    codes, scales = described(layer["codes"], folder), described(layer["scales"], folder)
    zero_points = layer["zero_points"] and described(layer["zero_points"], folder)
    numbers = {name: layer[name] for name in ("bits", "block_size", "per_axis", "loss", "plain_loss", "energy")}
    return [SiteResult(site, names[site], codes, scales, zero_points, **numbers) for site in sites]


def _sources(group: Group, channels: ChannelMap | Refusal | None) -> ChannelMap:
    return channels if isinstance(channels, np.ndarray) else np.arange(group.K)


def layers_of(group: Group) -> tuple[tuple[Site, ...], ...]:
    """Its sites by their weight: those that share one are rounded once."""
    layers: dict[tuple[ir.Value, bool, float, ir.DataType], list[Site]] = {}
    for site in group.sites:
        layers.setdefault((site.weight, site.transposed, site.factor, site.dtype), []).append(site)
    return tuple(tuple(together) for together in layers.values())


def _statistics_of(
    sites: Sequence[Site], seen: Mapping[str, InputStatistics], pooled: InputStatistics
) -> InputStatistics:
    """What is known of the inputs of one weight; where these were never seen, of the whole group's, and no token."""
    own = {id(one): one for site in sites if (one := seen.get(site.input.name or "")) is not None}
    return InputStatistics.merged(list(own.values())) if own else replace(pooled, tokens=0)


def absorbers_of(group: Group, channels: ChannelMap | Refusal | None, seen: bool) -> tuple[Absorber, ...] | Refusal:
    """What the scale of a group is folded into, or why nothing is. seen: whether calibration runs it."""
    if isinstance(group.routes, Refusal):
        return group.routes
    if isinstance(channels, Refusal):
        return channels
    if not seen:
        return Refusal(group.name, "calibration does not run it")
    if any(embedding.lookups(site) for site in group.sites):
        return Refusal(group.name, "its weight is the table of the embedding as well")
    return tuple(route.absorber for route in group.routes)


def divisor(absorber: Absorber, sources: ChannelMap, scale: Float32) -> Float32:
    """The scale of the inputs (K,) as the absorber's channels see it; 1 where a channel does not arrive."""
    divided = np.ones(absorber.channels, np.float32)
    divided[sources] = scale
    return divided


def read_weight(site: Site, opened: OpenedModel) -> Float32:
    """W as float32 (K, N), contiguous, with the layer's factor."""
    weight = np.ascontiguousarray(_stored_weight(site, opened), dtype=np.float32)
    return weight if site.factor == 1 else weight * np.float32(site.factor)


def _stored_weight(site: Site, opened: OpenedModel) -> NDArray[Any]:
    """W (K, N) as it is stored, without the layer's factor: a view where it can be."""
    stored = opened.read(site.tensor)
    return stored.T if site.transposed else stored


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
        parts.append(_largest_of_columns(absorber.site, opened))
        bias = read_bias(absorber.site)
        parts += [] if bias is None else [np.abs(bias).astype(np.float32)]
    magnitude: Float32 = np.max(parts, axis=0)
    return magnitude


def _largest_of_columns(site: Site, opened: OpenedModel) -> Float32:
    """max|w| of each column of a weight: float32 (N,)."""
    stored = _stored_weight(site, opened)
    largest = [np.abs(stored[:, some]).max(axis=0).astype(np.float32) for some in search.slices(site.N, search.SLICE)]
    return np.concatenate(largest) * np.float32(abs(site.factor))
