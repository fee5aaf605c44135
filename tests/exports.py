"""The real models that clients are tried with, and what plain onnxruntime makes of them: what clients must make too."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import onnxruntime
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
PROMPT = "The three largest cities of France are"

_greedy = runpy.run_path(str(ROOT / "examples" / "side_by_side.py"))["greedy"]


def trained(recipe: str, *options: str) -> Path:
    """The model.onnx that a recipe in models/ makes, built if it is not there yet, config and tokenizer beside it."""
    return _printed(recipe, *options)


def tiny(architecture: str) -> Path:
    """A random model of two layers, as optimum exports it."""
    return _printed("tiny.py", architecture)


def _printed(recipe: str, *options: str) -> Path:
    """In a process of its own: exporters warn, and leave much in memory."""
    words = [sys.executable, str(ROOT / "models" / recipe), *options, "--print-path"]
    return Path(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def prompt_ids(folder: Path) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    return ids


def greedy_ids(model: Path, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after `ids`, one by one through the cache."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return list(_greedy(session, ids, tokens))
