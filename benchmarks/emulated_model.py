"""A whole quantised decoder on our CUDA kernels, on the GPU that the tests emulate, beside onnxruntime's own kernel.

    python benchmarks/emulated_model.py MODEL [--tokens 1 12]

MODEL is a float16 decoder that awq-onnx has quantised, best with `--accuracy-level 0`: otherwise onnxruntime's kernel
rounds activations, ours do not. Both run in onnxruntime on the same random tokens, without a past; what is printed is
how far apart their outputs are: KL in nats per token, and how often the likeliest next token is the same. Emulated
kernels take minutes for what a GPU does in milliseconds; nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import script
from numpy.typing import NDArray

from awq_onnx.kernels import library
from awq_onnx.likelihood import log_probabilities
from awq_onnx.runtime import CPU_PROVIDERS, onnxruntime


def main() -> None:
    parser = argparse.ArgumentParser(description="A decoder on emulated CUDA kernels beside onnxruntime's own.")
    parser.add_argument("model", type=Path, help="a float16 decoder with MatMulNBits nodes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 12], metavar="N", help="in a sequence")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gpu = script("tests/gpus.py").emulated(Path(folder))
        ours, theirs = session(arguments.model, gpu), session(arguments.model, None)
        for length in arguments.tokens:
            gpu.launched()
            p, q = (log_probabilities(logits(one, length)) for one in (theirs, ours))
            kl = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
            same = float((p.argmax(axis=-1) == q.argmax(axis=-1)).mean())
            kernels = ", ".join(sorted(set(gpu.launched())))
            print(f"{length} tokens: KL {kl:.1e}, same next token {same:.0%}; {kernels}", flush=True)


def session(model: Path, gpu: Any) -> Any:
    """gpu: an `Emulated` of tests/gpus.py, or None: onnxruntime's own kernels."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 3
    if gpu is not None:
        provider = library.PROVIDERS["cpu"]
        library.configure_and_register(options, library.path(), provider, driver=gpu.driver, folder=gpu.folder)
    return onnxruntime().InferenceSession(str(model), options, providers=list(CPU_PROVIDERS))


def logits(running: Any, length: int) -> NDArray[np.float64]:
    """Of random tokens, (length, vocabulary)."""
    ids = np.random.default_rng(0).integers(0, 1000, (1, length))
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    feeds = {one.name: known.get(one.name, no_past(one)) for one in running.get_inputs()}
    made: NDArray[np.float64] = running.run(["logits"], feeds)[0][0].astype(np.float64)
    return made


def no_past(cache: Any) -> NDArray[Any]:
    """A key or value cache with nothing in it; its heads and their size are numbers."""
    shape = [1, *(axis if isinstance(axis, int) else 0 for axis in cache.shape[1:])]
    return np.zeros(shape, np.float16)


if __name__ == "__main__":
    main()
