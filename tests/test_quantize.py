"""quantize() from Python: every step together, on small models in the handwriting of real exporters."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
import onnx_ir
import onnxruntime
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, norm_and_readers, run, save, tiny_decoder
from onnx import helper, numpy_helper

import awq_onnx
from awq_onnx import Recipe, Report, errors

QUICK = Recipe(samples=4, sequence_length=16)
IDS = np.random.default_rng(7).integers(0, 160, (3, 12))
WORDS = ["[UNK]", "the", "a", "small", "model", "writes", "its", "own", "text"]


class Listener:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.done: dict[str, float] = {}

    def stage(self, title: str) -> None:
        self.stages.append(title)
        self.done[title] = 0.0

    def advance(self, fraction: float) -> None:
        self.done[self.stages[-1]] += fraction

    def note(self, line: str) -> None:
        self.notes.append(line)


def quantized(model: onnx.ModelProto, folder: Path, recipe: Recipe = QUICK, **options: Any) -> tuple[Report, Path]:
    """Quantise a model that is saved for it; the report and the output."""
    report = awq_onnx.quantize(save(model, folder / "model.onnx"), folder / "out.onnx", recipe, **options)
    return report, folder / "out.onnx"


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def quantized_nodes(path: Path) -> list[onnx.NodeProto]:
    return [node for node in graph_of(path).node if node.op_type == "MatMulNBits"]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def weights(path: Path) -> dict[str, Array]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def logits_by_decoding(path: Path, ids: Array) -> Array:
    """The logits (B, T, V) token by token, each with the cache of those before."""
    model = onnx.load(path, load_external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    feed = decoder_feed(model, ids)
    rows = []
    for position in range(ids.shape[1]):
        feed["input_ids"] = ids[:, position : position + 1]
        feed["attention_mask"] = np.ones((len(ids), position + 1), np.int64)
        outputs = dict(zip(names, session.run(names, feed), strict=True))
        rows.append(outputs.pop("logits"))
        feed.update({name.replace("present", "past_key_values"): value for name, value in outputs.items()})
    return np.concatenate(rows, axis=1)


# The report


def test_every_matmul_is_in_the_report_with_its_scale_and_its_fold(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(), tmp_path)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"]
    names = {f"/layers.{layer}/{projection}/MatMul" for layer in range(2) for projection in projections}
    assert {one.name for one in report.matmuls} == names
    for one in report.matmuls:
        assert (one.folded_into is None) != (one.reason is None)
        assert 0 <= one.alpha <= 1
        assert 0 < one.error < 1
    assert [one.what for one in report.kept] == ["/lm_head/MatMul"]


def test_scales_are_folded_where_they_belong(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(layers=1), tmp_path)
    folds = {one.name: one.folded_into for one in report.matmuls}
    assert folds == {
        **dict.fromkeys([f"/layers.0/{one}_proj/MatMul" for one in "qkv"], "/layers.0/input_layernorm/Mul_1"),
        "/layers.0/o_proj/MatMul": "/layers.0/v_proj/MatMul",
        "/layers.0/mlp/gate_proj/MatMul": "/layers.0/post_attention_layernorm/Mul_1",
        "/layers.0/mlp/up_proj/MatMul": "/layers.0/post_attention_layernorm/Mul_1",
        "/layers.0/mlp/down_proj/MatMul": "/layers.0/mlp/up_proj/MatMul",
    }
    assert report.scaled_caches == 1


def test_the_shape_of_each_matmul_is_that_of_its_weight(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(layers=1), tmp_path)
    shapes = {one.name.removesuffix("/MatMul"): (one.K, one.N) for one in report.matmuls}
    assert shapes["/layers.0/k_proj"] == (64, 32)
    assert shapes["/layers.0/mlp/down_proj"] == (96, 64)


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_sizes_are_those_of_the_files(tmp_path: Path, dtype: type, external: bool) -> None:
    path = save(tiny_decoder(dtype=dtype), tmp_path / "model.onnx", external=external)
    before = sum(one.stat().st_size for one in tmp_path.iterdir())
    report = awq_onnx.quantize(path, tmp_path / "out.onnx", QUICK)
    assert report.size_before_bytes == before
    assert report.size_after_bytes == sum(one.stat().st_size for one in tmp_path.glob("out.onnx*")) < before


def test_the_output_is_compared_with_the_original_on_held_out_text(tmp_path: Path) -> None:
    comparison = quantized(tiny_decoder(), tmp_path, Recipe(samples=32, sequence_length=8))[0].comparison
    assert comparison.kl_mean is not None
    assert comparison.kl_mean > 0
    assert comparison.kl_se is not None
    assert comparison.perplexity_original is not None
    assert 0 < (comparison.top1 or 0) <= 1
    assert (comparison.windows, comparison.tokens) == (2, 16)


def test_the_comparison_of_a_model_with_itself_finds_nothing(tmp_path: Path) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx")
    comparison = awq_onnx.compare(path, path, IDS)
    assert comparison.kl_mean == pytest.approx(0, abs=1e-9)
    assert (comparison.top1, comparison.windows, comparison.tokens) == (1, *IDS.shape[:1], IDS.size)


def test_compare_stays_callable_after_quantize(tmp_path: Path) -> None:
    quantized(tiny_decoder(layers=1), tmp_path)
    assert callable(awq_onnx.compare)


def test_the_report_survives_json(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(), tmp_path)
    values = json.loads(report.to_json())
    assert values == json.loads(json.dumps(report.to_dict()))
    assert Recipe(**values["recipe"]) == QUICK
    assert [one["name"] for one in values["matmuls"]] == [one.name for one in report.matmuls]
    assert values["comparison"]["kl_mean"] == report.comparison.kl_mean
    assert set(values) == set(Report.__dataclass_fields__)


def test_what_it_cost_is_in_the_report(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(), tmp_path)
    assert set(report.seconds) == {"calibration data", "calibrate and search", "write", "measure"}
    assert 0 < sum(report.seconds.values()) <= report.total_seconds


# The file


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_output_runs_in_plain_onnxruntime_near_the_original(tmp_path: Path, dtype: type, external: bool) -> None:
    model = tiny_decoder(dtype=dtype)
    awq_onnx.quantize(save(model, tmp_path / "model.onnx", external=external), tmp_path / "out.onnx", QUICK)
    feed = decoder_feed(model, IDS)
    expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
    assert {name: (value.shape, value.dtype) for name, value in actual.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    correlation = np.corrcoef(expected["logits"].ravel(), actual["logits"].ravel())[0, 1]
    assert correlation > 0.85


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_the_source_is_not_changed(tmp_path: Path, external: bool) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx", external=external)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    awq_onnx.quantize(path, tmp_path / "out.onnx", QUICK)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.name in before} == before


def test_only_matmuls_are_replaced_and_no_node_is_added(tmp_path: Path) -> None:
    model = tiny_decoder()
    _, output = quantized(model, tmp_path)
    before, after = Counter(n.op_type for n in model.graph.node), Counter(n.op_type for n in graph_of(output).node)
    assert after - before == Counter(MatMulNBits=14)
    assert before - after == Counter(MatMul=14)


def test_names_of_nodes_inputs_and_outputs_stay(tmp_path: Path) -> None:
    model = tiny_decoder()
    graph = graph_of(quantized(model, tmp_path)[1])
    assert [(one.name, one.output) for one in graph.node] == [(one.name, one.output) for one in model.graph.node]
    assert list(graph.input) == list(model.graph.input)
    assert list(graph.output) == list(model.graph.output)


def test_each_matmulnbits_tells_how_it_was_made(tmp_path: Path) -> None:
    model = tiny_decoder()
    for node in model.graph.node:
        node.doc_string = f"doc of {node.name}"
        node.metadata_props.add(key="exporter", value="kept")
    report, output = quantized(model, tmp_path)
    rows = {one.name: one for one in report.matmuls}
    for node in quantized_nodes(output):
        told = {one.key: one.value for one in node.metadata_props}
        assert float(told["awq_onnx.alpha"]) == pytest.approx(rows[node.name].alpha)
        assert told["awq_onnx.scale_from"] == rows[node.name].scale_from == "mean"
        assert told["awq_onnx.folded_into"] == rows[node.name].folded_into
        assert float(told["awq_onnx.error"]) == pytest.approx(rows[node.name].error, abs=1e-5)
        assert float(told["awq_onnx.error_of_plain_rounding"]) == pytest.approx(rows[node.name].plain_error, abs=1e-5)
        assert told["exporter"] == "kept"
        assert node.doc_string == f"doc of {node.name}"


def test_a_matmulnbits_without_a_doc_string_gets_one(tmp_path: Path) -> None:
    report, output = quantized(tiny_decoder(layers=1), tmp_path)
    rows = {one.name: one for one in report.matmuls}
    for node in quantized_nodes(output):
        row = rows[node.name]
        assert node.doc_string.startswith("4-bit weight, in blocks of 32 along K with zero points.\n")
        assert f"mean|x|^{row.alpha:g}" in node.doc_string if row.alpha else "not scaled" in node.doc_string
        assert f"plain rounding {row.plain_error:.3g}." in node.doc_string


def test_what_absorbed_a_scale_tells_whose(tmp_path: Path) -> None:
    report, output = quantized(tiny_decoder(layers=1), tmp_path)
    told = {
        node.name: one.value
        for node in graph_of(output).node
        for one in node.metadata_props
        if one.key == "awq_onnx.divided_by_the_scale_of"
    }
    scaled = [(one.folded_into, one.name) for one in report.matmuls if one.alpha > 0]
    assert scaled
    assert {(into, name) for into, names in told.items() for name in names.split(", ")} == set(scaled)


def test_the_model_tells_the_recipe_and_the_version(tmp_path: Path) -> None:
    _, output = quantized(tiny_decoder(layers=1), tmp_path)
    told = {one.key: one.value for one in onnx.load(output, load_external_data=False).metadata_props}
    assert told["awq_onnx.version"] == awq_onnx.__version__
    assert Recipe(**json.loads(told["awq_onnx.recipe"])) == QUICK


def test_the_data_file_holds_every_large_tensor_once(tmp_path: Path) -> None:
    _, output = quantized(tiny_decoder(), tmp_path)
    ranges = []
    for tensor in graph_of(output).initializer:
        told = {one.key: one.value for one in tensor.external_data}
        if told:
            assert told["location"] == "out.onnx.data"
            ranges.append((int(told["offset"]), int(told["offset"]) + int(told["length"])))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] == (tmp_path / "out.onnx.data").stat().st_size


def test_the_caches_of_the_output_belong_to_it(tmp_path: Path) -> None:
    """Token by token it says what it says in one pass: v is scaled in the cache as well, and o expects it so."""
    _, output = quantized(tiny_decoder(), tmp_path, Recipe(samples=4, sequence_length=16, accuracy_level=0))
    whole = run(output, decoder_feed(onnx.load(output, load_external_data=False), IDS))["logits"]
    np.testing.assert_allclose(logits_by_decoding(output, IDS), whole, rtol=1e-3, atol=1e-3)


def test_biases_are_divided_with_their_matmul(tmp_path: Path) -> None:
    model = tiny_decoder(bias=True)
    report, output = quantized(model, tmp_path)
    assert {one.name: one.folded_into for one in report.matmuls}["/layers.0/o_proj/MatMul"] == "/layers.0/v_proj/MatMul"
    feed = decoder_feed(model, IDS)
    correlation = np.corrcoef(run(model, feed)["logits"].ravel(), run(output, feed)["logits"].ravel())[0, 1]
    assert correlation > 0.85


# The recipe


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_block_size_runs_even_where_it_is_larger_than_the_weight(
    tmp_path: Path, block_size: int, symmetric: bool
) -> None:
    recipe = Recipe(samples=4, sequence_length=16, block_size=block_size, symmetric=symmetric)
    model = tiny_decoder(layers=1)
    _, output = quantized(model, tmp_path, recipe)
    for node in quantized_nodes(output):
        assert attributes(node)["block_size"] == block_size
        assert len(node.input) == (3 if symmetric else 4)
    logits = run(output, decoder_feed(model, IDS))["logits"]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_the_accuracy_level_is_written(tmp_path: Path, accuracy_level: int) -> None:
    recipe = Recipe(samples=4, sequence_length=16, accuracy_level=accuracy_level)
    _, output = quantized(tiny_decoder(layers=1), tmp_path, recipe)
    assert {attributes(node)["accuracy_level"] for node in quantized_nodes(output)} == {accuracy_level}


def test_the_accuracy_level_changes_no_weight(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    for level in (0, 4):
        recipe = Recipe(samples=4, sequence_length=16, accuracy_level=level)
        awq_onnx.quantize(path, tmp_path / f"{level}.onnx", recipe)
    assert same(weights(tmp_path / "0.onnx"), weights(tmp_path / "4.onnx"))


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        awq_onnx.quantize(path, tmp_path / folder / "out.onnx", QUICK)
    for name in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    _, output = quantized(tiny_decoder(), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    options = ["--samples", "4", "--sequence-length", "16", "--quiet"]
    words = [sys.executable, "-m", "awq_onnx", str(tmp_path / "model.onnx"), "-o", str(other / "out.onnx"), *options]
    subprocess.run(words, check=True, capture_output=True)
    for name in ("out.onnx", "out.onnx.data"):
        assert (other / name).read_bytes() == output.with_name(name).read_bytes()


def test_another_seed_writes_other_text_and_runs(tmp_path: Path) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx")
    for seed in (0, 1):
        awq_onnx.quantize(path, tmp_path / f"{seed}.onnx", Recipe(samples=4, sequence_length=16, seed=seed))
    assert not same(weights(tmp_path / "0.onnx"), weights(tmp_path / "1.onnx"))
    assert np.isfinite(run(tmp_path / "1.onnx", decoder_feed(tiny_decoder(), IDS))["logits"]).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_output_is_closer_than_plain_rounding(tmp_path: Path, seed: int) -> None:
    """Against onnxruntime's own quantiser: same block size, same MatMuls, fp32 arithmetic on both sides.

    The mean KL on random ids was 0.41, 0.60 and 0.57 of plain rounding's for these seeds.
    """
    model = tiny_decoder(hidden=128, mlp=256, seed=seed)
    recipe = Recipe(samples=16, sequence_length=64, accuracy_level=0)
    _, output = quantized(model, tmp_path, recipe)
    plain = save(rounded_plainly(model, block_size=32), tmp_path / "plain.onnx")
    ids = np.random.default_rng(99).integers(0, 160, (8, 64))
    ours, theirs = (awq_onnx.compare(tmp_path / "model.onnx", path, ids).kl_mean for path in (output, plain))
    assert ours is not None
    assert theirs is not None
    assert ours < 0.75 * theirs


def rounded_plainly(model: onnx.ModelProto, block_size: int) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    quantizer = MatMulNBitsQuantizer(
        copy, block_size=block_size, is_symmetric=False, accuracy_level=0, nodes_to_exclude=["/lm_head/MatMul"]
    )
    logging.disable(logging.INFO)  # it tells of every node
    try:
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    result: onnx.ModelProto = quantizer.model.model
    return result


# Where a model comes from


@pytest.mark.parametrize("kind", ["ModelProto", "onnx_ir", "graphsurgeon"])
def test_a_model_in_memory_gives_the_weights_that_its_file_gives(tmp_path: Path, kind: str) -> None:
    model = tiny_decoder()
    _, output = quantized(model, tmp_path)
    sources = {
        "ModelProto": lambda: model,
        "onnx_ir": lambda: onnx_ir.from_proto(model),
        "graphsurgeon": lambda: onnx_graphsurgeon.import_onnx(model),
    }
    report = awq_onnx.quantize(sources[kind](), tmp_path / "memory.onnx", QUICK)
    assert same(weights(tmp_path / "memory.onnx"), weights(output))
    assert report.model == "a model in memory"


def test_a_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    before = model.SerializeToString(deterministic=True)
    awq_onnx.quantize(model, tmp_path / "out.onnx", QUICK)
    assert model.SerializeToString(deterministic=True) == before


def test_an_ir_model_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = onnx_ir.from_proto(tiny_decoder(layers=1))
    before = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    awq_onnx.quantize(model, tmp_path / "out.onnx", QUICK)
    assert onnx_ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_something_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="list"):
        awq_onnx.quantize([1, 2], tmp_path / "out.onnx")


def test_paths_may_be_strings(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    assert awq_onnx.quantize(str(path), str(tmp_path / "out.onnx"), QUICK).output == str(tmp_path / "out.onnx")


# Calibration


def tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(folder / "tokenizer.json"))
    return folder


def test_calibration_with_an_array_of_ids(tmp_path: Path) -> None:
    report, _ = quantized(tiny_decoder(), tmp_path, calibration=np.tile(IDS, (3, 1)))
    assert report.calibration == "4 given samples, 1 more held out to measure with"


def test_calibration_with_arrays_by_name_leaves_padding_out(tmp_path: Path) -> None:
    """What stands behind the mask changes nothing."""
    path = save(tiny_decoder(), tmp_path / "model.onnx")
    mask = np.ones_like(IDS)
    mask[:, -4:] = 0
    for name, filler in (("one", 3), ("two", 77)):
        ids = np.where(mask, IDS, filler)
        arrays = {"input_ids": ids, "attention_mask": mask}
        awq_onnx.quantize(path, tmp_path / f"{name}.onnx", QUICK, calibration=arrays)
    assert same(weights(tmp_path / "one.onnx"), weights(tmp_path / "two.onnx"))


def test_calibration_with_texts_finds_the_tokenizer_beside_the_model(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    report, _ = quantized(tiny_decoder(), tmp_path, calibration=["the small model writes its own text"] * 20)
    assert report.calibration == "4 windows of the given texts, 1 more held out to measure with"


def test_calibration_with_texts_and_a_named_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tokenizer(tmp_path / "elsewhere")
    texts = ["the small model writes its own text"] * 20
    awq_onnx.quantize(tiny_decoder(), tmp_path / "out.onnx", QUICK, calibration=texts, tokenizer=folder)


def test_calibration_with_a_jsonl_file_breaks_lines_where_json_does(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand inside a JSON string."""
    tokenizer(tmp_path)
    lines = [json.dumps({"text": "the small\u2028model writes\x85its own text " * 10}, ensure_ascii=False)] * 5
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    quantized(tiny_decoder(), tmp_path, calibration=tmp_path / "data.jsonl")


