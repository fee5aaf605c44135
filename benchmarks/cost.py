"""Time and memory of the whole command, against plain forward passes of onnxruntime, on SmolLM2, in one run.

    python benchmarks/cost.py

The forward passes run over as many tokens as the calibration does, in a process of their own before and after the
command; the faster of two batch sizes counts. Generating the text is measured apart: it is a choice, one's own
text needs none. Private memory is what the process allocates, resident memory counts the mapped model file too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import held_out_text, smollm2

SAMPLES, LENGTH = 32, 256


def forward_seconds(model: Path) -> float:
    """One plain pass over SAMPLES x LENGTH tokens in an ordinary session."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    ids = held_out_text(model, SAMPLES, LENGTH)
    past = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past")
    }

    def run(batch: int) -> float:
        caches = {name: np.zeros((batch, *value.shape[1:]), np.float32) for name, value in past.items()}
        positions = np.tile(np.arange(LENGTH), (batch, 1))
        start = time.perf_counter()
        for at in range(0, SAMPLES, batch):
            tokens = ids[at : at + batch]
            session.run(
                ["logits"],
                {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions, **caches},
            )
        return time.perf_counter() - start

    return min(run(1), run(4))


def in_own_process(model: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--forward-only", str(model)], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the command in forward passes and model sizes.")
    parser.add_argument("--forward-only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.forward_only:
        print(forward_seconds(arguments.forward_only))
        return
    model = smollm2()
    before = in_own_process(model)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "awq_onnx", str(model), "-o", f"{folder}/int4.onnx", "--json", "--quiet"]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    after = in_own_process(model)
    report = json.loads(done.stdout)
    forward = statistics.mean([before, after])
    generating = report["seconds"]["calibration data"]
    size = report["size_before_bytes"]
    print(f"forward pass over {SAMPLES} x {LENGTH} tokens: {forward:.1f} s ({before:.1f} before, {after:.1f} after)")
    print(
        f"whole command: {seconds:.1f} s, of which " + ", ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items())
    )
    print(f"(command - generating) / forward: {(seconds - generating) / forward:.2f}")
    print(f"peak private memory / model file: {report['peak_memory_bytes'] / size:.2f}")
    print(f"peak resident memory / model file: {report['resident_memory_bytes'] / size:.2f}")


if __name__ == "__main__":
    main()
