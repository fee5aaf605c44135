"""Time and memory of the whole command, against plain forward passes of onnxruntime, on SmolLM2, in one run.

    python benchmarks/cost.py [--quality best]

The forward passes run over as many tokens as the calibration does, in a process of their own before and after the
command; the faster of two batch sizes counts. Generating the text is measured apart: it is a choice, one's own
text needs none. Private memory is what the process allocates, resident memory counts the mapped model file too.

What the search takes beside the forward passes is told in CPU seconds, since both run at the same time: of a run on
given tokens, the threads that search and those that sum up activations are watched; the rest is onnxruntime's. Not
with the best quality, which searches with all threads while nothing else runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import held_out_text, smollm2

from awq_onnx.recipe import BEST, DEFAULT, QUALITIES, SAMPLES

LENGTH = 256


def forward_seconds(model: Path, samples: int) -> float:
    """One plain pass over samples x LENGTH tokens in an ordinary session."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    ids = held_out_text(model, samples, LENGTH)
    past = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past")
    }

    def run(batch: int) -> float:
        caches = {name: np.zeros((batch, *value.shape[1:]), np.float32) for name, value in past.items()}
        positions = np.tile(np.arange(LENGTH), (batch, 1))
        start = time.perf_counter()
        for at in range(0, samples, batch):
            tokens = ids[at : at + batch]
            session.run(
                ["logits"],
                {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions, **caches},
            )
        return time.perf_counter() - start

    return min(run(1), run(4))


def stages_cpu_seconds(model: Path, quality: str) -> dict[str, float]:
    """CPU seconds of a run on as many given tokens: forward passes, sums over activations, search."""
    import awq_onnx
    from awq_onnx import groups, partwise
    from awq_onnx.statistics import Accumulator

    spent = {"forward": 0.0, "sums": 0.0, "search": 0.0}

    def timed(owner: Any, name: str, what: str, clock: Callable[[], float]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def run(*args: Any, **options: Any) -> Any:
            start = clock()
            try:
                return original(*args, **options)
            finally:
                spent[what] += clock() - start

        setattr(owner, name, run)

    timed(groups, "search_group", "search", time.thread_time)
    timed(Accumulator, "update", "sums", time.thread_time)
    timed(partwise.Partwise, "run", "forward", time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        ids = held_out_text(model, SAMPLES[quality], LENGTH)
        awq_onnx.quantize(model, f"{folder}/int4.onnx", awq_onnx.Recipe(quality=quality), calibration=ids)
    spent["forward"] -= spent["sums"] + spent["search"]
    return spent


def in_own_process(quality: str, option: str, model: Path) -> Any:
    command = [sys.executable, __file__, "--quality", quality, option, str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the command in forward passes and model sizes.")
    parser.add_argument("--quality", default=DEFAULT, choices=QUALITIES, help="preset of awq-onnx (%(default)s)")
    parser.add_argument("--forward-only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stages-only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quality = arguments.quality
    samples = SAMPLES[quality]
    if arguments.forward_only:
        print(forward_seconds(arguments.forward_only, samples))
        return
    if arguments.stages_only:
        print(json.dumps(stages_cpu_seconds(arguments.stages_only, quality)))
        return
    model = smollm2()
    before = in_own_process(quality, "--forward-only", model)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "awq_onnx", str(model), "-o", f"{folder}/int4.onnx"]
        command += ["--quality", quality, "--json", "--quiet"]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    after = in_own_process(quality, "--forward-only", model)
    report = json.loads(done.stdout)
    forward = statistics.mean([before, after])
    generating = report["seconds"]["calibration data"]
    size = report["size_before_bytes"]
    print(f"forward pass over {samples} x {LENGTH} tokens: {forward:.1f} s ({before:.1f} before, {after:.1f} after)")
    print(
        f"whole command: {seconds:.1f} s, of which " + ", ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items())
    )
    print(f"(command - generating) / forward: {(seconds - generating) / forward:.2f}")
    if quality != BEST:
        stages = in_own_process(quality, "--stages-only", model)
        print("on given tokens, CPU seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in stages.items()))
        print(f"search / forward passes: {stages['search'] / stages['forward']:.2f}")
    print(f"peak private memory / model file: {report['peak_memory_bytes'] / size:.2f}")
    print(f"peak resident memory / model file: {report['resident_memory_bytes'] / size:.2f}")


if __name__ == "__main__":
    main()
