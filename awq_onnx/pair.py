"""Two model files that should do the same, run one after the other on the same inputs.

One after the other also where both would fit into memory: what the first returns is kept, and nothing runs twice.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from awq_onnx import runtime, speed, threads
from awq_onnx.calibrate import data
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import Feed, Input, Signature, complete, signature
from awq_onnx.calibrate.shelf import Shelf
from awq_onnx.comparison import Comparison, compare_outputs, compared_outputs
from awq_onnx.device import Device, device_of
from awq_onnx.errors import DifferentModelsError, OutputError
from awq_onnx.likelihood import Rows
from awq_onnx.machine import Machine
from awq_onnx.plain import plain
from awq_onnx.progress import Progress, Silent
from awq_onnx.recipe import COMPARED, Recipe
from awq_onnx.speed import Speed
from awq_onnx.store import ModelSource, OpenedModel, open_model

WHOLE_NUMBERS = "iu"  # kinds of numpy's types


@dataclass(frozen=True)
class Pair:
    """Two opened models that take and return the same; `wanted` and `other` are their signatures.

    What follows from other inputs (masks, positions, empty caches) may be an input of one of them alone.
    """

    original: OpenedModel
    quantized: OpenedModel
    wanted: Signature
    other: Signature


@dataclass(frozen=True)
class Cost:
    """What a model takes: bytes with its data files, and its speed; None where it was not measured, or would say
    nothing, because the weights do not fit into memory.
    """

    size_bytes: int
    speed: Speed | None


@dataclass(frozen=True)
class PairReport:
    """What `measure` found. data: what the models were compared on, for people."""

    data: str
    comparison: Comparison
    original: Cost
    quantized: Cost

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        values: dict[str, Any] = plain(self)
        return values


def compare(
    original: ModelSource,
    quantized: ModelSource,
    calibration: Calibration = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models over `calibration` (as in `quantize`), every sample a window, and compare their outputs.

    recipe: its samples, sequence_length and seed count; without one arrays are taken whole, and of text, self-made text
    and files 16 windows of 256 tokens. The models may be of different types (float16, int8), not of different inputs.
    Raises ModelFileError, DifferentModelsError, CalibrationError, RuntimeFailedError, OutputError.
    """
    with open_pair(original, quantized) as pair:
        recipe = recipe or Recipe(samples=_samples_in(calibration))
        return measure(pair, calibration, tokenizer, recipe, machine, progress, timed=False).comparison


def _samples_in(calibration: Calibration) -> int:
    if isinstance(calibration, Mapping):
        calibration = np.asarray(next(iter(calibration.values()), ()))
    return max(1, len(np.atleast_1d(calibration))) if isinstance(calibration, np.ndarray) else COMPARED


@contextmanager
def open_pair(original: ModelSource, quantized: ModelSource) -> Iterator[Pair]:
    """Open both, without reading weights. Raises ModelFileError, DifferentModelsError."""
    with open_model(original) as one, open_model(quantized) as other:
        pair = Pair(one, other, signature(one.model.graph), signature(other.model.graph))
        _check_inputs(pair)
        _check_outputs(pair)
        yield pair


def measure(
    pair: Pair,
    calibration: Calibration = None,
    tokenizer: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    *,
    timed: bool = True,
) -> PairReport:
    """Run the original, keep what it returns, run the other beside that. timed: whether to measure their speeds.

    What is kept goes to a temporary folder where it is more than the budget of the machine.
    """
    recipe, machine, progress = recipe or Recipe(samples=COMPARED), machine or Machine(), progress or Silent()
    device, outputs = device_of(machine.device), compared_outputs(pair.wanted)
    with threads.limited(machine.threads), tempfile.TemporaryDirectory(prefix="awq-onnx-") as folder:
        windows, source = data.windows(pair.original, pair.wanted, recipe, calibration, tokenizer, progress, device)
        kept = Shelf(Path(folder), machine.budget_bytes, [{}] * len(windows))
        runner = _Runner(outputs, windows, device, machine, progress, timed)
        original = runner.keep_outputs(pair, kept)
        quantized, comparison = runner.compare(pair, kept)
    return PairReport(source, comparison, original, quantized)


