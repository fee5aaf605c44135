"""Make valid inputs for a model from the names, types and shapes of its graph inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.errors import CalibrationError
from awq_onnx.passes.absorb import is_cache_pair
from awq_onnx.passes.sites import constant

Feed: TypeAlias = "dict[str, NDArray[Any]]"

TOKENS = "input_ids"
MASK = "attention_mask"
POSITIONS = "position_ids"
SEGMENTS = "token_type_ids"
CACHE_SWITCH = "use_cache_branch"
ADVICE = "give inputs with --calibration data.npz"


@dataclass(frozen=True)
class Input:
    """One graph input. dims: its shape, an int where fixed, a name where not; None where the graph does not say."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...] | None

    @property
    def is_past(self) -> bool:
        return self.name.startswith("past")

    def fixed(self, axis: int) -> int | None:
        """The size of an axis where the graph fixes it."""
        size = self.dims[axis] if self.dims is not None and len(self.dims) > axis else None
        return size if isinstance(size, int) else None


@dataclass(frozen=True)
class Signature:
    """What a model wants and returns. caches: (past input, present output) pairs. vocabulary: tokens, if known."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    caches: tuple[tuple[str, str], ...]
    vocabulary: int | None

    @cached_property
    def names(self) -> dict[str, Input]:
        return {one.name: one for one in self.inputs}

    @property
    def takes_tokens(self) -> bool:
        return TOKENS in self.names

    @property
    def logits(self) -> str | None:
        """The output with the logits of every token, if there is one."""
        return "logits" if "logits" in self.outputs else None

    def sequence_length(self, wanted: int) -> int:
        """`wanted`, unless the graph fixes the length."""
        return (self.takes_tokens and self.names[TOKENS].fixed(1)) or wanted

    def batch_size(self, wanted: int) -> int:
        """`wanted`, unless the graph fixes the batch."""
        return (self.inputs[0].fixed(0) if self.inputs else None) or wanted


def signature(graph: ir.Graph) -> Signature:
    """Read the signature off a graph; inputs that are initializers with a default do not count."""
    values = [value for value in graph.inputs if not value.is_initializer()]
    outputs = tuple(value.name or "" for value in graph.outputs)
    caches = tuple((past.name or "", present) for past in values for present in outputs if is_cache_pair(past, present))
    return Signature(tuple(_input(value) for value in values), outputs, caches, _vocabulary(graph))


def _input(value: ir.Value) -> Input:
    dims = None
    if value.shape is not None:
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return Input(value.name or "", (value.dtype or ir.DataType.FLOAT).numpy(), dims)


def _vocabulary(graph: ir.Graph) -> int | None:
    """The rows of the table that the token ids look up."""
    for value in graph.inputs:
        if value.name == TOKENS:
            return _rows_looked_up(value)
    return None


def _rows_looked_up(value: ir.Value) -> int | None:
    for use in value.uses():
        table = constant(use.node.inputs[0])
        if use.node.op_type == "Gather" and use.idx == 1 and table is not None and len(table.shape) == 2:
            return int(table.shape.numpy()[0])
        if use.node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            found = _rows_looked_up(use.node.outputs[0])
            if found:
                return found
    return None


def token_feed(wanted: Signature, ids: NDArray[np.int64], past: Mapping[str, NDArray[Any]] | None = None) -> Feed:
    """A feed for token ids (B, T) after `past`, the caches by input name (B, heads, P, head_dim), or none.

    Raises CalibrationError where the model wants an input that cannot be made from tokens.
    """
    return complete(wanted, {TOKENS: ids}, past)


def complete(
    wanted: Signature, given: Mapping[str, NDArray[Any]], past: Mapping[str, NDArray[Any]] | None = None
) -> Feed:
    """`given` plus every input that follows from it: masks of ones, positions, zero segments, empty caches."""
    past = past or {}
    batch, tokens = _batch_and_tokens(wanted, given)
    before = next(iter(past.values())).shape[2] if past else 0
    feed: Feed = {}
    for one in wanted.inputs:
        if one.name in given:
            feed[one.name] = np.ascontiguousarray(given[one.name], dtype=one.dtype)
        elif one.name in past:
            feed[one.name] = past[one.name]
        else:
            feed[one.name] = _made(one, batch, tokens, before)
    return feed


def shortened(feed: Feed, wanted: Signature, tokens: int = 4) -> Feed:
    """The first tokens of a feed, where everything else follows from them; else the whole feed."""
    if not wanted.takes_tokens:
        return feed
    try:
        return token_feed(wanted, feed[TOKENS][:, : wanted.sequence_length(tokens)])
    except CalibrationError:
        return feed


def _batch_and_tokens(wanted: Signature, given: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    if TOKENS in given:
        return given[TOKENS].shape[0], given[TOKENS].shape[1]
    first = next(iter(given.values()), None)
    batch = first.shape[0] if first is not None and first.ndim else wanted.batch_size(1)
    return batch, first.shape[1] if first is not None and first.ndim > 1 else wanted.sequence_length(1)


def _made(one: Input, batch: int, tokens: int, before: int) -> NDArray[Any]:
    if one.name == MASK:
        return np.ones((batch, before + tokens), one.dtype)
    if one.name == POSITIONS:
        return np.broadcast_to(np.arange(before, before + tokens, dtype=one.dtype), (batch, tokens)).copy()
    if one.name == SEGMENTS:
        return np.zeros((batch, tokens), one.dtype)
    if one.name == CACHE_SWITCH:
        return np.full([one.fixed(0) or 1], before > 0, one.dtype)
    if one.is_past and one.dims is not None and len(one.dims) == 4:
        return empty_cache(one, batch)
    raise CalibrationError(
        f"the model's input {one.name} ({one.dtype}, {_shape_text(one)}) cannot be guessed: {ADVICE}"
    )


def empty_cache(one: Input, batch: int) -> NDArray[Any]:
    """A key/value cache of no tokens: (B, heads, 0, head_dim)."""
    heads, head_dim = one.fixed(1), one.fixed(3)
    if heads is None or head_dim is None:
        raise CalibrationError(
            f"the model's input {one.name} ({_shape_text(one)}) does not fix its heads and head size: {ADVICE}"
        )
    return np.zeros((batch, heads, one.fixed(2) or 0, head_dim), one.dtype)


def random_feed(wanted: Signature, batch: int, tokens: int, rng: np.random.Generator) -> Feed:
    """Random inputs: token ids from the vocabulary, numbers from the normal distribution.

    Raises CalibrationError where an axis of a float input is neither fixed nor the batch nor a sequence.
    """
    batch, tokens = wanted.batch_size(batch), wanted.sequence_length(tokens)
    given: Feed = {}
    for one in wanted.inputs:
        if one.name == TOKENS:
            given[one.name] = rng.integers(0, wanted.vocabulary or 2, (batch, tokens))
        elif one.dtype.kind == "f" and not one.is_past:
            given[one.name] = rng.standard_normal(_sizes(one, batch, tokens), dtype=np.float32)
    return complete(wanted, given)


def _sizes(one: Input, batch: int, tokens: int) -> Sequence[int]:
    if one.dims is None:
        raise CalibrationError(f"the model's input {one.name} has no shape: {ADVICE}")
    return [dim if isinstance(dim, int) else _size(one, axis, dim, batch, tokens) for axis, dim in enumerate(one.dims)]


def _size(one: Input, axis: int, dim: str, batch: int, tokens: int) -> int:
    if axis == 0 or "batch" in dim:
        return batch
    if "seq" in dim or "length" in dim or "token" in dim or (axis == 1 and len(one.dims or ()) == 3):
        return tokens
    raise CalibrationError(
        f"the model's input {one.name} ({_shape_text(one)}) does not say how large {dim} is: {ADVICE}"
    )


def _shape_text(one: Input) -> str:
    return "no shape" if one.dims is None else "shape " + " x ".join(map(str, one.dims))
