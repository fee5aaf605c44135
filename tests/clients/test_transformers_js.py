"""transformers.js runs what awq-onnx writes, from a local folder in its naming: onnx/model_q4.onnx."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import npm
import numpy as np
import pytest
from chromium import browse, served
from numpy.typing import NDArray
from rows import Row
from trained import LITTLE, NEW_TOKENS, PROMPT, UNPACKED, WEB_MODEL, greedy_text, plain_session, tokenizer_of, trained

import awq_onnx

pytestmark = pytest.mark.clients

PIPELINE_PAGE = Path(__file__).with_name("pipeline_page.cjs")
PIPELINE = Path(__file__).with_name("pipeline.cjs")
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SENTENCE = "A llama is a domesticated animal of South America."


def test_it_writes_the_text_of_plain_onnxruntime(web_smollm2: Path, row: Callable[[Row], None]) -> None:
    [answer] = run("text-generation", web_smollm2, PROMPT, GREEDY)
    assert answer["generated_text"] == PROMPT + greedy_text(web_smollm2 / WEB_MODEL, web_smollm2)
    row(told("SmolLM2-135M", "text-generation in node", "the text of plain onnxruntime"))


def test_it_answers_a_chat(web_smollm2: Path) -> None:
    [answer] = run("text-generation", web_smollm2, [{"role": "user", "content": "Say hello."}], GREEDY)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert answer["generated_text"][-1]["content"]


def test_it_gives_the_vectors_of_plain_onnxruntime(encoder: Path, row: Callable[[Row], None]) -> None:
    vectors = np.array(run("feature-extraction", encoder, SENTENCE, {}))
    expected = token_vectors(encoder / WEB_MODEL, encoder, SENTENCE)
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    row(told("all-MiniLM-L6-v2", "feature-extraction in node", "the token vectors of plain onnxruntime"))


def test_a_browser_writes_the_text_of_plain_onnxruntime(web_qdq_smollm2: Path, row: Callable[[Row], None]) -> None:
    """On WebAssembly, which is slow without one setting of the session."""
    with served(web_qdq_smollm2, npm.installed(npm.TRANSFORMERS)) as url:
        given = (PIPELINE_PAGE, url, "text-generation", json.dumps(PROMPT), json.dumps(GREEDY))
        usual, unpacked = browse(*given, "{}"), browse(*given, json.dumps(UNPACKED))
    expected = PROMPT + greedy_text(web_qdq_smollm2 / WEB_MODEL, web_qdq_smollm2, **UNPACKED)
    assert [one["output"] for one in (usual, unpacked)] == [[{"generated_text": expected}]] * 2
    gain = usual["seconds"] / unpacked["seconds"]
    assert gain > 2
    ran = "text-generation in Chromium, WebAssembly, `--format qdq`"
    row(
        told(
            "SmolLM2-135M", ran, f"the text of plain onnxruntime in floats; disable_quant_qdq: {gain:.0f} times as fast"
        )
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    awq_onnx.quantize(trained("bert.py"), folder, replace(LITTLE, target="web"))
    return folder


def run(task: str, folder: Path, given: object, options: dict[str, Any]) -> Any:
    modules = npm.installed(npm.TRANSFORMERS)
    return npm.run(PIPELINE, folder, task, json.dumps(given), json.dumps(options), modules=modules)


def token_vectors(model: Path, folder: Path, text: str) -> NDArray[np.float32]:
    """(1, tokens, channels)"""
    encoding = tokenizer_of(folder).encode(text)
    feed = {
        "input_ids": np.array([encoding.ids]),
        "attention_mask": np.array([encoding.attention_mask]),
        "token_type_ids": np.array([encoding.type_ids]),
    }
    vectors: NDArray[np.float32] = plain_session(model).run(["last_hidden_state"], feed)[0]
    return vectors


def told(model: str, ran: str, result: str) -> Row:
    return Row("transformers.js", npm.version(npm.TRANSFORMERS), model, ran, result)
