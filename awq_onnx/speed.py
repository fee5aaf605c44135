"""How fast a model runs in a session, roughly: a second or two of what it is there for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed, Signature
from awq_onnx.calibrate.generate import Tokens, with_cache
from awq_onnx.errors import RuntimeFailedError
from awq_onnx.progress import unheard

DECODED, WARM_UP = 32, 8  # tokens in all, and those of them that are not timed
FORWARD_SECONDS = 1.0  # at least, and one pass
TOKENS, SAMPLES = "tokens", "samples"


@dataclass(frozen=True)
class Speed:
    """per_second: tokens or samples, see unit. decoding: whether they were written one by one, in one sequence, through
    the key/value cache; else all of a window ran at once.
    """

    per_second: float
    unit: str
    decoding: bool


def measure(session: Any, wanted: Signature, outputs: Sequence[str], window: Feed) -> Speed | None:
    """The speed of a session that has run `window` before; None where it cannot write text as its inputs promise."""
    if not decodes(wanted):
        return _forward(session, wanted, outputs, window)
    try:
        return _decoding(session, wanted, window)
    except RuntimeFailedError:
        return None


def decodes(wanted: Signature) -> bool:
    """Whether it is a language model that is given one token at a time."""
    one_by_one = wanted.grows_caches and wanted.takes_tokens and wanted.sequence_length(1) == 1
    return wanted.logits is not None and one_by_one


def _decoding(session: Any, wanted: Signature, window: Feed) -> Speed:
    """By the median time of a token, so that a pause counts for nothing."""
    chosen_at: list[float] = []

    def likeliest(logits: NDArray[Any], _: Tokens) -> Tokens:
        chosen_at.append(time.perf_counter())
        chosen: Tokens = logits.argmax(axis=-1)
        return chosen

    ids: Tokens = np.zeros((len(window[wanted.text]), DECODED + 1), np.int64)
    ids[:, 0] = window[wanted.text][:, 0]
    others = {one.name: window[one.name] for one in wanted.inputs if not one.follows and one.name != wanted.text}
    with_cache(session, wanted, ids, others, likeliest, unheard)
    seconds = float(np.median(np.diff(chosen_at)[WARM_UP:]))
    return Speed(len(ids) / seconds, TOKENS, decoding=True)


def _forward(session: Any, wanted: Signature, outputs: Sequence[str], window: Feed) -> Speed:
    text = window.get(wanted.text)
    count = len(next(iter(window.values()))) if text is None else text.size
    seconds: list[float] = []
    while sum(seconds) < FORWARD_SECONDS:
        start = time.perf_counter()
        runtime.run(session, list(outputs), window)
        seconds.append(time.perf_counter() - start)
    return Speed(count / float(np.median(seconds)), SAMPLES if text is None else TOKENS, decoding=False)
