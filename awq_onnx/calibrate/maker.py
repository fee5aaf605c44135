"""Make whole inputs for a model: the other half of an encoder-decoder, what it writes itself, made-up numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from awq_onnx import runtime
from awq_onnx.calibrate import companion, prose, synthetic
from awq_onnx.calibrate.feeds import (
    ADVICE,
    DECODER_TOKENS,
    ENCODER_STATES,
    MASK,
    TOKENS,
    Arrays,
    Feed,
    Signature,
    complete,
    signature,
)
from awq_onnx.calibrate.generate import LENGTH_WITHOUT_CACHE, Bounds, generate, is_causal, written_well
from awq_onnx.calibrate.hints import Hints, read_hints
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import CalibrationError, RuntimeFailedError
from awq_onnx.progress import Progress
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel, open_model

RANDOM = "random inputs"
PROSE = "short texts that come with awq-onnx"
PROSE_AND_NOISE = f"{PROSE}, the rest of the inputs random"
MOST_COPIED_BYTES = 600_000_000  # of weights as float32: a session may copy them, which makes it faster
LARGE_BYTES = 4 << 30  # a model file above takes too long to write its own text
NOISY = (RANDOM, PROSE_AND_NOISE)


@dataclass(frozen=True)
class Maker:
    """Makes inputs for one model; arrays have samples along axis 0."""

    opened: OpenedModel
    wanted: Signature
    hints: Hints
    recipe: Recipe
    progress: Progress
    tokenizer: str | os.PathLike[str] | None = None
    device: Device = PROCESSOR

    @classmethod
    def of(
        cls,
        opened: OpenedModel,
        recipe: Recipe,
        progress: Progress,
        tokenizer: str | os.PathLike[str] | None = None,
        wanted: Signature | None = None,
        device: Device = PROCESSOR,
    ) -> Maker:
        hints = read_hints(opened.path)
        wanted = wanted or signature(opened.model.graph)
        wanted = replace(wanted, vocabulary=wanted.vocabulary or hints.vocabulary)
        return cls(opened, wanted, hints, recipe, progress, tokenizer, device)

    @cached_property
    def session(self) -> Any:
        """Of a large model nothing is fused: that copies weights, those of half precision as float32."""
        opened, providers = self.opened, self.device.providers
        fuse = may_be_copied(opened)
        return runtime.session(opened.serialize(), opened.folder, fuse=fuse, providers=providers)

    @property
    def is_large(self) -> bool:
        return self.opened.size_bytes > LARGE_BYTES

    def fill(self, given: Arrays, samples: int) -> tuple[Arrays, str]:
        """`given` plus every input that does not follow from others; and what to call a sample, for people.

        Raises CalibrationError where that cannot be.
        """
        if not synthetic.missing(self.wanted, given):
            return given, RANDOM
        known = self.with_states(given, samples)
        length = self.longest(known)
        made = self._made(known, samples, length)
        if self.wanted.needs_past and not any(name.startswith("past") for name in given):
            self.progress.note("There is no decoder beside the model that makes its caches: they are random numbers.")
        if self.wanted.text in given:
            return made, RANDOM
        if self.is_large or not self._can_write(made, length):
            prose = self._with_prose(given, known, made, samples, length)
            if prose[1] != RANDOM or not self._can_write(made, length):
                return prose
        texts = self._written(made, samples, length)
        length = texts[self.wanted.text].shape[1]
        return {**made, **texts}, f"sequences of {length} tokens that the model wrote itself"

    def _with_prose(self, given: Arrays, known: Arrays, made: Arrays, samples: int, length: int) -> tuple[Arrays, str]:
        """`made` with text in the place of random tokens, where there is a tokenizer to make it with."""
        wanted = self.wanted
        if TOKENS in given or TOKENS not in wanted.names:
            return made, RANDOM
        fixed = wanted.names[TOKENS].fixed(1)
        ids = prose.windows(
            self.opened.path, self.tokenizer, wanted.vocabulary, samples, fixed or length, exact=fixed is not None
        )
        if ids is None:
            return made, RANDOM
        known = {**known, TOKENS: ids}
        what = PROSE_AND_NOISE if synthetic.missing(wanted, known) else PROSE
        return self._made(known, samples, min(length, ids.shape[1])), what

    def with_states(self, given: Arrays, samples: int) -> Arrays:
        """`given` plus what the encoder beside the model makes, where the model wants that and there is one."""
        if ENCODER_STATES not in self.wanted.names or ENCODER_STATES in given:
            return given
        path = companion.encoder_beside(self.opened, self.wanted)
        if path is None:
            self.progress.note(
                f"There is no encoder beside the model: its {ENCODER_STATES} are random numbers. "
                f"The encoder in the same folder, or inputs of your own (--calibration data.npz), would be better."
            )
            return given
        self.progress.stage(f"Running {path.name} for the states that the decoder reads")
        with open_model(path) as opened:
            encoder = Maker.of(opened, self.recipe, self.progress, self.tokenizer, device=self.device)
            arrays, _ = encoder.fill(encoder._read_by_encoder(given), samples)
            return {**given, ENCODER_STATES: companion.states_of(encoder.session, encoder.wanted, arrays)}

    def _read_by_encoder(self, given: Arrays) -> Arrays:
        """What an encoder of tokens reads where the decoder is given these: the same text, under the mask for it."""
        if TOKENS not in self.wanted.names:
            return {}
        tokens, mask = given.get(TOKENS), given.get(f"encoder_{MASK}")
        if mask is None:
            return {TOKENS: tokens} if tokens is not None else {}
        if tokens is None or tokens.shape != mask.shape:
            tokens = self._rng().integers(0, self.wanted.vocabulary or 2, mask.shape)
        return {TOKENS: tokens, MASK: mask}

    def longest(self, known: Arrays) -> int:
        """The most tokens, up to what is wanted, that the model runs with: the positions it has learned may be fewer.

        Found by trying, with the first samples of `known` (see `with_states`).
        """
        wished = self.recipe.sequence_length
        if DECODER_TOKENS in self.wanted.names:  # the encoder in the same graph runs for every token that is written
            wished = min(wished, LENGTH_WITHOUT_CACHE)
        wished, session = self.wanted.sequence_length(wished), self.session
        shape = None
        for length in _lengths(wished, self.hints.positions if self.wanted.takes_tokens else None):
            feed = self._first_feed(known, length)
            if shape == (shape := {name: values.shape for name, values in feed.items()}):
                continue  # the length changes nothing
            try:
                runtime.run(session, [self.wanted.outputs[0]], feed)
            except RuntimeFailedError as error:
                failure = f"the model does not run on inputs made for it, {_shapes(feed)}: {ADVICE} ({error})"
                continue
            if length < wished:
                name = self.opened.path.name if self.opened.path else "the model"
                self.progress.note(f"Sequences of {length} tokens for {name}: {wished} are more than it takes.")
            return length
        raise CalibrationError(failure)

    def _first_feed(self, known: Arrays, length: int) -> Feed:
        batch = self.wanted.batch_size(1)
        first = {name: values[:batch] for name, values in known.items()}
        return complete(self.wanted, self._made(first, batch, length))

    def _made(self, known: Arrays, samples: int, length: int) -> Arrays:
        return synthetic.fill(self.wanted, known, samples, length, self.hints, self._rng())

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.recipe.seed)

    def _can_write(self, made: Arrays, length: int) -> bool:
        """Whether it is a language model that can go on from its own tokens."""
        wanted = self.wanted
        if not wanted.logits or not wanted.takes_tokens or wanted.needs_past:
            return False
        return length > 1 and is_causal(self.session, wanted, _without(made, wanted.text))

    def _written(self, made: Arrays, samples: int, length: int) -> Arrays:
        """Token ids, and a mask where not all of them are good text."""
        self.progress.stage("Writing text with the model itself")
        if not self.wanted.grows_caches and length > LENGTH_WITHOUT_CACHE:
            self.progress.note(
                f"With no key/value cache the model writes its text {LENGTH_WITHOUT_CACHE} tokens at a time, "
                "slowly. Text of your own (--calibration file.txt) would be faster."
            )
        wanted, bounds, seed = self.wanted, self._bounds(), self.recipe.seed
        others = _without(made, wanted.text)
        ids = generate(self.session, wanted, samples, length, seed, self.progress.advance, others, bounds)
        used = written_well(ids, bounds)
        mask = wanted.names.get(wanted.text_mask)
        if used.all() or mask is None or len(mask.dims or ids.shape) != ids.ndim:
            return {wanted.text: ids}
        padding = self.hints.padding
        if padding is None or padding >= (wanted.vocabulary or 0):
            padding = bounds.ends[0]
        return {wanted.text: np.where(used, ids, padding), wanted.text_mask: used.astype(np.int64)}

    def _bounds(self) -> Bounds:
        known = range(self.wanted.vocabulary or 0)
        ends = tuple(end for end in self.hints.ends if end in known)
        return Bounds(self.hints.start if self.hints.start in known else None, ends)


def may_be_copied(opened: OpenedModel) -> bool:
    """Whether a session may copy the weights, all of them, as float32."""
    tensors = [value.const_value for graph in opened.model.graphs() for value in graph.initializers.values()]
    size_bytes = sum(4 * one.size for one in tensors if one is not None and one.dtype.is_floating_point())
    return size_bytes <= MOST_COPIED_BYTES


def _lengths(wished: int, positions: int | None) -> Iterator[int]:
    length = min(wished, positions or wished)
    while length:
        yield length
        length //= 2


def _without(arrays: Arrays, name: str) -> Arrays:
    return {other: values for other, values in arrays.items() if other != name}


def _shapes(feed: Feed) -> str:
    """The names and shapes of all inputs but the caches."""
    shapes = ((name, " x ".join(map(str, one.shape)) or "a number") for name, one in feed.items() if name[:4] != "past")
    return ", ".join(f"{name} {shape}" for name, shape in shapes)
