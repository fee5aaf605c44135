"""What the benchmarks share: the models, held-out text, other tools' quantisers."""

from __future__ import annotations

import importlib.util
import logging
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Collection, Mapping
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


# How the trained models are built: the script in models/ and what it is called with.
RECIPES: Mapping[str, tuple[str, ...]] = {
    "smollm2": ("smollm2.py",),
    "smollm2-dynamo": ("smollm2.py", "--export", "dynamo"),
    "smollm2-genai": ("smollm2.py", "--export", "genai"),
    "smollm2-fp16": ("smollm2.py", "--dtype", "fp16"),
    "smollm2-dynamo-fp16": ("smollm2.py", "--export", "dynamo", "--dtype", "fp16"),
    "smollm2-genai-fp16": ("smollm2.py", "--export", "genai", "--dtype", "fp16"),
    "gpt2": ("gpt2.py",),
    "bert": ("bert.py",),
    "paraphrase": ("paraphrase.py",),
}


def trained_model(name: str) -> Path:
    """One of `RECIPES`, built in a process of its own if it is not there yet."""
    recipe, *options = RECIPES[name]
    command = [sys.executable, str(ROOT / "models" / recipe), *options, "--print-path"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def smollm2() -> Path:
    """The fp32 SmolLM2-135M, built if it is not there yet."""
    return trained_model("smollm2")


def held_out_text(model: Path, windows: int, length: int) -> NDArray[np.int64]:
    """Token ids (windows, length) of CPython's own documentation, evenly spread over it.

    Each window stands between the tokens that the tokenizer puts around a text, if it does.
    """
    from tokenizers import Tokenizer

    topics: dict[str, str] = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_file(str(model.with_name("tokenizer.json")))
    around = tokenizer.encode("").ids
    before, after = around[: len(around) // 2], around[len(around) // 2 :]
    ids, length = tokenizer.encode(text, add_special_tokens=False).ids, length - len(around)
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    return np.array([[*before, *ids[start : start + length], *after] for start in starts], np.int64)


def other_text() -> str:
    """English text that is not in `held_out_text`: what numpy says of its functions and classes."""
    documented = (getattr(np, name).__doc__ for name in sorted(np.__all__))
    return "\n\n".join(text for text in documented if isinstance(text, str))


def legal_text() -> str:
    """The licences of what is in onnxruntime: English far from any documentation."""
    import onnxruntime

    return (Path(onnxruntime.__file__).parent / "ThirdPartyNotices.txt").read_text(errors="replace")


def ort_rtn(model: Path, output: Path, block_size: int, accuracy_level: int, kept: Collection[str]) -> Path:
    """onnxruntime's own round-to-nearest, asymmetric, on all constant MatMuls but those `kept`, by node name.

    It knows no Gemm; each is given to it as the MatMul and the Add that it stands for, so that it gets every layer.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells every node
    quantizer = MatMulNBitsQuantizer(
        without_gemms(onnx.load(model)),
        block_size=block_size,
        is_symmetric=False,
        accuracy_level=accuracy_level,
        nodes_to_exclude=list(kept),
    )
    quantizer.process()
    quantized = quantizer.model.model
    set_accuracy_level(quantized, accuracy_level)  # the tool writes no attribute for 0
    onnx.save(quantized, output)
    return output


def without_gemms(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed: every Gemm with a constant weight is a MatMul of the same name, and an Add of its bias."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        plain = node.op_type == "Gemm" and node.input[1] in weights and not _attribute(node, "transA", 0)
        nodes += _matmul_and_add(node, model.graph, weights) if plain else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _matmul_and_add(
    gemm: onnx.NodeProto, graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    weight = onnx.numpy_helper.to_array(weights[gemm.input[1]])
    weight = (weight.T if _attribute(gemm, "transB", 0) else weight) * weight.dtype.type(_attribute(gemm, "alpha", 1))
    name = f"{gemm.name or gemm.output[0]}.weight"
    graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight), name))
    if len(gemm.input) < 3:
        return [onnx.helper.make_node("MatMul", [gemm.input[0], name], gemm.output, gemm.name)]
    assert _attribute(gemm, "beta", 1) == 1, f"{gemm.name} scales its bias"
    product = f"{gemm.output[0]}.product"
    return [
        onnx.helper.make_node("MatMul", [gemm.input[0], name], [product], gemm.name),
        onnx.helper.make_node("Add", [product, gemm.input[2]], gemm.output, f"{gemm.name}.bias"),
    ]


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    return float(next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default))


def count_quantized(model: Path) -> int:
    return sum(node.op_type == "MatMulNBits" for node in onnx.load(model, load_external_data=False).graph.node)


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
