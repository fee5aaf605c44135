"""awq-onnx beside the fastest other AWQ for ONNX that finishes: NVIDIA ModelOpt's awq_lite, on SmolLM2, in one run.

    python benchmarks/rivals.py [--samples 32] [--length 256] [--skip-rival]

Both calibrate on the same windows of tokens, quantise the same layers in blocks of 32 and leave the lm_head; what they
make is compared with the fp32 model on other text. Each tool is a process of its own, in turns: ours, theirs, ours.
Seconds are of the whole process, imports included; CPU seconds are of all cores together. Both want an idle machine,
and our two runs far apart tell that it was none. Memory is sampled from outside, summed over the process and all that
it starts: private memory is what they allocate, resident memory counts mapped files too. awq-onnx keeps two of the 32
windows apart to measure its result with, which is part of its time; ModelOpt measures nothing.

ModelOpt is called as its guide does, `modelopt.onnx.quantization.int4.quantize`, with what makes it fastest: others.py
tells what that is, and why. No zero points and 11 values of alpha, its defaults; fewer cannot be asked for:
`awqlite_alpha_step` changes nothing where MatMuls are searched one by one.

Two things are done for it before its clock starts: the model is lifted to opset 21, which INT4 needs (its general
`modelopt.onnx.quantization.quantize` does that too, and takes longer), and its C++ packing is compiled. It lives in a
virtual environment of its own, made in the cache by the first run (1.4 GB, some minutes). One run takes five to ten
minutes on two idle cores, and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from common import held_out_text, size_bytes, smollm2
from others import Call, at_opset_21, calibration_ids, last_line
from watching import Cost, watched

OURS, THEIRS = "awq-onnx", "ModelOpt awq_lite"
BLOCK_SIZE = 32
WINDOWS, WINDOW_LENGTH = 8, 256  # to measure the results with
RIVAL = Call("modelopt", {"method": "awq_lite", "block_size": BLOCK_SIZE})


@dataclass(frozen=True)
class Output:
    """kl: mean in nats per token, and its standard error; None where `trouble` tells why onnxruntime did not run it."""

    layers: int
    muls_added: int
    size: int
    kl: tuple[float, float] | None
    trouble: str


@dataclass(frozen=True)
class Result:
    """output: None where the tool failed, as `trouble` tells."""

    tool: str
    cost: Cost
    output: Output | None
    trouble: str = ""


def run_tool(tool: str, command: Sequence[str], model: Path, output: Path) -> Result:
    log = output.with_suffix(".log")
    with log.open("wb") as printed:
        cost, code = watched(command, printed, printed)
    if code != 0:
        return Result(tool, cost, None, f"exit code {code}: {last_line(log)}")
    return Result(tool, cost, looked_at(model, output))


def looked_at(model: Path, output: Path) -> Output:
    import awq_onnx

    before, after = counts(model), counts(output)
    kl, trouble = None, ""
    try:
        comparison = awq_onnx.compare(model, output, held_out_text(model, WINDOWS, WINDOW_LENGTH))
        if comparison.kl_mean is not None and comparison.kl_se is not None:
            kl = comparison.kl_mean, comparison.kl_se
    except awq_onnx.errors.AwqOnnxError as error:
        trouble = str(error).splitlines()[0]
    layers = after.get("MatMulNBits", 0) + after.get("DequantizeLinear", 0)
    return Output(layers, after["Mul"] - before["Mul"], size_bytes(output), kl, trouble)


def counts(model: Path) -> Mapping[str, int]:
    """How many nodes there are of every operator."""
    nodes = [node.op_type for node in onnx.load(model, load_external_data=False).graph.node]
    return {name: nodes.count(name) for name in sorted(set(nodes))}


def our_command(model: Path, ids: Path, output: Path) -> list[str]:
    options = ["--calibration", str(ids), "-o", str(output), "--quiet", "--json", "--block-size", str(BLOCK_SIZE)]
    return [sys.executable, "-m", "awq_onnx", str(model), *options]


def row(one: Result) -> str:
    used = one.cost
    memory = f"{used.private_bytes / 1e6:.0f} | {used.resident_bytes / 1e6:.0f}"
    cost = f"{used.seconds:.1f} | {used.cpu_seconds:.1f} | {memory}"
    if one.output is None:
        return f"| {one.tool} | {cost} | {one.trouble} | - | - | - |"
    kl = one.output.trouble or "no logits"
    if one.output.kl is not None:
        kl = "{:.4f} +-{:.4f}".format(*one.output.kl)
    made = one.output
    return f"| {one.tool} | {cost} | {made.layers} | {made.muls_added} | {made.size / 1e6:.0f} MB | {kl} |"


def ratios(ours: Sequence[Result], theirs: Result) -> Iterator[str]:
    """Theirs / ours: by the mean of our runs, and by each; all of them have an output."""

    def ratio(what: str, of: Callable[[Result], float]) -> str:
        each = [of(theirs) / of(one) for one in ours]
        mean = of(theirs) / statistics.mean(of(one) for one in ours)
        return f"{what}: {mean:.2f} ({min(each):.2f} to {max(each):.2f})"

    yield ratio("seconds", lambda one: one.cost.seconds)
    yield ratio("CPU seconds", lambda one: one.cost.cpu_seconds)
    yield ratio("peak private memory", lambda one: one.cost.private_bytes)
    yield ratio("peak resident memory", lambda one: one.cost.resident_bytes)
    yield ratio("size", lambda one: one.output.size if one.output else 0)
    if all(one.output and one.output.kl for one in (*ours, theirs)):
        yield ratio("KL", lambda one: one.output.kl[0] if one.output and one.output.kl else 0)


def compare_tools(samples: int, length: int, skip_rival: bool) -> list[Result]:
    """Prints each row of the table as soon as it is known."""
    model = smollm2()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids, lifted = folder / "ids.npy", folder / "opset21.onnx"
        np.save(ids, calibration_ids(model, samples, length))
        turns = [(OURS, our_command(model, ids, folder / "ours.onnx"), folder / "ours.onnx")]
        if not skip_rival:
            at_opset_21(model, lifted)
            output, again = folder / "theirs.onnx", folder / "again.onnx"
            turns += [(THEIRS, RIVAL.command(lifted, ids, output), output)]
            turns += [(OURS, our_command(model, ids, again), again)]
        for tool, command, output in turns:
            results.append(run_tool(tool, command, model, output))
            print(row(results[-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Time, memory and result of awq-onnx and of ModelOpt's awq_lite.")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on (32)")
    parser.add_argument("--length", type=int, default=256, help="tokens in each (256)")
    parser.add_argument("--skip-rival", action="store_true", help="awq-onnx alone, once")
    arguments = parser.parse_args()
    print(f"{arguments.samples} x {arguments.length} tokens, blocks of {BLOCK_SIZE}; {RIVAL.version}\n")
    print("| tool | seconds | CPU s | private MB | resident MB | layers | Muls added | size | KL, mean +-SE |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    results = compare_tools(arguments.samples, arguments.length, arguments.skip_rival)
    ours, theirs = ([one for one in results if one.tool == tool] for tool in (OURS, THEIRS))
    if not all(one.output for one in results):
        return 1
    if theirs:
        print(f"\n{THEIRS} / {OURS}, by the mean of two runs (by each):", *ratios(ours, theirs[0]), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
