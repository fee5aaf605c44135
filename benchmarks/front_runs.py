"""What benchmarks/front.py runs: awq-onnx and every other tool, in which settings."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from front_points import FRONT, LAYERS, OURS
from numpy.typing import NDArray
from others import INT4_TOOLS, LM_HEAD, Call, at_opset_21, cache_folder, calibration_ids, last_line, with_own_head

import awq_onnx
from awq_onnx import sizing
from awq_onnx.calibrate import data
from awq_onnx.calibrate.feeds import TOKENS, signature
from awq_onnx.progress import Silent
from awq_onnx.recipe import BEST, DEFAULT, Recipe
from awq_onnx.sizing import estimated_losses
from awq_onnx.store import open_model

LENGTH = 256  # of windows to calibrate on and to measure with
SAMPLES = 32
LIMIT_SECONDS = 15 * 60
OUR_LAYERS = ((DEFAULT, 32), (DEFAULT, 64), (BEST, 128))  # quality and block size
TARGET_BITS = (3.5, 4.0, 4.3, 4.5, 4.7, 5.0, 5.5, 6.0, 7.0, 7.5, 8.0, 8.5)


@dataclass(frozen=True)
class Job:
    """run: makes the model at a path. key: of what is kept of the result; empty: nothing. original: the trained model
    that it is compared with.
    """

    part: str
    tool: str
    settings: str
    run: Callable[[Path], None]
    key: str = ""
    original: str = "smollm2"

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.settings}"


@dataclass(frozen=True)
class Bench:
    """What all runs share. folder: for the copies of the model and the token ids that other tools get."""

    model: Path
    windows: NDArray[np.int64]
    folder: Path
    again: bool
    estimated: list[list[float]] = field(default_factory=list)

    def given(self, call: Call, own_head: bool) -> Path:
        """The model as a tool gets it."""
        path = self.model
        if own_head:
            path = self._made("own_head.onnx", lambda output: with_own_head(self.model, output))
        if call.tool not in INT4_TOOLS:
            return path
        return self._made(f"opset21_{own_head}.onnx", lambda output: at_opset_21(path, output))

    def ids(self) -> Path:
        """Of the text that other tools are calibrated with."""
        return self._made("ids.npy", lambda output: np.save(output, calibration_ids(self.model, SAMPLES, LENGTH)))

    def own_text(self) -> Path:
        """Token ids that the model wrote itself, as many as the best quality takes; kept in the cache."""
        path = (self.folder if self.again else cache_folder("front")) / "own-text.npy"
        if not path.exists():
            with open_model(self.model) as opened:
                recipe = Recipe(quality=BEST, sequence_length=LENGTH)
                written = data.load(opened, signature(opened.model.graph), recipe, None, None, Silent())
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.concatenate([feed[TOKENS] for feed in written.all_feeds]))
        return path

    def estimated_once(self, *arguments: Any) -> list[list[float]]:
        """`sizing.estimated_losses`, which no target changes: for the first of them alone."""
        if not self.estimated:
            self.estimated.extend(estimated_losses(*arguments))
        return self.estimated

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path


class ToolError(Exception):
    """Another tool failed, or took too long."""


def our_jobs(bench: Bench, target_bits: Sequence[float]) -> Iterator[Job]:
    for quality, block_size in OUR_LAYERS:
        recipe = Recipe(quality=quality, block_size=block_size, accuracy_level=0)
        yield _ours(bench, LAYERS, f"{quality}, block {block_size}", recipe)
    for bits in target_bits:
        yield _ours(bench, FRONT, f"--target-bits {bits:g}", Recipe(target_bits=bits, accuracy_level=0))


def _ours(bench: Bench, part: str, settings: str, recipe: Recipe) -> Job:
    def run(output: Path) -> None:
        with ExitStack() as stack:
            if recipe.target_bits is not None:
                stack.enter_context(patch.object(sizing, "estimated_losses", bench.estimated_once))
            awq_onnx.quantize(bench.model, output, recipe, calibration=np.load(bench.own_text()))

    return Job(part, OURS, settings, run)


def other_jobs(bench: Bench) -> Iterator[Job]:
    yield from _onnxruntime_layers(bench)
    yield from _modelopt_layers(bench)
    for block in (32, 128):
        yield _other(bench, LAYERS, "NNCF AWQ", f"block {block}", Call("nncf", {"block_size": block, "ratio": 1.0}))
    yield from _onnxruntime_front(bench)
    yield from _genai_front(bench)
    yield from _modelopt_front(bench)
    yield from _nncf_front(bench)


def _onnxruntime_layers(bench: Bench) -> Iterator[Job]:
    for block in (32, 64, 128):
        for method, tool in (("rtn", "ORT RTN"), ("hqq", "ORT HQQ"), ("k_quant", "ORT k_quant")):
            call = Call("onnxruntime", {"method": method, "block_size": block})
            yield _other(bench, LAYERS, tool, f"block {block}", call)

    gptq = Call("onnxruntime", {"method": "gptq", "block_size": 32, "windows": 1})
    yield _other(bench, LAYERS, "ORT GPTQ", "block 32", gptq)


def _modelopt_layers(bench: Bench) -> Iterator[Job]:
    plain: dict[str, Any] = {"method": "awq_lite", "block_size": 32}
    yield _other(bench, LAYERS, "ModelOpt awq_lite", "block 32, symmetric", Call("modelopt", plain))
    zeros = {**plain, "zero_points": True}
    yield _other(bench, LAYERS, "ModelOpt awq_lite", "block 32", Call("modelopt", zeros))
    yield _other(bench, LAYERS, "ModelOpt awq_full", "block 32", Call("modelopt", {**zeros, "method": "awq_full"}))
    clip = {**plain, "method": "awq_clip", "windows": 2}
    yield _other(bench, LAYERS, "ModelOpt awq_clip", "block 32, symmetric", Call("modelopt", clip))


def _onnxruntime_front(bench: Bench) -> Iterator[Job]:
    for block in (16, 32, 64, 128):
        both = {"block_size": block, "gather": block, "whole": True}
        for method, tool in (("rtn", "ORT RTN"), ("k_quant", "ORT k_quant"), ("hqq", "ORT HQQ")):
            yield _other(bench, FRONT, tool, f"{block}", Call("onnxruntime", {"method": method, **both}), True)
    variants = {"last": [LM_HEAD], "mixed": _mixed(bench.model)}
    for block in (32, 128):
        for name, layers in variants.items():
            settings = {"method": "k_quant", "block_size": block, "gather": 32, "whole": True, "eight_bits": layers}
            yield _other(bench, FRONT, "ORT k_quant", f"{name} {block}", Call("onnxruntime", settings), True)


def _mixed(model: Path) -> list[str]:
    """The layers that onnxruntime-genai's builder gives 8 bits as k_quant_mixed, by their names in optimum's export."""
    names = {node.name for node in onnx.load(model, load_external_data=False).graph.node if node.op_type == "MatMul"}
    count = sum(name.endswith("/mlp/down_proj/MatMul") for name in names)
    chosen = [i for i in range(count) if i < count / 8 or i >= 7 * count / 8 or (i - round(count / 8)) % 3 == 2]
    own = [f"/model/layers.{i}/{layer}/MatMul" for i in chosen for layer in ("self_attn/v_proj", "mlp/down_proj")]
    assert names.issuperset(own)
    return [*own, LM_HEAD]


def _genai_front(bench: Bench) -> Iterator[Job]:
    """One table for lm_head and embedding, of 8 bits in the variants."""
    for method, name in (("k_quant", ""), ("k_quant_last", "last "), ("k_quant_mixed", "mixed ")):
        for block in (32, 128) if name else (16, 32, 64):
            call = Call("genai", {"method": method, "block_size": block})
            yield _other(bench, FRONT, "genai k_quant", f"{name}{block}", call)


def _modelopt_front(bench: Bench) -> Iterator[Job]:
    for block in (32, 128):
        both = {"block_size": block, "gather": 32, "whole": True, "zero_points": True, "method": "awq_lite"}
        yield _other(bench, FRONT, "ModelOpt awq_lite", f"{block}", Call("modelopt", both), True)


def _nncf_front(bench: Bench) -> Iterator[Job]:
    """Embedding and lm_head have 8 bits by default. It fails where both read one table."""
    whole: dict[str, Any] = {"block_size": 32, "whole": True}
    for ratio in (1.0, 0.8, 0.5):
        call = Call("nncf", {**whole, "ratio": ratio})
        yield _other(bench, FRONT, "NNCF AWQ", f"32, ratio {ratio:g}", call, True)
    four = Call("nncf", {**whole, "ratio": 1.0, "all_layers": True})
    yield _other(bench, FRONT, "NNCF AWQ", "32, all layers", four, True)
    eight = Call("nncf", {"mode": "INT8_ASYM", "aware": False, "whole": True})
    yield _other(bench, FRONT, "NNCF INT8", "columns", eight, True)


def _other(bench: Bench, part: str, tool: str, settings: str, call: Call, own_head: bool = False) -> Job:
    def run(output: Path) -> None:
        command = call.command(bench.given(call, own_head), bench.ids(), output)
        log = output.with_suffix(".log")
        try:
            with log.open("wb") as printed:
                subprocess.run(command, stdout=printed, stderr=printed, timeout=LIMIT_SECONDS, check=True)
        except subprocess.TimeoutExpired:
            raise ToolError(f"stopped after {LIMIT_SECONDS // 60} minutes") from None
        except subprocess.CalledProcessError as error:
            raise ToolError(f"exit code {error.returncode}: {last_line(log)}") from None

    measuring = [importlib.metadata.version("onnxruntime"), *bench.windows.shape, SAMPLES, LENGTH, own_head, part]
    settings += ", own head" if own_head else ""
    original = "smollm2-genai" if call.tool == "genai" else "smollm2"
    return Job(part, tool, settings, run, f"{call.key()} {measuring}", original)
