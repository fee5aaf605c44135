"""Text that comes with awq-onnx, for models that read text and cannot write their own: prose.txt, of many kinds."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx.calibrate import given
from awq_onnx.errors import CalibrationError, MissingPackageError

SHORTEST = 16  # tokens in a window
ONE_TOKEN = 0.3  # of all may be the same: more, and the tokenizer is for no language of ours


def windows(
    model: Path | None,
    tokenizer: str | os.PathLike[str] | None,
    vocabulary: int | None,
    samples: int,
    length: int,
    *,
    exact: bool = False,
) -> NDArray[np.int64] | None:
    """Token ids (samples, length): a piece of the prose each, between the tokens that bound a text.

    They are shorter where that keeps pieces from overlapping, unless the length must be `exact`. None where there is no
    tokenizer, or one that does not know our words. Raises CalibrationError where `tokenizer` names none.
    """
    try:
        loaded = given.load_tokenizer(model, tokenizer)
    except (CalibrationError, MissingPackageError):
        if tokenizer is not None:
            raise
        return None
    text = (resources.files(__package__) / "prose.txt").read_text(encoding="utf-8")
    try:
        ids = np.array(loaded.encode(text, add_special_tokens=False).ids, np.int64)
        before, after = _bounds(loaded)
    except Exception:  # tokenizers raises plain Exception, for words it has no token for
        return None
    if ids.size < samples or np.bincount(ids).max() > ONE_TOKEN * ids.size:
        return None
    if vocabulary is not None and max(int(ids.max()), *before, *after, 0) >= vocabulary:
        return None
    body = length - len(before) - len(after)
    if not exact:
        body = min(body, max(ids.size // samples, SHORTEST))
    if not 0 < body <= ids.size:
        return None
    starts = np.linspace(0, ids.size - body, samples).astype(int)
    return np.array([[*before, *ids[start : start + body], *after] for start in starts], np.int64)


def _bounds(loaded: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    plain = loaded.encode("text", add_special_tokens=False).ids
    whole = loaded.encode("text").ids
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    return ([], []) if at is None or not plain else (whole[:at], whole[at + len(plain) :])
