"""Arrays in, arrays out: executing `com.microsoft::MatMulNBits`. reference.py is the specification of every kernel.

    import awq_onnx.kernels
    options = onnxruntime.SessionOptions()
    awq_onnx.kernels.register(options)  # sessions made with them run MatMulNBits on our CUDA kernels

The public names are those below. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq_onnx.adoption import adopt
    from awq_onnx.kernels.library import register
    from awq_onnx.passes.adopt import Adoption, Left

__all__ = ["Adoption", "Left", "adopt", "register"]

_HOMES = {
    "Adoption": "awq_onnx.passes.adopt",
    "Left": "awq_onnx.passes.adopt",
    "adopt": "awq_onnx.adoption",
    "register": "awq_onnx.kernels.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
