"""quantize() in format qdq, and for each target: onnxruntime fuses it back and computes what MatMulNBits does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import Array, GraphBuilder, decoder_feed, norm_and_readers, run, save, tiny_decoder
from onnx import TensorProto, numpy_helper

import awq_onnx
from awq_onnx import Recipe, Report, errors
from awq_onnx.targets import MATMULNBITS, QDQ, TARGETS

QUICK: dict[str, Any] = {"samples": 4, "sequence_length": 16}
IDS = np.random.default_rng(7).integers(0, 160, (3, 12))


def quantized(proto: onnx.ModelProto, output: Path, **settings: Any) -> Report:
    """Quantise a model that is saved beside `output`."""
    path = save(proto, output.with_name("model.onnx"))
    return awq_onnx.quantize(path, output, Recipe(**QUICK | settings), overwrite=True)


def fused(model: Path, level: int) -> tuple[onnxruntime.InferenceSession, Counter[str]]:
    """A session with an accuracy level for what it fuses, and the ops of the graph that it runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(model.with_name("optimized.onnx"))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return session, Counter(node.op_type for node in graph.node)


def logits(session: onnxruntime.InferenceSession, proto: onnx.ModelProto) -> Array:
    made: Array = session.run(["logits"], decoder_feed(proto, IDS))[0]
    return made


def written(model: Path) -> onnx.ModelProto:
    return onnx.load(model)


def ops_of(model: Path) -> Counter[str]:
    return Counter(node.op_type for node in written(model).graph.node)


