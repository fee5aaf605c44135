"""What two runs must have in common for one to go on with what the other left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

import numpy as np

from awq_onnx import runtime
from awq_onnx._version import __version__
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import ENCODER_STATES, Signature
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel, fingerprint


def key(
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
) -> str | None:
    """A text that is the same only where all of this and what it depends on are; None for a model in memory."""
    if opened.path is None:
        return None
    read = [*opened.files, *opened.path.parent.glob("*.json")]  # config.json, tokenizer.json
    if ENCODER_STATES in wanted.names or wanted.needs_past:
        read += opened.path.parent.glob("*.onnx")  # the other half may be among them
    if tokenizer is not None:
        read += Path(tokenizer).glob("*.json")
    if isinstance(calibration, str | os.PathLike):
        with contextlib.suppress(OSError):  # that it cannot be read is told where it is
            read += [Path(calibration)] if Path(calibration).exists() else []
    versions = [__version__, np.__version__, runtime.onnxruntime().__version__, metadata.version("onnx_ir")]
    parts = [versions, recipe.to_dict(), sorted({str(fingerprint(path)) for path in read}), _content(calibration)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _content(calibration: Calibration) -> str:
    """What is given in memory, as a hash; a path as it is."""
    if calibration is None or isinstance(calibration, str | os.PathLike):
        return str(calibration)
    digest = hashlib.blake2b(digest_size=16)
    items = calibration.items() if isinstance(calibration, dict) else enumerate(calibration)
    for name, values in items:
        digest.update(json.dumps(name).encode())
        digest.update(values.encode() if isinstance(values, str) else _bytes(np.asarray(values)))
    return digest.hexdigest()


def _bytes(values: np.ndarray) -> bytes:
    return json.dumps([str(values.dtype), values.shape]).encode() + values.tobytes()
