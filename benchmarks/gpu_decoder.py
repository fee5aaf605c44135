"""A whole decoder on a GPU, one token after the other: our kernels beside onnxruntime's, both under CUDA graphs.

    python benchmarks/gpu_decoder.py [--size 1.5] [--layers N] [--steps 200] [--block-size 32] [--output FILE]
                                     [--device cuda]

The model is that of random_llama.py in float16 with MatMulNBits nodes in the place of its MatMuls: random codes, which
cost the same as any. Tokens per second are those of steps that each append one token to a cache that the graph's inputs
and outputs share; a step is what one call of onnxruntime takes, the graph's start included. The logits of both are
compared after the last step, on the same tokens.

`--device cpu` runs it with the reference kernel in C, to try the script.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from random_llama import SHAPES, DataFile, Decoder, Shape

from awq_onnx import kernels
from awq_onnx.errors import AwqOnnxError, MissingPackageError
from awq_onnx.runtime import find_cuda, onnxruntime

PROVIDERS: Mapping[str, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CACHE_LENGTH = 1024  # positions that the cache has room for
WARM_UPS = 10
POOL_BYTES = 1 << 24  # of random codes, of which every weight is a run

Array = NDArray[Any]


class Int4Decoder(Decoder):
    """With MatMulNBits nodes. What GroupQueryAttention wants to know of lengths are inputs: nothing runs on the CPU."""

    def __init__(self, shape: Shape, data: DataFile, block_size: int) -> None:
        super().__init__(shape, data)
        self._block_size = block_size
        self._pool = np.random.default_rng(0).integers(0, 256, POOL_BYTES, np.uint8)

    def _declare_inputs(self) -> None:
        for name in ("input_ids", "position_ids"):
            self._declare(self._inputs, name, [1, 1], TensorProto.INT64)
        self._declare(self._inputs, "last_token", [1], TensorProto.INT32)
        self._declare(self._inputs, "total_length", [1], TensorProto.INT32)
        self._declare(self._outputs, "logits", [1, 1, self.shape.vocabulary])

    def _lengths(self) -> tuple[str, str]:
        return "last_token", "total_length"

    def _cache(self, number: int, part: str) -> tuple[str, str]:
        names = f"past_key_values.{number}.{part}", f"present.{number}.{part}"
        for infos, name in zip((self._inputs, self._outputs), names, strict=True):
            self._declare(infos, name, self.cache_shape)
        return names

    @property
    def cache_shape(self) -> list[int]:
        return [1, self.shape.kv_heads, CACHE_LENGTH, self.shape.head_size]

    def _append_layers(self) -> None:
        super()._append_layers()
        head = self._nodes.pop()  # the lm_head is made with the layers, as a MatMul
        self.data.tensors.pop()
        self._matmul_nbits(head.name, head.input[0], self.shape.hidden, self.shape.vocabulary, 1.0, ["logits"])

    def _linear(self, name: str, x: str, K: int, N: int, *, ends_branch: bool = False) -> str:
        gain = 1 / math.sqrt(2 * self.shape.layers) if ends_branch else 1.0
        return self._matmul_nbits(f"{name}/MatMul", x, K, N, gain, [f"{name}/MatMul/output_0"])

    def _matmul_nbits(self, name: str, x: str, K: int, N: int, gain: float, outputs: list[str]) -> str:
        """Random codes; scales that keep x at about its size."""
        G = -(-K // self._block_size)
        codes, scales = f"{name}.codes", f"{name}.scales"
        size = N * G * self._block_size // 2
        runs = (self._pool[: min(POOL_BYTES, size - at)] for at in range(0, size, POOL_BYTES))
        self.data.add(codes, (N, G, self._block_size // 2), TensorProto.UINT8, runs)
        scale = gain / math.sqrt(K) / 4.6  # 4.6: the standard deviation of a code
        self.data.known(scales, np.full((N, G), scale))
        attributes = {"K": K, "N": N, "block_size": self._block_size, "bits": 4}
        return self._microsoft(name, "MatMulNBits", [x, codes, scales], outputs, **attributes)[0]


def build(folder: Path, shape: Shape, block_size: int) -> Path:
    path = folder / "model.onnx"
    with DataFile(folder / "model.onnx.data", np.dtype(np.float16), 0) as data:
        model = Int4Decoder(shape, data, block_size).model()
    onnx.save(model, str(path))
    return path


class Steps:
    """One session and its tensors: every step appends one token, all addresses stay."""

    def __init__(self, model: Path, shape: Shape, device: str, with_ours: bool) -> None:
        options = onnxruntime().SessionOptions()
        options.log_severity_level = 3
        if with_ours:
            kernels.register(options, device=device)
        graph = {"enable_cuda_graph": "1"} if device == "cuda" else {}
        providers = [(PROVIDERS[device], graph)]
        self._session = onnxruntime().InferenceSession(str(model), options, providers=providers)
        self._device = device
        self._values: dict[str, Any] = {}
        self._binding = self._session.io_binding()
        self._bind(shape)

    def run(self, token: int, position: int) -> float:
        """Seconds of a step."""
        for name, value in (("input_ids", token), ("position_ids", position)):
            self._values[name].update_inplace(np.array([[value]], np.int64))
        self._values["last_token"].update_inplace(np.array([position], np.int32))
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start

    def logits(self) -> Array:
        """Those of the last step, float32 (vocabulary,)."""
        return np.asarray(self._values["logits"].numpy()[0, 0], np.float32)

    def _bind(self, shape: Shape) -> None:
        half = np.float16
        self._input("input_ids", np.zeros((1, 1), np.int64))
        self._input("position_ids", np.zeros((1, 1), np.int64))
        self._input("last_token", np.zeros(1, np.int32))
        # The length of the cache, the same in every step: it is read on the CPU, where a CUDA graph would not see it.
        self._input("total_length", np.full(1, CACHE_LENGTH, np.int32), "cpu")
        self._output("logits", np.zeros((1, 1, shape.vocabulary), half))
        for layer in range(shape.layers):
            for part in ("key", "value"):
                past = f"past_key_values.{layer}.{part}"
                self._input(past, np.zeros((1, shape.kv_heads, CACHE_LENGTH, shape.head_size), half))
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", self._values[past])

    def _input(self, name: str, value: Array, device: str | None = None) -> None:
        self._values[name] = self._value(value, device or self._device)
        self._binding.bind_ortvalue_input(name, self._values[name])

    def _output(self, name: str, value: Array) -> None:
        self._values[name] = self._value(value, self._device)
        self._binding.bind_ortvalue_output(name, self._values[name])

    def _value(self, value: Array, device: str) -> Any:
        return onnxruntime().OrtValue.ortvalue_from_numpy(value, device, 0)


def measured(model: Path, shape: Shape, device: str, steps: int, with_ours: bool) -> tuple[float, Array]:
    """Tokens per second, and the logits after the last."""
    running = Steps(model, shape, device, with_ours)
    tokens = np.random.default_rng(1).integers(0, shape.vocabulary, WARM_UPS + steps)
    times = [running.run(int(token), position) for position, token in enumerate(tokens)]
    return 1 / median(times[WARM_UPS:]), running.logits()


def run(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not find_cuda():
        raise MissingPackageError("the installed onnxruntime cannot use CUDA: pip install 'awq-onnx[gpu]'")
    shape = SHAPES[arguments.size]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder), shape, arguments.block_size)
        its_rate, its = measured(model, shape, arguments.device, arguments.steps, with_ours=False)
        rate, logits = measured(model, shape, arguments.device, arguments.steps, with_ours=True)
    error = np.linalg.norm(logits - its) / np.linalg.norm(its)
    lines = [
        f"{arguments.size} B, {shape.layers} layers, blocks of {arguments.block_size}, float16; "
        f"onnxruntime {onnxruntime().__version__}, {arguments.device}\n",
        "| onnxruntime, tokens/s | our kernels, tokens/s | ratio | error of the logits |",
        "|---|---|---|---|",
        f"| {its_rate:.1f} | {rate:.1f} | {rate / its_rate:.2f} | {error:.1e} |",
    ]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tokens per second of a decoder with our kernels and onnxruntime's.")
    parser.add_argument("--size", choices=list(SHAPES), default="1.5", help="billions of parameters")
    parser.add_argument("--layers", type=int, metavar="N", help="as many layers instead of the size's own")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="tokens that are timed")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--device", choices=list(PROVIDERS), default="cuda")
    try:
        run(parser.parse_args(argv))
    except AwqOnnxError as error:
        print(f"gpu_decoder: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
