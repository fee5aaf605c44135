"""The layout that transformers.js and the page of examples/browser read, made by hand of a model in models/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx

import awq_onnx
from awq_onnx import Recipe

MODEL = Path("onnx") / "model_q4.onnx"


def write_web_folder(model: Path, folder: Path) -> None:
    """The model in 4 bits, its weights inside, with the configuration that lies beside the original."""
    separate, whole = folder / "separate.onnx", folder / MODEL
    whole.parent.mkdir(parents=True)
    awq_onnx.quantize(model, separate, Recipe(quality="fast", samples=4, sequence_length=32))
    onnx.save(onnx.load(separate), whole)
    for path in folder.glob("separate.onnx*"):
        path.unlink()
    for path in model.parent.glob("*.json"):
        shutil.copy(path, folder)
    template = model.with_name("chat_template.jinja")
    if template.exists():  # which transformers.js does not read
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template.read_text()}))
