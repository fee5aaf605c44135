"""Weights become references to the file they lie in; everything else stays, and broken files are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import norm_and_readers, tiny_decoder
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from awq_onnx import wire
from awq_onnx.wire import WireError

property_test = settings(max_examples=200, deadline=None)


def externalized(data: bytes, min_bytes: int = 256) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(wire.externalize(memoryview(data), "model.onnx", min_bytes))


def reference_of(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert set(entries) == {"location", "offset", "length"}
    return entries["location"], int(entries["offset"]), int(entries["length"])


def put_back(model: onnx.ModelProto, data: bytes) -> onnx.ModelProto:
    """The model with every reference replaced by the bytes that it names."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _, offset, length = reference_of(tensor)
            tensor.raw_data = data[offset : offset + length]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return whole


def decorated() -> onnx.ModelProto:
    """A model with something in every field that an exporter may fill."""
    model = norm_and_readers(K=16, columns=(8, 8)).model()
    model.doc_string, model.domain, model.model_version, model.producer_version = "a model", "org.example", 7, "1.0"
    helper.set_model_props(model, {"author": "somebody", "empty": ""})
    graph = model.graph
    graph.doc_string = "a graph"
    graph.value_info.append(helper.make_tensor_value_info(graph.node[0].output[0], 1, ["batch", "sequence", 16]))
    graph.metadata_props.add(key="graph", value="data")
    graph.quantization_annotation.add(tensor_name="x")
    graph.node[0].doc_string = "a node"
    graph.node[0].metadata_props.add(key="node", value="data")
    graph.initializer[-1].doc_string = "a weight"
    graph.initializer[-1].metadata_props.add(key="weight", value="data")
    model.functions.append(
        helper.make_function(
            "org.example", "Same", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], model.opset_import
        )
    )
    return model


def small_model_bytes() -> bytes:
    return norm_and_readers(K=16, columns=(8,)).model().SerializeToString()


@pytest.mark.parametrize("model", [decorated(), tiny_decoder(layers=1)], ids=["decorated", "decoder"])
def test_references_name_the_exact_bytes_and_nothing_else_changes(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    result = externalized(data)
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in result.graph.initializer)
    whole = put_back(result, data)
    for descriptor, value in model.ListFields():  # field by field first: a readable failure
        assert getattr(whole, descriptor.name) == value, descriptor.name
    for descriptor, value in model.graph.ListFields():
        assert getattr(whole.graph, descriptor.name) == value, descriptor.name
    assert whole == model


def whole(model: onnx.ModelProto, data: bytes) -> onnx.ModelProto:
    """What `internalize` makes of a model whose references are into `data`."""
    pieces = wire.internalize(memoryview(model.SerializeToString()))
    read = [data[p.offset : p.offset + p.length] if isinstance(p, wire.Span) else bytes(p) for p in pieces]
    assert sum(map(len, read)) == wire.size_of(pieces)
    return onnx.ModelProto.FromString(b"".join(read))


@pytest.mark.parametrize("model", [decorated(), tiny_decoder(layers=1)], ids=["decorated", "decoder"])
def test_references_become_weights_again(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    assert whole(externalized(data), data) == model
    assert whole(model, b"") == model


def test_references_of_graphs_inside_nodes_become_weights_too() -> None:
    weight = numpy_helper.from_array(np.arange(50, dtype=np.float32), "w")
    data = weight.raw_data
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "inner", [], [], [weight])
    deeper = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=inner)], "deeper", [], [])
    model = helper.make_model(
        helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=deeper)], "g", [], [])
    )
    referring = onnx.ModelProto.FromString(model.SerializeToString())
    (tensor,) = referring.graph.node[0].attribute[0].g.node[0].attribute[0].g.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    assert whole(referring, data) == model


def test_the_values_of_a_weight_are_read_through_its_reference() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(weight, "w")])
    data = helper.make_model(graph).SerializeToString()
    (tensor,) = externalized(data).graph.initializer
    location, offset, length = reference_of(tensor)
    assert location == "model.onnx"
    assert not tensor.HasField("raw_data")
    np.testing.assert_array_equal(np.frombuffer(data[offset : offset + length], np.float32).reshape(32, 16), weight)


