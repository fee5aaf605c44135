"""Hugging Face's optimum opens an output folder as it is, and computes what plain onnxruntime does.

It runs in processes of its own: it warns of much that is no concern of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rows import Row
from trained import (
    LITTLE,
    NEW_TOKENS,
    PROMPT,
    greedy_ids,
    plain_session,
    prompt_ids,
    tiny,
    tokenizer_of,
    trained,
)

import awq_onnx

TEXTS = [
    "A man is eating food.",
    "The girl is carrying a baby over the wet grass.",
    "Where can I buy a ticket for the train to Lyon?",
]

GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, ids, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
print(json.dumps(made[0, ids.shape[1] :].tolist()))
"""

CONTINUE = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer = ORTModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
print(tokenizer.decode(made[0]))
"""

EMBED = """
import json, sys
import numpy
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer

folder, texts, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model, tokenizer = ORTModelForFeatureExtraction.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(texts, padding=True, return_tensors="pt")
made = model(**inputs).last_hidden_state.numpy()
numpy.savez(output, made=made, **{name: values.numpy() for name, values in inputs.items()})
"""


def run(script: str, *arguments: object) -> str:
    ended = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def version() -> str:
    return f"optimum-onnx {metadata.version('optimum-onnx')}, onnxruntime {metadata.version('onnxruntime')}"


def test_a_causal_model_writes_the_tokens_of_plain_onnxruntime(tmp_path: Path) -> None:
    awq_onnx.quantize(tiny("llama"), f"{tmp_path}/int4/", LITTLE)
    ids = [1, 5, 9, 300, 17]
    written = json.loads(run(GENERATE, tmp_path / "int4", ids, NEW_TOKENS))
    plain = greedy_ids(tmp_path / "int4" / "model.onnx", ids)
    assert len(written) > 1
    assert written == plain[: len(written)]  # it ends with the token that ends a text


@pytest.mark.clients
def test_a_trained_model_writes_the_text_of_plain_onnxruntime(
    smollm2: Path, tmp_path: Path, row: Callable[[Row], None]
) -> None:
    """Its own prompt and end are found in the folder's tokenizer and configuration."""
    awq_onnx.quantize(smollm2, f"{tmp_path}/int4/", LITTLE)
    text = run(CONTINUE, tmp_path / "int4", PROMPT, NEW_TOKENS)
    ids = prompt_ids(tmp_path / "int4")
    plain = greedy_ids(tmp_path / "int4" / "model.onnx", ids)
    assert text.strip() == tokenizer_of(smollm2.parent).decode([*ids, *plain]).strip()
    ran = f"ORTModelForCausalLM.from_pretrained(DIR), {NEW_TOKENS} greedy tokens"
    row(Row("optimum", version(), "SmolLM2-135M (optimum)", ran, "the text of plain onnxruntime"))


@pytest.mark.clients
def test_an_encoder_makes_the_vectors_of_plain_onnxruntime(tmp_path: Path, row: Callable[[Row], None]) -> None:
    source = trained("bert.py")
    awq_onnx.quantize(source, f"{tmp_path}/int4/")
    run(EMBED, tmp_path / "int4", json.dumps(TEXTS), tmp_path / "made.npz")
    made = dict(np.load(tmp_path / "made.npz"))
    states = made.pop("made")
    plain, original = last_hidden_state(tmp_path / "int4" / "model.onnx", made), last_hidden_state(source, made)
    np.testing.assert_allclose(states, plain, rtol=0, atol=1e-5)
    cosine = cosines(pooled(states, made), pooled(original, made))
    assert cosine.min() > 0.95
    ran = "ORTModelForFeatureExtraction.from_pretrained(DIR), three texts"
    result = f"the vectors of plain onnxruntime; cosine to the fp32 model's {cosine.min():.4f} and more"
    row(Row("optimum", version(), "all-MiniLM-L6-v2", ran, result))


Array = NDArray[Any]


def last_hidden_state(model: Path, feed: dict[str, Array]) -> Array:
    session = plain_session(model)
    wanted = {one.name for one in session.get_inputs()}
    made: Array = session.run(["last_hidden_state"], {n: v for n, v in feed.items() if n in wanted})[0]
    return made


def pooled(states: Array, feed: dict[str, Array]) -> Array:
    """The mean over the tokens of each text: (texts, D)."""
    mask = feed["attention_mask"][..., None]
    mean: Array = (states * mask).sum(axis=1) / mask.sum(axis=1)
    return mean


def cosines(a: Array, b: Array) -> Array:
    product: Array = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return product
