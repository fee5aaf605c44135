"""Fold scales and round nothing: the model must then compute what it did. Tests and benchmarks/coverage.py do this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from awq_onnx import groups
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.codec import Float32
from awq_onnx.passes import fold
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.sites import Refusal
from awq_onnx.store import OpenedModel

SPREAD = np.float32(np.e)  # scales lie between 1 / e and e: a channel that is forgotten shows


def fold_random_scales(
    opened: OpenedModel, plan: Sequence[Group], maps: Mapping[Group, ChannelMap | Refusal], seed: int = 0
) -> list[Group]:
    """Give every group that has an absorber a random scale and fold it, in `opened`; the groups this was done for.

    maps: as from `channels.trace`.
    """
    rng = np.random.default_rng(seed)
    foldings = []
    for group in plan:
        channels = maps.get(group)
        if not isinstance(group.routes, Refusal) and isinstance(channels, np.ndarray):
            scale = _random_scale(channels, rng)
            absorbers = [route.absorber for route in group.routes]
            divided = tuple((one, groups.divisor(one, channels, scale)) for one in absorbers)
            foldings.append(fold.Folding(group, scale, divided))
    fold.fold_scales(opened.model.graph, foldings, partial(groups.read_weight, opened=opened))
    return [folding.group for folding in foldings]


def _random_scale(channels: ChannelMap, rng: np.random.Generator) -> Float32:
    """One number for each channel of the absorber, as the inputs see it: float32 (K,)."""
    scale: Float32 = (SPREAD ** rng.uniform(-1, 1, channels.max() + 1)).astype(np.float32)[channels]
    return scale
