"""Small graphs in the handwriting of real exporters, with a few channels that carry most of the activation.

And the arrays that tests of the numbers share: activations, weights, what calibration would learn of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from awq_onnx import codec
from awq_onnx.codec import Format
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.sites import survey
from awq_onnx.passes.switch import INPUTS, StandIn
from awq_onnx.search import Reader
from awq_onnx.statistics import InputStatistics
from awq_onnx.store import OpenedModel, open_model

Array = NDArray[Any]

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
PLAIN = Format(32, False, FLOAT32)
FORMATS = [
    pytest.param(PLAIN, id="zero points-float32"),
    pytest.param(Format(32, True, FLOAT32), id="symmetric-float32"),
    pytest.param(Format(32, False, FLOAT16), id="zero points-float16"),
    pytest.param(Format(16, True, FLOAT16), id="symmetric-float16"),
]
every_format = pytest.mark.parametrize("fmt", FORMATS)


class GraphBuilder:
    """Append nodes, get names back; `model()` at the end."""

    def __init__(self, *, opset: int = 18, dtype: type = np.float32, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dims: list[int | str], dtype: Any = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.element_type(dtype), dims))
        return name

    def output(self, name: str, dims: list[int | str] | None = None, dtype: Any = None) -> str:
        """An output of the model; without `dims` its shape is inferred."""
        self.outputs.append(helper.make_tensor_value_info(name, self.element_type(dtype), dims))
        return name

    def constant(self, values: Any, name: str | None = None, dtype: Any = None) -> str:
        """An initializer."""
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype or self.dtype), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(values, dtype=np.int64)

    def add(self, op_type: str, *inputs: str, name: str | None = None, to: str | None = None, **attributes: Any) -> str:
        """A node with one output, `to` or NAME_output_0; its output."""
        name = name or f"/{op_type}_{len(self.nodes)}"
        output = to or f"{name}_output_0"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def weight(self, K: int, N: int, name: str | None = None) -> str:
        return self.constant(self.rng.standard_normal((K, N)) / np.sqrt(K), name)

    def linear(self, x: str, K: int, N: int, name: str, *, bias: bool = False) -> str:
        product = self.add("MatMul", x, self.weight(K, N, f"{name}.weight"), name=f"{name}/MatMul")
        if not bias:
            return product
        return self.add("Add", self.constant(self.rng.standard_normal(N), f"{name}.bias"), product, name=f"{name}/Add")

    def outlier_gain(self, K: int) -> Array:
        """Norm gains of which a few are large, as in trained models."""
        gain = np.exp(self.rng.standard_normal(K) * 0.5)
        gain[:: max(1, K // 4)] *= 8
        return gain

    def rms_norm(self, x: str, K: int, name: str, *, gain_first: bool = True, casts: bool = True) -> str:
        """RMSNorm as torch's TorchScript exporter decomposes it."""
        cast = self.cast(x, np.float32, f"{name}/Cast") if casts else x
        power = self.add("Pow", cast, self.constant(2.0, dtype=np.float32 if casts else None), name=f"{name}/Pow")
        mean = self.add("ReduceMean", power, self.integers(-1), name=f"{name}/ReduceMean", keepdims=1)
        epsilon = self.constant(1e-5, dtype=np.float32 if casts else None)
        root = self.add("Sqrt", self.add("Add", mean, epsilon, name=f"{name}/Add"), name=f"{name}/Sqrt")
        one = self.constant(1.0, dtype=np.float32 if casts else None)
        normed = self.add("Mul", cast, self.add("Div", one, root, name=f"{name}/Div"), name=f"{name}/Mul")
        if casts:
            normed = self.cast(normed, self.dtype, f"{name}/Cast_1")
        gain = self.constant(self.outlier_gain(K), f"{name}.weight")
        return self.add("Mul", *((gain, normed) if gain_first else (normed, gain)), name=f"{name}/Mul_1")

    def cast(self, x: str, dtype: Any, name: str) -> str:
        output = f"{name}_output_0"
        self.nodes.append(helper.make_node("Cast", [x], [output], name=name, to=self.element_type(dtype)))
        return output

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        model.producer_name = "builders"
        _fill_output_shapes(model)
        onnx.checker.check_model(model)
        return model

    def element_type(self, dtype: Any = None) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype)))


def _fill_output_shapes(model: onnx.ModelProto) -> None:
    if all(output.type.tensor_type.HasField("shape") for output in model.graph.output):
        return
    inferred = {output.name: output for output in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])