SETTINGS = [
    pytest.param({}, id="zero points"),
    pytest.param({"symmetric": True}, id="symmetric"),
    pytest.param({"bits": 8}, id="8 bits"),
    pytest.param({"block_size": 64, "lm_head": "8"}, id="lm_head"),
    pytest.param({"block_size": -1}, id="columns"),
    pytest.param({"quality": "best"}, id="best"),
    pytest.param({"symmetric": True, "explicit_zero_points": True}, id="explicit zero points"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("level", [0, 4])
def test_onnxruntime_fuses_qdq_back_and_computes_what_matmul_nbits_does(
    tmp_path: Path, settings: dict[str, Any], dtype: type, level: int
) -> None:
    """Scales are folded into v_proj and up_proj, which are packed themselves."""
    proto = tiny_decoder(dtype=dtype, bias=True)
    if "quality" in settings:
        settings = settings | {"override": ("*:bits=4",)}  # format qdq could not choose 2
    quantized(proto, tmp_path / "nbits.onnx", accuracy_level=level, **settings)
    report = quantized(proto, tmp_path / "qdq.onnx", format=QDQ, **settings)
    onnx.checker.check_model(tmp_path / "qdq.onnx", full_check=True)
    session, ops = fused(tmp_path / "qdq.onnx", level)
    assert (ops["MatMulNBits"], ops["DequantizeLinear"]) == (len(report.matmuls), 0)
    actual, expected = logits(session, proto), logits(fused(tmp_path / "nbits.onnx", level)[0], proto)
    if dtype == np.float32 and settings.get("block_size") != -1:
        np.testing.assert_array_equal(actual, expected)
    elif dtype == np.float32 and level == 0:
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    else:  # casts stand elsewhere, and at level 4 activations are rounded in blocks of another size
        assert np.abs(actual - expected).mean() < 0.04 * np.abs(expected).mean()


def test_layers_make_up_for_what_finished_ones_do_in_both_formats_alike(tmp_path: Path) -> None:
    """Finished layers run as MatMulNBits meanwhile, read back from the file."""
    settings = QUICK | {"quality": "best", "override": ("*:bits=4", "*v_proj*:block_size=-1")}
    ids = np.random.default_rng(1).integers(0, 160, (8, 16))
    path = save(tiny_decoder(), tmp_path / "model.onnx")
    awq_onnx.quantize(path, tmp_path / "nbits.onnx", Recipe(**settings, accuracy_level=0), calibration=ids)
    awq_onnx.quantize(path, tmp_path / "qdq.onnx", Recipe(**settings, format=QDQ), calibration=ids)
    made = [logits(fused(tmp_path / name, 0)[0], tiny_decoder()) for name in ("nbits.onnx", "qdq.onnx")]
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)


def test_qdq_is_standard_onnx_of_the_lowest_version_that_has_it(tmp_path: Path) -> None:
    quantized(tiny_decoder(), tmp_path / "qdq.onnx", format=QDQ)
    model = written(tmp_path / "qdq.onnx")
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert ops_of(tmp_path / "qdq.onnx")["DequantizeLinear"] == 14


@pytest.mark.parametrize("version", [17, 18, 21, 22])
def test_matmul_nbits_leaves_the_versions_as_they_are(tmp_path: Path, version: int) -> None:
    builder = GraphBuilder(opset=version)
    product = builder.linear(builder.input("x", ["rows", 64]), 64, 32, "layer")
    builder.output(product, ["rows", 32])
    proto = builder.model()
    quantized(proto, tmp_path / "out.onnx")
    model = written(tmp_path / "out.onnx")
    assert {one.domain: one.version for one in model.opset_import} == {"": version, "com.microsoft": 1}
    assert model.ir_version == proto.ir_version


def gemms(between: str = "Erf", **options: Any) -> onnx.ModelProto:
    """x -> Gemm with a bias -> Erf -> Gemm with a bias, of an odd number of inputs."""
    builder = GraphBuilder(**options)
    x = builder.input("x", ["rows", 64])
    for at, (K, N) in enumerate([(64, 45), (45, 33)]):
        bias = builder.constant(builder.rng.standard_normal(N))
        x = builder.add("Gemm", x, builder.weight(K, N), bias, name=f"fc{at}")
        x = builder.add(between, x) if at == 0 else x
    builder.output(x, ["rows", 33])
    return builder.model()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gemms_with_odd_sizes_compute_the_same_in_both_formats(tmp_path: Path, dtype: type, symmetric: bool) -> None:
    proto = gemms(dtype=dtype)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(dtype)
    made = {}
    for name in (MATMULNBITS, QDQ):
        quantized(proto, tmp_path / f"{name}.onnx", format=name, symmetric=symmetric)
        (made[name],) = run(tmp_path / f"{name}.onnx", {"x": x}).values()
    assert ops_of(tmp_path / f"{QDQ}.onnx") == Counter({"DequantizeLinear": 2, "MatMul": 2, "Add": 2, "Erf": 1})
    np.testing.assert_allclose(made[QDQ], made[MATMULNBITS], atol=1e-5 if dtype == np.float32 else 2e-2)


def test_a_gemm_that_onnxruntime_merges_with_what_follows_is_computed_from_the_same_weight(tmp_path: Path) -> None:
    """Gemm and Relu become a FusedGemm there, which reads floats: that one is dequantised at every run."""
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    quantized(gemms("Relu"), tmp_path / "nbits.onnx", accuracy_level=0)
    quantized(gemms("Relu"), tmp_path / "qdq.onnx", format=QDQ)
    session, ops = fused(tmp_path / "qdq.onnx", 0)
    assert (ops["MatMulNBits"], ops["DequantizeLinear"], ops["FusedGemm"]) == (1, 1, 1)
    (expected,) = run(tmp_path / "nbits.onnx", {"x": x}).values()
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_a_bias_is_outside_of_the_node_where_the_target_takes_none(tmp_path: Path) -> None:
    quantized(gemms(), tmp_path / "dml.onnx", target="dml")
    assert ops_of(tmp_path / "dml.onnx") == Counter({"MatMulNBits": 2, "Add": 2, "Erf": 1})
    nodes = [node for node in written(tmp_path / "dml.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert [(node.name, len(node.input)) for node in nodes] == [("fc0", 4), ("fc1", 4)]
    quantized(gemms(), tmp_path / "cpu.onnx")
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    (one,), (other,) = (run(tmp_path / f"{name}.onnx", {"x": x}).values() for name in ("dml", "cpu"))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_zero_points_are_written_for_dml_even_where_they_are_all_in_the_middle(tmp_path: Path) -> None:
    quantized(tiny_decoder(), tmp_path / "dml.onnx", target="dml", symmetric=True)
    model = written(tmp_path / "dml.onnx")
    tensors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 14
    for node in nodes:
        assert tensors[node.input[3]].dtype == np.uint8
        assert (tensors[node.input[3]] & 0xF == 8).all()


@pytest.mark.parametrize("name", ["tensorrt", "qnn"])
@pytest.mark.parametrize("quality", ["default", "best"])
def test_what_wants_positive_scales_and_no_zero_points_gets_them(tmp_path: Path, name: str, quality: str) -> None:
    """The second half of a gated layer has 96 inputs, which are no blocks of 64."""
    report = quantized(tiny_decoder(), tmp_path / "out.onnx", target=name, quality=quality)
    model = written(tmp_path / "out.onnx")
    tensors = {one.name: one for one in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == len(report.matmuls) == {"tensorrt": 12, "qnn": 14}[name]
    for node in nodes:
        codes, scales = (tensors[one] for one in node.input)
        assert codes.data_type in ({TensorProto.INT4} if name == "tensorrt" else {TensorProto.INT4, TensorProto.INT8})
        assert (numpy_helper.to_array(scales) > 0).all()
        blocks = {one.name: one.i for one in node.attribute}.get("block_size")
        assert blocks in ({64, 128} if name == "tensorrt" else {None})
        assert blocks is None or codes.dims[0] % blocks == 0
    refused = [one.what for one in report.kept if "fill no whole blocks" in one.reason]
    assert refused == ([f"/layers.{layer}/mlp/down_proj/MatMul" for layer in range(2)] if name == "tensorrt" else [])


@pytest.mark.parametrize("name", TARGETS)
def test_best_chooses_only_what_the_target_runs(tmp_path: Path, name: str) -> None:
    report = quantized(tiny_decoder(), tmp_path / "out.onnx", target=name, target_bits=6.5)
    wants = TARGETS[name]
    assert {one.bits for one in report.matmuls} <= set(wants.bits)
    assert name == "qnn" or {one.block_size for one in report.matmuls} <= set(wants.block_sizes)


def test_the_summary_tells_the_format_and_the_target(tmp_path: Path) -> None:
    row = dict(quantized(norm_and_readers().model(), tmp_path / "a.onnx", format=QDQ).rows())["Quantised"]
    assert row == "2 MatMuls to 4 bits, block size 32, with zero points, DequantizeLinear (QDQ)"
    row = dict(quantized(norm_and_readers().model(), tmp_path / "b.onnx", target="qnn").rows())["Quantised"]
    assert row == "2 MatMuls to 4 bits, a scale for each column, symmetric, DequantizeLinear (QDQ), for qnn"


def test_the_table_of_an_embedding_stays_in_qdq_and_the_report_says_so(tmp_path: Path) -> None:
    """As packed rows are looked up by a node of onnxruntime's own."""
    report = quantized(tiny_decoder(), tmp_path / "out.onnx", format=QDQ, target_bits=6.0)
    assert {one.what: one.reason for one in report.kept} == {
        "/embed_tokens/Gather": "standard ONNX has no node that looks up packed rows"
    }
    assert ops_of(tmp_path / "out.onnx")["GatherBlockQuantized"] == 0
    names = {one.name: one for one in written(tmp_path / "out.onnx").graph.initializer}
    assert names["embed_tokens.weight"].data_type == TensorProto.FLOAT


def test_a_table_that_is_the_weight_of_the_lm_head_stays_beside_its_codes(tmp_path: Path) -> None:
    builder = GraphBuilder()
    table = builder.weight(160, 64, "table")
    ids = builder.input("input_ids", ["batch", "sequence"], np.int64)
    normed = builder.rms_norm(builder.add("Gather", table, ids, name="embed"), 64, "norm")
    turned = builder.add("Transpose", table, name="turn", perm=[1, 0])
    builder.output(builder.add("MatMul", normed, turned, name="lm_head", to="logits"), ["batch", "sequence", 160])
    report = quantized(builder.model(), tmp_path / "out.onnx", format=QDQ, lm_head="4")
    assert [one.what for one in report.kept] == ["embed"]
    model = written(tmp_path / "out.onnx")
    assert {"table", "lm_head.codes"} <= {one.name for one in model.graph.initializer}
    assert [node.op_type for node in model.graph.node if node.name in ("embed", "lm_head")] == ["Gather", "MatMul"]


def test_a_model_whose_version_cannot_be_raised_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    builder = norm_and_readers(opset=18)
    model = builder.model()
    odd = onnx.helper.make_node("GroupNormalization", ["g", "ones", "ones"], ["odd"], name="odd", num_groups=2)
    model.graph.node.append(odd)
    model.graph.input.append(onnx.helper.make_tensor_value_info("g", TensorProto.FLOAT, [1, 4, 2]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "ones"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("odd", TensorProto.FLOAT, [1, 4, 2]))
    with pytest.raises(errors.ModelError, match=r"needs opset 21, the model has 18, where odd \(GroupNormalization\)"):
        quantized(model, tmp_path / "out.onnx", format=QDQ)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_that_is_in_qdq_is_quantised_already(tmp_path: Path) -> None:
    quantized(norm_and_readers().model(), tmp_path / "out.onnx", format=QDQ)
    with pytest.raises(errors.AlreadyQuantizedError, match="DequantizeLinear"):
        awq_onnx.quantize(tmp_path / "out.onnx", tmp_path / "again.onnx")


def test_the_same_recipe_makes_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        quantized(norm_and_readers().model(), tmp_path / "out.onnx", format=QDQ)
        files.append([(tmp_path / name).read_bytes() for name in ("out.onnx", "out.onnx.data")])
    assert files[0] == files[1]
