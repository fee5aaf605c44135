"""Find the other half of an encoder-decoder beside it, and run it to get the inputs that only it can make.

Nothing but names of inputs and outputs is matched: an encoder returns `last_hidden_state`, and the decoder that
comes first returns a present for every past that the other wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import ENCODER_STATES, Arrays, Signature, complete, signature
from awq_onnx.errors import AwqOnnxError
from awq_onnx.passes.steps import is_cache_pair
from awq_onnx.store import OpenedModel, open_model

STATES = "last_hidden_state"
PAST_BUDGET_BYTES = 400 << 20  # for the caches that a decoder goes on after
POSITIONS_AFTER_PAST = 16  # of each sequence, to go on from


def encoder_beside(opened: OpenedModel, wanted: Signature) -> Path | None:
    """The file of the encoder whose states the decoder `opened` reads."""
    width = wanted.names[ENCODER_STATES].fixed(2)

    def fits(other: OpenedModel) -> bool:
        made = next((value for value in other.model.graph.outputs if value.name == STATES), None)
        if made is None or any(value.name == ENCODER_STATES for value in other.model.graph.inputs):
            return False
        size = made.shape[2] if made.shape is not None and len(made.shape) == 3 else None
        return width is None or not isinstance(size, int) or size == width

    return _beside(opened, fits)


def decoder_before(opened: OpenedModel) -> Path | None:
    """The file of the decoder that makes every past that `opened` wants, and wants none itself."""
    pasts = [value for value in opened.model.graph.inputs if (value.name or "").startswith("past")]

    def fits(other: OpenedModel) -> bool:
        if any((value.name or "").startswith("past") for value in other.model.graph.inputs):
            return False
        presents = [value.name or "" for value in other.model.graph.outputs]
        return all(any(is_cache_pair(past, present) for present in presents) for past in pasts)

    return _beside(opened, fits)


def _beside(opened: OpenedModel, fits: Callable[[OpenedModel], bool]) -> Path | None:
    """The first other model in the folder of `opened` that fits, those with the plainest names first."""
    if opened.path is None:
        return None
    own = opened.path.resolve()
    others = [path for path in opened.path.parent.glob("*.onnx") if path.resolve() != own]
    for path in sorted(others, key=lambda path: (len(path.name), path.name)):
        try:
            with open_model(path) as other:
                if fits(other):
                    return path
        except AwqOnnxError:
            continue
    return None


def states_of(session: Any, wanted: Signature, arrays: Arrays) -> NDArray[Any]:
    """What an encoder makes of inputs with samples along axis 0: (samples, S, D)."""
    return np.concatenate([runtime.run(session, [STATES], feed)[0] for feed in _batches(wanted, arrays)])


def continued(session: Any, first: Signature, second: OpenedModel, arrays: Arrays) -> list[dict[str, NDArray[Any]]]:
    """Inputs of the decoder `second` that goes on after `first` has read `arrays`: one token, and the caches.

    One entry for each of some positions in the text, samples along axis 0; fewer samples where caches are large.
    """
    wanted = signature(second.model.graph)
    caches = _caches(session, first, second, arrays)
    samples = len(next(iter(caches.values())))
    kept = {name: values[:samples] for name, values in arrays.items() if name in wanted.names and name != first.text}
    text = arrays[first.text][:samples]
    grown = {past for past, _ in wanted.caches}
    positions = np.linspace(1, text.shape[1] - 1, POSITIONS_AFTER_PAST).astype(int)
    return [
        {
            **kept,
            wanted.text: text[:, position : position + 1],
            **{past: made[:, :, :position] if past in grown else made for past, made in caches.items()},
        }
        for position in np.unique(positions).tolist()
    ]


def _caches(session: Any, first: Signature, second: OpenedModel, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The caches after all of the text by the name of the past they become, for as many samples as memory allows."""
    pasts = [value for value in second.model.graph.inputs if (value.name or "").startswith("past")]
    presents = [next(name for name in first.outputs if is_cache_pair(past, name)) for past in pasts]
    runs: list[list[NDArray[Any]]] = []
    for feed in _batches(first, arrays):
        runs.append(runtime.run(session, presents, feed))
        if len(runs) > 1 and sum(one.nbytes for run in runs for one in run) > PAST_BUDGET_BYTES:
            break
    joined = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return {past.name or "": made for past, made in zip(pasts, joined, strict=True)}


def _batches(wanted: Signature, arrays: Arrays) -> Iterator[dict[str, NDArray[Any]]]:
    """Feeds as small as the model takes them."""
    step = wanted.batch_size(1)
    total = len(next(iter(arrays.values())))
    for start in range(0, total - step + 1, step):
        yield complete(wanted, {name: values[start : start + step] for name, values in arrays.items()})
