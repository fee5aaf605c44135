"""What decoding costs in a browser without a GPU: both formats of `--target web` and fp32 on WebAssembly, in turns.

    npm install --ignore-scripts --prefix examples/browser
    python benchmarks/wasm.py [--rounds 3] [--tokens 24]

node runs onnxruntime-web's WebAssembly on one thread, each model of each round in a process of its own. CPU time is
measured, of which other work on the machine takes little; the ratios to fp32 are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import ROOT, held_out_text, size_bytes, trained_model

import awq_onnx
from awq_onnx import Recipe

PROMPT = 16  # tokens
FP32 = "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time and memory of decoding on WebAssembly.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--modules", type=Path, default=ROOT / "examples" / "browser" / "node_modules")
    arguments = parser.parse_args()
    source = trained_model("smollm2")
    prompt = json.dumps(held_out_text(source, 1, PROMPT)[0].tolist())
    with tempfile.TemporaryDirectory() as folder:
        models = {FP32: source, **quantised(source, Path(folder))}
        sizes = {name: size_bytes(path) for name, path in models.items()}
        rounds = [measured(models, prompt, arguments) for _ in range(arguments.rounds)]
    print("| model | ms of CPU time a token | / fp32 | memory | file |\n|---|---|---|---|---|")
    for name in models:
        print(line(name, rounds, sizes[name]))


def quantised(source: Path, folder: Path) -> dict[str, Path]:
    """By format. Little calibration: what the codes are does not change the speed."""
    made = {}
    for name in ("matmulnbits", "qdq"):
        recipe = Recipe(target="web", format=name, quality="fast", samples=4, sequence_length=32)
        made[name] = Path(awq_onnx.quantize(source, folder / f"{name}.onnx", recipe).output)
    return made


def measured(models: Mapping[str, Path], prompt: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """milliseconds of a token and bytes of memory, by model: one round."""
    told = {}
    for name, path in models.items():
        script = Path(__file__).with_suffix(".mjs")
        command = ["node", str(script), str(arguments.modules), str(path), prompt, str(arguments.tokens)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told[name] = json.loads(ended.stdout)
    return told


def line(name: str, rounds: list[dict[str, dict[str, float]]], size: int) -> str:
    spent = [one[name]["milliseconds"] for one in rounds]
    ratios = [one[name]["milliseconds"] / one[FP32]["milliseconds"] for one in rounds]
    ratio = "-" if name == FP32 else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    memory = max(one[name]["memory"] for one in rounds)
    return f"| {name} | {statistics.median(spent):.0f} | {ratio} | {memory / 1e9:.1f} GB | {size / 1e6:.0f} MB |"


if __name__ == "__main__":
    main()
