"""What an error in each layer costs the output, measured: with one layer rounded, the model runs.

The loss of an output is nearly quadratic in small errors, and errors of different layers hardly have anything in
common, so that the sum of what each costs alone is about what all cost together.

What comes before a layer does not change with it. So the layers are taken in stages, and for those of a stage the graph
runs from the first of them on, with the values that were alive there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature, shortened
from awq_onnx.calibrate.maker import may_be_copied
from awq_onnx.calibrate.parts import Piece, extract, needed, reads
from awq_onnx.calibrate.segments import in_float32
from awq_onnx.comparison import Rows, log_softmax, mean_kl, real_rows
from awq_onnx.passes import switch
from awq_onnx.passes.switch import NOBODY, NOISE, StandIn
from awq_onnx.progress import unheard
from awq_onnx.runtime import CPU_PROVIDERS, Providers
from awq_onnx.store import OpenedModel

TOKENS = 64  # of a sequence
STAGES = 8  # half of the graph runs on average, and a little more where there are few
BATCH_BYTES = 128 << 20  # of stand-ins in one model


def measure(
    opened: OpenedModel,
    places: Sequence[str],
    stand_ins: Mapping[str, StandIn],
    windows: Sequence[Feed],
    outputs: list[str],
    wanted: Signature,
    *,
    providers: Providers = CPU_PROVIDERS,
    advance: Callable[[float], None] = unheard,
) -> dict[str, float]:
    """What an error at each of `places` costs, names of values that nodes of the graph make.

    Where there is a stand-in for the layer that makes it, the loss of the output with that; else the loss per squared
    relative error, measured with noise. The loss is the KL of the logits, where there are any, else the squared
    relative error. windows: to run the model on. Places in the bodies of other nodes are left out, and all where no
    output holds floats.
    """
    windows = [in_float32(window) for window in windows]
    alive, losses = windows, {}
    fuse = may_be_copied(opened)
    stages = list(_stages(opened.model.graph, places, stand_ins, outputs))
    share = 1 / max(sum(len(stage.places) for stage in stages), 1)
    for stage in stages:
        model = extract(opened.model, stage.rest, alive[0])
        which = switch.add_switches(model, stage.places, stand_ins)
        session = runtime.session(model.SerializeToString(), opened.folder, fuse=fuse, half=False, providers=providers)
        rest = _Rest(session, stage.rest, which)
        alive = [rest.run(values, NOBODY) for values in alive]
        judges = [_Judge.of(values, window, outputs, wanted) for values, window in zip(alive, windows, strict=True)]
        for number, place in enumerate(stage.places):
            if all(judge.expected for judge in judges):
                made = (rest.run(values, number) for values in alive)
                loss = float(np.mean([judge.loss(values) for judge, values in zip(judges, made, strict=True)]))
                losses[place] = loss if place in stand_ins else loss / NOISE**2
            advance(share)
    return losses


def window_of(feeds: Sequence[Feed], wanted: Signature) -> Feed:
    """What to measure on: the first tokens of the last feed where none of these is padding, else all of the last."""
    for feed in reversed(feeds):
        mask = feed.get(wanted.text_mask)
        if mask is None or (mask.ndim == 2 and mask[:, :TOKENS].all()):
            return shortened(feed, wanted, TOKENS)
    return feeds[-1]


@dataclass(frozen=True)
class _Stage:
    """Some places, and what comes after the first of them is made, that included; it makes what later stages read."""

    places: list[str]
    rest: Piece


def _stages(
    graph: ir.Graph, places: Sequence[str], stand_ins: Mapping[str, StandIn], outputs: Sequence[str]
) -> Iterator[_Stage]:
    """The first of them runs everything that leads to the outputs."""
    reading = {node: reads(node) for node in graph}
    nodes = needed(reading, set(outputs))
    made_at = {output.name or "": at for at, node in enumerate(nodes) for output in node.outputs}
    batches = list(_batches(sorted(made_at.keys() & set(places), key=made_at.__getitem__), stand_ins))
    starts = [made_at[batch[0]] if at else 0 for at, batch in enumerate(batches)]
    read = [
        tuple(dict.fromkeys(name for node in nodes[start:] for name in reading[node] if made_at.get(name, -1) < start))
        for start in starts
    ]
    for batch, start, now, later in zip(batches, starts, read, [*read[1:], ()], strict=False):
        makes = [name for name in dict.fromkeys([*outputs, *later]) if made_at.get(name, -1) >= start]
        yield _Stage(batch, Piece(tuple(nodes[start:]), now, tuple(makes)))


def _batches(places: Sequence[str], stand_ins: Mapping[str, StandIn]) -> Iterator[list[str]]:
    """Neighbours whose stand-ins fit into one model."""
    most = -(-len(places) // STAGES)
    some: list[str] = []
    size = 0
    for place in places:
        own = stand_ins[place].path.stat().st_size if place in stand_ins else 0
        if some and (size + own > BATCH_BYTES or len(some) == most):
            yield some
            some, size = [], 0
        some.append(place)
        size += own
    if some:
        yield some


@dataclass(frozen=True)
class _Rest:
    """A piece of the graph in a session. which: the input that says where the error is."""

    session: Any
    piece: Piece
    which: str

    def run(self, values: Feed, number: int) -> Feed:
        """`values`, and in their place what the piece makes of them with the error there."""
        names = list(self.piece.makes)
        feed = {name: values[name] for name in self.piece.reads}
        made = runtime.run(self.session, names, {**feed, self.which: np.array(number, np.int64)})
        return {**values, **dict(zip(names, made, strict=True))}


@dataclass(frozen=True)
class _Judge:
    """What an error does to the outputs for one window.

    expected: of each output of floats, rows (R, C); of logits the logarithms of probabilities.
    """

    outputs: Sequence[str]
    window: Feed
    wanted: Signature
    expected: tuple[Rows, ...] = ()

    @classmethod
    def of(cls, values: Feed, window: Feed, outputs: Sequence[str], wanted: Signature) -> _Judge:
        judge = cls(outputs, window, wanted)
        rows = judge._rows(values)
        if rows and judge._are_logits(rows[0]):
            rows = (log_softmax(rows[0]).astype(np.float32),)
        return replace(judge, expected=rows)

    def loss(self, values: Feed) -> float:
        """With these outputs."""
        rows = self._rows(values)
        if self._are_logits(rows[0]):
            return mean_kl(self.expected[0], rows[0])
        both = [
            (one, other, np.isfinite(one) & np.isfinite(other)) for one, other in zip(self.expected, rows, strict=True)
        ]
        energy = sum(float(np.square(one[finite]).sum()) for one, _, finite in both)
        error = sum(float(np.square(one[finite] - other[finite]).sum()) for one, other, finite in both)
        return error / (energy or 1.0)

    def _rows(self, values: Feed) -> tuple[Rows, ...]:
        made = (values[name] for name in self.outputs)
        return tuple(real_rows(one, self.window, self.wanted) for one in made if one.dtype.kind == "f")

    def _are_logits(self, rows: Rows) -> bool:
        return self.wanted.logits is not None and rows.shape[1] > 1