def test_calibration_from_python_that_is_neither_text_nor_arrays_is_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    with pytest.raises(errors.CalibrationError):
        quantized(tiny_decoder(layers=1), tmp_path, calibration=[1, 2, 3])


def test_every_stage_is_told_and_comes_to_its_end(tmp_path: Path) -> None:
    listener = Listener()
    quantized(tiny_decoder(), tmp_path, progress=listener)
    assert listener.stages == [
        "Writing text with the model itself",
        "Tracing channels",
        "Calibrating and searching",
        "Writing the model",
        "Measuring the result",
    ]
    for title in (listener.stages[0], listener.stages[2], listener.stages[4]):
        assert listener.done[title] == pytest.approx(1)
    assert listener.notes == []


# Other models


def test_a_model_that_is_no_language_model_gets_random_inputs_and_says_so(tmp_path: Path) -> None:
    listener = Listener()
    model = norm_and_readers().model()
    report, output = quantized(model, tmp_path, progress=listener)
    assert "random inputs" in listener.notes[0]
    assert report.calibration == "4 random inputs, 1 more held out to measure with"
    assert report.comparison.kl_mean is None
    assert 0 < report.comparison.relative_error < 0.2
    x = np.random.default_rng(1).standard_normal((1, 5, 64), np.float32)
    for name, expected in run(model, {"x": x}).items():
        np.testing.assert_allclose(run(output, {"x": x})[name], expected, atol=0.15 * np.abs(expected).max())


