"""What two runs must have in common for one to go on with what the other left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awq_onnx._version import __version__
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import ENCODER_STATES, Signature
from awq_onnx.machine import CPU
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel, fingerprint
from awq_onnx.versions import versions

BESIDE = ("config.json", "preprocessor_config.json", "tokenizer.json")  # the model, or one folder up


def key(
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
    device: str = CPU,
) -> str | None:
    """A text that is the same only where all of this and what it depends on are; None for a model in memory."""
    if opened.path is None:
        return None
    read = {*opened.files, *_beside(opened.path, wanted)}
    if tokenizer is not None:
        read |= {Path(tokenizer), Path(tokenizer) / "tokenizer.json"}
    if isinstance(calibration, str | os.PathLike):
        read.add(Path(calibration))
    parts = [__version__, versions(), recipe.to_dict(), device, str(tokenizer), _content(calibration)]
    return hashlib.blake2b(json.dumps([parts, sorted(_fingerprints(read))]).encode(), digest_size=16).hexdigest()


def _beside(model: Path, wanted: Signature) -> Iterator[Path]:
    for folder in (model.parent, model.parent.parent):
        yield from (folder / name for name in BESIDE)
    if ENCODER_STATES in wanted.names or wanted.needs_past:
        yield from model.parent.glob("*.onnx")  # the other half may be among them


def _fingerprints(paths: set[Path]) -> Iterator[str]:
    for path in paths:
        with contextlib.suppress(OSError):  # what is missing is told where it is wanted
            if path.is_file():
                yield json.dumps(fingerprint(path))


def _content(calibration: Calibration) -> str:
    """What is given in memory, as a hash; a path as it is. What nobody can calibrate with is never the same."""
    if calibration is None or isinstance(calibration, str | os.PathLike):
        return str(calibration)
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(calibration, np.ndarray):
        calibration = {"": calibration}
    if not isinstance(calibration, Mapping | list | tuple):
        return uuid.uuid4().hex
    for name, values in calibration.items() if isinstance(calibration, Mapping) else enumerate(calibration):
        try:
            digest.update(_bytes(name, values))
        except (TypeError, ValueError):
            return uuid.uuid4().hex
    return digest.hexdigest()


def _bytes(name: object, values: Any) -> bytes:
    if isinstance(values, str):
        return json.dumps([name, values]).encode()
    array = np.asarray(values)
    if array.dtype.hasobject:
        raise TypeError("its bytes are addresses")
    return json.dumps([name, str(array.dtype), array.shape]).encode() + array.tobytes()
