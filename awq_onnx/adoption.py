"""A model file whose MatMulNBits nodes run on our CUDA kernels, where those serve them (`awq_onnx.passes.adopt`)."""

from __future__ import annotations

import os
from pathlib import Path

from awq_onnx.errors import ModelError
from awq_onnx.output import OutputFiles
from awq_onnx.passes.adopt import FROM, OP_TYPE, Adoption, Left, move
from awq_onnx.store import ModelSource, open_model


def adopt(model: ModelSource, output: str | os.PathLike[str], *, overwrite: bool = False) -> Adoption:
    """Write a model whose MatMulNBits nodes are ours, awq_onnx::MatMulNBits, wherever the CUDA kernels serve them.

    It runs in sessions with the library registered, see `register`: with replace=False the nodes that were left run on
    onnxruntime's own kernel. The weights are copied as they are. The output appears whole or not at all.

    Raises ModelError where no node can be moved, OutputError where the output exists or cannot be written.
    """
    with open_model(model) as opened, OutputFiles(Path(output), opened, overwrite=overwrite) as files:
        adoption = move(opened.model)
        if not adoption.moved:
            raise ModelError(f"{opened.path or 'the model'} has nothing for the kernels: {_why_nothing(adoption.left)}")
        files.write(opened.model)
        files.publish()
    return adoption


def _why_nothing(left: tuple[Left, ...]) -> str:
    if not left:
        return f"it has no {FROM}::{OP_TYPE}; quantise it with awq-onnx first"
    return f"none of its {len(left)} {OP_TYPE} can be moved; of {left[0].name}, {left[0].reason}"
