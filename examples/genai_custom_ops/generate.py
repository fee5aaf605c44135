"""Continue a prompt with onnxruntime-genai, MatMulNBits on the CUDA kernels of awq-onnx.

    python -m awq_onnx.kernels export kernels/          # the library, and the kernels beside it
    python examples/genai_custom_ops/generate.py MODEL_FOLDER kernels/libawq_onnx.so "The capital of France is"

MODEL_FOLDER has a genai_config.json, and a float16 model that awq-onnx has quantised. It is not changed: what
session_options.json shows is laid over its configuration here, and can as well be written into it once and for all,
then for programs in C, C++ and C# too. A path in it that is not absolute starts at MODEL_FOLDER.

A model of which the kernels serve not every MatMulNBits (one with some layers of 8 bits) is refused, with the reason;
`python -m awq_onnx.kernels adopt model.onnx -o ours.onnx` moves those that they serve to a domain of their own, and
--adopted runs the others on onnxruntime's own kernel. --cpu needs no GPU: it runs a slow reference, to try things out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai


def session_options(library: Path, adopted: bool) -> dict[str, str]:
    """What makes sessions run MatMulNBits on our kernels."""
    options = {"custom_ops_library": str(library.resolve())}
    return options | {"awq_onnx.replace": "0"} if adopted else options


def load(folder: Path, options: dict[str, str], cpu: bool) -> Any:
    config = genai.Config(str(folder))
    config.clear_providers()
    if not cpu:
        config.append_provider("cuda")
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return genai.Model(config)


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The ids, and the likeliest tokens after them."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a prompt with onnxruntime-genai on awq-onnx's kernels.")
    parser.add_argument("folder", type=Path, help="with genai_config.json and the model")
    parser.add_argument("library", type=Path, help="what python -m awq_onnx.kernels export wrote")
    parser.add_argument("prompt", help="a text; with --ids numbers of tokens, like 5,6,7")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="to generate (default: 32)")
    parser.add_argument("--ids", action="store_true", help="take and print tokens, without a tokenizer")
    parser.add_argument("--adopted", action="store_true", help="leave com.microsoft::MatMulNBits to onnxruntime")
    parser.add_argument("--cpu", action="store_true", help="run the reference kernel, without a GPU")
    arguments = parser.parse_args()
    library = ctypes.CDLL(str(arguments.library))
    if arguments.cpu:
        library.awq_configure(b"CPUExecutionProvider", None, None)
    model = load(arguments.folder, session_options(arguments.library, arguments.adopted), arguments.cpu)
    if arguments.ids:
        print(*greedy(model, [int(one) for one in arguments.prompt.split(",")], arguments.tokens))
    else:
        tokenizer = genai.Tokenizer(model)
        ids = [int(one) for one in tokenizer.encode(arguments.prompt)]
        print(tokenizer.decode(greedy(model, ids, arguments.tokens)))
    print(f"{library.awq_calls()} calls of the kernels")


if __name__ == "__main__":
    main()
