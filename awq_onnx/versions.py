"""The versions of what computes: part of what repeats a run to the same bytes."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

from awq_onnx import runtime

COMPUTING = ("ml_dtypes", "numpy", "onnx", "onnx_ir", "tokenizers")  # packages that may change a bit


def versions() -> dict[str, str]:
    """By name: Python, onnxruntime, and the packages that are there."""
    found = {"python": platform.python_version(), "onnxruntime": str(runtime.onnxruntime().__version__)}
    for name in COMPUTING:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
