"""onnxruntime-genai opens the folder that awq-onnx makes of one by its builder, and writes what onnxruntime does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import wheels
from rows import Row
from trained import NEW_TOKENS, greedy_ids, prompt_ids, trained

END = 2  # the token that ends a text, which genai leaves out
VERSION = "0.14.1"

GENERATE = """
import json, sys
import numpy
import onnxruntime_genai as genai

folder, ids, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
parameters = genai.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(ids) + tokens)
generator = genai.Generator(model, parameters)
generator.append_tokens(numpy.array([ids], numpy.int32))
while not generator.is_done():
    generator.generate_next_token()
made = generator.get_sequence(0)[len(ids) :]
print(json.dumps({"tokens": [int(token) for token in made], "text": genai.Tokenizer(model).decode(made)}))
"""


def generate(folder: Path, ids: list[int]) -> tuple[list[int], str]:
    """What genai writes after `ids`, with nothing but the folder."""
    environment = os.environ | {"PYTHONPATH": str(wheels.installed(f"onnxruntime-genai=={VERSION}"))}
    command = [sys.executable, "-c", GENERATE, str(folder), json.dumps(ids), str(NEW_TOKENS)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    return told["tokens"], told["text"]


@pytest.mark.clients
@pytest.mark.parametrize("lm_head", ["none", "8", "4"])
def test_genai_writes_the_tokens_of_plain_onnxruntime(tmp_path: Path, row: Callable[[Row], None], lm_head: str) -> None:
    """By the command, as a user would; lm_head and embedding have one weight, that is quantised once for both."""
    source = trained("smollm2.py", "--export", "genai")
    command = [sys.executable, "-m", "awq_onnx", str(source), "-o", f"{tmp_path}/int4/", "--lm-head", lm_head]
    little = ["--quality", "fast", "--samples", "4", "--sequence-length", "32", "--quiet"]
    subprocess.run([*command, *little], check=True, stdout=subprocess.PIPE)
    ids, model = prompt_ids(source.parent), tmp_path / "int4" / "model.onnx"
    tokens, text = generate(tmp_path / "int4", ids)
    plain = greedy_ids(model, ids)
    assert tokens == plain[: plain.index(END) if END in plain else NEW_TOKENS]
    assert "Paris" in text
    types = {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}
    assert ("GatherBlockQuantized" in types) == (lm_head != "none")
    ran = f"genai.Model(DIR), --lm-head {lm_head}, {NEW_TOKENS} greedy tokens"
    row(Row("onnxruntime-genai", VERSION, "SmolLM2-135M (genai)", ran, "the tokens of plain onnxruntime"))
