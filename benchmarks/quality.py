"""Quality at equal size: awq-onnx against onnxruntime's round-to-nearest (RTN), on SmolLM2, in one run.

    python benchmarks/quality.py [--windows 24] [--block-sizes 32 128]

KL(fp32 || int4) in nats, mean over the tokens of English text that calibrated nothing (CPython's documentation);
+- is the standard error over windows, of the ratio too (windows resampled in pairs). awq-onnx is run as a user
without data runs it. Accuracy level 0 compares the methods, 4 is what the CPU kernel makes of them at speed.
Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import held_out_text, ort_rtn, size_bytes, smollm2, with_accuracy_level

import awq_onnx
from awq_onnx import Comparison

LENGTH = 256


def ratio_with_error(ours: Comparison, theirs: Comparison) -> tuple[float, float]:
    """Ratio of the mean KLs and its standard error, by the bootstrap over windows."""
    a, b = np.array(ours.kl_windows), np.array(theirs.kl_windows)
    picks = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    return float(a.mean() / b.mean()), float((a[picks].mean(axis=1) / b[picks].mean(axis=1)).std())


def row(name: str, one: Comparison, size: int, ratio: str) -> str:
    return (
        f"| {name} | {one.kl_mean:.4f} +-{one.kl_se or 0:.4f} | {one.kl_median:.4f} | {ratio} "
        f"| {one.perplexity_quantized:.2f} | {one.top1:.1%} | {size / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="KL, perplexity and top-1 of awq-onnx and onnxruntime's RTN.")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[32, 128])
    arguments = parser.parse_args()
    model = smollm2()
    ids = held_out_text(model, arguments.windows, LENGTH)
    print(f"{arguments.windows} windows x {LENGTH} tokens, awq-onnx {awq_onnx.__version__}\n")
    print("| model | KL, mean +-SE | median | / RTN | perplexity | top-1 | size |\n|---|---|---|---|---|---|---|")
    perplexity = None
    with tempfile.TemporaryDirectory() as folder:
        for block_size in arguments.block_sizes:
            ours = Path(folder) / "ours.onnx"
            awq_onnx.quantize(model, ours, awq_onnx.Recipe(block_size=block_size), overwrite=True)
            for level in (0, 4):
                theirs = ort_rtn(model, Path(folder) / "rtn.onnx", block_size, level)
                rtn = awq_onnx.compare(model, theirs, ids)
                with_accuracy_level(ours, ours, level)
                awq = awq_onnx.compare(model, ours, ids)
                settings = f"block {block_size}, level {level}"
                print(row(f"ORT RTN, {settings}", rtn, size_bytes(theirs), "-"))
                ratio, error = ratio_with_error(awq, rtn)
                print(row(f"awq-onnx, {settings}", awq, size_bytes(ours), f"{ratio:.3f} +-{error:.3f}"), flush=True)
                perplexity = awq.perplexity_original
    print(f"\nperplexity of the fp32 model: {perplexity:.2f}")


if __name__ == "__main__":
    main()
