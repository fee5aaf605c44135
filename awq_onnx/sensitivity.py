"""What an error in each layer costs the output, measured: with one layer rounded, the model runs.

The loss of an output is nearly quadratic in small errors, and errors of different layers hardly have anything in
common, so that the sum of what each costs alone is about what all cost together.

What comes before a layer does not change with it. So the layers are taken in stages, and for those of a stage the graph
runs from the first of them on, with the values that were alive there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature, shortened
from awq_onnx.calibrate.maker import may_be_copied
from awq_onnx.calibrate.parts import Piece, extract, needed, reads
from awq_onnx.calibrate.segments import in_float32
from awq_onnx.judges import HeadJudge, Judge, OutputJudge, large_head
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
    relative error, measured with noise. The loss is the KL of the logits, where there are any (of a large vocabulary
    from a sample), else the squared relative error. windows: to run the model on. Places in the bodies of other nodes
    are left out, and all where no output holds floats.
    """
    windows = [in_float32(window) for window in windows]
    graph, losses = opened.model.graph, dict[str, float]()
    stages = [
        (stage, look)
        for look in _looks(opened, places, windows, outputs, wanted, providers)
        for stage in _stages(graph, look.places, stand_ins, look.outputs)
    ]
    share = 1 / max(sum(len(stage.places) for stage, _ in stages), 1)
    alive = windows
    for stage, look in stages:
        rest = _Rest.of(opened, stage.rest, alive[0], providers, stage.places, stand_ins)
        alive = [rest.run(values, NOBODY) for values in alive]
        judges = [judge.expecting(values) for judge, values in zip(look.judges, alive, strict=True)]
        for number, place in enumerate(stage.places):
            made = (rest.run(values, number) for values in alive)
            judged = [judge.loss(values) for judge, values in zip(judges, made, strict=True)]
            known = [loss for loss in judged if loss is not None]
            if known:
                losses[place] = float(np.mean(known)) / (1 if place in stand_ins else NOISE**2)
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
class _Look:
    """Where the errors of some places are looked at, outputs of the model or values before, and who judges them, window
    by window.
    """

    places: Sequence[str]
    outputs: list[str]
    judges: Sequence[Judge]


def _looks(
    opened: OpenedModel,
    places: Sequence[str],
    windows: Sequence[Feed],
    outputs: list[str],
    wanted: Signature,
    providers: Providers,
) -> Iterator[_Look]:
    """At the outputs; where a large layer makes the logits, and there is nothing else to look at, at what it reads."""
    reading = {node: reads(node) for node in opened.model.graph}
    early: set[str] = set()
    head = large_head(opened, wanted) if outputs == [wanted.logits] else None
    if head is not None:
        read = head.input.name or ""
        early = set(_made_at(needed(reading, {read})))
        nodes = needed(reading, set(outputs))
        whole = Piece(tuple(nodes), _read(nodes, reading), (read, *outputs))
        rest = _Rest.of(opened, whole, windows[0], providers)
        judges = [HeadJudge.of(head, rest.run(window), window, wanted, opened) for window in windows]
        yield _Look([place for place in places if place in early], [read], judges)
    late = [place for place in places if place not in early]
    yield _Look(late, outputs, [OutputJudge(outputs, window, wanted) for window in windows])


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
    made_at = _made_at(nodes)
    batches = list(_batches(sorted(made_at.keys() & set(places), key=made_at.__getitem__), stand_ins))
    starts = [made_at[batch[0]] if at else 0 for at, batch in enumerate(batches)]
    read = [_read(nodes[start:], reading) for start in starts]
    for batch, start, now, later in zip(batches, starts, read, [*read[1:], ()], strict=False):
        makes = [name for name in dict.fromkeys([*outputs, *later]) if made_at.get(name, -1) >= start]
        yield _Stage(batch, Piece(tuple(nodes[start:]), now, tuple(makes)))


def _made_at(nodes: Sequence[ir.Node]) -> dict[str, int]:
    """The place of the node that makes each value."""
    return {output.name or "": at for at, node in enumerate(nodes) for output in node.outputs}


def _read(nodes: Sequence[ir.Node], reading: Mapping[ir.Node, Sequence[str]]) -> tuple[str, ...]:
    """What nodes read that they do not make. reading: what each of them reads."""
    made = _made_at(nodes)
    return tuple(dict.fromkeys(name for node in nodes for name in reading[node] if name not in made))


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
    """A piece of the graph in a session. which: the input that says where the error is; None: nowhere."""

    session: Any
    piece: Piece
    which: str | None

    @classmethod
    def of(
        cls,
        opened: OpenedModel,
        piece: Piece,
        alive: Feed,
        providers: Providers,
        places: Sequence[str] = (),
        stand_ins: Mapping[str, StandIn] | None = None,
    ) -> _Rest:
        """alive: its inputs, for their types. places: where there can be an error."""
        model = extract(opened.model, piece, alive)
        which = switch.add_switches(model, places, stand_ins or {}) if places else None
        fuse = may_be_copied(opened)
        made = runtime.session(model.SerializeToString(), opened.folder, fuse=fuse, half=False, providers=providers)
        return cls(made, piece, which)

    def run(self, values: Feed, number: int = NOBODY) -> Feed:
        """`values`, and in their place what the piece makes of them with the error there."""
        names = list(self.piece.makes)
        feed = {name: values[name] for name in self.piece.reads}
        if self.which is not None:
            feed[self.which] = np.array(number, np.int64)
        made = runtime.run(self.session, names, feed)
        return {**values, **dict(zip(names, made, strict=True))}
