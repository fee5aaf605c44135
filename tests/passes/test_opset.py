"""The version of ai.onnx is raised only where the model goes on to mean the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, run, tiny_decoder
from onnx import defs, version_converter

from awq_onnx.errors import ModelError
from awq_onnx.passes import opset

IR_VERSION = 10


def raised(proto: onnx.ModelProto, version: int = 21) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    opset.check_raisable(model, version)
    opset.raise_to(model, version, IR_VERSION)
    written = ir.to_proto(model)
    onnx.checker.check_model(written, full_check=True)
    return written


def one_node(op_type: str, *, version: int, inputs: int = 1, outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    """x (4, 6, 8) -> the node -> its outputs."""
    builder = GraphBuilder(opset=version)
    x = builder.input("x", [4, 6, 8])
    names = [f"y{at}" for at in range(outputs)]
    builder.nodes.append(onnx.helper.make_node(op_type, [x] * inputs, names, name="node", **attributes))
    for name in names:
        builder.output(name)
    return builder.model()


@pytest.mark.parametrize("name", sorted(opset.SAME))
def test_what_is_listed_as_the_same_only_got_more(name: str) -> None:
    history = [one for one in defs.get_all_schemas_with_history() if (one.name, one.domain) == (name, "")]
    new = defs.get_schema(name, opset.NEWEST, "")
    versions = [one.since_version for one in history]
    first = max((one for one in versions if one <= opset.OLDEST), default=min(versions))
    old = next(one for one in history if one.since_version == first)
    optional = defs.OpSchema.FormalParameterOption.Optional
    assert len(new.inputs) >= len(old.inputs)
    for at, given in enumerate(new.inputs):
        assert given.option == optional or given.option == old.inputs[at].option
    assert set(old.attributes) <= set(new.attributes)
    for attribute, given in new.attributes.items():
        before = old.attributes.get(attribute)
        assert not given.required or before is not None
        assert before is None or (before.type, before.default_value) == (given.type, given.default_value)


def test_a_decoder_of_every_version_computes_the_same_and_keeps_its_names() -> None:
    for version in (18, 19, 20):
        proto = tiny_decoder(opset=version)
        written = raised(proto)
        assert [(one.domain, one.version) for one in written.opset_import] == [("", 21)]
        assert written.ir_version == IR_VERSION
        assert [node.name for node in written.graph.node] == [node.name for node in proto.graph.node]
        feed = decoder_feed(proto, np.random.default_rng(0).integers(0, 160, (2, 5)))
        for name, values in run(proto, feed).items():
            np.testing.assert_array_equal(run(written, feed)[name], values)


def test_what_onnx_itself_makes_of_a_decoder_has_the_same_nodes() -> None:
    proto = tiny_decoder()
    expected = version_converter.convert_version(proto, 21)
    assert Counter(node.op_type for node in raised(proto).graph.node) == Counter(
        node.op_type for node in expected.graph.node
    )


@pytest.mark.parametrize("op_type", sorted(name for name in opset.ADAPTERS if name.startswith("Reduce")))
@pytest.mark.parametrize("attributes", [{}, {"axes": [-1]}, {"axes": [0, 2], "keepdims": 0}])
@pytest.mark.parametrize("version", [13, 17])
def test_the_axes_of_a_reduction_become_an_input(op_type: str, attributes: dict[str, Any], version: int) -> None:
    proto = one_node(op_type, version=version, **attributes)
    written = raised(proto)
    node = written.graph.node[0]
    assert len(node.input) == 1 + ("axes" in attributes)
    assert [one.name for one in node.attribute if one.name == "axes"] == []
    x: Array = np.random.default_rng(0).random((4, 6, 8), np.float32)
    np.testing.assert_array_equal(run(written, {"x": x})["y0"], run(proto, {"x": x})["y0"])


def test_a_split_into_equal_parts_is_told_how_many() -> None:
    proto = one_node("Split", version=17, outputs=3, axis=1)
    written = raised(proto)
    assert {one.name: one.i for one in written.graph.node[0].attribute} == {"axis": 1, "num_outputs": 3}
    x: Array = np.random.default_rng(0).random((4, 6, 8), np.float32)
    for name, values in run(proto, {"x": x}).items():
        np.testing.assert_array_equal(run(written, {"x": x})[name], values)


def test_a_reduction_in_a_branch_is_raised_too() -> None:
    body = {
        f"{one}_branch": onnx.helper.make_graph(
            [onnx.helper.make_node("ReduceMean", ["x"], [f"{one}_made"], name=f"{one}_mean", axes=[axis])],
            one,
            [],
            [onnx.helper.make_tensor_value_info(f"{one}_made", 1, None)],
        )
        for axis, one in enumerate(("then", "else"))
    }
    builder = GraphBuilder(opset=17)
    builder.input("x", [4, 6, 8])
    flag = builder.input("flag", [], np.bool_)
    builder.nodes.append(onnx.helper.make_node("If", [flag], ["y"], name="if", **body))
    builder.output("y", ["a", "b", "c"])
    proto = builder.model()
    written = raised(proto)
    x: Array = np.random.default_rng(0).random((4, 6, 8), np.float32)
    for taken in (True, False):
        feed = {"x": x, "flag": np.array(taken)}
        np.testing.assert_array_equal(run(written, feed)["y"], run(proto, feed)["y"])


@pytest.mark.parametrize("version", [21, 22, 23])
def test_a_version_that_is_high_enough_stays(version: int) -> None:
    written = raised(tiny_decoder(opset=version))
    assert [one.version for one in written.opset_import] == [version]


@pytest.mark.parametrize(
    ("op_type", "version"), [("GridSample", 16), ("GroupNormalization", 18), ("RoiAlign", 13), ("Upsample", 13)]
)
def test_what_changed_its_meaning_is_refused_with_the_name_of_the_node(op_type: str, version: int) -> None:
    builder = GraphBuilder(opset=version)
    builder.output(builder.add("Identity", builder.input("x", [2])), [2])
    model = ir.from_proto(builder.model())
    model.graph.append(ir.node(op_type, [model.graph.inputs[0]], name="odd"))
    with pytest.raises(ModelError, match=rf"needs opset 21, the model has {version}.*odd \({op_type}\)"):
        opset.check_raisable(model, 21)


def test_a_version_older_than_what_is_known_is_refused() -> None:
    builder = GraphBuilder(opset=12)
    builder.output(builder.add("Softmax", builder.input("x", [2, 3])), [2, 3])
    with pytest.raises(ModelError, match="the model has 12; export it with opset 13 or later"):
        opset.check_raisable(ir.from_proto(builder.model()), 21)


def test_nodes_of_other_domains_do_not_matter() -> None:
    builder = GraphBuilder()
    builder.output(builder.add("Identity", builder.input("x", [2])), [2])
    model = ir.from_proto(builder.model())
    model.graph.append(ir.node("GridSample", [model.graph.inputs[0]], domain="com.microsoft"))
    model.graph.append(ir.node("SimplifiedLayerNormalization", [model.graph.inputs[0]]))
    opset.check_raisable(model, 21)