def encoder() -> onnx.ModelProto:
    """Ids, a mask and segments in, one vector for each token out; no logits."""
    builder = GraphBuilder()
    dims: list[int | str] = ["batch_size", "sequence_length"]
    ids, mask, kinds = (builder.input(n, dims, np.int64) for n in ("input_ids", "attention_mask", "token_type_ids"))
    words = builder.add("Gather", builder.weight(50, 64, "words"), ids, name="words")
    segments = builder.add("Gather", builder.weight(2, 64, "segments"), kinds, name="segments")
    x = builder.add("Add", words, segments, name="embeddings")
    real = builder.add("Unsqueeze", builder.cast(mask, np.float32, "real"), builder.integers(2), name="real_1")
    normed = builder.rms_norm(builder.add("Mul", x, real, name="masked"), 64, "norm")
    hidden = builder.add("Relu", builder.linear(normed, 64, 96, "up", bias=True), name="act")
    builder.output(builder.linear(hidden, 96, 64, "down", bias=True), [*dims, 64])
    return builder.model()


def test_an_encoder_is_calibrated_with_random_tokens(tmp_path: Path) -> None:
    listener = Listener()
    report, _ = quantized(encoder(), tmp_path, progress=listener)
    assert [one.name for one in report.matmuls] == ["up/MatMul", "down/MatMul"]
    assert "no language model" in listener.notes[0]
    assert report.comparison.relative_error < 0.3


