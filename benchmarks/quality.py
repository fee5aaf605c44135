"""Quality at equal size: awq-onnx against onnxruntime's round-to-nearest (RTN), on trained models, in one run.

    python benchmarks/quality.py [--model smollm2 gpt2 bert ...] [--quality fast default best] [--block-sizes 32 128]

The loss of a language model is KL(original || int4) in nats, mean over tokens; of an encoder 1 - cosine, mean over what
its outputs hold for every token (and for a whole text, where it has such an output). Both tools quantise exactly the
same layers; RTN gets each Gemm as MatMul and Add, since it knows no Gemm. Measured is on text that calibrated nothing:
CPython's documentation, and for the GPT-2 of microbes samples drawn from the model.

awq-onnx is run as a user without data runs it. Encoders, which write no text of their own, are also done with
--allow-mul, and with --calibration text (numpy's documentation). +- is the standard error over windows, of the ratio
too (windows resampled in pairs). Accuracy level 0 compares the methods, 4 is what the CPU kernel makes of them.
SmolLM2 takes about a quarter of an hour on two cores, the small models a few minutes each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RECIPES,
    count_quantized,
    held_out_text,
    ort_rtn,
    other_text,
    size_bytes,
    trained_model,
    with_accuracy_level,
)
from numpy.typing import NDArray

import awq_onnx
from awq_onnx import Comparison, Report
from awq_onnx.recipe import DEFAULT, QUALITIES

LENGTH = 256
ENCODERS = ("bert", "paraphrase")
HEADER = """\
| model | loss, mean +-SE | median | / RTN | perplexity | top-1 | size | seconds |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Measured:
    """losses: of each window, KL or 1 - cosine."""

    losses: NDArray[np.float64]
    comparison: Comparison
    size: int


def held_out(name: str, model: Path, windows: int) -> NDArray[np.int64]:
    """Token ids (windows, length); of the GPT-2's samples every other one, so twice to three times as many."""
    if name != "gpt2":
        return held_out_text(model, windows, LENGTH)
    samples: NDArray[np.int64] = np.load(model.with_name("samples.npz"))["input_ids"]
    return samples[::2]


def variants(name: str, qualities: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What awq-onnx is run with, besides the block size: settings, or `calibration`."""
    presets = {f"awq-onnx {one}": {"quality": one} for one in qualities}
    if name not in ENCODERS:
        return presets
    return {
        **presets,
        "awq-onnx --allow-mul": {"allow_mul": True},
        "awq-onnx, text": {"calibration": [other_text()]},
    }


def quantize(model: Path, output: Path, block_size: int, settings: dict[str, Any]) -> Report:
    fields = {name: value for name, value in settings.items() if name != "calibration"}
    recipe = awq_onnx.Recipe(block_size=block_size, **fields)
    return awq_onnx.quantize(model, output, recipe, calibration=settings.get("calibration"), overwrite=True)


def measure(model: Path, quantized: Path, ids: NDArray[np.int64]) -> Measured:
    whole = awq_onnx.compare(model, quantized, ids)
    losses = whole.kl_windows or [awq_onnx.compare(model, quantized, one[None]).cosine_distance for one in ids]
    return Measured(np.array(losses, np.float64), whole, size_bytes(quantized))


def ratio_with_error(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float]:
    """Ratio of the mean losses of windows and its standard error, by the bootstrap over windows."""
    picks = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    return float(ours.mean() / theirs.mean()), float((ours[picks].mean(axis=1) / theirs[picks].mean(axis=1)).std())


def row(name: str, one: Measured, ratio: str, seconds: str) -> str:
    digits = 4 if one.comparison.kl_mean is not None else 6
    mean, error, median = (
        f"{value:.{digits}f}"
        for value in (one.losses.mean(), one.losses.std(ddof=1) / len(one.losses) ** 0.5, np.median(one.losses))
    )
    perplexity, top1 = one.comparison.perplexity_quantized, one.comparison.top1
    return (
        f"| {name} | {mean} +-{error} | {median} | {ratio} | {'-' if perplexity is None else f'{perplexity:.2f}'} "
        f"| {'-' if top1 is None else f'{top1:.1%}'} | {one.size / 1e6:.1f} MB | {seconds} |"
    )


def rows(name: str, windows: int, block_sizes: Sequence[int], qualities: Sequence[str]) -> Iterator[str]:
    """Of one model: RTN and each variant of awq-onnx, at every block size and accuracy level."""
    model = trained_model(name)
    ids = held_out(name, model, windows)
    perplexity = None
    for block_size in block_sizes:
        theirs: dict[int, Measured] = {}
        for variant, settings in variants(name, qualities).items():
            with tempfile.TemporaryDirectory() as folder:
                output, rtn = Path(folder) / "ours.onnx", Path(folder) / "rtn.onnx"
                start = time.perf_counter()
                report = quantize(model, output, block_size, settings)
                seconds = time.perf_counter() - start
                for level in (0, 4):
                    of = f"{name}: {{}}, block {block_size}, level {level}"
                    if level not in theirs:
                        ort_rtn(model, rtn, block_size, level, [one.what for one in report.kept])
                        assert count_quantized(rtn) == len(report.matmuls), "the two tools chose different layers"
                        theirs[level] = measure(model, rtn, ids)
                        yield row(of.format("ORT RTN"), theirs[level], "-", "-")
                    with_accuracy_level(output, output, level)
                    ours = measure(model, output, ids)
                    ratio, error = ratio_with_error(ours.losses, theirs[level].losses)
                    yield row(of.format(variant), ours, f"{ratio:.3f} +-{error:.3f}", f"{seconds:.0f}")
                    perplexity = ours.comparison.perplexity_original
    if perplexity is not None:
        yield f"| {name}: the original | 0 | 0 | - | {perplexity:.2f} | 100% | {size_bytes(model) / 1e6:.1f} MB | - |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of awq-onnx and onnxruntime's RTN.")
    parser.add_argument("--model", nargs="+", default=["smollm2"], choices=[*RECIPES, "all"], help="which (smollm2)")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--quality", nargs="+", default=[DEFAULT], choices=QUALITIES, help="presets of awq-onnx")
    arguments = parser.parse_args()
    print(f"{arguments.windows} windows x {LENGTH} tokens, awq-onnx {awq_onnx.__version__}\n")
    print(HEADER)
    for name in RECIPES if "all" in arguments.model else arguments.model:
        for line in rows(name, arguments.windows, arguments.block_sizes, arguments.quality):
            print(line, flush=True)


if __name__ == "__main__":
    main()
