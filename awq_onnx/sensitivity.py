"""What an error in each layer costs the output, measured: with one layer rounded, the whole model runs.

The loss of an output is nearly quadratic in small errors, and errors of different layers hardly have anything in
common, so that the sum of what each costs alone is about what all cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature, shortened
from awq_onnx.calibrate.maker import may_be_copied
from awq_onnx.calibrate.segments import in_float32
from awq_onnx.comparison import kl_divergence, log_softmax, real_rows
from awq_onnx.passes import switch
from awq_onnx.passes.switch import NOBODY, NOISE, StandIn
from awq_onnx.progress import unheard
from awq_onnx.runtime import CPU_PROVIDERS, Providers
from awq_onnx.store import OpenedModel

TOKENS = 64  # of a sequence
EVERY = 4  # of its tokens are looked at: logits are large
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
    shorter = [in_float32(_shorter(window, wanted)) for window in windows]
    fuse, losses = may_be_copied(opened), {}
    for some in _batches(places, stand_ins):
        model = ir.to_proto(opened.model)
        made = {output for node in model.graph.node for output in node.output}
        which = switch.add_switches(model, some, stand_ins)
        session = runtime.session(model.SerializeToString(), opened.folder, fuse=fuse, half=False, providers=providers)
        judges = [_Judge.of(session, outputs, window, wanted, which) for window in shorter]
        for number, place in enumerate(some):
            if place in made and all(judge.expected for judge in judges):
                loss = float(np.mean([judge.loss(number) for judge in judges]))
                losses[place] = loss if place in stand_ins else loss / NOISE**2
            advance(1 / len(places))
    return losses


def _shorter(window: Feed, wanted: Signature) -> Feed:
    """The first tokens; all of them where some are padding."""
    mask = window.get(wanted.text_mask)
    return window if mask is not None and not mask.all() else shortened(window, wanted, TOKENS)


def _batches(places: Sequence[str], stand_ins: Mapping[str, StandIn]) -> Iterator[list[str]]:
    """Places whose stand-ins fit into one model."""
    some: list[str] = []
    size = 0
    for place in places:
        own = stand_ins[place].path.stat().st_size if place in stand_ins else 0
        if some and size + own > BATCH_BYTES:
            yield some
            some, size = [], 0
        some.append(place)
        size += own
    if some:
        yield some


@dataclass(frozen=True)
class _Judge:
    """What an error does to the outputs for one window. expected: of each output of floats, rows (R, C); of logits the
    logarithms of probabilities, for every few tokens.
    """

    session: Any
    outputs: list[str]
    window: Feed
    wanted: Signature
    which: str
    expected: tuple[NDArray[np.float64], ...] = ()

    @classmethod
    def of(cls, session: Any, outputs: list[str], window: Feed, wanted: Signature, which: str) -> _Judge:
        judge = cls(session, outputs, window, wanted, which)
        return replace(judge, expected=judge._made(NOBODY))

    def loss(self, number: int) -> float:
        """With the error at that place."""
        pairs = list(zip(self.expected, self._made(number), strict=True))
        if self._are_logits(self.expected[0]):
            return float(kl_divergence(*pairs[0]).mean())
        both = [(one, other, np.isfinite(one) & np.isfinite(other)) for one, other in pairs]
        energy = sum(float(np.square(one[finite]).sum()) for one, _, finite in both)
        error = sum(float(np.square(one[finite] - other[finite]).sum()) for one, other, finite in both)
        return error / (energy or 1.0)

    def _made(self, number: int) -> tuple[NDArray[np.float64], ...]:
        made = runtime.run(self.session, self.outputs, {**self.window, self.which: np.array(number, np.int64)})
        rows = [real_rows(one, self.window, self.wanted) for one in made if one.dtype.kind == "f"]
        if rows and self._are_logits(rows[0]):
            of_tokens = made[0].ndim == 3
            return (log_softmax(rows[0][:: EVERY if of_tokens else 1]),)
        return tuple(one.astype(np.float64) for one in rows)

    def _are_logits(self, rows: NDArray[Any]) -> bool:
        return self.wanted.logits is not None and rows.shape[1] > 1
