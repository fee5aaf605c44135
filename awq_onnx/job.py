"""What the steps of one call share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from awq_onnx import groups
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.calibrate.feeds import Signature
from awq_onnx.device import Device
from awq_onnx.output import OutputFiles
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.sites import Refusal
from awq_onnx.progress import Progress
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel
from awq_onnx.threads import LARGE, Spread, Workers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """opened: the model whose weights are quantised. wanted: its inputs and outputs. device: what runs and searches."""

    opened: OpenedModel
    wanted: Signature
    recipe: Recipe
    files: OutputFiles
    device: Device
    budget_bytes: int
    progress: Progress


@dataclass(frozen=True)
class Traced:
    """What is known before any part runs. straight: the model along the branches that the data take, which is what
    runs. maps: where channels go, as from `channels.trace`.
    """

    straight: OpenedModel
    maps: Mapping[Group, ChannelMap | Refusal]


def submit(workers: Workers, group: Group, work: Callable[[Spread], Result], *, drifts: bool = False) -> Future[Result]:
    """Let workers search a group, with the memory that this takes. drifts: its inputs do, and the next part waits."""
    size_bytes, piece_bytes = groups.memory_bytes(group), groups.piece_bytes(group, drifts=drifts)
    return workers.submit(size_bytes, work, piece_bytes=piece_bytes, alone=drifts, large=group.K > LARGE)
