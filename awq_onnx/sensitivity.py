"""What an error in each layer costs the output, measured: with one layer rounded, the whole model runs.

The loss of an output is nearly quadratic in small errors, and errors of different layers hardly have anything in
common, so that the sum of what each costs alone is about what all cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature, shortened
from awq_onnx.calibrate.maker import may_be_copied
from awq_onnx.comparison import kl_divergence, log_softmax, real_rows
from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import DOMAIN
from awq_onnx.progress import unheard
from awq_onnx.runtime import CPU_PROVIDERS, Providers
from awq_onnx.store import OpenedModel

NOISE = 0.1  # relative: about what 4 bits do
TOKENS = 64  # of a sequence
EVERY = 4  # of its tokens are looked at: logits are large
BATCH_BYTES = 128 << 20  # of stand-ins in one model
NOBODY = -1
INPUTS = ("codes", "scales", "zero_points", "g_idx", "bias")  # of a MatMulNBits, after what it reads


@dataclass(frozen=True)
class StandIn:
    """A rounded layer, to be asked for in the place of the original.

    input: the name of what it reads. path: a .npz file with `codes` and `zero_points` as MatMulNBits reads them,
    `scales` float32 (N, G), `bias` float32 (N,), and `inverse` float32 (K,), which multiplies the input; only the first
    and the scales have to be there.
    """

    input: str
    path: Path
    K: int
    N: int
    bits: int
    block_size: int


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
    shorter = [_widened(_shorter(window, wanted)) for window in windows]
    fuse, losses = may_be_copied(opened), {}
    for some in _batches(places, stand_ins):
        model = ir.to_proto(opened.model)
        made = {output for node in model.graph.node for output in node.output}
        which = _add_switches(model, some, stand_ins)
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


def _widened(feed: Feed) -> Feed:
    """For the float32 twin of a model of half precision."""
    return {name: one.astype(np.float32) if one.dtype == np.float16 else one for name, one in feed.items()}


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


def _add_switches(model: onnx.ModelProto, places: Sequence[str], stand_ins: Mapping[str, StandIn]) -> str:
    """Let an input, whose name is returned, say at which of `places` there is an error."""
    names = Names(ir.from_proto(model).graph)
    which = names.fresh("place")
    model.graph.input.append(helper.make_tensor_value_info(which, TensorProto.INT64, []))
    numbers = {place: number for number, place in enumerate(places)}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for at, output in enumerate(node.output):
            if output not in numbers:
                continue
            node.output[at] = names.fresh(f"{output}.clean")
            own = names.fresh(f"{output}.number")
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers[output], np.int64), own))
            if output in stand_ins:
                wrong = _stand_in(model.graph, names, output, stand_ins[output])
            else:
                wrong = _with_noise(names, node.output[at], output, numbers[output])
            nodes += _switch(names, node.output[at], output, wrong, (which, own))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if all(one.domain != DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return which


def _with_noise(names: Names, clean: str, output: str, seed: int) -> list[onnx.NodeProto]:
    """Every value times 1 +- NOISE."""
    factors, noisy = names.fresh(f"{output}.factors"), names.fresh(f"{output}.noisy")
    return [
        helper.make_node("RandomNormalLike", [clean], [factors], mean=1.0, scale=NOISE, seed=float(seed)),
        helper.make_node("Mul", [clean, factors], [noisy]),
    ]


def _stand_in(graph: onnx.GraphProto, names: Names, output: str, layer: StandIn) -> list[onnx.NodeProto]:
    with np.load(layer.path) as arrays:
        constants = {what: numpy_helper.from_array(arrays[what], names.fresh(f"{output}.{what}")) for what in arrays}
    graph.initializer.extend(constants.values())
    inputs = [constants[what].name if what in constants else "" for what in INPUTS]
    read, nodes = layer.input, []
    if "inverse" in constants:
        read = names.fresh(f"{output}.scaled")
        nodes.append(helper.make_node("Mul", [layer.input, constants["inverse"].name], [read]))
    inputs.insert(0, read)
    while not inputs[-1]:
        inputs.pop()
    made = names.fresh(f"{output}.rounded")
    node = helper.make_node("MatMulNBits", inputs, [made], domain=DOMAIN)
    sizes = {"K": layer.K, "N": layer.N, "bits": layer.bits, "block_size": layer.block_size}
    node.attribute.extend(helper.make_attribute(name, size) for name, size in sizes.items())
    return [*nodes, node]


def _switch(
    names: Names, clean: str, output: str, wrong: Sequence[onnx.NodeProto], equal: tuple[str, str]
) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Nodes that make `output`: where two numbers are equal what `wrong` makes, else `clean`."""
    asked, kept = names.fresh(f"{output}.asked"), names.fresh(f"{output}.kept")
    branches = {
        branch: helper.make_graph(nodes, branch, [], [helper.make_empty_tensor_value_info(nodes[-1].output[0])])
        for branch, nodes in (
            ("then_branch", wrong),
            ("else_branch", [helper.make_node("Identity", [clean], [kept])]),
        )
    }
    return helper.make_node("Equal", list(equal), [asked]), helper.make_node("If", [asked], [output], **branches)
