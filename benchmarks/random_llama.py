"""Llama-shaped decoders of any size with random weights, to see what quantising costs where there are no trained ones.

    python benchmarks/random_llama.py FOLDER [--size 0.1|0.5|1.5|6] [--layers N] [--dtype fp16|fp32] [--seed N]

Writes FOLDER/model.onnx and model.onnx.data and prints the path; downloads nothing. The graph is in the handwriting of
onnxruntime-genai's builder: RMSNorm with the residual as one node, RotaryEmbedding, GroupQueryAttention, key/value
cache. What it computes means nothing, but activations keep about unit size from the first layer to the last, and every
norm has a few channels with a large gain, so that AWQ has something to do.

The weights go to the data file in pieces, none is ever in memory; the same seed gives the same bytes, and the fp32
model holds the numbers of the fp16 one.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Floats: TypeAlias = "NDArray[np.float16] | NDArray[np.float32]"

DTYPES: Mapping[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
POSITIONS = 2048  # that the rotary tables reach
ROTARY_BASE = 10000.0
EPSILON = 1e-5
GAIN_SPREAD = 0.3  # of the logarithm of a norm's gains
OUTLIER_GAIN = 10.0
OUTLIER_SHARE = 200  # one channel in so many has it
POOL = 1 << 22  # random numbers that are made; all weights are runs of them
RUN = 1 << 16  # numbers in a run, far fewer than the pool: two weights hardly share any
PAGE_BYTES = 4096  # every tensor starts on a page of the data file, so that it can be mapped


@dataclass(frozen=True)
class Shape:
    """What decides the sizes of a model's weights. head_size: channels of one head, of which there are `heads`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int = 32000

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def parameters(self) -> int:
        """Embedding and lm_head (which share nothing), layers, norms; not the rotary tables."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden


# By billions of parameters. All have Llama-2's vocabulary, so that the lm_head does not hide the layers.
SHAPES: Mapping[str, Shape] = {
    "0.1": Shape(576, 1536, 30, heads=9, kv_heads=3, head_size=64),  # SmolLM2-135M
    "0.5": Shape(1024, 3072, 28, heads=16, kv_heads=8, head_size=128),  # Qwen3-0.6B, without norms of q and k
    "1.5": Shape(1536, 8960, 28, heads=12, kv_heads=2, head_size=128),  # Qwen2.5-1.5B, without biases
    "6": Shape(4096, 11008, 28, heads=32, kv_heads=32, head_size=128),  # Llama-2-7B with 4 layers less
}


def build(folder: Path, shape: Shape, dtype: str = "fp16", seed: int = 0) -> Path:
    """Write the model into `folder`; returns the path of the graph, which is written last."""
    path = folder / "model.onnx"
    with DataFile(folder / "model.onnx.data", DTYPES[dtype], seed) as data:
        model = Decoder(shape, data).model()
    path.write_bytes(model.SerializeToString())
    return path


class Normals:
    """Normal numbers about as fast as a disk takes them: runs of one pool, from other places for every tensor."""

    def __init__(self, seed: int, dtype: np.dtype[Any]) -> None:
        self._seed = seed
        self._dtype = dtype
        self._pool = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
        self._scaled: dict[float, Floats] = {}

    def generator(self, name: str) -> np.random.Generator:
        """A generator for one tensor, which does not depend on what was drawn for others."""
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])

    def runs(self, name: str, count: int, std: float) -> Iterator[Floats]:
        """`count` numbers in pieces, rounded to fp16 whatever their dtype."""
        if std not in self._scaled:
            self._scaled[std] = (self._pool * np.float32(std)).astype(np.float16).astype(self._dtype)
        pool = self._scaled[std]
        starts = self.generator(name).integers(0, POOL - RUN, size=-(-count // RUN))
        for position, start in enumerate(starts):
            yield pool[start : start + min(RUN, count - position * RUN)]


class DataFile:
    """The weights of a model: each goes to the file as it is asked for, and to `tensors` as a reference."""

    def __init__(self, path: Path, dtype: np.dtype[Any], seed: int) -> None:
        self.dtype = dtype
        self.tensors: list[onnx.TensorProto] = []
        self.normals = Normals(seed, dtype)
        self._path = path

    def __enter__(self) -> DataFile:
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def element_type(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def random(self, name: str, shape: Sequence[int], std: float) -> str:
        """A tensor of normal numbers; its name."""
        return self.add(name, shape, self.element_type, self.normals.runs(name, math.prod(shape), std))

    def gain(self, name: str, channels: int) -> str:
        """The gain of a norm: around one, but for a few channels that stand out in all norms alike; its name."""
        outliers = self.normals.generator("outliers").choice(channels, -(-channels // OUTLIER_SHARE), replace=False)
        gain = np.exp(GAIN_SPREAD * self.normals.generator(name).standard_normal(channels))
        gain[outliers] *= OUTLIER_GAIN
        return self.known(name, gain)

    def known(self, name: str, values: NDArray[Any]) -> str:
        """A tensor of given numbers; its name."""
        return self.add(name, values.shape, self.element_type, [values.astype(np.float16).astype(self.dtype)])

    def add(self, name: str, shape: Sequence[int], element_type: int, pieces: Iterable[NDArray[Any]]) -> str:
        """A tensor that comes in pieces; its name."""
        self._file.write(bytes(-self._file.tell() % PAGE_BYTES))
        offset = self._file.tell()
        for piece in pieces:
            self._file.write(piece.data)
        length = self._file.tell() - offset
        tensor = TensorProto(
            name=name, dims=shape, data_type=element_type, data_location=TensorProto.DataLocation.EXTERNAL
        )
        for key, value in (("location", self._path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name


class Decoder:
    """The graph, node by node from the token ids to the logits."""

    def __init__(self, shape: Shape, data: DataFile) -> None:
        self.shape = shape
        self.data = data
        self._nodes: list[onnx.NodeProto] = []
        self._small: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def model(self) -> onnx.ModelProto:
        """The whole model; its weights are in the data file then."""
        self._declare_inputs()
        self._last_tokens, self._total_length = self._lengths()
        self._tables = self._rotary_tables()
        self._append_layers()
        initializers = [*self._small, *self.data.tensors]
        graph = helper.make_graph(self._nodes, "main_graph", self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="random_llama.py")

    def _declare_inputs(self) -> None:
        tokens = ["batch_size", "sequence_length"]
        self._declare(self._inputs, "input_ids", tokens, TensorProto.INT64)
        self._declare(self._inputs, "attention_mask", ["batch_size", "total_sequence_length"], TensorProto.INT64)
        self._declare(self._inputs, "position_ids", tokens, TensorProto.INT64)
        self._declare(self._outputs, "logits", [*tokens, self.shape.vocabulary])

    def _append_layers(self) -> None:
        hidden = self.shape.hidden
        table = self.data.random("model.embed_tokens.weight", [self.shape.vocabulary, hidden], 1.0)
        stream = self._node("/model/embed_tokens/Gather", "Gather", [table, "input_ids"])
        branch: str | None = None
        for number in range(self.shape.layers):
            layer = f"/model/layers.{number}"
            normed, stream = self._norm(f"{layer}/input_layernorm", stream, branch)
            branch = self._attention(f"{layer}/attn", number, normed)
            normed, stream = self._norm(f"{layer}/post_attention_layernorm", stream, branch)
            branch = self._mlp(f"{layer}/mlp", normed)
        normed, _ = self._norm("/model/norm", stream, branch)
        weight = self.data.random("lm_head.MatMul.weight", [hidden, self.shape.vocabulary], 1 / math.sqrt(hidden))
        self._node("/lm_head/MatMul", "MatMul", [normed, weight], outputs=["logits"])

    def _norm(self, name: str, stream: str, branch: str | None) -> tuple[str, str]:
        """RMSNorm of the residual stream and what a branch adds to it; the result, and the stream after that."""
        gain = self.data.gain(f"{_dotted(name)}.weight", self.shape.hidden)
        if branch is None:
            normed = self._node(
                f"{name}/LayerNorm", "SimplifiedLayerNormalization", [stream, gain], epsilon=EPSILON, axis=-1
            )
            return normed, stream
        outputs = [f"{name}/output_0", "", "", f"{name}/output_3"]
        skip_norm = "SkipSimplifiedLayerNormalization"
        self._microsoft(f"{name}/SkipLayerNorm", skip_norm, [stream, branch, gain], outputs, epsilon=EPSILON)
        return outputs[0], outputs[3]

    def _attention(self, name: str, number: int, normed: str) -> str:
        hidden, queries, keys = self.shape.hidden, self.shape.queries, self.shape.keys
        q = self._rotated(f"{name}/q_rotary", self._linear(f"{name}/q_proj", normed, hidden, queries))
        k = self._rotated(f"{name}/k_rotary", self._linear(f"{name}/k_proj", normed, hidden, keys))
        v = self._linear(f"{name}/v_proj", normed, hidden, keys)
        caches = [self._cache(number, part) for part in ("key", "value")]
        attended, *_ = self._microsoft(
            f"{name}/GroupQueryAttention",
            "GroupQueryAttention",
            [q, k, v, *(past for past, _ in caches), self._last_tokens, self._total_length],
            [f"{name}/GroupQueryAttention/output_0", *(present for _, present in caches)],
            num_heads=self.shape.heads,
            kv_num_heads=self.shape.kv_heads,
            scale=1 / math.sqrt(self.shape.head_size),
        )
        return self._linear(f"{name}/o_proj", attended, queries, hidden, ends_branch=True)

    def _mlp(self, name: str, normed: str) -> str:
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        gate = self._linear(f"{name}/gate_proj", normed, hidden, intermediate)
        up = self._linear(f"{name}/up_proj", normed, hidden, intermediate)
        sigmoid = self._node(f"{name}/act_fn/Sigmoid", "Sigmoid", [gate])
        activated = self._node(f"{name}/act_fn/Mul", "Mul", [gate, sigmoid])
        product = self._node(f"{name}/Mul", "Mul", [activated, up])
        return self._linear(f"{name}/down_proj", product, intermediate, hidden, ends_branch=True)

    def _linear(self, name: str, x: str, K: int, N: int, *, ends_branch: bool = False) -> str:
        """x W of about the size of x; where it is added to the residual stream, smaller the more layers do that."""
        std = 1 / math.sqrt(K * (2 * self.shape.layers if ends_branch else 1))
        weight = self.data.random(f"{_dotted(name)}.MatMul.weight", [K, N], std)
        return self._node(f"{name}/MatMul", "MatMul", [x, weight])

    def _rotated(self, name: str, x: str) -> str:
        inputs, outputs = [x, "position_ids", *self._tables], [f"{name}/RotaryEmbedding/output_0"]
        return self._microsoft(f"{name}/RotaryEmbedding", "RotaryEmbedding", inputs, outputs, interleaved=0)[0]

    def _cache(self, number: int, part: str) -> tuple[str, str]:
        """The input and the output of a key or value cache, declared."""
        past, present = f"past_key_values.{number}.{part}", f"present.{number}.{part}"
        before, after = "past_sequence_length", "total_sequence_length"
        for infos, name, length in ((self._inputs, past, before), (self._outputs, present, after)):
            self._declare(infos, name, ["batch_size", self.shape.kv_heads, length, self.shape.head_size])
        return past, present

    def _lengths(self) -> tuple[str, str]:
        """What GroupQueryAttention wants to know: the last token's place in every sequence, the length of the mask."""
        name, one = "/model/attn_mask_reformat", self._integers("/model/constants/one", [1])
        count = self._node(f"{name}/ReduceSum", "ReduceSum", ["attention_mask", one], keepdims=0)
        last = self._node(f"{name}/Sub", "Sub", [count, one])
        shape = self._node(f"{name}/Shape", "Shape", ["attention_mask"])
        axis = self._integers("/model/constants/axis", 1)
        total = self._node(f"{name}/Gather", "Gather", [shape, axis], axis=0)
        last, total = (
            self._node(f"{name}/{what}/Cast", "Cast", [value], to=TensorProto.INT32)
            for what, value in (("Sub", last), ("Gather", total))
        )
        return last, total

    def _rotary_tables(self) -> tuple[str, str]:
        half = self.shape.head_size // 2
        angles = np.outer(np.arange(POSITIONS), ROTARY_BASE ** -(np.arange(half) / half))  # (positions, half a head)
        return self.data.known("cos_cache", np.cos(angles)), self.data.known("sin_cache", np.sin(angles))

    def _integers(self, name: str, values: int | list[int]) -> str:
        self._small.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _node(
        self, name: str, op_type: str, inputs: list[str], *, outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """A node with one output, called after the node where `outputs` does not say; its output."""
        made = list(outputs) or [f"{name}/output_0"]
        self._nodes.append(helper.make_node(op_type, inputs, made, name, **attributes))
        return made[0]

    def _microsoft(
        self, name: str, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> list[str]:
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name, domain="com.microsoft", **attributes))
        return outputs

    def _declare(
        self, infos: list[onnx.ValueInfoProto], name: str, dims: Sequence[int | str], element_type: int | None = None
    ) -> None:
        infos.append(helper.make_tensor_value_info(name, element_type or self.data.element_type, dims))


def _dotted(name: str) -> str:
    """What the weights of a node are called: /model/layers.0/mlp -> model.layers.0.mlp."""
    return name.lstrip("/").replace("/", ".")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a llama-shaped decoder with random weights as ONNX.")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--size", choices=list(SHAPES), default="0.1", help="billions of parameters")
    parser.add_argument("--layers", type=int, metavar="N", help="as many layers instead of the size's own")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.size]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(build(arguments.folder, shape, arguments.dtype, arguments.seed))


if __name__ == "__main__":
    main()
