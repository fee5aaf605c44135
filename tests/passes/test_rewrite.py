"""A rewritten MatMul is the same node for everyone who looks at the graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, norm_and_readers, run

from awq_onnx import codec
from awq_onnx.codec import Format
from awq_onnx.kernels import reference
from awq_onnx.passes import rewrite
from awq_onnx.passes.rewrite import PackedWeight
from awq_onnx.passes.sites import Site, survey

BLOCK = 16


def packed(site: Site, name: str, *, symmetric: bool = False) -> PackedWeight:
    """The weight of a site, rounded to nearest."""
    values = site.tensor.numpy().astype(np.float32)
    weight = np.ascontiguousarray(values.T if site.transposed else values)
    fmt = Format(BLOCK, symmetric, np.dtype(site.dtype.numpy()))
    blocks = codec.to_blocks(weight, BLOCK)
    grid = codec.minmax_grid(blocks, fmt)
    zero_points = codec.pack_zero_points(grid.zero_points)
    return PackedWeight(
        ir.Tensor(codec.pack(codec.centred_codes(blocks, grid), grid), name=f"{name}.codes"),
        ir.Tensor(codec.pack_scales(grid.scales, site.dtype.numpy()), name=f"{name}.scales"),
        None if symmetric else ir.Tensor(zero_points, name=f"{name}.zero_points"),
    )


def rewritten(proto: onnx.ModelProto, *, symmetric: bool = False, accuracy_level: int = 0) -> ir.Model:
    """The model with all of its sites rewritten."""
    model = ir.from_proto(proto)
    sites = survey(model).sites
    names = rewrite.weight_names(sites)
    for site in sites:
        rewrite.to_matmul_nbits(
            model,
            site,
            packed(site, names[site], symmetric=symmetric),
            block_size=BLOCK,
            bits=4,
            accuracy_level=accuracy_level,
            metadata={"awq_onnx.alpha": "0.5"},
        )
    return model


def one_layer(*, transposed: bool = False, dtype: type = np.float32) -> GraphBuilder:
    """x (batch, sequence, 40) -> MatMul "layer" (40, 24) -> Relu -> y. The width is no multiple of the block."""
    builder = GraphBuilder(dtype=dtype)
    stored = builder.weight(24, 40, "w") if transposed else builder.weight(40, 24, "w")
    weight = builder.add("Transpose", stored, name="turn", perm=[1, 0]) if transposed else stored
    product = builder.add("MatMul", builder.input("x", ["batch", "sequence", 40]), weight, name="layer", to="product")
    builder.output(builder.add("Relu", product, to="y"), ["batch", "sequence", 24])
    return builder


def node_named(model: ir.Model, name: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == name)
    return node


def test_name_doc_string_and_metadata_of_the_node_stay() -> None:
    proto = one_layer().model()
    layer = next(node for node in proto.graph.node if node.name == "layer")
    layer.doc_string = "from torch"
    layer.metadata_props.add(key="pkg.torch.onnx.name", value="model.layer")
    node = node_named(rewritten(proto), "layer")
    assert (node.domain, node.op_type, node.doc_string) == ("com.microsoft", "MatMulNBits", "from torch")
    assert dict(node.metadata_props) == {"pkg.torch.onnx.name": "model.layer", "awq_onnx.alpha": "0.5"}


def test_the_attributes_are_those_of_the_weight() -> None:
    node = node_named(rewritten(one_layer().model(), accuracy_level=4), "layer")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "K": 40,
        "N": 24,
        "bits": 4,
        "block_size": BLOCK,
        "accuracy_level": 4,
    }


def test_the_output_keeps_its_name_type_shape_and_reader() -> None:
    proto = onnx.shape_inference.infer_shapes(one_layer().model())
    output = node_named(rewritten(proto), "layer").outputs[0]
    assert (output.name, output.dtype) == ("product", ir.DataType.FLOAT)
    assert output.shape == ir.Shape(["batch", "sequence", 24])
    assert [node.op_type for node in output.consumers()] == ["Relu"]


def test_an_output_that_is_an_output_of_the_model_stays_one() -> None:
    model = rewritten(norm_and_readers(columns=(48, 32)).model())
    assert [value.name for value in model.graph.outputs] == ["y0", "y1"]
    assert [value.producer().op_type for value in model.graph.outputs] == ["MatMulNBits"] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_onnxruntime_computes_what_the_packed_weight_says(dtype: type, transposed: bool, symmetric: bool) -> None:
    model = rewritten(one_layer(transposed=transposed, dtype=dtype).model(), symmetric=symmetric)
    x: Array = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(dtype)
    weights = [value.const_value.numpy() for value in node_named(model, "layer").inputs[1:]]  # type: ignore[union-attr]
    assert len(weights) == (2 if symmetric else 3)
    expected = np.maximum(reference.matmul_nbits(x, *weights), 0)
    actual = run(ir.to_proto(model), {"x": x})["y"]
    np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), atol=5e-3)


def test_shape_inference_goes_on_behind_the_node() -> None:
    """It does not know com.microsoft, so what the graph said of the output must still be said."""
    proto = onnx.shape_inference.infer_shapes(one_layer().model())
    model = ir.to_proto(rewritten(proto))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in inferred.dim] == ["batch", "sequence", 24]


def test_the_old_weight_goes() -> None:
    model = rewritten(one_layer().model())
    assert set(model.graph.initializers) == {"layer.codes", "layer.scales", "layer.zero_points"}


def test_a_weight_that_something_else_reads_stays() -> None:
    builder = one_layer()
    builder.output(builder.add("Transpose", "w", name="tied"))
    model = rewritten(builder.model())
    assert "w" in model.graph.initializers
    assert node_named(model, "tied").inputs[0] is model.graph.initializers["w"]


def test_a_weight_of_two_layers_goes_after_the_second() -> None:
    builder = GraphBuilder()
    w = builder.weight(32, 32, "w")
    x = builder.add("MatMul", builder.input("x", ["rows", 32]), w, name="first")
    builder.output(builder.add("MatMul", builder.add("Relu", x), w, name="second"))
    model = rewritten(builder.model())
    assert "w" not in model.graph.initializers
    assert len(model.graph.initializers) == 6


def test_a_transpose_in_front_of_the_weight_goes_too() -> None:
    model = rewritten(one_layer(transposed=True).model())
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "Relu"]
    assert "w" not in model.graph.initializers


def test_a_constant_node_with_the_weight_goes_too() -> None:
    builder = GraphBuilder()
    value = onnx.numpy_helper.from_array(np.ones((32, 8), np.float32))
    builder.nodes.append(onnx.helper.make_node("Constant", [], ["w"], value=value))
    builder.output(builder.add("MatMul", builder.input("x", ["rows", 32]), "w", name="layer"))
    assert [node.op_type for node in rewritten(builder.model()).graph] == ["MatMulNBits"]


def test_the_opset_of_the_domain_is_imported_once() -> None:
    proto = norm_and_readers(columns=(48, 32)).model()
    written = ir.to_proto(rewritten(proto))
    assert {opset.domain: opset.version for opset in written.opset_import} == {"": 18, "com.microsoft": 1}
    assert len(written.opset_import) == 2


def test_an_import_of_the_domain_that_is_there_stays() -> None:
    proto = one_layer().model()
    proto.opset_import.insert(0, onnx.helper.make_opsetid("com.microsoft", 1))
    assert [opset.domain for opset in ir.to_proto(rewritten(proto)).opset_import] == ["com.microsoft", ""]


# Names of the packed tensors


def layers_named(*node_names: str, outputs: tuple[str, ...] | None = None) -> GraphBuilder:
    """Layers side by side on x, with these names."""
    builder = GraphBuilder()
    x = builder.input("x", ["rows", 32])
    for index, name in enumerate(node_names):
        output = outputs[index] if outputs else f"y{index}"
        node = onnx.helper.make_node("MatMul", [x, builder.weight(32, 8)], [output], name=name)
        builder.nodes.append(node)
        builder.output(output, ["rows", 8])
    return builder


def names_of(builder: GraphBuilder) -> list[str]:
    return list(rewrite.weight_names(survey(ir.from_proto(builder.model())).sites).values())


def test_packed_tensors_are_named_for_their_node() -> None:
    assert names_of(layers_named("q", "k")) == ["q", "k"]


def test_nodes_that_share_a_name_or_have_none_are_told_apart_by_their_outputs() -> None:
    assert names_of(layers_named("q", "", "", "k", "k")) == ["q", "y1", "y2", "y3", "y4"]


def test_a_node_named_like_the_output_of_another_is_told_apart() -> None:
    names = names_of(layers_named("y1", "", outputs=("y0", "y1")))
    assert len(set(names)) == 2


def test_nodes_without_names_are_rewritten_all() -> None:
    builder = layers_named("", "", "same", "same")
    model = rewritten(builder.model())
    assert [node.op_type for node in model.graph] == ["MatMulNBits"] * 4
    assert len(model.graph.initializers) == 12


def test_every_layer_gets_its_own_weight() -> None:
    """No names, different weights: the outputs must differ as those of the float model do."""
    proto = layers_named("", "", "", "").model()
    x: Array = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    expected, actual = run(proto, {"x": x}), run(ir.to_proto(rewritten(proto)), {"x": x})
    for name, values in expected.items():
        assert np.corrcoef(values.ravel(), actual[name].ravel())[0, 1] > 0.97
