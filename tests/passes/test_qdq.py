"""A layer as DequantizeLinear and MatMul is the same layer for everyone who looks at the graph, and for onnxruntime."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, norm_and_readers, run

from awq_onnx import codec
from awq_onnx.codec import Format
from awq_onnx.passes import check, opset, qdq
from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import PackedWeight
from awq_onnx.passes.sites import Site, quantized_nodes, survey

BLOCK = 16
TYPES = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8, (8, False): np.uint8}


def weight_of(site: Site) -> Array:
    values = site.tensor.numpy().astype(np.float32)
    return np.ascontiguousarray(values.T if site.transposed else values) * np.float32(site.factor)


def rounded(site: Site, fmt: Format, *, per_axis: bool) -> tuple[PackedWeight, Array]:
    """The weight of a site, rounded to nearest, and what it then is."""
    weight, name = weight_of(site), site.output.name
    blocks = codec.to_blocks(weight, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    centred = codec.centred_codes(blocks, grid)
    offset = 0 if fmt.symmetric else grid.zero_points[:, None, :]
    dtype = TYPES[fmt.bits, fmt.symmetric]
    codes = codec.from_blocks(centred + offset, site.K).astype(dtype)
    scales, points = (one[0] if per_axis else one for one in (grid.scales, grid.zero_points))
    packed = PackedWeight(
        ir.Tensor(codes, name=f"{name}.codes"),
        ir.Tensor(scales.astype(fmt.scale_dtype), name=f"{name}.scales"),
        None if fmt.symmetric else ir.Tensor(points.astype(dtype), name=f"{name}.zero_points"),
        None
        if site.bias is None
        else ir.Tensor((site.bias.numpy() * site.beta).astype(site.dtype.numpy()), name=f"{name}.b"),
    )
    return packed, codec.from_blocks(codec.dequantize(centred, grid), site.K)


def rewritten(
    proto: onnx.ModelProto, *, symmetric: bool = False, bits: int = 4, block_size: int = BLOCK, per_axis: bool = False
) -> tuple[ir.Model, dict[str, Array]]:
    """The model with all of its sites rewritten, and their weights (K, N)."""
    model = ir.from_proto(proto)
    before, added, weights = check.outline_of(model.graph), Counter[str](), {}
    opset.raise_to(model, qdq.OPSET, qdq.IR_VERSION)
    names = Names(model.graph)
    for site in survey(model).sites:
        fmt = Format(block_size, symmetric, np.dtype(site.dtype.numpy()), bits)
        packed, weights[site.name] = rounded(site, fmt, per_axis=per_axis)
        metadata = {"awq_onnx.alpha": "0.5"}
        added += qdq.to_dequantized(model.graph, site, packed, names, block_size=block_size, metadata=metadata)
    check.check(model.graph, before, added)
    return model, weights


def one_layer(*, dtype: type = np.float32, K: int = 40, N: int = 24) -> GraphBuilder:
    """x (batch, sequence, K) -> MatMul "layer" (K, N) -> Relu -> y. By default K fills no whole number of blocks."""
    builder = GraphBuilder(dtype=dtype)
    x = builder.input("x", ["batch", "sequence", K])
    product = builder.add("MatMul", x, builder.weight(K, N, "w"), name="layer", to="product")
    builder.output(builder.add("Relu", product, to="y"), ["batch", "sequence", N])
    return builder


def gemm(*, beta: float = 1.0, transposed: bool = False) -> GraphBuilder:
    """x (rows, 32) -> Gemm "fc" with a bias -> y (rows, 24)."""
    builder = GraphBuilder()
    stored = builder.weight(24, 32, "w") if transposed else builder.weight(32, 24, "w")
    bias = builder.constant(builder.rng.standard_normal(24), "b")
    x = builder.input("x", ["rows", 32])
    builder.output(
        builder.add("Gemm", x, stored, bias, name="fc", to="y", alpha=0.5, beta=beta, transB=int(transposed)),
        ["rows", 24],
    )
    return builder


def node_named(model: ir.Model, name: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == name)
    return node


def test_name_doc_string_and_metadata_are_those_of_the_matmul() -> None:
    proto = one_layer().model()
    layer = next(node for node in proto.graph.node if node.name == "layer")
    layer.doc_string = "from torch"
    layer.metadata_props.add(key="pkg.torch.onnx.name", value="model.layer")
    node = node_named(rewritten(proto)[0], "layer")
    assert (node.domain, node.op_type, node.doc_string) == ("", "MatMul", "from torch")
    assert dict(node.metadata_props) == {"pkg.torch.onnx.name": "model.layer", "awq_onnx.alpha": "0.5"}


def test_the_weight_is_dequantised_in_blocks_along_its_inputs() -> None:
    model, _ = rewritten(one_layer().model())
    node = node_named(model, "layer/DequantizeLinear")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"axis": 0, "block_size": BLOCK}
    shapes = [tuple(value.shape.numpy()) for value in node.inputs]  # type: ignore[union-attr]
    assert shapes == [(40, 24), (3, 24), (3, 24)]
    assert [value.dtype.name for value in node.inputs] == ["UINT4", "FLOAT", "UINT4"]  # type: ignore[union-attr]


def test_a_whole_column_is_dequantised_along_its_outputs() -> None:
    model, _ = rewritten(one_layer().model(), block_size=48, symmetric=True, per_axis=True)
    node = node_named(model, "layer/DequantizeLinear")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"axis": 1}
    assert [tuple(value.shape.numpy()) for value in node.inputs] == [(40, 24), (24,)]  # type: ignore[union-attr]


def test_the_output_keeps_its_name_type_shape_and_reader() -> None:
    output = node_named(rewritten(onnx.shape_inference.infer_shapes(one_layer().model()))[0], "layer").outputs[0]
    assert (output.name, output.dtype) == ("product", ir.DataType.FLOAT)
    assert output.shape == ir.Shape(["batch", "sequence", 24])
    assert [node.op_type for node in output.consumers()] == ["Relu"]


def test_the_old_weight_goes() -> None:
    model, _ = rewritten(one_layer().model())
    assert set(model.graph.initializers) == {"product.codes", "product.scales", "product.zero_points"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize(("K", "N"), [(64, 48), (40, 24), (41, 33)])
@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_onnxruntime_computes_what_the_codes_say(
    dtype: type, block_size: int, K: int, N: int, symmetric: bool, bits: int
) -> None:
    """With level 4, which is onnxruntime's default: activations are rounded to 8 bits."""
    proto = one_layer(dtype=dtype, K=K, N=N).model()
    model, weights = rewritten(proto, symmetric=symmetric, bits=bits, block_size=block_size)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    x: Array = np.random.default_rng(0).standard_normal((2, 3, K)).astype(dtype)
    expected = np.maximum(x.astype(np.float32) @ weights["layer"], 0)
    np.testing.assert_allclose(run(written, {"x": x})["y"].astype(np.float32), expected, atol=0.05)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_bias_of_a_gemm_is_added_behind(beta: float, transposed: bool) -> None:
    proto = gemm(beta=beta, transposed=transposed).model()
    model, weights = rewritten(proto, bits=8)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Add"]
    assert model.graph.outputs[0].name == "y"
    assert node_named(model, "fc").op_type == "MatMul"
    x: Array = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    bias = next(one for one in proto.graph.initializer if one.name == "b")
    expected = x @ weights["fc"] + beta * onnx.numpy_helper.to_array(bias)
    np.testing.assert_allclose(run(ir.to_proto(model), {"x": x})["y"], expected, atol=0.05)


