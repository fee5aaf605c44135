"""Tokens per second when decoding: fp32, onnxruntime's RTN and awq-onnx at the same settings, in turns.

    python benchmarks/decode.py [--rounds 7] [--accuracy-level 4] [--quality best]

Each round decodes the same tokens greedily with every model through its key/value cache; the ratios are taken round
by round, since machines are noisy. All presets but the best give all layers the same format, and the same speed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import held_out_text, ort_rtn, script, smollm2

import awq_onnx
from awq_onnx.recipe import BEST, DEFAULT, QUALITIES

PROMPT, TOKENS, BLOCK_SIZE = 16, 64, 32


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description="Decoding speed of fp32, RTN and awq-onnx models.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accuracy-level", type=int, default=4, choices=(0, 4))
    parser.add_argument("--quality", default=DEFAULT, choices=QUALITIES, help="preset of awq-onnx (%(default)s)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    model, greedy = smollm2(), script("examples/side_by_side.py").greedy
    prompt = held_out_text(model, 1, PROMPT)[0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.onnx", Path(folder) / "rtn.onnx"
        level, quality = arguments.accuracy_level, arguments.quality
        recipe = awq_onnx.Recipe(block_size=BLOCK_SIZE, accuracy_level=level, quality=quality)
        if quality != BEST:  # which looks for formats: little calibration would find others
            recipe = replace(recipe, samples=4, sequence_length=32)
        report = awq_onnx.quantize(model, ours, recipe)
        ort_rtn(model, theirs, BLOCK_SIZE, level, [one.what for one in report.kept])
        sessions = {
            name: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for name, path in (("fp32", model), ("ORT RTN", theirs), ("awq-onnx", ours))
        }
        speeds: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(rounds + 1):  # the first warms up
            for name, session in sessions.items():
                start = time.perf_counter()
                list(greedy(session, prompt, TOKENS))
                if number:
                    speeds[name].append(TOKENS / (time.perf_counter() - start))
    for name, values in speeds.items():
        print(f"{name:9} {statistics.median(values):6.1f} tokens/s (median of {rounds})")
    for other in ("ORT RTN", "fp32"):
        ratios = [a / b for a, b in zip(speeds["awq-onnx"], speeds[other], strict=True)]
        print(f"awq-onnx / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
