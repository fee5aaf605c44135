"""passes/embedding.py: --lm-head packs the head, and the embedding that shares its weight looks up the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Array, GraphBuilder, decoder_feed, run, save, tiny_decoder
from onnx import helper, numpy_helper

import awq_onnx
from awq_onnx import Recipe, Report
from awq_onnx.kernels import reference
from awq_onnx.passes.rewrite import DOMAIN

K, VOCABULARY = 64, 160
IDS: Array = np.random.default_rng(3).integers(0, VOCABULARY, (3, 10))
BITS = ("8", "4")


def tied(*, width: int = K, table_is: str = "(V, D)", dtype: type = np.float32, **options: Any) -> onnx.ModelProto:
    """A decoder whose lm_head is its table: stored as rows of tokens, or as columns."""
    model = tiny_decoder(hidden=width, vocabulary=VOCABULARY, layers=1, dtype=dtype, **options)
    kept = [one for one in model.graph.initializer if one.name != "lm_head.weight"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    (table,) = (one for one in model.graph.initializer if one.name == "embed_tokens.weight")
    values = numpy_helper.to_array(table) / 4
    turned = helper.make_node("Transpose", [table.name], ["turned"], name="tie", perm=[1, 0])
    if table_is == "(V, D)":
        reader = next(node for node in model.graph.node if node.name == "/lm_head/MatMul")
    else:
        reader = next(node for node in model.graph.node if node.name == "/embed_tokens/Gather")
        values = np.ascontiguousarray(values.T)
        next(node for node in model.graph.node if node.name == "/lm_head/MatMul").input[1] = table.name
    reader.input[1 if reader.op_type == "MatMul" else 0] = "turned"
    model.graph.node.insert(0, turned)
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.checker.check_model(model)
    return model


def quantized(model: onnx.ModelProto, folder: Path, lm_head: str, **options: Any) -> tuple[Report, Path]:
    settings = {"samples": 2, "sequence_length": 8, "accuracy_level": 0, **options}
    recipe = Recipe(lm_head=lm_head, **settings)
    path = folder / f"out_{lm_head}.onnx"
    return awq_onnx.quantize(save(model, folder / "model.onnx"), path, recipe, overwrite=True), path


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {one.name: one.i for one in node.attribute}


def packed_weight(model: onnx.ModelProto, layer: onnx.NodeProto) -> Array:
    """What a MatMulNBits stands for, (N, K), by the reference."""
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    codes, scales, *zero_points = (stored[name] for name in layer.input[1:4] if name)
    values = numbers(layer)
    return reference.dequantize(codes, scales, zero_points[0] if zero_points else None, values["K"], values["bits"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("table_is", ["(V, D)", "(D, V)"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
def test_the_table_of_a_tied_head_is_looked_up_in_its_bytes(
    tmp_path: Path, bits: str, table_is: str, symmetric: bool
) -> None:
    model = tied(table_is=table_is)
    report, path = quantized(model, tmp_path, bits, symmetric=symmetric)
    after = onnx.load(path)
    head, lookup = node_of(after, "/lm_head/MatMul"), node_of(after, "/embed_tokens/Gather")
    assert (head.op_type, lookup.op_type, lookup.domain) == ("MatMulNBits", "GatherBlockQuantized", DOMAIN)
    assert numbers(head)["bits"] == numbers(lookup)["bits"] == int(bits)
    (rows,) = (node for node in after.graph.node if node.output[0] == lookup.input[0])
    assert (rows.op_type, rows.input[0]) == ("Reshape", head.input[1])  # the same bytes in another shape
    assert lookup.input[2] == head.input[2]
    assert not [one for one in after.graph.initializer if one.name in ("embed_tokens.weight", "turned")]

    assert [(one.name, one.bits) for one in report.matmuls if one.bits != 4 or "lm_head" in one.name] == [
        ("/lm_head/MatMul", int(bits))
    ]

    probe = onnx.ModelProto()
    probe.CopyFrom(after)
    probe.graph.output.append(onnx.ValueInfoProto(name=lookup.output[0]))
    looked_up = run(probe, decoder_feed(model, IDS))[lookup.output[0]]
    np.testing.assert_allclose(looked_up, packed_weight(after, head)[IDS], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_packed_table_is_close_to_the_original(tmp_path: Path, bits: str, dtype: type) -> None:
    model = tied(dtype=dtype)
    _, path = quantized(model, tmp_path, bits)
    after = onnx.load(path)
    table = next(numpy_helper.to_array(one) for one in model.graph.initializer if one.name == "embed_tokens.weight")
    error = packed_weight(after, node_of(after, "/lm_head/MatMul")) - table.astype(np.float32)
    assert np.linalg.norm(error) < (0.01 if bits == "8" else 0.12) * np.linalg.norm(table.astype(np.float32))
    expected, actual = (run(one, decoder_feed(model, IDS))["logits"].astype(np.float32) for one in (model, path))
    assert np.linalg.norm(actual - expected) < 0.5 * np.linalg.norm(expected)


def test_the_file_is_smaller_the_fewer_bits_the_table_has(tmp_path: Path) -> None:
    sizes = [quantized(tied(), tmp_path, lm_head)[0].size_after_bytes for lm_head in ("none", "8", "4")]
    table_bytes = 4 * VOCABULARY * K
    assert sizes[0] - sizes[1] > 0.5 * table_bytes
    assert sizes[1] - sizes[2] > 0.08 * table_bytes


def test_without_lm_head_a_tied_table_stays_as_it_is(tmp_path: Path) -> None:
    report, path = quantized(tied(), tmp_path, "none")
    after = onnx.load(path)
    assert node_of(after, "/embed_tokens/Gather").op_type == "Gather"
    assert [one.reason for one in report.kept] == ["it is the lm_head, which stays as it is"]


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
def test_without_lm_head_a_table_stays_whatever_becomes_of_the_logits(tmp_path: Path, op_type: str) -> None:
    model = tied()
    head = node_of(model, "/lm_head/MatMul")
    head.output[0] = "scores"
    model.graph.node.append(helper.make_node(op_type, ["scores"], ["logits"], name="shares", axis=-1))
    _, path = quantized(model, tmp_path, "none")
    assert node_of(onnx.load(path), "/embed_tokens/Gather").op_type == "Gather"


def test_rows_get_blocks_that_they_fill(tmp_path: Path) -> None:
    """48 numbers fill none of 32."""
    report, path = quantized(tied(width=48), tmp_path, "8")
    after = onnx.load(path)
    assert node_of(after, "/embed_tokens/Gather").op_type == "GatherBlockQuantized"
    assert {one.block_size for one in report.matmuls if one.name == "/lm_head/MatMul"} == {16}
    assert {one.block_size for one in report.matmuls if one.name != "/lm_head/MatMul"} == {32}


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_fill_no_blocks_keep_the_table(tmp_path: Path, bits: str) -> None:
    model = tied(width=40)
    report, path = quantized(model, tmp_path, bits)
    assert [(one.what, one.reason) for one in report.kept] == [
        (
            "/embed_tokens/Gather",
            "its rows of 40 numbers fill no blocks; the weight of /lm_head/MatMul is packed beside it",
        )
    ]
    predicted = awq_onnx.inspect(tmp_path / "model.onnx", Recipe(lm_head=bits)).predicted_bytes
    assert predicted == pytest.approx(report.size_after_bytes, rel=0.2)  # the graph counts, it is small
    after = onnx.load(path)
    assert node_of(after, "/lm_head/MatMul").op_type == "MatMulNBits"
    assert node_of(after, "/embed_tokens/Gather").op_type == "Gather"
    np.testing.assert_array_equal(
        *(
            next(numpy_helper.to_array(one) for one in made.graph.initializer if one.name == "embed_tokens.weight")
            for made in (model, after)
        )
    )


@pytest.mark.parametrize("bits", BITS)
def test_another_reader_of_the_table_keeps_it_for_itself(tmp_path: Path, bits: str) -> None:
    model = tied()
    model.graph.node.append(helper.make_node("ReduceSum", ["embed_tokens.weight"], ["sum"], name="spy", keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("sum", 1, []))
    _, path = quantized(model, tmp_path, bits)
    after = onnx.load(path)
    assert node_of(after, "/embed_tokens/Gather").op_type == "GatherBlockQuantized"
    feed = decoder_feed(model, IDS)
    np.testing.assert_allclose(run(path, feed)["sum"], run(model, feed)["sum"], rtol=1e-5)


def test_two_lookups_of_one_table_share_it(tmp_path: Path) -> None:
    model = tied()
    again = helper.make_node("Gather", ["embed_tokens.weight", "input_ids"], ["again"], name="again")
    model.graph.node.insert(1, again)
    model.graph.output.append(helper.make_tensor_value_info("again", 1, None))
    _, path = quantized(model, tmp_path, "8")
    after = onnx.load(path)
    first, second = node_of(after, "/embed_tokens/Gather"), node_of(after, "again")
    assert first.op_type == second.op_type == "GatherBlockQuantized"
    assert first.input[0] == second.input[0]
    made = run(path, decoder_feed(model, IDS))["again"]
    np.testing.assert_allclose(made, packed_weight(after, node_of(after, "/lm_head/MatMul"))[IDS], rtol=1e-6, atol=1e-7)


def test_a_lookup_along_the_other_axis_keeps_the_table(tmp_path: Path) -> None:
    """A row of K positions is no row of a block."""
    model = tied()
    columns = numpy_helper.from_array(np.array([3, 1]), "columns")
    model.graph.initializer.append(columns)
    model.graph.node.insert(1, helper.make_node("Gather", ["embed_tokens.weight", "columns"], ["picked"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("picked", 1, [VOCABULARY, 2]))
    _, path = quantized(model, tmp_path, "8")
    feed = decoder_feed(model, IDS)
    np.testing.assert_array_equal(run(path, feed)["picked"], run(model, feed)["picked"])


@pytest.mark.parametrize("bits", BITS)
def test_negative_token_ids_count_from_the_end_as_before(tmp_path: Path, bits: str) -> None:
    """What Gather allows."""
    model = tied()
    _, path = quantized(model, tmp_path, bits)
    feeds = [decoder_feed(model, ids) for ids in (IDS, IDS - VOCABULARY)]
    np.testing.assert_array_equal(*(run(path, feed)["logits"] for feed in feeds))


def test_the_scale_of_a_tied_head_is_folded_nowhere(tmp_path: Path) -> None:
    """The lookup would see it."""
    report, _ = quantized(tied(), tmp_path, "4")
    (head,) = (one for one in report.matmuls if one.name == "/lm_head/MatMul")
    assert (head.alpha, head.folded_into) == (0, None)
    assert head.reason == "its weight is the table of the embedding as well"
    (before,) = (one for one in report.matmuls if "down_proj" in one.name)
    assert before.fold is not None


@pytest.mark.parametrize("bits", BITS)
def test_an_untied_head_is_folded_into_the_last_norm(tmp_path: Path, bits: str) -> None:
    model = tiny_decoder(layers=1)
    report, path = quantized(model, tmp_path, bits)
    (head,) = (one for one in report.matmuls if one.name == "/lm_head/MatMul")
    assert (head.fold, head.folded_into, head.bits) == ("norm gain", "/norm/Mul_1", int(bits))
    assert node_of(onnx.load(path), "/embed_tokens/Gather").op_type == "Gather"


def test_eight_bits_of_the_head_are_nearer_than_four(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    errors = [
        next(one.error for one in quantized(model, tmp_path, bits)[0].matmuls if "lm_head" in one.name) for bits in BITS
    ]
    assert errors[0] < errors[1] / 8


def test_a_head_with_a_factor_leaves_the_table_to_the_embedding(tmp_path: Path) -> None:
    """Its packed weight is the table times the factor: looked up there, every embedding would be wrong."""
    builder = GraphBuilder()
    table = builder.constant(builder.rng.standard_normal((VOCABULARY, K)), "table")
    x = builder.add("Gather", table, builder.input("input_ids", ["b", "s"], np.int64), name="look", to="seen")
    builder.output(x, ["b", "s", K])
    normed = builder.add("Reshape", builder.rms_norm(x, K, "norm"), builder.integers(-1, K))
    builder.output(builder.add("Gemm", normed, table, name="head", to="logits", alpha=0.125, transB=1))
    ids = np.arange(12).reshape(2, 6)
    out = tmp_path / "out.onnx"
    model = builder.model()
    awq_onnx.quantize(model, out, awq_onnx.Recipe(lm_head="8", samples=2, sequence_length=8))
    np.testing.assert_array_equal(run(out, {"input_ids": ids})["seen"], run(model, {"input_ids": ids})["seen"])


# Embeddings of their own


def looked_up_in(model: onnx.ModelProto, node: onnx.NodeProto, ids: Array) -> Array:
    """What a GatherBlockQuantized should make, by the reference."""
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    codes, scales, zero_points = (stored[node.input[at]] for at in (0, 2, 3))
    packed = codes.reshape(len(codes), scales.shape[1], -1)
    width = numbers(node)["block_size"] * scales.shape[1]
    rows: Array = reference.dequantize(packed, scales, zero_points, width, numbers(node)["bits"])[ids]
    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("width", "block_size", "expected"), [(64, 32, 32), (96, 64, 32), (64, -1, 64)])
def test_an_embedding_is_looked_up_in_packed_rows(
    tmp_path: Path, bits: str, dtype: type, width: int, block_size: int, expected: int
) -> None:
    model = tiny_decoder(hidden=width, vocabulary=VOCABULARY, layers=1, dtype=dtype)
    report, path = quantized(model, tmp_path, "none", embedding=bits, block_size=block_size)
    after = onnx.load(path)
    lookup = node_of(after, "/embed_tokens/Gather")
    assert (lookup.op_type, lookup.domain, numbers(lookup)["block_size"]) == ("GatherBlockQuantized", DOMAIN, expected)
    probe = onnx.ModelProto()
    probe.CopyFrom(after)
    probe.graph.output.append(onnx.ValueInfoProto(name=lookup.output[0]))
    made = run(probe, decoder_feed(model, IDS))[lookup.output[0]]
    np.testing.assert_allclose(made, looked_up_in(after, lookup, IDS), rtol=2e-3, atol=1e-4)

    table = next(numpy_helper.to_array(one) for one in model.graph.initializer if one.name == "embed_tokens.weight")
    table = table.astype(np.float32)
    error = np.linalg.norm(looked_up_in(after, lookup, np.arange(VOCABULARY)) - table) / np.linalg.norm(table)
    (told,) = report.tables
    assert (told.name, told.V, told.D, told.bits) == ("/embed_tokens/Gather", VOCABULARY, width, int(bits))
    assert told.error == pytest.approx(error, rel=1e-3)
    assert error < (0.01 if bits == "8" else 0.12)
    assert "embed_tokens.weight" not in {one.name for one in after.graph.initializer}
    assert any("/embed_tokens/Gather to" in text for _, text in report.rows())


def test_an_embedding_stays_unless_it_is_asked_for(tmp_path: Path) -> None:
    report, path = quantized(tiny_decoder(vocabulary=VOCABULARY, layers=1), tmp_path, "none")
    assert node_of(onnx.load(path), "/embed_tokens/Gather").op_type == "Gather"
    assert report.tables == ()


def test_a_table_that_the_head_reads_stays_without_the_head(tmp_path: Path) -> None:
    report, path = quantized(tied(), tmp_path, "none", embedding="8")
    assert node_of(onnx.load(path), "/embed_tokens/Gather").op_type == "Gather"
    assert ("/embed_tokens/Gather", "Transpose reads the table of the embedding as well") in [
        (one.what, one.reason) for one in report.kept
    ]


def test_a_table_that_the_head_reads_goes_with_the_head(tmp_path: Path) -> None:
    report, path = quantized(tied(), tmp_path, "4", embedding="8")
    assert numbers(node_of(onnx.load(path), "/embed_tokens/Gather"))["bits"] == 4
    assert report.tables == ()
    assert not [one for one in report.kept if "Gather" in one.what]


def test_a_table_whose_rows_fill_no_block_stays(tmp_path: Path) -> None:
    report, path = quantized(tiny_decoder(hidden=72, vocabulary=VOCABULARY, layers=1), tmp_path, "none", embedding="8")
    assert node_of(onnx.load(path), "/embed_tokens/Gather").op_type == "Gather"
    assert ("/embed_tokens/Gather", "its rows of 72 numbers fill no blocks") in [
        (one.what, one.reason) for one in report.kept
    ]
