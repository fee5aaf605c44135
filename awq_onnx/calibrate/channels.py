"""Trace which channel of an absorber becomes which channel of the inputs it serves (see passes/skeleton.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.errors import RuntimeFailedError
from awq_onnx.passes import skeleton
from awq_onnx.passes.absorb import Group, Route
from awq_onnx.passes.sites import Refusal, Survey

BASE = 16  # channel numbers are sent digit by digit: 1 .. 16 survive fp16 and an average over tokens exactly
TOLERANCE = 0.05

ChannelMap = NDArray[np.int64]  # (K,): the absorber's channel behind each channel of the input
Drive = Callable[[int], NDArray[np.int64]]  # what an absorber with so many channels makes
Runs = Mapping[str, Sequence[NDArray[np.float64]]]  # what a value holds for each of the drives


def trace(
    models: Sequence[onnx.ModelProto], folder: Path, groups: Sequence[Group], survey: Survey, feed: Feed
) -> dict[Group, ChannelMap | Refusal]:
    """For every group with an absorber: the map that all of its inputs have in common, or why there is none.

    models: the model, to be taken apart; several where an If has to be followed both ways. feed: any valid input, with
    no past.
    """
    routes = skeleton.traced_routes(groups)
    runs: Runs = {}
    failure = None
    for model in models if routes else ():
        try:
            runs = {**_run(skeleton.build(model, routes, (*survey.sites, *survey.floats)), folder, feed), **runs}
        except RuntimeFailedError as error:
            failure = error
    maps = {g: _common_map(g, g.routes, runs) for g in groups if not isinstance(g.routes, Refusal)}
    if failure is None:
        return maps
    refusal = f"its channels could not be traced: {failure}"
    return {g: Refusal(g.name, refusal) if isinstance(one, Refusal) else one for g, one in maps.items()}


def _run(built: skeleton.Skeleton, folder: Path, feed: Feed) -> Runs:
    if not built.outputs:
        return {}
    session = runtime.session(built.model.SerializeToString(), folder, fuse=False, reuse=False)
    needed = {value.name for value in session.get_inputs()}
    digits = _digits_needed(max(size for size, _ in built.drives.values()))
    drives: list[Drive] = [_ones, *(partial(_digit, position) for position in range(digits)), _scattered]
    runs = [
        runtime.run(session, list(built.outputs), _only(needed, {**feed, **_drives(built, drive)})) for drive in drives
    ]
    return {name: [run[index].astype(np.float64) for run in runs] for index, name in enumerate(built.outputs)}


def _digits_needed(channels: int) -> int:
    digits = 1
    while BASE**digits < channels:
        digits += 1
    return digits


def _ones(size: int) -> ChannelMap:
    return np.ones(size, np.int64)


def _digit(position: int, size: int) -> ChannelMap:
    """One digit of each channel's number, plus 1."""
    digit: ChannelMap = np.arange(size) // BASE**position % BASE + 1
    return digit


def _scattered(size: int) -> ChannelMap:
    """1 .. 16 without order: the average of some channels can look like one in digits, hardly here as well."""
    scattered: ChannelMap = np.random.default_rng(size).integers(1, BASE + 1, size)
    return scattered


def _drives(built: skeleton.Skeleton, drive: Drive) -> Feed:
    return {name: drive(size).astype(dtype.numpy()) for name, (size, dtype) in built.drives.items()}


def _only(names: set[str], feed: Feed) -> Feed:
    return {name: values for name, values in feed.items() if name in names}


def _common_map(group: Group, routes: Sequence[Route], runs: Runs) -> ChannelMap | Refusal:
    maps = [found for route in routes for found in _maps(group, route, runs)]
    first = maps[0]
    if first is None or any(found is None for found in maps):
        return Refusal(routes[0].absorber.name, "its channels do not arrive at the input one by one")
    if not all(found is not None and np.array_equal(first, found) for found in maps):
        return Refusal(
            routes[0].absorber.name,
            "the layers behind it read its channels in different orders, so they cannot share a scale",
        )
    if any(_meets(route, first, runs) for route in routes):
        return Refusal(routes[0].absorber.name, "something else reads the channels that would be divided")
    return first


def _maps(group: Group, route: Route, runs: Runs) -> list[ChannelMap | None]:
    """One map for each input of a route; None where channels are mixed or nothing arrived."""
    return [
        np.arange(group.K) if moved is None else _map(runs.get(moved.name or "", ()), route.absorber.channels, group.K)
        for moved in route.inputs.values()
    ]


def _map(runs: Sequence[NDArray[np.float64]], size: int, K: int) -> ChannelMap | None:
    channels = _decode(runs, size)
    if channels is None or channels.shape[-1] != K:
        return None
    rows = channels.reshape(-1, K)
    return rows[0] if np.all(rows == rows[0]) else None


def _meets(route: Route, channels: ChannelMap, runs: Runs) -> bool:
    """Whether what others read holds a channel that would be divided, or could hold one."""
    for value in route.untouched:
        others = _decode(runs.get(value.name or "", ()), route.absorber.channels)
        if others is None or np.isin(others, channels).any():
            return True
    return False


def _decode(runs: Sequence[NDArray[np.float64]], size: int) -> NDArray[np.int64] | None:
    """The channel that each number of a value came from, in its shape; None where one came from several, or none."""
    if not runs or not runs[0].size or not np.all(np.isfinite(runs[0])) or np.any(runs[0] == 0):
        return None
    ones, *digits, scattered = runs
    channels = np.zeros(ones.shape, np.int64)
    for position, run in enumerate(digits):
        channels += (np.rint(run / ones).astype(np.int64) - 1) * BASE**position
    if not np.all((channels >= 0) & (channels < size)):
        return None
    drives = [*(_digit(position, size) for position in range(len(digits))), _scattered(size)]
    exact = all(
        np.all(np.abs(run / ones - drive[channels]) < TOLERANCE)
        for run, drive in zip([*digits, scattered], drives, strict=True)
    )
    return channels if exact else None