def test_weights_that_are_small_stay_in_the_graph() -> None:
    model = norm_and_readers(K=16, columns=(8, 8)).model()
    result = externalized(model.SerializeToString(), min_bytes=256)
    for before, after in zip(model.graph.initializer, result.graph.initializer, strict=True):
        moved = after.data_location == onnx.TensorProto.EXTERNAL
        assert moved == (len(before.raw_data) >= 256)
        assert moved or before == after


def test_what_holds_no_raw_data_stays_as_it_is() -> None:
    typed = helper.make_tensor("typed", onnx.TensorProto.FLOAT, [500], np.arange(500.0))
    words = helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a" * 500, b"b" * 500])
    elsewhere = onnx.TensorProto(name="elsewhere", data_type=1, dims=[9], data_location=onnx.TensorProto.EXTERNAL)
    elsewhere.external_data.add(key="location", value="a" * 500)
    model = helper.make_model(helper.make_graph([], "g", [], [], [typed, words, elsewhere]))
    assert externalized(model.SerializeToString()) == model


@pytest.mark.parametrize("shift", range(8))
def test_weights_may_lie_at_any_offset(shift: int) -> None:
    weight = np.arange(100, dtype=np.float32)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, producer_name="p" * shift)
    data = model.SerializeToString()
    result = externalized(data)
    assert reference_of(result.graph.initializer[0])[1] == data.index(weight.tobytes())
    assert put_back(result, data) == model


def test_a_graph_in_two_pieces_is_merged_as_protobuf_does() -> None:
    halves = [
        helper.make_model(
            helper.make_graph([], "g", [], [], [numpy_helper.from_array(np.full(99, index, np.float32), f"w{index}")])
        ).SerializeToString()
        for index in (0, 1)
    ]
    data = b"".join(halves)
    assert put_back(externalized(data), data) == onnx.ModelProto.FromString(data)


def test_a_truncated_model_is_refused_or_has_all_its_weights() -> None:
    data = small_model_bytes()
    whole = onnx.ModelProto.FromString(data).graph
    refused = 0
    for end in range(len(data)):
        try:
            graph = externalized(data[:end]).graph
        except (WireError, DecodeError):
            refused += 1
            continue
        if graph.ByteSize():  # before the graph there is nothing to lose, and nothing that would pass for a model
            assert len(graph.initializer) == len(whole.initializer)
            assert len(graph.node) == len(whole.node)
    assert refused > 0.9 * len(data)


@property_test
@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused_or_pass_as_protobuf(data: bytes) -> None:
    try:
        result = wire.externalize(memoryview(data), "model.onnx", 8)
    except (WireError, DecodeError):
        return
    assert isinstance(result, bytes)


@property_test
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_wrong_byte_never_makes_a_reference_that_leaves_the_file(position: int, value: int) -> None:
    data = bytearray(small_model_bytes())
    data[position % len(data)] = value
    try:
        result = externalized(bytes(data))
    except (WireError, DecodeError):
        return
    for tensor in result.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and len(tensor.external_data) == 3:
            _, offset, length = reference_of(tensor)
            assert 0 <= offset <= offset + length <= len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"\x3b", "wire type 3", id="a group"),
        pytest.param(b"\x3a\x05ab", "does not end within", id="a length beyond the end"),
        pytest.param(b"\x02\x00", "does not end within", id="field number zero"),
        pytest.param(b"\x08" + b"\xff" * 20, "number at byte", id="a number of 20 bytes"),
        pytest.param(b"\x08\x80", "number at byte", id="a number that is cut off"),
        pytest.param(b"\x0d\x00\x00", "does not end within", id="four bytes of which two are there"),
        pytest.param(b"\x3a" + b"\xff" * 9 + b"\x01", "does not end within", id="a length of 2**64"),
    ],
)
def test_broken_fields_are_named_by_their_byte(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wire.externalize(memoryview(data), "model.onnx", 1)
