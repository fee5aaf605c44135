"""Continue one prompt with two language models in plain onnxruntime, side by side.

    python examples/side_by_side.py model.onnx model_int4.onnx "The capital of France is"

Nothing of awq-onnx is imported: this is all that an application needs to run the 4-bit model. Takes decoders with
a key/value cache as optimum exports them; tokenizer.json is read from the first model's folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def greedy(session: onnxruntime.InferenceSession, ids: list[int], tokens: int) -> Iterator[int]:
    """The likeliest next token, `tokens` times."""
    inputs = {one.name: one for one in session.get_inputs()}
    outputs = [one.name for one in session.get_outputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past: dict[str, Any] = {
        name: np.zeros((1, one.shape[1], 0, one.shape[3]), types[one.type])
        for name, one in inputs.items()
        if name.startswith("past_key_values")
    }
    seen = 0
    for _ in range(tokens):
        feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, seen + len(ids)), np.int64)}
        feed["position_ids"] = np.arange(seen, seen + len(ids), dtype=np.int64)[None]
        seen += len(ids)
        made = dict(
            zip(outputs, session.run(None, {n: v for n, v in (feed | past).items() if n in inputs}), strict=True)
        )
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
        ids = [int(made["logits"][0, -1].argmax())]
        yield ids[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue one prompt with two models, side by side.")
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.models[0].with_name("tokenizer.json")))
    ids = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    print(f"Prompt: {arguments.prompt}\n")
    for model in arguments.models:
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        start = time.perf_counter()
        written = list(greedy(session, ids, arguments.tokens))
        seconds = time.perf_counter() - start
        print(f"{model.name} ({len(written) / seconds:.1f} tokens/s)\n  {tokenizer.decode(written).strip()}\n")


if __name__ == "__main__":
    main()