def test_shape_inference_goes_on_without_being_told() -> None:
    model = ir.to_proto(rewritten(one_layer().model())[0])
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    known = {one.name: one.type.tensor_type.shape for one in inferred.graph.value_info}
    assert [dim.dim_param or dim.dim_value for dim in known["product"].dim] == ["batch", "sequence", 24]


def test_layers_without_names_are_told_apart() -> None:
    builder = norm_and_readers(columns=(48, 32))
    for node in builder.nodes:
        node.name = "same"
    model, _ = rewritten(builder.model())
    names = [node.name for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(set(names)) == 2
    made = [output.name for node in model.graph for output in node.outputs]
    assert len(set(made)) == len(made)


def test_layers_in_a_branch_have_their_weights_there_where_onnxruntime_looks_for_them() -> None:
    inner = GraphBuilder(seed=1)
    product = inner.add("MatMul", "x", "w", name="layer", to="product")
    branches = {
        f"{one}_branch": onnx.helper.make_graph(
            [*(inner.nodes if one == "then" else [onnx.helper.make_node("Neg", ["x"], ["minus"])])],
            one,
            [],
            [onnx.helper.make_tensor_value_info(product if one == "then" else "minus", 1, None)],
        )
        for one in ("then", "else")
    }
    builder = GraphBuilder()
    builder.input("x", ["rows", 32])
    builder.weight(32, 32, "w")
    flag = builder.input("flag", [], np.bool_)
    builder.output(builder.add("If", flag, name="if", to="y", **branches), ["rows", 32])
    model, weights = rewritten(builder.model(), bits=8)
    assert not model.graph.initializers
    x: Array = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    made = run(written, {"x": x, "flag": np.array(True)})["y"]
    np.testing.assert_allclose(made, x @ weights["layer"], atol=0.05)
    np.testing.assert_array_equal(run(written, {"x": x, "flag": np.array(False)})["y"], -x)


def test_a_model_that_was_written_so_is_known_to_be_quantised() -> None:
    model, _ = rewritten(one_layer().model())
    assert [node.op_type for node in quantized_nodes(model.graph)] == ["DequantizeLinear"]
