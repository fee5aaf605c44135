"""Let a language model write its own calibration text: as good as real text for AWQ's scales, and always at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Arrays, Feed, Signature, complete, empty_cache
from awq_onnx.errors import RuntimeFailedError

Tokens = NDArray[np.int64]
Advance = Callable[[float], None]
Choose = Callable[[NDArray[Any], Tokens], Tokens]  # from logits (B, V) and what is written before (B, position)

CACHE_BUDGET_BYTES = 400 << 20  # for the key/value caches of the sequences that are written side by side
LENGTH_WITHOUT_CACHE = 64  # every token then costs a pass over all before it
SMALLEST_NOISE = np.float32(1e-30)
GOES_ON = 0.25  # of the length of a first text: shorter ones after it are none
NOTHING: Arrays = MappingProxyType({})


@dataclass(frozen=True)
class Bounds:
    """The tokens that texts start and end with. start: None where nobody tells it. ends: may be none."""

    start: int | None = None
    ends: tuple[int, ...] = ()


UNBOUNDED = Bounds()


def is_causal(session: Any, wanted: Signature, others: Arrays = NOTHING) -> bool:
    """Whether a token's logits depend on the tokens before it alone: changing the last one changes no other.

    others: the inputs that do not follow from the tokens, samples along axis 0.
    """
    tokens = wanted.sequence_length(4)
    if wanted.logits is None or not wanted.vocabulary or wanted.vocabulary < 2 or tokens < 2:
        return False
    batch = wanted.batch_size(1)
    ids = np.zeros((batch, tokens), np.int64)
    changed = ids.copy()
    changed[:, -1] = 1
    try:
        feeds = [complete(wanted, {**_rows(others, 0, batch), wanted.text: one}) for one in (ids, changed)]
        first, second = (runtime.run(session, [wanted.logits], feed)[0] for feed in feeds)
    except RuntimeFailedError:
        return False
    if first.ndim != 3 or first.shape[1] != tokens:
        return False
    before_agree = np.allclose(first[:, :-1], second[:, :-1], rtol=1e-3, atol=1e-3)
    return bool(before_agree and not np.allclose(first[:, -1], second[:, -1]))


def generate(
    session: Any,
    wanted: Signature,
    samples: int,
    length: int,
    seed: int,
    advance: Advance,
    others: Arrays = NOTHING,
    bounds: Bounds = UNBOUNDED,
) -> Tokens:
    """Token ids (samples, length), sampled at temperature 1.

    They start as texts do, then with any token, so that they differ; where a text ends the next one starts. advance:
    told the fraction of the work just done. others: the inputs that do not follow from the tokens, samples along
    axis 0. The same seed gives the same ids.
    """
    rng = np.random.default_rng(seed)
    write = with_cache if wanted.grows_caches else _without_cache
    if not wanted.grows_caches:
        length = min(length, LENGTH_WITHOUT_CACHE)
    batch = _side_by_side(wanted, samples, length)
    rounds = -(-samples // batch)
    written = [
        write(
            session,
            wanted,
            _first_tokens(wanted, (batch, length), bounds, rng),
            _rows(others, at * batch, batch),
            lambda logits, ids: _next(logits, ids, wanted.vocabulary, bounds, rng),
            lambda part: advance(part / rounds),
        )
        for at in range(rounds)
    ]
    ids = np.concatenate(written)[:samples]
    missing = wanted.sequence_length(length) - length
    return (
        np.pad(ids, ((0, 0), (0, missing)), "wrap") if missing > 0 else ids
    )  # the graph may want more than was written


def _rows(arrays: Arrays, start: int, count: int) -> Feed:
    """So many samples; where they end, from the first again."""
    return {name: values.take(range(start, start + count), axis=0, mode="wrap") for name, values in arrays.items()}


def _side_by_side(wanted: Signature, samples: int, length: int) -> int:
    """How many sequences to write at once: as many as the budget for caches allows, in groups of one size."""
    caches = [empty_cache(wanted.names[past], 1) for past, _ in wanted.caches] if wanted.grows_caches else []
    per_sequence = 2 * length * sum(one.itemsize * one.shape[1] * one.shape[3] for one in caches)
    most = max(1, CACHE_BUDGET_BYTES // per_sequence) if per_sequence else samples
    rounds = -(-samples // min(most, samples))
    return wanted.batch_size(-(-samples // rounds))


def with_cache(
    session: Any, wanted: Signature, ids: Tokens, others: Arrays, choose: Choose, advance: Advance
) -> Tokens:
    """Ids (B, length), all but the first written token by token through the key/value caches; see `generate`."""
    batch, length = ids.shape
    caches = _Caches(wanted, batch, length)
    for position in range(1, length):
        feed = complete(wanted, {**others, wanted.text: ids[:, position - 1 : position]}, caches.past())
        logits = caches.step(session, feed)
        ids[:, position] = choose(logits[:, -1], ids[:, :position])
        advance(1 / (length - 1))
    return ids


def _without_cache(
    session: Any, wanted: Signature, ids: Tokens, others: Arrays, choose: Choose, advance: Advance
) -> Tokens:
    length = ids.shape[1]
    for position in range(1, length):
        seen = ids[:, :position]
        after = wanted.sequence_length(position) - position  # a graph of fixed length wants the tokens after it, too
        feed = complete(wanted, {**others, wanted.text: np.pad(seen, ((0, 0), (0, after)))})
        (logits,) = runtime.run(session, [wanted.logits or ""], feed)
        ids[:, position] = choose(logits[:, position - 1], ids[:, :position])
        advance(2 * position / (length * (length - 1)))
    return ids


def _first_tokens(wanted: Signature, shape: tuple[int, int], bounds: Bounds, rng: np.random.Generator) -> Tokens:
    ids = np.zeros(shape, np.int64)
    ids[:, 0] = _any_tokens(len(ids), wanted.vocabulary, rng) if bounds.start is None else bounds.start
    return ids


def _any_tokens(count: int, vocabulary: int | None, rng: np.random.Generator) -> Tokens:
    return rng.integers(0, vocabulary or 2, count)


def _next(
    logits: NDArray[Any], written: Tokens, vocabulary: int | None, bounds: Bounds, rng: np.random.Generator
) -> Tokens:
    """The tokens (B,) after those `written` (B, position), logits (B, V): drawn, but for the bounds of texts."""
    if bounds.start is None:
        return _sample(logits, rng)
    if written.shape[1] == 1:
        return _any_tokens(len(written), vocabulary, rng)
    drawn = _sample(logits, rng)
    return drawn if bounds.start in bounds.ends else np.where(np.isin(written[:, -1], bounds.ends), bounds.start, drawn)


def written_well(ids: Tokens, bounds: Bounds) -> NDArray[np.bool_]:
    """Which tokens (samples, length) to use: all, or those of the first text in each sample alone.

    A model that has learned to go on after the end of a text writes about as much again. One that saw only padding
    there ends at once, over and over: no text that anybody would give it.
    """
    ended = np.isin(ids, bounds.ends)
    ended[:, :2] = False  # tokens it did not choose
    first: NDArray[np.bool_] = np.cumsum(ended, axis=1) - ended == 0
    ends, later_ends = int(ended.any(axis=1).sum()), int((ended & ~first).sum())
    if later_ends and (~first).sum() / later_ends < GOES_ON * first.sum() / ends:  # tokens for each end
        return first
    return np.ones_like(first)


def _sample(logits: NDArray[Any], rng: np.random.Generator) -> Tokens:
    """One token of each row of logits (B, V) at temperature 1: the largest of logits + Gumbel noise."""
    noise = rng.standard_exponential(logits.shape, dtype=np.float32)
    np.maximum(noise, SMALLEST_NOISE, out=noise)  # numpy's fp32 exponential can be exactly 0
    chosen: Tokens = np.argmax(logits.astype(np.float32) - np.log(noise), axis=-1)
    return chosen


class _Caches:
    """The key/value caches of a batch: two buffers for each, used in turns, so that nothing is allocated per step.

    onnxruntime reads the past from one and writes the present into the other.
    """

    def __init__(self, wanted: Signature, batch: int, length: int) -> None:
        self._wanted = wanted
        self._tokens = 0
        self._turn = 0
        self._buffers = {}
        self._empty = {past: empty_cache(wanted.names[past], batch) for past, _ in wanted.caches}
        for past, empty in self._empty.items():
            size = batch * empty.shape[1] * length * empty.shape[3]
            self._buffers[past] = [np.empty(size, empty.dtype) for _ in range(2)]

    def past(self) -> Feed:
        return {past: self._view(past, self._turn, self._tokens) for past, _ in self._wanted.caches}

    def step(self, session: Any, feed: Feed) -> NDArray[Any]:
        """Run one token; the logits (B, 1, V). The caches are one token longer afterwards."""
        binding = session.io_binding()
        for name, values in feed.items():
            binding.bind_input(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
        grown = {past: self._view(past, 1 - self._turn, self._tokens + 1) for past, _ in self._wanted.caches}
        for past, present in self._wanted.caches:
            values = grown[past]
            binding.bind_output(present, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
        binding.bind_output(self._wanted.logits, "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise RuntimeFailedError(
                f"onnxruntime failed while generating text with the model: {runtime.first_line(error)}"
            ) from error
        self._turn, self._tokens = 1 - self._turn, self._tokens + 1
        logits: NDArray[Any] = binding.get_outputs()[-1].numpy()
        return logits

    def _view(self, past: str, turn: int, tokens: int) -> NDArray[Any]:
        """The first part of a buffer as a cache of that many tokens: (B, heads, tokens, head_dim)."""
        batch, heads, _, head_dim = self._empty[past].shape
        return self._buffers[past][turn][: batch * heads * tokens * head_dim].reshape(batch, heads, tokens, head_dim)
