"""The trained models of models/, and what plain onnxruntime makes of a language model: what clients must make too."""

from __future__ import annotations

import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
PROMPT = "The three largest cities of France are"
NEW_TOKENS = 24

_greedy = runpy.run_path(str(ROOT / "examples" / "side_by_side.py"))["greedy"]


def trained(recipe: str) -> Path:
    """The model.onnx of a recipe in models/, built if it is not there yet, with config and tokenizer beside it."""
    script = ROOT / "models" / recipe  # in a process of its own: exporters warn, and leave much in memory
    built = subprocess.run([sys.executable, str(script), "--print-path"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.strip())


def prompt_ids(folder: Path) -> list[int]:
    ids: list[int] = _tokenizer(folder).encode(PROMPT, add_special_tokens=False).ids
    return ids


def greedy_text(model: Path, folder: Path, tokens: int = NEW_TOKENS) -> str:
    """What the model writes after the prompt until it ends the text; tokenizer and generation_config.json in folder."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    ids = itertools.takewhile(lambda token: token != end, _greedy(session, prompt_ids(folder), tokens))
    text: str = _tokenizer(folder).decode(list(ids))
    return text


def last_logits(model: Path, ids: list[int]) -> NDArray[np.float32]:
    """(vocabulary,) of what follows the tokens, the cache empty."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    shapes = {one.name: one.shape for one in session.get_inputs()}
    feed: dict[str, NDArray[np.generic]] = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    for name in shapes.keys() - feed.keys():
        feed[name] = np.zeros((1, shapes[name][1], 0, shapes[name][3]), np.float32)
    logits: NDArray[np.float32] = session.run(["logits"], feed)[0]
    return logits[0, -1]


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