def norm_and_readers(*, K: int = 64, columns: tuple[int, ...] = (48, 32), **options: Any) -> GraphBuilder:
    """x -> RMSNorm -> several MatMuls -> their outputs. `options`: of GraphBuilder and rms_norm."""
    norm_options = {key: options.pop(key) for key in ("gain_first", "casts") if key in options}
    builder = GraphBuilder(**options)
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", K]), K, "norm", **norm_options)
    for index, N in enumerate(columns):
        product = builder.add(
            "MatMul", normed, builder.weight(K, N, f"w{index}"), name=f"reader_{index}", to=f"y{index}"
        )
        builder.output(product, ["batch", "sequence", N])
    return builder


def gated_mlp(
    *, K: int = 64, hidden: int = 96, activation: str = "silu", bias: bool = False, **options: Any
) -> GraphBuilder:
    """x -> RMSNorm -> gate, up -> act(gate) * up -> down."""
    builder = GraphBuilder(**options)
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", K]), K, "norm")
    gate, up = builder.linear(normed, K, hidden, "gate"), builder.linear(normed, K, hidden, "up", bias=bias)
    if activation == "silu":
        acted = builder.add("Mul", gate, builder.add("Sigmoid", gate, name="act/Sigmoid"), name="act/Mul")
    else:
        acted = gate
    product = builder.add("Mul", acted, up, name="product")
    builder.output(builder.linear(product, hidden, K, "down"), ["batch", "sequence", K])
    return builder


def two_linears(
    middle: Callable[[GraphBuilder, str], str],
    *,
    K: int = 32,
    hidden: int = 32,
    arriving: int | None = None,
    bias: bool = False,
    **options: Any,
) -> GraphBuilder:
    """x -> MatMul "first" (K, hidden) -> whatever `middle` appends -> MatMul "second" (arriving, 24) -> y."""
    builder = GraphBuilder(**options)
    first = builder.linear(builder.input("x", ["batch", "sequence", K]), K, hidden, "first", bias=bias)
    second = builder.linear(middle(builder, first), arriving or hidden, 24, "second")
    builder.output(second)
    return builder


def tiny_decoder(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 96,
    vocabulary: int = 160,
    cache: bool = True,
    bias: bool = False,
    causal: bool = True,
    **options: Any,
) -> onnx.ModelProto:
    """A Llama-shaped decoder as optimum exports it (without rotary positions): ids in, logits and caches out."""
    builder = GraphBuilder(**options)
    head_dim = hidden // heads
    ids = builder.input("input_ids", ["batch_size", "sequence_length"], np.int64)
    mask = builder.input("attention_mask", ["batch_size", "past_sequence_length + sequence_length"], np.int64)
    table = builder.constant(builder.rng.standard_normal((vocabulary, hidden)), "embed_tokens.weight")
    x = builder.add("Gather", table, ids, name="/embed_tokens/Gather")
    bias_mask = _causal_mask(builder, ids, mask, causal)
    for layer in range(layers):
        name = f"/layers.{layer}"
        attended = _attention(builder, x, bias_mask, name, (hidden, heads, kv_heads, head_dim), layer, cache, bias)
        x = builder.add("Add", x, attended, name=f"{name}/Add")
        normed = builder.rms_norm(x, hidden, f"{name}/post_attention_layernorm")
        gate = builder.linear(normed, hidden, mlp, f"{name}/mlp/gate_proj")
        up = builder.linear(normed, hidden, mlp, f"{name}/mlp/up_proj", bias=bias)
        sigmoid = builder.add("Sigmoid", gate, name=f"{name}/mlp/Sigmoid")
        acted = builder.add("Mul", gate, sigmoid, name=f"{name}/mlp/act/Mul")
        product = builder.add("Mul", acted, up, name=f"{name}/mlp/Mul")
        x = builder.add("Add", x, builder.linear(product, mlp, hidden, f"{name}/mlp/down_proj"), name=f"{name}/Add_1")
    normed = builder.rms_norm(x, hidden, "/norm")
    head = builder.constant(builder.rng.standard_normal((hidden, vocabulary)) / np.sqrt(hidden) * 2, "lm_head.weight")
    logits = builder.add("MatMul", normed, head, name="/lm_head/MatMul", to="logits")
    builder.outputs.insert(
        0, helper.make_tensor_value_info(logits, builder.element_type(), ["batch_size", "sequence_length", vocabulary])
    )
    return builder.model()


