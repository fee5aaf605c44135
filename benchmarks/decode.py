"""Tokens per second when decoding: fp32, onnxruntime's RTN and awq-onnx at the same settings, in turns.

    python benchmarks/decode.py [--model smollm2-genai] [--lm-head 8] [--rounds 7] [--accuracy-level 4] [--quality best]

Each round decodes the same tokens greedily with every model through its key/value cache; the ratios are taken round
by round, since machines are noisy. All presets but the best give all layers the same format, and the same speed.
RTN quantises an lm_head to 4 bits where its weight is a constant of its own, as in genai's export, and never to 8.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RECIPES, held_out_text, ort_rtn, script, trained_model

import awq_onnx
from awq_onnx.recipe import BEST, DEFAULT, LM_HEADS, QUALITIES

PROMPT, TOKENS, BLOCK_SIZE = 16, 64, 32
DECODERS = [name for name in RECIPES if name.startswith("smollm2")]
OURS, RTN, FP32 = "awq-onnx", "ORT RTN", "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed of fp32, RTN and awq-onnx models.")
    parser.add_argument("--model", default="smollm2", choices=DECODERS, help="export (%(default)s)")
    parser.add_argument("--lm-head", default="none", choices=LM_HEADS, help="its bits (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accuracy-level", type=int, default=4, choices=(0, 4))
    parser.add_argument("--quality", default=DEFAULT, choices=QUALITIES, help="preset of awq-onnx (%(default)s)")
    arguments = parser.parse_args()
    model = trained_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        speeds = measured(
            models(model, arguments, Path(folder)), held_out_text(model, 1, PROMPT)[0].tolist(), arguments
        )
    for name, values in speeds.items():
        print(f"{name:9} {statistics.median(values):6.1f} tokens/s (median of {arguments.rounds})")
    for other in (RTN, FP32):
        if other in speeds:
            ratios = [a / b for a, b in zip(speeds[OURS], speeds[other], strict=True)]
            print(f"{OURS} / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def models(model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """What is compared, made if need be."""
    ours, theirs, level = folder / "ours.onnx", folder / "rtn.onnx", arguments.accuracy_level
    recipe = awq_onnx.Recipe(
        block_size=BLOCK_SIZE, accuracy_level=level, quality=arguments.quality, lm_head=arguments.lm_head
    )
    if arguments.quality != BEST:  # which looks for formats: little calibration would find others
        recipe = replace(recipe, samples=4, sequence_length=32)
    report = awq_onnx.quantize(model, ours, recipe)
    if arguments.lm_head == "8":
        return {FP32: model, OURS: ours}
    return {FP32: model, RTN: ort_rtn(model, theirs, BLOCK_SIZE, level, [one.what for one in report.kept]), OURS: ours}


def measured(paths: Mapping[str, Path], prompt: list[int], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each model, round by round."""
    import onnxruntime

    greedy: Any = script("examples/side_by_side.py").greedy
    sessions = {
        name: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, session in sessions.items():
            start = time.perf_counter()
            list(greedy(session, prompt, TOKENS))
            if number:
                speeds[name].append(TOKENS / (time.perf_counter() - start))
    return speeds


if __name__ == "__main__":
    main()