def test_a_gated_mlp_folds_down_into_up(tmp_path: Path) -> None:
    report, _ = quantized(gated_mlp().model(), tmp_path)
    assert {one.name: one.folded_into for one in report.matmuls}["down/MatMul"] == "up/MatMul"


def test_a_decoder_without_a_cache_writes_its_own_text_and_says_that_it_is_slow(tmp_path: Path) -> None:
    listener = Listener()
    recipe = Recipe(samples=2, sequence_length=80)
    report, output = quantized(tiny_decoder(cache=False), tmp_path, recipe, progress=listener)
    assert "no key/value cache" in listener.notes[0]
    assert report.calibration == "2 sequences of 64 tokens that the model wrote itself, 1 more held out to measure with"
    assert report.scaled_caches == 0
    assert np.isfinite(run(output, {"input_ids": IDS, "attention_mask": np.ones_like(IDS)})["logits"]).all()


@pytest.mark.parametrize("samples", [3, 4], ids=["two batches", "two and a half"])
def test_a_decoder_with_a_fixed_batch_gets_whole_batches(tmp_path: Path, samples: int) -> None:
    model = tiny_decoder(layers=1)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    report, _ = quantized(model, tmp_path, Recipe(samples=samples, sequence_length=8))
    assert len(report.matmuls) == 7