@dataclass(frozen=True)
class _Runner:
    """timed: whether to measure speeds."""

    outputs: list[str]
    windows: Sequence[Feed]
    device: Device
    machine: Machine
    progress: Progress
    timed: bool

    def keep_outputs(self, pair: Pair, kept: Shelf) -> Cost:
        """Run the original, put its outputs for every window on the shelf."""
        session, fits = self._session(pair.original, "original")
        for window, alive in zip(self.windows, kept.feeds, strict=True):
            made = runtime.run(session, self.outputs, window)
            with _room_wanted():
                kept.put(alive, dict(zip(self.outputs, made, strict=True)))
            self.progress.advance(1 / len(self.windows))
        found = speed.measure(session, pair.wanted, self.outputs, self.windows[0]) if self.timed and fits else None
        return Cost(pair.original.size_bytes, found)

    def compare(self, pair: Pair, kept: Shelf) -> tuple[Cost, Comparison]:
        """Run the other model beside what was kept."""
        session, fits = self._session(pair.quantized, "quantised model")
        windows = [_for_other(window, pair.other) for window in self.windows]
        expected, advance = self._taken_from(kept), self.progress.advance
        comparison = compare_outputs(self.outputs, expected, session, windows, pair.wanted, advance)
        found = speed.measure(session, pair.other, self.outputs, windows[0]) if self.timed and fits else None
        return Cost(pair.quantized.size_bytes, found), comparison

    def _taken_from(self, kept: Shelf) -> Iterator[list[Rows]]:
        """The outputs of each window, dropped when the next ones are wanted."""
        for alive in kept.feeds:
            yield [alive[name] for name in self.outputs]
            kept.drop(alive, self.outputs)

    def _session(self, opened: OpenedModel, title: str) -> tuple[Any, bool]:
        """As fast as an application's where memory allows that, and whether it does."""
        runtime.give_back_memory()  # of the model that ran before
        self.progress.stage(f"Running the {title}")
        room_bytes = self.machine.memory_budget or psutil.virtual_memory().available
        fits = runtime.COPIES * opened.size_bytes <= room_bytes
        if not fits:
            self.progress.note(f"The {title} is too large for this memory: its weights are read from the disk, slowly.")
        model, folder, providers = opened.serialize(), opened.folder, self.device.providers
        return runtime.session(model, folder, fuse=fits, prepack=fits, reuse=False, providers=providers), fits


@contextmanager
def _room_wanted() -> Iterator[None]:
    """A full disk, in words."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the outputs of the original do not fit into {tempfile.gettempdir()} ({error.strerror or error}); "
            "compare on fewer samples, or set TMPDIR to a folder with more room"
        ) from error


def _for_other(window: Feed, other: Signature) -> Feed:
    """The same numbers in the types of another model, and what follows from them where only that one asks for it."""
    return complete(other, {name: values for name, values in window.items() if name in other.names})


def _check_inputs(pair: Pair) -> None:
    inputs, others = pair.wanted.names, pair.other.names
    sizes = pair.wanted.vocabulary, pair.other.vocabulary
    if None not in sizes and sizes[0] != sizes[1]:
        raise DifferentModelsError(
            f"the models have different vocabularies: the original knows {sizes[0]} tokens, the other {sizes[1]}"
        )
    for which, some, rest in (("original", inputs, others), ("other", others, inputs)):
        alone = [name for name, one in some.items() if name not in rest and not one.follows]
        if alone:
            raise DifferentModelsError(f"the models want different inputs: only the {which} has {', '.join(alone)}")
    for name in sorted(inputs.keys() & others.keys()):
        if not _agree(inputs[name], others[name]):
            raise DifferentModelsError(
                f"the models want different inputs: {inputs[name]} is the original's, {others[name]} the other's"
            )


def _agree(one: Input, other: Input) -> bool:
    """Whether the same numbers are right for both."""
    kinds = {"i" if like.dtype.kind in WHOLE_NUMBERS else like.dtype.kind for like in (one, other)}
    if one.dims is None or other.dims is None:
        return len(kinds) == 1
    fixed = [(a, b) for a, b in zip(one.dims, other.dims, strict=False) if isinstance(a, int) and isinstance(b, int)]
    return len(kinds) == 1 and len(one.dims) == len(other.dims) and all(a == b for a, b in fixed)


def _check_outputs(pair: Pair) -> None:
    missing = [name for name in compared_outputs(pair.wanted) if name not in pair.other.outputs]
    if missing:
        raise DifferentModelsError(
            f"the models return different outputs: the original has {', '.join(missing)}, "
            f"the other {', '.join(compared_outputs(pair.other))}"
        )
