"""Fold scales and round nothing: the model must then compute what it did. Tests and benchmarks/coverage.py do this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from awq_onnx import groups
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.codec import Float32
from awq_onnx.passes import fold
from awq_onnx.passes.absorb import Group, Linear
from awq_onnx.passes.sites import Refusal, Site
from awq_onnx.store import OpenedModel

SPREAD = np.float32(np.e)  # scales lie between 1 / e and e: a channel that is forgotten shows


def fold_random_scales(
    opened: OpenedModel, plan: Sequence[Group], maps: Mapping[Group, ChannelMap | Refusal], seed: int = 0
) -> list[Group]:
    """Give every group that has an absorber a random scale and fold it, in `opened`; the groups this was done for.

    maps: as from `channels.trace`.
    """
    rng = np.random.default_rng(seed)
    rows: dict[Site, Float32] = {}
    columns: dict[Site, Float32] = {}
    folded = []
    for group in plan:
        channels = maps.get(group)
        if isinstance(group.routes, Refusal) or not isinstance(channels, np.ndarray):
            continue
        scale = _random_scale(channels, rng)
        for route in group.routes:
            divisor = groups.divisor(route.absorber, channels, scale)
            for vector in route.absorber.vectors:
                fold.divide_vector(opened.model.graph, vector, divisor)
            if isinstance(route.absorber, Linear):
                columns[route.absorber.site] = divisor
        rows.update((site, scale) for site in (*group.sites, *group.compensated))
        folded.append(group)
    for layer in {**rows, **columns}:
        weight = groups.read_weight(layer, opened)
        fold.rescale_layer(opened.model.graph, layer, weight, rows.get(layer), columns.get(layer))
    return folded


def _random_scale(channels: ChannelMap, rng: np.random.Generator) -> Float32:
    """One number for each channel of the absorber, as the inputs see it: float32 (K,)."""
    scale: Float32 = (SPREAD ** rng.uniform(-1, 1, channels.max() + 1)).astype(np.float32)[channels]
    return scale
