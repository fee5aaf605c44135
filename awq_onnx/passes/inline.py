"""Put the bodies of a model's functions in the place of their calls, so that what they hold and are given is seen."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass


def inline_functions(model: ir.Model) -> None:
    """Inline every function, as onnxruntime does when it loads a model: a layer or a norm may be in any."""
    if model.functions:
        InlinePass()(model)
