"""What a model wants, read off its graph; and the inputs that follow from others: masks, positions, empty caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.errors import CalibrationError
from awq_onnx.passes.constants import constant
from awq_onnx.passes.steps import is_cache_pair

Feed: TypeAlias = "dict[str, NDArray[Any]]"
Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"

TOKENS = "input_ids"
DECODER_TOKENS = "decoder_input_ids"  # of an encoder-decoder in one graph, where TOKENS are the encoder's
MASK = "attention_mask"
POSITIONS = "position_ids"
CACHE_POSITIONS = "cache_position"
SEGMENTS = "token_type_ids"
CACHE_SWITCH = "use_cache_branch"
LOGITS_KEPT = ("num_logits_to_keep", "logits_to_keep")  # of how many tokens there are logits; 0 is all
ENCODER_STATES = "encoder_hidden_states"
UNNAMED = "?"  # an axis of which the graph says nothing
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

    @property
    def is_tokens(self) -> bool:
        return self.name in (TOKENS, DECODER_TOKENS)

    @property
    def follows(self) -> bool:
        """Whether it follows from the other inputs, see `complete`; caches can be empty."""
        names = (POSITIONS, CACHE_POSITIONS, SEGMENTS, CACHE_SWITCH, *LOGITS_KEPT)
        return self.is_mask or self.is_past or self.name in names

    @property
    def is_mask(self) -> bool:
        return self.name.endswith("_mask")

    def fixed(self, axis: int) -> int | None:
        """The size of an axis where the graph fixes it."""
        size = self.dims[axis] if self.dims is not None and len(self.dims) > axis else None
        return size if isinstance(size, int) else None

    def __str__(self) -> str:
        shape = "no shape" if self.dims is None else "shape " + " x ".join(map(str, self.dims))
        return f"{self.name} ({self.dtype}, {shape})"


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
        return self.text in self.names

    @property
    def text(self) -> str:
        """The input with the tokens that the logits continue."""
        return DECODER_TOKENS if DECODER_TOKENS in self.names else TOKENS

    @property
    def text_mask(self) -> str:
        """The input that says which of these tokens are padding."""
        return MASK if self.text == TOKENS else f"decoder_{MASK}"

    @property
    def logits(self) -> str | None:
        """The output with logits, if there is one: of every token, or of a whole sample."""
        return "logits" if "logits" in self.outputs else None

    @property
    def needs_past(self) -> bool:
        """Whether it is the half of an encoder-decoder that goes on after another: it returns no encoder caches."""
        paired = {past for past, _ in self.caches}
        alone = any(one.is_past and one.name not in paired for one in self.inputs)
        return alone and CACHE_SWITCH not in self.names and ENCODER_STATES not in self.names

    @property
    def grows_caches(self) -> bool:
        """Whether text can be written token by token: every run returns the caches that the next one wants."""
        return bool(self.caches) and not self.needs_past and ENCODER_STATES not in self.names

    def sequence_length(self, wanted: int) -> int:
        """`wanted`, unless the graph fixes the length."""
        return (self.takes_tokens and self.names[self.text].fixed(1)) or wanted

    @property
    def fixed_batch(self) -> int | None:
        """The batch where the graph fixes it."""
        first = next((one for one in self.inputs if one.dims is not None and len(one.dims) > 1), None)
        return first.fixed(0) if first else None

    def batch_size(self, wanted: int) -> int:
        """`wanted`, unless the graph fixes the batch."""
        return self.fixed_batch or wanted


def signature(graph: ir.Graph) -> Signature:
    """Read the signature off a graph; inputs that are initializers with a default do not count."""
    values = [value for value in graph.inputs if not value.is_initializer()]
    outputs = tuple(value.name or "" for value in graph.outputs)
    caches = tuple((past.name or "", present) for past in values for present in outputs if is_cache_pair(past, present))
    return Signature(tuple(_input(value) for value in values), outputs, caches, _vocabulary(graph))


def _input(value: ir.Value) -> Input:
    dims = None
    if value.shape is not None:
        dims = tuple(dim if isinstance(dim, int) else str(dim.value or UNNAMED) for dim in value.shape)
    dtype = value.dtype or ir.DataType.FLOAT
    if dtype == ir.DataType.BFLOAT16:  # such a model is run as its float32 twin
        dtype = ir.DataType.FLOAT
    return Input(value.name or "", dtype.numpy(), dims)


def _vocabulary(graph: ir.Graph) -> int | None:
    """The rows of the table that the token ids look up."""
    found = (_rows_looked_up(value) for value in graph.inputs if value.name in (TOKENS, DECODER_TOKENS))
    return next((rows for rows in found if rows), None)


# The operators that look up rows: which input holds the indices, and which the table.
_LOOKUPS = {"Gather": (1, 0), "EmbedLayerNormalization": (0, 2), "GatherBlockQuantized": (1, 0)}


def _rows_looked_up(value: ir.Value) -> int | None:
    for use in value.uses():
        indices, table_at = _LOOKUPS.get(use.node.op_type, (None, 0))
        table = constant(use.node.inputs[table_at])
        if use.idx == indices and table is not None and len(table.shape) == 2:
            return int(table.shape.numpy()[0])
        if use.node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            found = _rows_looked_up(use.node.outputs[0])
            if found:
                return found
    return None


def token_feed(wanted: Signature, ids: NDArray[np.int64], past: Arrays | None = None) -> Feed:
    """A feed for token ids (B, T) after `past`, the caches by input name (B, heads, P, head_dim), or none.

    Raises CalibrationError where the model wants an input that cannot be made from tokens.
    """
    return complete(wanted, {wanted.text: ids}, past)


def complete(wanted: Signature, given: Arrays, past: Arrays | None = None) -> Feed:
    """`given` plus every input that follows from it: masks of ones, positions, zero segments, empty caches.

    Raises CalibrationError where an input does not follow from those given.
    """
    past = past or {}
    sizes = _sizes(wanted, {**past, **given})
    feed: Feed = {}
    for one in wanted.inputs:
        if one.name in given and not one.is_past:
            feed[one.name] = np.ascontiguousarray(given[one.name], dtype=one.dtype)
        elif one.name in given:  # the first tokens of a longer cache are not copied
            feed[one.name] = np.asarray(given[one.name], dtype=one.dtype)
        elif one.name in past:
            feed[one.name] = past[one.name]
        else:
            feed[one.name] = _made(one, wanted, sizes)
    return feed


def shortened(feed: Feed, wanted: Signature, tokens: int = 4) -> Feed:
    """The first tokens of a feed with no past, where that can be had; else the whole feed."""
    if wanted.text not in feed:
        return feed
    grown = {past for past, _ in wanted.caches}
    kept = {
        one.name: feed[one.name]
        for one in wanted.inputs
        if not one.follows or (one.is_past and one.name not in grown) or one.name == f"encoder_{MASK}"
    }
    text = kept[wanted.text][:, : wanted.sequence_length(tokens)]
    try:
        return complete(wanted, {**kept, wanted.text: text})
    except CalibrationError:
        return feed


@dataclass(frozen=True)
class _Sizes:
    """What the inputs that are known tell about the others.

    tokens: of the text. before: tokens in the caches. encoded: tokens of the encoder. named: sizes of axes by name.
    """

    batch: int
    tokens: int
    before: int
    encoded: int | None
    named: Mapping[str, int]

    def of(self, one: Input) -> tuple[int, ...] | None:
        """The shape of an input whose axes are all fixed, or are axes of known inputs too."""
        found = [dim if isinstance(dim, int) else self.named.get(dim) for dim in one.dims or ()]
        if found and found[0] is None:
            found[0] = self.batch
        return tuple(size for size in found if size is not None) if found and None not in found else None


def _sizes(wanted: Signature, known: Arrays) -> _Sizes:
    text = known.get(wanted.text, next((one for one in known.values() if one.ndim), None))
    grown = {past for past, _ in wanted.caches}
    pasts = {name: values.shape[2] for name, values in known.items() if name.startswith("past") and values.ndim == 4}
    by_kind = [pasts[name] for name in sorted(pasts, key=lambda name: name not in grown)]  # the encoder's last
    return _Sizes(
        batch=wanted.batch_size(1) if text is None else text.shape[0],
        tokens=wanted.sequence_length(1) if text is None or text.ndim < 2 else text.shape[1],
        before=by_kind[0] if pasts else 0,
        encoded=_encoded(wanted, known) or (by_kind[-1] if pasts else None),
        named=named_sizes(wanted, known),
    )


def _encoded(wanted: Signature, known: Arrays) -> int | None:
    """How many tokens the encoder has, where its input or its output is known."""
    names = (ENCODER_STATES, TOKENS) if wanted.text == DECODER_TOKENS else (ENCODER_STATES,)
    return next((int(known[name].shape[1]) for name in names if name in known), None)


def named_sizes(wanted: Signature, known: Arrays) -> dict[str, int]:
    """The sizes of axes by the name that the graph gives them, from the inputs that are known."""
    named: dict[str, int] = {}
    for one in wanted.inputs:
        if one.name in known and one.dims is not None:
            sizes = zip(one.dims, known[one.name].shape, strict=False)
            named.update((dim, size) for dim, size in sizes if isinstance(dim, str) and dim != UNNAMED)
    return named


def _made(one: Input, wanted: Signature, sizes: _Sizes) -> NDArray[Any]:
    positions = np.arange(sizes.before, sizes.before + sizes.tokens)
    shape: tuple[int, ...] = (sizes.batch, sizes.tokens)
    if one.is_mask:
        return np.ones(_mask_shape(one, wanted, sizes), one.dtype)
    if one.name == POSITIONS:
        several = one.dims is not None and len(one.dims) == 3  # (3, B, T): of time, height and width
        return np.broadcast_to(positions, (one.fixed(0) or 1, *shape) if several else shape).astype(one.dtype)
    if one.name == CACHE_POSITIONS:
        return positions.astype(one.dtype)
    if one.name == SEGMENTS:
        return np.zeros(shape, one.dtype)
    if one.name == CACHE_SWITCH:
        return np.full([one.fixed(0) or 1], sizes.before > 0, one.dtype)
    if one.name in LOGITS_KEPT:
        return np.zeros([1] * len(one.dims or ()), one.dtype)
    if one.is_past and one.dims is not None and len(one.dims) == 4:
        return empty_cache(one, sizes.batch)
    raise CalibrationError(f"the model's input {one} cannot be guessed: {ADVICE}")


def _mask_shape(one: Input, wanted: Signature, sizes: _Sizes) -> tuple[int, ...]:
    text = (sizes.batch, sizes.before + sizes.tokens)
    if one.name == wanted.text_mask and sizes.before:  # graphs are careless about the past when they name axes
        return text
    named = sizes.of(one)
    if named is not None:
        return named
    if one.name == wanted.text_mask:
        return text
    if one.name.endswith(MASK) and sizes.encoded is not None:
        return sizes.batch, sizes.encoded
    raise CalibrationError(f"the model's input {one} cannot be guessed: {ADVICE}")


def empty_cache(one: Input, batch: int) -> NDArray[Any]:
    """A key/value cache of no tokens: (B, heads, 0, head_dim)."""
    heads, head_dim = one.fixed(1), one.fixed(3)
    if heads is None or head_dim is None:
        raise CalibrationError(f"the model's input {one} does not fix its heads and head size: {ADVICE}")
    return np.zeros((batch, heads, one.fixed(2) or 0, head_dim), one.dtype)
