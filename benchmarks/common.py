"""What the benchmarks share: the model, held-out text, other tools' quantisers."""

from __future__ import annotations

import importlib.util
import logging
import pydoc_data.topics
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """A script of this project that lies in no package: models/smollm2.py, examples/side_by_side.py."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def smollm2() -> Path:
    """The fp32 SmolLM2-135M, built if it is not there yet."""
    folder: Path = script("models/smollm2.py").build()
    return folder / "model.onnx"


def held_out_text(model: Path, windows: int, length: int) -> NDArray[np.int64]:
    """Token ids (windows, length) of CPython's own documentation, evenly spread over it."""
    from tokenizers import Tokenizer

    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(model.with_name("tokenizer.json"))).encode(text, add_special_tokens=False).ids
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int64)


def ort_rtn(model: Path, output: Path, block_size: int, accuracy_level: int) -> Path:
    """onnxruntime's own round-to-nearest, asymmetric, on the same MatMuls (all but the lm_head)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells every node
    quantizer = MatMulNBitsQuantizer(
        onnx.load(model),
        block_size=block_size,
        is_symmetric=False,
        accuracy_level=accuracy_level,
        nodes_to_exclude=["/lm_head/MatMul"],
    )
    quantizer.process()
    quantized = quantizer.model.model
    set_accuracy_level(quantized, accuracy_level)  # the tool writes no attribute for 0
    onnx.save(quantized, output)
    return output


def with_accuracy_level(model: Path, output: Path, accuracy_level: int) -> Path:
    """A copy of a quantised model's graph with another accuracy level; it shares the data file, in one folder."""
    graph = onnx.load(model, load_external_data=False)
    set_accuracy_level(graph, accuracy_level)
    output.write_bytes(graph.SerializeToString())
    return output


def set_accuracy_level(model: onnx.ModelProto, accuracy_level: int) -> None:
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", accuracy_level)])


def size_bytes(model: Path) -> int:
    """Graph and data."""
    data = {
        entry.value
        for tensor in onnx.load(model, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return model.stat().st_size + sum(model.with_name(name).stat().st_size for name in data)
