"""awq-onnx beside the fastest other AWQ for ONNX that finishes: NVIDIA ModelOpt's awq_lite, on SmolLM2, in one run.

    python benchmarks/rivals.py [--samples 32] [--length 256] [--skip-rival]

Both calibrate on the same windows of tokens, quantise the same layers in blocks of 32 and leave the lm_head; what they
make is compared with the fp32 model on other text. Each tool is a process of its own, in turns: ours, theirs, ours.
Seconds are of the whole process, imports included; CPU seconds are of all cores together. Both want an idle machine,
and our two runs far apart tell that it was none. Memory is sampled from outside, summed over the process and all that
it starts: private memory is what they allocate, resident memory counts mapped files too. awq-onnx keeps two of the 32
windows apart to measure its result with, which is part of its time; ModelOpt measures nothing.

ModelOpt is called as its guide does, `modelopt.onnx.quantization.int4.quantize`, with what makes it fastest:

* `enable_fast_path_using_high_sysram`: the model runs once over each window and the inputs of all MatMuls are kept in
  memory. Without it the model runs over all windows again for every MatMul, 210 times here;
  `awqlite_run_per_subgraph` does so for every group, 120 times, and cannot be put together with the fast path.
* `awqlite_fuse_nodes=False`: the default ends in an AttributeError (`numpy.ndarray` has no `get`) where there is no
  cupy, that is, on a machine without CUDA. So each layer gets a Mul.
* No zero points and 11 values of alpha, its defaults. Fewer cannot be asked for: `awqlite_alpha_step` changes nothing
  where MatMuls are searched one by one.

Two things are done for it before its clock starts: the model is lifted to opset 21, which INT4 needs (its general
`modelopt.onnx.quantization.quantize` does that too, and takes longer), and its C++ packing is compiled. It lives in a
virtual environment of its own, made in the cache by the first run (1.4 GB, some minutes). One run takes five to ten
minutes on two idle cores, and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from common import held_out_text, other_text, size_bytes, smollm2
from numpy.typing import NDArray
from watching import Cost, watched

OURS, THEIRS = "awq-onnx", "ModelOpt awq_lite"
BLOCK_SIZE = 32
WINDOWS, WINDOW_LENGTH = 8, 256  # to measure the results with
# What ModelOpt's extra "onnx" asks for, without cupy, and onnxruntime in the place of onnxruntime-gpu.
PACKAGES = (
    "nvidia-modelopt==0.47.0",
    "torch==2.13.0",
    "numpy==2.4.6",
    "scipy==1.17.1",
    "onnx==1.21.0",
    "onnxruntime==1.24.2",
    "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0",
    "onnxscript==0.7.2",
    "onnxslim==0.1.98",
    "ml_dtypes==0.6.0",
    "lief==1.0.0",
    "cppimport==26.4.17",
)


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


def calibration_ids(model: Path, samples: int, length: int) -> NDArray[np.int64]:
    """Token ids (samples, length) of numpy's documentation, evenly spread over it."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model.with_name("tokenizer.json"))).encode(other_text(), add_special_tokens=False).ids
    if samples * length > len(ids):
        sys.exit(f"the text has {len(ids)} tokens, {samples} windows of {length} overlap: take fewer or shorter ones")
    starts = np.linspace(0, len(ids) - length, samples).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int64)


def at_opset_21(model: Path, output: Path) -> Path:
    """A copy that may hold INT4. Between 18 and 21 no operator of the model changed, types were added."""
    copy = onnx.load(model)
    versions = {one.domain: one for one in copy.opset_import}
    assert versions[""].version >= 18, "an older model needs onnx.version_converter"
    versions[""].version = max(21, versions[""].version)
    onnx.save(copy, output)
    return output


def rival_python() -> Path:
    """The interpreter of ModelOpt's virtual environment, made if it is not there as `PACKAGES` wants it."""
    root = os.environ.get("AWQ_ONNX_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "awq-onnx") / "rivals" / "modelopt"
    python, complete, wanted = folder / "bin" / "python", folder / "packages.txt", "\n".join(PACKAGES)
    if not complete.exists() or complete.read_text() != wanted:
        print(f"Making {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
        subprocess.run(install, check=True)
        # The first import compiles the C++ part.
        subprocess.run([str(python), "-c", "import modelopt.onnx.quantization.extensions"], check=True)
        complete.write_text(wanted)
    return python


def run_modelopt(model: Path, ids: NDArray[np.int64], output: Path) -> None:
    """What the rival's own interpreter runs."""
    from modelopt.onnx.quantization.int4 import quantize  # type: ignore[import-not-found]

    original = onnx.load(model)
    quantized = quantize(
        original,
        calibration_method="awq_lite",
        calibration_data_reader=modelopt_inputs(original.graph, ids),
        calibration_eps=["cpu"],
        block_size=BLOCK_SIZE,
        nodes_to_exclude=["/lm_head"],
        enable_fast_path_using_high_sysram=True,
        awqlite_fuse_nodes=False,
    )
    onnx.save(quantized, output)


def modelopt_inputs(graph: onnx.GraphProto, ids: NDArray[np.int64]) -> list[dict[str, NDArray[np.generic]]]:
    """One dict of all inputs for each of the sequences (B, T), the key/value cache empty."""
    caches = {
        one.name: np.zeros((1, heads.dim_value, 0, size.dim_value), np.float32)
        for one in graph.input
        if one.name.startswith("past")
        for _, heads, _, size in [one.type.tensor_type.shape.dim]
    }
    mask, positions = np.ones((1, ids.shape[1]), np.int64), np.arange(ids.shape[1])[None]
    return [{"input_ids": one[None], "attention_mask": mask, "position_ids": positions, **caches} for one in ids]


def run_tool(tool: str, command: Sequence[str], model: Path, output: Path) -> Result:
    log = output.with_suffix(".log")
    with log.open("wb") as printed:
        cost, code = watched(command, printed, printed)
    if code != 0:
        return Result(tool, cost, None, f"exit code {code}: {last_line(log)}")
    return Result(tool, cost, looked_at(model, output))


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")


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
    python = None if skip_rival else rival_python()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids, lifted = folder / "ids.npy", folder / "opset21.onnx"
        np.save(ids, calibration_ids(model, samples, length))
        turns = [(OURS, our_command(model, ids, folder / "ours.onnx"), folder / "ours.onnx")]
        if python is not None:
            at_opset_21(model, lifted)
            output = folder / "theirs.onnx"
            inside = [str(python), __file__, "--inside", str(lifted), str(ids), str(output)]
            again = folder / "again.onnx"
            turns += [(THEIRS, inside, output), (OURS, our_command(model, ids, again), again)]
        for tool, command, output in turns:
            results.append(run_tool(tool, command, model, output))
            print(row(results[-1]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Time, memory and result of awq-onnx and of ModelOpt's awq_lite.")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on (32)")
    parser.add_argument("--length", type=int, default=256, help="tokens in each (256)")
    parser.add_argument("--skip-rival", action="store_true", help="awq-onnx alone, once")
    parser.add_argument("--inside", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        lifted, ids, output = arguments.inside
        run_modelopt(lifted, np.load(ids), output)
        return 0
    print(f"{arguments.samples} x {arguments.length} tokens, blocks of {BLOCK_SIZE}; {PACKAGES[0]}\n")
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
