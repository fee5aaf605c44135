"""Trace which channel of an absorber becomes which channel of the input it serves (see passes/skeleton.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.errors import RuntimeFailedError
from awq_onnx.passes import skeleton
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.sites import Refusal

BASE = 16  # channel numbers are sent digit by digit: 1 .. 16 survive fp16 and an average over tokens exactly
TOLERANCE = 0.05

ChannelMap = NDArray[np.int64]  # (K,): the absorber's channel behind each channel of the input
Drive = Callable[[int], NDArray[np.int64]]  # what an absorber with so many channels makes


def trace(model: ir.Model, folder: Path, groups: Sequence[Group], feed: Feed) -> list[ChannelMap | Refusal]:
    """The map of each group, or why it could not be traced. `feed`: any valid input of the model, with no past."""
    if not groups:
        return []
    built = skeleton.build(model, groups)
    try:
        session = runtime.session(built.model.SerializeToString(), folder)
        needed = {value.name for value in session.get_inputs()}
        digits = _digits_needed(max(size for size, _ in built.drives.values()))
        drives: list[Drive] = [_ones, *(partial(_digit, position) for position in range(digits)), _scattered]
        runs = [
            dict(
                zip(
                    built.outputs,
                    runtime.run(session, list(built.outputs), _only(needed, {**feed, **_drives(built, drive)})),
                    strict=True,
                )
            )
            for drive in drives
        ]
    except RuntimeFailedError as error:
        return [Refusal(group.name, f"its channels could not be traced: {error}") for group in groups]
    return [_decode(group, [run[group.input.name or ""] for run in runs]) for group in groups]


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


def _decode(group: Group, runs: list[NDArray[np.generic]]) -> ChannelMap | Refusal:
    assert not isinstance(group.absorber, Refusal)
    lost = Refusal(group.absorber.name, "its channels do not arrive at the input one by one")
    ones, *digits, scattered = (run.astype(np.float64).reshape(-1, run.shape[-1]) for run in runs)  # (T, K)
    if ones.shape[1] != group.K or not ones.size or not np.all(np.isfinite(ones)) or np.any(ones == 0):
        return lost
    channels = np.zeros(group.K, np.int64)
    for position, run in enumerate(digits):
        channels += (np.rint(run[0] / ones[0]).astype(np.int64) - 1) * BASE**position
    size = group.absorber.channels
    if not np.all((channels >= 0) & (channels < size)):
        return lost
    drives = [*(_digit(position, size) for position in range(len(digits))), _scattered(size)]
    exact = all(
        np.all(np.abs(run / ones - drive[channels]) < TOLERANCE)
        for run, drive in zip([*digits, scattered], drives, strict=True)
    )
    return channels if exact else lost
