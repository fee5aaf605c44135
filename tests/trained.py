"""The models that clients are tried with, and what plain onnxruntime makes of them: what clients must make too."""

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

from awq_onnx import Recipe

ROOT = Path(__file__).parent.parent
WEB_MODEL = Path("onnx") / "model_q4.onnx"  # in the folder that --target web makes of a model.onnx
PROMPT = "The three largest cities of France are"
NEW_TOKENS = 24
UNPACKED = {"disable_quant_qdq": "1"}  # a session that unpacks weights of QDQ once, as WebAssembly wants
LITTLE = Recipe(quality="fast", samples=4, sequence_length=32)  # calibration enough for clients

_greedy = runpy.run_path(str(ROOT / "examples" / "side_by_side.py"))["greedy"]


def trained(recipe: str, *options: str) -> Path:
    """The model.onnx that a recipe in models/ makes, built if it is not there yet, config and tokenizer beside it."""
    words = [sys.executable, str(ROOT / "models" / recipe), *options, "--print-path"]
    built = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True
    )  # exporters warn, and leave much behind
    return Path(built.stdout.strip())


def tiny(architecture: str) -> Path:
    """A random model of two layers, as optimum exports it."""
    return trained("tiny.py", architecture)


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def prompt_ids(folder: Path, prompt: str = PROMPT) -> list[int]:
    ids: list[int] = tokenizer_of(folder).encode(prompt, add_special_tokens=False).ids
    return ids


def plain_session(model: Path, **settings: str) -> onnxruntime.InferenceSession:
    """On the CPU. settings: of the session, "session." left out."""
    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", value)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def greedy_ids(model: Path, ids: list[int], tokens: int = NEW_TOKENS, **settings: str) -> list[int]:
    """The likeliest tokens after `ids`, one by one through the cache."""
    return list(_greedy(plain_session(model, **settings), ids, tokens))


def greedy_text(model: Path, folder: Path, prompt: str = PROMPT, tokens: int = NEW_TOKENS, **settings: str) -> str:
    """What the model writes after the prompt until it ends the text; tokenizer and generation_config.json in folder."""
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    made = greedy_ids(model, prompt_ids(folder, prompt), tokens, **settings)
    text: str = tokenizer_of(folder).decode(list(itertools.takewhile(lambda token: token != end, made)))
    return text


def last_logits(model: Path, ids: list[int]) -> NDArray[np.float32]:
    """(vocabulary,) of what follows the tokens, the cache empty."""
    session = plain_session(model)
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