def _causal_mask(builder: GraphBuilder, ids: str, mask: str, causal: bool) -> str:
    """0 where a token may look, -1e4 where not: (batch, 1, tokens, past + tokens)."""
    real = builder.add("Unsqueeze", builder.cast(mask, np.bool_, "/real"), builder.integers(1, 2), name="/real_1")
    if not causal:
        return builder.add("Where", real, builder.constant(0.0), builder.constant(-1e4), name="/bias")
    tokens = builder.add(
        "Gather", builder.add("Shape", ids, name="/Shape"), builder.integers(1), name="/tokens", axis=0
    )
    total = builder.add(
        "Gather", builder.add("Shape", mask, name="/Shape_1"), builder.integers(1), name="/total", axis=0
    )
    zero, one = builder.constant(0, dtype=np.int64), builder.constant(1, dtype=np.int64)
    scalar = builder.constant(np.array([], np.int64), dtype=np.int64)
    columns = builder.add("Range", zero, builder.add("Reshape", total, scalar, name="/total_0"), one, name="/columns")
    rows = builder.add("Range", zero, builder.add("Reshape", tokens, scalar, name="/tokens_0"), one, name="/rows")
    past = builder.add("Sub", total, tokens, name="/past")
    rows = builder.add("Unsqueeze", builder.add("Add", rows, past, name="/rows_1"), builder.integers(1), name="/rows_2")
    visible = builder.add("LessOrEqual", columns, rows, name="/visible")
    allowed = builder.add("And", visible, real, name="/allowed")
    return builder.add("Where", allowed, builder.constant(0.0), builder.constant(-1e4), name="/bias")


