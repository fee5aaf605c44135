"""Models with MatMulNBits nodes, made from arrays at hand: what custom execution is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx import TensorProto, helper

from awq_onnx.kernels import reference

Array = NDArray[Any]

MICROSOFT, OURS = "com.microsoft", "awq_onnx"
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
}


@dataclass
class Node:
    """A MatMulNBits with random tensors. Those that are None are left out."""

    K: int
    block_size: int
    codes: Array
    scales: Array
    zero_points: Array | None = None
    bias: Array | None = None
    group_index: Array | None = None
    domain: str = MICROSOFT
    bits: int = 4
    name: str = "the/node"

    @property
    def N(self) -> int:
        return len(self.codes)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.scales.dtype

    def activations(self, *leading: int) -> Array:
        rng = np.random.default_rng(7)
        return rng.standard_normal((*leading, self.K)).astype(self.dtype)

    def expected(self, a: Array) -> Array:
        """(…, N), by the specification."""
        product = reference.matmul_nbits(a, self.codes, self.scales, self.zero_points, self.bias)
        return np.asarray(product.astype(np.float32))

    def append(self, graph: onnx.GraphProto, x: str, y: str) -> None:
        """x -> the node -> y."""
        tensors = (self.codes, self.scales, self.zero_points, self.group_index, self.bias)
        names = [x]
        for kind, values in zip(("codes", "scales", "zero_points", "g_idx", "bias"), tensors, strict=True):
            names.append("" if values is None else f"{self.name}.{kind}")
            if values is not None:
                graph.initializer.append(tensor(names[-1], values))
        while not names[-1]:
            names.pop()
        shape = {"K": self.K, "N": self.N, "block_size": self.block_size, "bits": self.bits}
        graph.node.append(
            helper.make_node("MatMulNBits", names, [y], name=self.name, domain=self.domain, accuracy_level=0, **shape)
        )

    def model(self, rank: int = 2) -> onnx.ModelProto:
        return model(self, rank=rank)


def node(
    K: int = 40,
    N: int = 5,
    block_size: int = 16,
    dtype: Any = np.float32,
    *,
    zero_points: bool = False,
    bias: bool = False,
    bits: int = 4,
    seed: int = 0,
    **others: Any,
) -> Node:
    rng = np.random.default_rng(seed)
    G = -(-K // block_size)
    return Node(
        K,
        block_size,
        rng.integers(0, 256, (N, G, block_size * bits // 8), np.uint8),
        (rng.standard_normal((N, G)) / 2 ** (bits - 1)).astype(dtype),
        rng.integers(0, 256, (N, -(-G * bits // 8)), np.uint8) if zero_points else None,
        rng.standard_normal(N).astype(dtype) if bias else None,
        bits=bits,
        **others,
    )


def model(*nodes: Node, rank: int = 2) -> onnx.ModelProto:
    """x (free axes, K) -> every node of its own -> y0, y1, ... They have one K and type."""
    first = nodes[0]
    axes = [f"axis_{index}" for index in range(rank - 1)]
    x = helper.make_tensor_value_info("x", TYPES[first.dtype], [*axes, first.K])
    graph = helper.make_graph([], "nbits", [x], [])
    for index, one in enumerate(nodes):
        one.append(graph, "x", f"y{index}")
        graph.output.append(helper.make_tensor_value_info(f"y{index}", TYPES[first.dtype], [*axes, one.N]))
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in {one.domain for one in nodes})]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def tensor(name: str, values: Array) -> onnx.TensorProto:
    made: onnx.TensorProto = helper.make_tensor(name, TYPES[values.dtype], values.shape, values.tobytes(), raw=True)
    return made
