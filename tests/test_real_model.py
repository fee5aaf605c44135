"""SmolLM2-135M from end to end: what the small graphs cannot show. The model is built once, then cached."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from tokenizers import Tokenizer

import awq_onnx
from awq_onnx import Recipe, Report

pytestmark = pytest.mark.real

LAYERS = 30
PROMPT = "The capital of France is"
NEW_TOKENS = 12

Array = NDArray[Any]


@pytest.fixture(scope="module")
def source() -> Path:
    """The folder of the original."""
    script = Path(__file__).parent.parent / "models" / "smollm2.py"
    # In a process of its own: the exporter warns, and what it leaves in memory would count as ours.
    built = subprocess.run([sys.executable, str(script), "--print-path"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.strip()).parent


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The model, quantised once: report and output."""
    output = tmp_path_factory.mktemp("smollm2") / "model_int4.onnx"
    report = awq_onnx.quantize(source / "model.onnx", output, Recipe(samples=8, sequence_length=64))
    yield SimpleNamespace(report=report, output=output)
    for path in output.parent.iterdir():  # pytest keeps folders of several runs, and this one is large
        path.unlink()


def op_types(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def folds_of(report: Report, projection: str) -> list[tuple[str, str | None]]:
    """(reader, what it was folded into) of one projection, without what comes before and after the layer's name."""
    return [(one.name, one.folded_into) for one in report.matmuls if f"/{projection}/" in one.name]


def test_all_matmuls_of_the_layers_are_quantised_and_the_lm_head_is_kept(done: SimpleNamespace) -> None:
    assert len(done.report.matmuls) == 7 * LAYERS
    assert [one.what for one in done.report.kept] == ["/lm_head/MatMul"]
    assert op_types(done.output)["MatMulNBits"] == 7 * LAYERS


def test_every_scale_is_folded(done: SimpleNamespace) -> None:
    assert [one.name for one in done.report.matmuls if one.folded_into is None] == []


def test_sixty_folds_go_into_matmuls_and_sixty_into_gains(done: SimpleNamespace) -> None:
    quantised = {one.name for one in done.report.matmuls}
    targets = {one.folded_into for one in done.report.matmuls}
    assert len(targets & quantised) == 2 * LAYERS
    assert len([one for one in targets - quantised if "layernorm" in one]) == 2 * LAYERS
    assert len(targets) == 4 * LAYERS


def test_no_node_is_added(source: Path, done: SimpleNamespace) -> None:
    before, after = op_types(source / "model.onnx"), op_types(done.output)
    assert after - before == Counter(MatMulNBits=7 * LAYERS)
    assert before - after == Counter(MatMul=7 * LAYERS)
    assert after["Mul"] == before["Mul"]


def test_o_proj_is_folded_into_the_v_proj_of_its_layer_with_a_scale(done: SimpleNamespace) -> None:
    folds = folds_of(done.report, "o_proj")
    assert len(folds) == LAYERS
    assert all(into == name.replace("o_proj", "v_proj") for name, into in folds)
    assert sum(one.alpha > 0 for one in done.report.matmuls if "/o_proj/" in one.name) > LAYERS // 2
    assert done.report.scaled_caches > LAYERS // 2


def test_down_proj_is_folded_into_the_up_proj_of_its_layer(done: SimpleNamespace) -> None:
    folds = folds_of(done.report, "down_proj")
    assert len(folds) == LAYERS
    assert all(into == name.replace("down_proj", "up_proj") for name, into in folds)


def test_it_takes_at_most_one_and_a_half_times_the_memory_of_the_model(source: Path, done: SimpleNamespace) -> None:
    if done.report.peak_memory_bytes is None:
        pytest.skip("private memory cannot be measured on this system")
    assert done.report.peak_memory_bytes <= 1.5 * (source / "model.onnx").stat().st_size


def test_the_output_is_smaller_by_the_layers(done: SimpleNamespace) -> None:
    """106 of 134 million weights go from 32 to about 5 bits; embedding and lm_head are one table each and stay."""
    assert done.report.size_after_bytes < 0.6 * done.report.size_before_bytes


def test_real_text_reads_almost_as_before(source: Path, done: SimpleNamespace) -> None:
    """Held-out English: CPython's own documentation. Measured: KL 0.096, top-1 0.85."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = np.array(tokenizer(source).encode(text).ids, np.int64)
    windows = ids[len(ids) // 2 :][: 2 * 128].reshape(2, 128)
    comparison = awq_onnx.compare(source / "model.onnx", done.output, windows)
    assert comparison.tokens == windows.size
    assert comparison.kl_mean is not None
    assert comparison.kl_mean < 0.2
    assert comparison.top1 is not None
    assert comparison.top1 > 0.75


def empty_caches(path: Path) -> dict[str, Array]:
    caches = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        if value.name.startswith("past"):
            dims = value.type.tensor_type.shape.dim
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            caches[value.name] = np.zeros((1, dims[1].dim_value, 0, dims[3].dim_value), dtype)
    return caches


class Decoder:
    """A session with default options, and its caches."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.inputs = {one.name for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.empty = empty_caches(path)

    def run(self, ids: list[int], caches: dict[str, Array], before: int) -> tuple[Array, dict[str, Array]]:
        """The logits (T, V) of `ids` after `before` tokens in the caches; the caches afterwards."""
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, before + len(ids)), np.int64),
            "position_ids": np.arange(before, before + len(ids), dtype=np.int64)[None],
            **caches,
        }
        wanted = {name: values for name, values in feed.items() if name in self.inputs}
        outputs = dict(zip(self.outputs, self.session.run(self.outputs, wanted), strict=True))
        logits: Array = outputs.pop("logits")[0]
        return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


def test_a_prompt_is_continued_through_the_cache_as_in_one_pass(source: Path, done: SimpleNamespace) -> None:
    decoder = Decoder(done.output)
    prompt = tokenizer(source).encode(PROMPT).ids
    written: list[int] = []
    step, caches = prompt, decoder.empty
    while len(written) < NEW_TOKENS:
        logits, caches = decoder.run(step, caches, len(prompt) + len(written) - len(step) if written else 0)
        step = [int(logits[-1].argmax())]
        written += step
    whole, _ = decoder.run([*prompt, *written], decoder.empty, 0)
    assert whole.argmax(axis=-1)[len(prompt) - 1 : -1].tolist() == written
    assert "Paris" in tokenizer(source).decode(written)
