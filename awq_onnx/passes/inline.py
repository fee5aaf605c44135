"""Put the bodies of a model's functions in the place of their calls, so that the weights they are given are seen."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from awq_onnx.passes.sites import LAYER_OPS


def inline_functions(model: ir.Model) -> None:
    """Inline every function that holds a linear layer, itself or through one that it calls; onnxruntime inlines them
    all when it loads a model. Functions without one stay.
    """
    holders = _holders(model)
    if holders:
        InlinePass(lambda function: function.identifier() in holders)(model)


def _holders(model: ir.Model) -> set[ir.OperatorIdentifier]:
    calls = {
        identifier: {node.op_identifier() for node in function.all_nodes()}
        for identifier, function in model.functions.items()
    }
    holders = {
        identifier
        for identifier, function in model.functions.items()
        if any(node.op_type in (*LAYER_OPS, "Conv") for node in function.all_nodes())
    }
    while True:
        further = {one for one, called in calls.items() if called & holders} - holders
        if not further:
            return holders
        holders |= further
