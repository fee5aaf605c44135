"""onnxruntime-genai with the library as its custom_ops_library, by examples/genai_custom_ops/generate.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wheels
from builders import save, tiny_decoder

import awq_onnx
from awq_onnx.kernels import library

EXAMPLE = Path(__file__).parents[2] / "examples" / "genai_custom_ops"
GENAI = "onnxruntime-genai==0.14.1"  # 59 MB to download
TOKENS = 8
NODES = 14  # MatMulNBits in the decoder


def configuration() -> dict[str, Any]:
    """genai_config.json for builders.tiny_decoder."""
    caches = {f"{kind}_{part}_names": f"{name}.%d.{part}" for kind, name in CACHES for part in ("key", "value")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{name: value for name, value in caches.items() if name.startswith("past")},
        },
        "outputs": {
            "logits": "logits",
            **{name: value for name, value in caches.items() if name.startswith("present")},
        },
        "head_size": 16,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    model = {"type": "llama", "vocab_size": 160, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2}
    return {"model": model | {"pad_token_id": 0, "decoder": decoder}, "search": {"max_length": 64}}


CACHES = (("past", "past_key_values"), ("present", "present"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("genai")
    save(tiny_decoder(), made / "plain.onnx")
    awq_onnx.quantize(made / "plain.onnx", made / "model.onnx")
    (made / "genai_config.json").write_text(json.dumps(configuration()))
    return made


def generate(folder: Path, *arguments: str, path: Path | None = None) -> tuple[list[int], int]:
    """The tokens, and how often our kernels ran."""
    command = [sys.executable, str(EXAMPLE / "generate.py"), str(folder), str(path or library.path()), "5,6,7"]
    environment = os.environ | {"PYTHONPATH": str(wheels.installed(GENAI))}
    ended = subprocess.run(
        [*command, "--ids", "--cpu", "--tokens", str(TOKENS), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    tokens, calls = ended.stdout.splitlines()
    return [int(one) for one in tokens.split()], int(calls.split()[0])


def test_it_generates_on_our_kernels_what_it_does_on_onnxruntimes(folder: Path) -> None:
    """With replace off, onnxruntime's own kernel runs: the entry of the configuration arrives."""
    ours, calls = generate(folder)
    assert calls == NODES * TOKENS
    theirs, none = generate(folder, "--adopted")
    assert none == 0
    assert ours == theirs
    assert ours[:3] == [5, 6, 7]
    assert len(ours) == 3 + TOKENS


def test_the_fragment_of_the_configuration_is_that_of_the_example() -> None:
    fragment = json.loads((EXAMPLE / "session_options.json").read_text())
    options = fragment["model"]["decoder"]["session_options"]
    assert options == {"custom_ops_library": "libawq_onnx.so", "provider_options": [{"cuda": {}}]}