def test_nodes_without_names_are_named_after_what_they_make(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    for node in model.graph.node:
        node.name = ""
    report, output = quantized(model, tmp_path)
    assert "MatMul of /layers.0/q_proj/MatMul_output_0" in {one.name for one in report.matmuls}
    assert len(quantized_nodes(output)) == 7


def tied_behind_two_norms() -> onnx.ModelProto:
    """One weight, read behind two norms, and a third time where what it makes is divided again."""
    builder = GraphBuilder()
    weight = builder.weight(64, 64, "w")
    for index in (0, 1):
        normed = builder.rms_norm(builder.input(f"x{index}", ["batch", "sequence", 64]), 64, f"norm_{index}")
        product = builder.add("MatMul", normed, weight, name=f"reader_{index}")
        builder.output(builder.add("Tanh", product, to=f"y{index}"), ["batch", "sequence", 64])
    return builder.model()


def test_a_tied_weight_is_packed_once(tmp_path: Path) -> None:
    model = tied_behind_two_norms()
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((8, 6, 64)).astype(np.float32) for name in ("x0", "x1")}
    awq_onnx.quantize(model, tmp_path / "out.onnx", Recipe(accuracy_level=0), calibration=feed)
    first, second = quantized_nodes(tmp_path / "out.onnx")
    assert first.input[1:] == second.input[1:]
    assert sum(values.dtype == np.uint8 and values.ndim == 3 for values in weights(tmp_path / "out.onnx").values()) == 1
    expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
    for name, values in expected.items():
        assert np.linalg.norm(actual[name] - values) < 0.15 * np.linalg.norm(values)


