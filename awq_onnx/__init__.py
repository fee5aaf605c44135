"""4-bit transformers in ONNX: activation-aware weight quantization (AWQ) in one call.

    import awq_onnx
    report = awq_onnx.quantize("model.onnx", "model_int4.onnx")

The public names are those below; `awq_onnx.errors` draws the exceptions. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from awq_onnx import errors
from awq_onnx._version import __version__

if TYPE_CHECKING:
    from awq_onnx.comparison import Comparison
    from awq_onnx.inspection import Inspection, inspect
    from awq_onnx.machine import Machine
    from awq_onnx.page import write_page
    from awq_onnx.pair import compare
    from awq_onnx.pipeline import quantize
    from awq_onnx.progress import Progress
    from awq_onnx.recipe import Recipe
    from awq_onnx.report import Report

__all__ = [
    "Comparison",
    "Inspection",
    "Machine",
    "Progress",
    "Recipe",
    "Report",
    "__version__",
    "compare",
    "errors",
    "inspect",
    "quantize",
    "write_page",
]

_HOMES = {
    "Comparison": "awq_onnx.comparison",
    "Inspection": "awq_onnx.inspection",
    "Machine": "awq_onnx.machine",
    "Progress": "awq_onnx.progress",
    "Recipe": "awq_onnx.recipe",
    "Report": "awq_onnx.report",
    "compare": "awq_onnx.pair",
    "inspect": "awq_onnx.inspection",
    "quantize": "awq_onnx.pipeline",
    "write_page": "awq_onnx.page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'awq_onnx' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