def _attention(
    builder: GraphBuilder,
    x: str,
    bias_mask: str,
    name: str,
    sizes: tuple[int, int, int, int],
    layer: int,
    cache: bool,
    bias: bool,
) -> str:
    hidden, heads, kv_heads, head_dim = sizes
    normed = builder.rms_norm(x, hidden, f"{name}/input_layernorm")
    shape = builder.add("Shape", normed, name=f"{name}/attn/Shape")
    batch = builder.add("Gather", shape, builder.integers(0), name=f"{name}/attn/batch", axis=0)
    tokens = builder.add("Gather", shape, builder.integers(1), name=f"{name}/attn/tokens", axis=0)

    def split(value: str, count: int, kind: str) -> str:
        target = builder.add(
            "Concat",
            batch,
            tokens,
            builder.integers(count),
            builder.integers(head_dim),
            name=f"{name}/{kind}/s",
            axis=0,
        )
        reshaped = builder.add("Reshape", value, target, name=f"{name}/{kind}/Reshape")
        return builder.add("Transpose", reshaped, name=f"{name}/{kind}/Transpose", perm=[0, 2, 1, 3])

    def cached(value: str, kind: str) -> str:
        if not cache:
            return value
        dims: list[int | str] = ["batch_size", kv_heads, "past_sequence_length", head_dim]
        past = builder.input(f"past_key_values.{layer}.{kind}", dims)
        present = f"present.{layer}.{kind}"
        builder.add("Concat", past, value, name=f"{name}/{kind}/Concat", to=present, axis=2)
        builder.output(present, ["batch_size", kv_heads, "past_sequence_length + sequence_length", head_dim])
        return present

    def repeated(value: str, kind: str) -> str:
        if heads == kv_heads:
            return value
        shape = builder.add("Shape", value, name=f"{name}/{kind}/Shape")
        length = builder.add("Gather", shape, builder.integers(2), name=f"{name}/{kind}/length", axis=0)
        times = builder.integers(heads // kv_heads)
        wide = builder.add(
            "Concat", batch, builder.integers(kv_heads), times, length, builder.integers(head_dim),
            name=f"{name}/{kind}/wide", axis=0,
        )  # fmt: skip
        flat = builder.add(
            "Concat",
            batch,
            builder.integers(heads),
            length,
            builder.integers(head_dim),
            name=f"{name}/{kind}/flat",
            axis=0,
        )
        unsqueezed = builder.add("Unsqueeze", value, builder.integers(2), name=f"{name}/{kind}/Unsqueeze")
        expanded = builder.add("Expand", unsqueezed, wide, name=f"{name}/{kind}/Expand")
        return builder.add("Reshape", expanded, flat, name=f"{name}/{kind}/Reshape_1")

    kv_width = kv_heads * head_dim
    query = split(builder.linear(normed, hidden, hidden, f"{name}/q_proj", bias=bias), heads, "query")
    key = split(builder.linear(normed, hidden, kv_width, f"{name}/k_proj", bias=bias), kv_heads, "key")
    value = split(builder.linear(normed, hidden, kv_width, f"{name}/v_proj", bias=bias), kv_heads, "value")
    key, value = repeated(cached(key, "key"), "key"), repeated(cached(value, "value"), "value")
    key = builder.add("Transpose", key, name=f"{name}/attn/Transpose", perm=[0, 1, 3, 2])
    scores = builder.add("MatMul", query, key, name=f"{name}/attn/MatMul")
    scaled = builder.add("Mul", scores, builder.constant(head_dim**-0.5), name=f"{name}/attn/Mul")
    weights = builder.add(
        "Softmax", builder.add("Add", scaled, bias_mask, name=f"{name}/attn/Add"), name=f"{name}/attn/Softmax", axis=-1
    )
    mixed = builder.add("MatMul", weights, value, name=f"{name}/attn/MatMul_1")
    merged = builder.add("Transpose", mixed, name=f"{name}/attn/Transpose_1", perm=[0, 2, 1, 3])
    target = builder.add("Concat", batch, tokens, builder.integers(hidden), name=f"{name}/attn/Concat", axis=0)
    return builder.linear(
        builder.add("Reshape", merged, target, name=f"{name}/attn/Reshape"), hidden, hidden, f"{name}/o_proj"
    )


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write the model as one file, or with its weights in NAME.data."""
    if external:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


@contextmanager
def opened_with_groups(model: onnx.ModelProto) -> Iterator[tuple[OpenedModel, tuple[Group, ...]]]:
    with open_model(model) as opened:
        yield opened, find_groups(survey(opened.model))


def run(model: onnx.ModelProto | Path, feed: dict[str, Array]) -> dict[str, Array]:
    """All outputs of a model in plain onnxruntime, by name."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def stand_ins_of(model: Path, factor: float = 1) -> dict[str, StandIn]:
    """The layers of a quantised model, by what they make. factor: of the weights, and of the input its inverse."""
    loaded = onnx.load(model)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    found = {}
    for number, node in enumerate(loaded.graph.node):
        if node.op_type == "MatMulNBits":
            arrays = {what: tensors[name] for what, name in zip(INPUTS, node.input[1:], strict=False)}
            sizes = {one.name: one.i for one in node.attribute}
            arrays["scales"] = factor * arrays["scales"]
            arrays["inverse"] = np.full(sizes["K"], 1 / factor, np.float32)
            path = model.with_name(f"{number}-{factor}.npz")
            np.savez(path, **arrays)  # type: ignore[arg-type]
            numbers = (sizes[name] for name in ("K", "N", "bits", "block_size"))
            found[node.output[0]] = StandIn(node.input[0], path, *numbers)
    return found


def decoder_feed(model: onnx.ModelProto, ids: Array) -> dict[str, Array]:
    """Ids (B, T), a mask of ones, empty caches."""
    feed: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in model.graph.input:
        if value.name.startswith("past"):
            dims = value.type.tensor_type.shape.dim
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = np.zeros((len(ids), dims[1].dim_value, 0, dims[3].dim_value), dtype)
    return feed


def bigrams(logits: Array, *, dtype: type = np.float32) -> onnx.ModelProto:
    """A language model without a cache, whose logits are those (V, V) of the token alone."""
    builder = GraphBuilder(dtype=dtype)
    ids = builder.input("input_ids", ["batch_size", "sequence_length"], np.int64)
    table = builder.constant(logits, "table")
    builder.output(builder.add("Gather", table, ids, to="logits"), ["batch_size", "sequence_length", logits.shape[1]])
    return builder.model()


def tiny_encoder(*, hidden: int = 32, vocabulary: int = 40, positions: int | None = None) -> onnx.ModelProto:
    """Ids and a mask in, `last_hidden_state` out; `positions`: the rows of its table of learned positions, if any."""
    builder = GraphBuilder()
    dims: list[int | str] = ["batch_size", "encoder_sequence_length"]
    ids, mask = (builder.input(name, dims, np.int64) for name in ("input_ids", "attention_mask"))
    x = builder.add("Gather", builder.weight(vocabulary, hidden, "words"), ids, name="words")
    if positions is not None:
        x = builder.add("Add", x, learned_positions(builder, ids, positions, hidden), name="positioned")
    real = builder.add("Unsqueeze", builder.cast(mask, np.float32, "real"), builder.integers(2), name="real_1")
    normed = builder.rms_norm(builder.add("Mul", x, real, name="masked"), hidden, "norm")
    product = builder.add("MatMul", normed, builder.weight(hidden, hidden, "w"), name="up", to="last_hidden_state")
    builder.output(product, [*dims, hidden])
    return builder.model()


def learned_positions(builder: GraphBuilder, ids: str, rows: int, hidden: int) -> str:
    """The vectors of positions 0, 1, 2 …: onnxruntime fails where there are more tokens than rows."""
    one = builder.integers(1)
    ones = builder.add("Add", builder.add("Mul", ids, builder.integers(0)), one)
    counted = builder.add("CumSum", ones, builder.constant(1, dtype=np.int64))
    positions = builder.add("Sub", counted, one)
    return builder.add("Gather", builder.weight(rows, hidden, "positions"), positions, name="positions")


def tiny_cross_decoder(*, past: bool, hidden: int = 32, vocabulary: int = 40) -> onnx.ModelProto:
    """The decoder of an encoder-decoder, as optimum names its ends: what comes first, or what goes on after it.

    Its attention is a mean over what it may see. The first half reads `encoder_hidden_states` and returns the caches
    of both; the second wants them, and returns that of the decoder.
    """
    builder = GraphBuilder()
    ids = builder.input("input_ids", ["batch_size", "decoder_sequence_length"], np.int64)
    x = builder.add("Gather", builder.weight(vocabulary, hidden, "words"), ids, name="words")
    own = builder.add("Unsqueeze", x, builder.integers(1))  # (B, 1 head, T, D)
    cache: list[int | str] = ["batch_size", 1, "past_decoder_sequence_length", hidden]
    encoded: list[int | str] = ["batch_size", 1, "encoder_sequence_length", hidden]
    if past:
        builder.input("encoder_attention_mask", ["batch_size", "encoder_sequence_length"], np.int64)
        before = builder.input("past_key_values.0.decoder.key", cache)
        read = builder.input("past_key_values.0.encoder.key", encoded)
        own = builder.add("Concat", before, own, axis=2)
    else:
        states = builder.input("encoder_hidden_states", ["batch_size", "encoder_sequence_length", hidden])
        read = builder.add("Unsqueeze", states, builder.integers(1), to="present.0.encoder.key")
        builder.output(read, encoded)
    seen = builder.add("CumSum", own, builder.constant(2, dtype=np.int64))
    if past:
        ends = (builder.integers(-1), builder.integers(np.iinfo(np.int64).max), builder.integers(2))
        seen = builder.add("Slice", seen, *ends)
    mean = builder.add("ReduceMean", read, builder.integers(2), keepdims=1)
    mixed = builder.add("Squeeze", builder.add("Add", seen, mean), builder.integers(1))
    normed = builder.rms_norm(mixed, hidden, "norm")
    head = builder.weight(hidden, vocabulary, "lm_head")
    builder.output(builder.add("MatMul", normed, head, name="/lm_head/MatMul", to="logits"))
    builder.output(builder.add("Identity", own, to="present.0.decoder.key"), cache)
    return builder.model()


def activations(rng: np.random.Generator, K: int, *, T: int = 256, outliers: int = 0) -> Array:
    """Correlated channels of different strength; the first `outliers` of a shuffle are 30 times stronger."""
    mixed = rng.standard_normal((T, 12)) @ rng.standard_normal((12, K)) + rng.standard_normal((T, K))
    strength = np.exp(rng.standard_normal(K) * 0.5)
    strength[rng.permutation(K)[:outliers]] *= 30
    x: Array = (mixed * strength).astype(np.float32)
    return x


def weight(rng: np.random.Generator, K: int, N: int) -> Array:
    w: Array = (rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)
    return w


def statistics_of(x: Array, validation: Array | None = None) -> InputStatistics:
    """What calibration would learn from activations (T, K), and from more of them, kept for validation."""
    x = (x if validation is None else np.concatenate([x, validation])).astype(np.float32)
    magnitude = np.abs(x)
    second_moment: Array = x.T @ x / np.float32(len(x))
    return InputStatistics(second_moment, magnitude.mean(axis=0), magnitude.max(axis=0), len(x), validation)


def read_by(statistics: InputStatistics, *weights: Array, fmt: Format = PLAIN) -> list[Reader]:
    """Weights that read one input."""
    return [Reader(one, statistics, fmt=fmt) for one in weights]


def plain_error(w: Array, scale: Array, fmt: Format) -> Array:
    """Q(s W) / s - W on the min-max grid: (K, N)."""
    blocks = codec.to_blocks(scale[:, None] * w, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    restored = codec.dequantize(codec.centred_codes(blocks, grid), grid)
    error: Array = codec.from_blocks(restored, len(w)) / scale[:, None] - w
    return error


LARGE_K, LARGE_N = 160, 128  # a weight of 80 kB: large enough to stay in its file


def large_model(seed: int = 0) -> onnx.ModelProto:
    """x -> RMSNorm -> two MatMuls, each with a weight that stays in its file."""
    return norm_and_readers(K=LARGE_K, columns=(LARGE_N, LARGE_N), seed=seed).model()


def values_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_same_values(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype
        np.testing.assert_array_equal(actual[name], values, err_msg=name)
