"""transformers.js runs what awq-onnx writes, from a local folder in its naming: onnx/model_q4.onnx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import npm
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Row
from numpy.typing import NDArray
from tokenizers import Tokenizer
from trained import NEW_TOKENS, PROMPT, greedy_text, trained

import awq_onnx
from awq_onnx import Recipe

pytestmark = pytest.mark.clients

PIPELINE = Path(__file__).with_name("pipeline.cjs")
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SENTENCE = "A llama is a domesticated animal of South America."


def test_it_writes_the_text_of_plain_onnxruntime(chat_model: Path, row: Callable[[Row], None]) -> None:
    [answer] = run("text-generation", chat_model, PROMPT, GREEDY)
    assert answer["generated_text"] == PROMPT + greedy_text(chat_model / "onnx" / "model_q4.onnx", chat_model)
    row(told("SmolLM2-135M", "text-generation in node, dtype q4", "the greedy text of plain onnxruntime"))


def test_it_answers_a_chat(chat_model: Path) -> None:
    [answer] = run("text-generation", chat_model, [{"role": "user", "content": "Say hello."}], GREEDY)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert answer["generated_text"][-1]["content"]


def test_it_gives_the_vectors_of_plain_onnxruntime(encoder: Path, row: Callable[[Row], None]) -> None:
    vectors = np.array(run("feature-extraction", encoder, SENTENCE, {}))
    expected = token_vectors(encoder / "onnx" / "model_q4.onnx", encoder, SENTENCE)
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    row(told("all-MiniLM-L6-v2", "feature-extraction in node, dtype q4", "the token vectors of plain onnxruntime"))


@pytest.fixture(scope="module")
def chat_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from web_folder(smollm2, tmp_path_factory.mktemp("web") / "smollm2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from web_folder(trained("bert.py"), tmp_path_factory.mktemp("web") / "bert")


def web_folder(model: Path, folder: Path) -> Iterator[Path]:
    """The model in 4 bits as transformers.js wants it, weights inside; there until the generator is closed."""
    output = folder / "onnx" / "model_q4.onnx"
    output.parent.mkdir(parents=True)
    separate = folder / "separate.onnx"
    awq_onnx.quantize(model, separate, Recipe(quality="fast", samples=4, sequence_length=32))
    onnx.save(onnx.load(separate), output)
    for path in model.parent.glob("*.json"):
        shutil.copy(path, folder)
    template = model.with_name("chat_template.jinja")
    if template.exists():  # transformers.js reads it nowhere else
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template.read_text()}))
    yield folder
    shutil.rmtree(folder)  # pytest keeps folders of several runs, and these are large


def run(task: str, folder: Path, given: object, options: dict[str, Any]) -> Any:
    modules = npm.installed(npm.TRANSFORMERS)
    return npm.run(PIPELINE, folder, task, json.dumps(given), json.dumps(options), modules=modules)


def token_vectors(model: Path, folder: Path, text: str) -> NDArray[np.float32]:
    """(1, tokens, channels)"""
    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    feed = {
        "input_ids": np.array([encoding.ids]),
        "attention_mask": np.array([encoding.attention_mask]),
        "token_type_ids": np.array([encoding.type_ids]),
    }
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    vectors: NDArray[np.float32] = session.run(["last_hidden_state"], feed)[0]
    return vectors


def told(model: str, ran: str, result: str) -> Row:
    return Row("transformers.js", npm.version(npm.TRANSFORMERS), model, ran, result)