def test_a_tied_weight_whose_columns_are_divided_once_shares_its_codes(tmp_path: Path) -> None:
    """One layer three times in a row: the last one's columns are not divided, so its scales are its own."""
    builder = GraphBuilder()
    x, weight = builder.rms_norm(builder.input("x", ["b", "s", 64]), 64, "norm"), builder.weight(64, 64, "w")
    for index in range(3):
        x = builder.add("Relu", builder.add("MatMul", x, weight, name=f"layer_{index}"), name=f"relu_{index}")
    builder.output(x)
    model, feed = builder.model(), {"x": np.random.default_rng(0).standard_normal((8, 6, 64)).astype(np.float32)}
    awq_onnx.quantize(model, tmp_path / "out.onnx", Recipe(accuracy_level=0), calibration=feed)
    nodes = quantized_nodes(tmp_path / "out.onnx")
    assert len({node.input[1] for node in nodes}) == 1
    assert nodes[0].input[2] == nodes[1].input[2]
    (expected,), (actual,) = run(model, feed).values(), run(tmp_path / "out.onnx", feed).values()
    assert np.linalg.norm(actual - expected) < 0.25 * np.linalg.norm(expected)


@pytest.mark.parametrize("excluded", ["reader_1", "first"])
def test_an_excluded_layer_stays_in_float_and_is_rescaled(tmp_path: Path, excluded: str) -> None:
    builder = norm_and_readers(columns=(48, 32))
    hidden = builder.add("Relu", builder.linear("y0", 48, 64, "first", bias=True))
    builder.output(builder.linear(hidden, 64, 16, "second"))
    model, feed = builder.model(), {"x": np.random.default_rng(0).standard_normal((8, 6, 64)).astype(np.float32)}
    recipe = Recipe(accuracy_level=0, exclude=(f"{excluded}*",))
    report = awq_onnx.quantize(model, tmp_path / "out.onnx", recipe, calibration=feed)
    assert len(report.matmuls) == 3
    expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
    for name, values in expected.items():
        assert np.linalg.norm(actual[name] - values) < 0.2 * np.linalg.norm(values)


def test_two_runs_that_rescale_float_layers_write_the_same_bytes(tmp_path: Path) -> None:
    """Their weights stand behind Transposes, so each gets an initializer of its own; in what order must not vary."""
    builder = norm_and_readers(columns=(48,))
    normed = builder.nodes[-1].input[0]
    for index in range(6):
        turned = builder.add("Transpose", builder.weight(8, 64), perm=[1, 0])
        builder.output(builder.add("MatMul", normed, turned, name=f"kept_{index}"))
    recipe, model = Recipe(accuracy_level=0, exclude=("kept*",)), builder.model()
    feed = {"x": np.random.default_rng(0).standard_normal((8, 6, 64)).astype(np.float32) * np.linspace(0.1, 5, 64)}
    feed["x"] = feed["x"].astype(np.float32)
    for run_number in range(3):
        (tmp_path / str(run_number)).mkdir()
        path = tmp_path / str(run_number) / "out.onnx"
        awq_onnx.quantize(model, path, recipe, calibration=feed)
        assert path.read_bytes() == (tmp_path / "0" / "out.onnx").read_bytes()
