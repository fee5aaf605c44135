"""How close to the original at how many bits: awq-onnx beside every other tool that makes 4-bit ONNX models.

    python benchmarks/front.py [--parts layers front] [--tools ours others] [--only PATTERN] [--json FILE]
    python benchmarks/front.py --from-json FILE [FILE ...] [--json FILE] [--plot docs/front.svg]

KL(original || quantised) of SmolLM2, nats per token, over 24 windows of 256 tokens of CPython's documentation, which
calibrated nothing; +- is the standard error over windows. All is measured in float arithmetic (accuracy level 0), so
that methods are compared and not kernels: onnxruntime first makes MatMulNBits of a DequantizeLinear and a MatMul, as it
does when it loads such a model, and then every MatMulNBits gets the attribute.

layers: all but lm_head and embedding, which stay in floats, as in quality.py. Bits are what the file holds for a weight
of these layers, scales and zero points included. This model is fp32 and so are its scales: blocks of 32, 64 and 128
with zero points have 5.125, 4.562 and 4.281 bits. In an fp16 model they have 4.625, 4.312 and 4.156.

front: the whole model. Bits are 8 x bytes of the file / weights of the original, those of lm_head and embedding, which
are the same, counted once; nodes, names and norms count too. In optimum's export lm_head reads the table of the
embedding through a Transpose, which other tools skip. Where it says "own head" they got a copy in which lm_head has a
weight of its own, the same function, so that they quantise it; their file then holds the table twice. Of every point of
another tool it is told whether it lies above our curve: straight lines between our points. What onnxruntime-genai's
builder makes is compared with the fp32 model that it builds, which takes other inputs and is the same function.

awq-onnx is calibrated with text that the model wrote itself, as without any option; that text is written once. Other
tools get the 32 windows of 256 tokens of numpy's documentation that rivals.py gives them, which is closer to what is
measured on. others.py tells how each is called; what was measured is kept in the cache by version and settings
(--again: anew). A tool that takes longer than 15 minutes is stopped. Seconds are of its whole process, on a machine
that need not be idle; for times see rivals.py.

onnxruntime's GPTQ gets one of the windows: it reads the half of a triangular matrix that is zero, so that no error is
made up for, whatever it is calibrated with. Beside its RTN it shows what that comes to.

All of it takes hours of two cores; a second run only what awq-onnx takes. One at a time: two side by side take longer.
The second form puts together what several runs found; of a row that is in several files the last counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
from common import held_out_text, size_bytes, smollm2, trained_model, with_accuracy_level
from front_points import LAYERS, PARTS, Measured, Point, load, plot, save, table, verdicts
from front_runs import LENGTH, TARGET_BITS, Bench, Job, ToolError, other_jobs, our_jobs
from others import cache_folder
from pictures import pyplot

import awq_onnx


def measured(bench: Bench, job: Job) -> Measured:
    """Run and compare, or what was kept of that."""
    kept = cache_folder("front") / f"{hashlib.sha256(job.key.encode()).hexdigest()[:24]}.json"
    if job.key and kept.exists() and not bench.again:
        return Measured(**json.loads(kept.read_text()))
    result = _measured_now(bench, job)
    if job.key:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(result)))
    return result


def _measured_now(bench: Bench, job: Job) -> Measured:
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        output = Path(name) / "quantized.onnx"
        start = time.perf_counter()
        try:
            job.run(output)
            seconds = time.perf_counter() - start
            comparison = awq_onnx.compare(trained_model(job.original), in_floats(output), bench.windows)
        except (ToolError, awq_onnx.errors.AwqOnnxError) as error:
            return Measured(time.perf_counter() - start, trouble=in_short(error))
        bits = layer_bits(output) if job.part == LAYERS else file_bits(bench.model, output)
        return Measured(seconds, comparison.kl_mean, comparison.kl_se, comparison.top1, bits, size_bytes(output))


def in_short(error: Exception) -> str:
    """What it says first, without the folders of this machine."""
    return textwrap.shorten(re.sub(r"(/[\w.-]+)+/", "", str(error).splitlines()[0]), 200)


def in_floats(model: Path) -> Path:
    """A copy beside it that computes every quantised layer in floats."""
    output = model.with_name("in_floats.onnx")
    blocks = {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}
    return with_accuracy_level(fused(model) if "DequantizeLinear" in blocks else model, output, 0)


def fused(model: Path) -> Path:
    """A copy beside it as onnxruntime rewrites it: MatMulNBits for every DequantizeLinear in blocks and its MatMul."""
    import onnxruntime

    output = model.with_name("fused.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the file may suit this machine alone
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(output)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return output


def layer_bits(model: Path) -> float:
    """What the file holds for a weight of a quantised layer: itself, its scale and zero point."""
    graph = onnx.load(model).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    bits, weights = 0, 0
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "DequantizeLinear"):
            continue
        stored = [tensors[name] for name in node.input if name in tensors]
        bits += sum(8 * _bytes(tensor) for tensor in stored)
        sizes = {one.name: one.i for one in node.attribute}
        weights += sizes["K"] * sizes["N"] if node.op_type == "MatMulNBits" else _count(stored[0])
    return bits / weights


def _bytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-_count(tensor) // 2)
    return _count(tensor) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(int(size) for size in tensor.dims)


def file_bits(original: Path, model: Path) -> float:
    """Bits of the file for each weight of the original."""
    tensors = onnx.load(original, load_external_data=False).graph.initializer
    weights = sum(_count(one) for one in tensors if one.data_type == onnx.TensorProto.FLOAT)
    return 8 * size_bytes(model) / weights


def run_all(arguments: argparse.Namespace) -> list[Point]:
    """Prints each row as soon as it is known."""
    model = smollm2()
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="awq-onnx-front-") as name:
        bench = Bench(model, held_out_text(model, arguments.windows, LENGTH), Path(name), arguments.again)
        jobs = [*our_jobs(bench, arguments.target_bits)] if "ours" in arguments.tools else []
        jobs += [*other_jobs(bench)] if "others" in arguments.tools else []
        for part in arguments.parts:
            chosen = (job for job in jobs if job.part == part and fnmatchcase(job.name, arguments.only))
            for line in table(part, _points(bench, chosen, points)):
                print(line, flush=True)
                if arguments.json is not None:
                    save(points, arguments.json)
    return points


def _points(bench: Bench, jobs: Iterator[Job], into: list[Point]) -> Iterator[Point]:
    for job in jobs:
        into.append(Point(job.part, job.tool, job.settings, measured(bench, job)))
        yield into[-1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="KL over bits of awq-onnx and of other tools.")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tools", nargs="+", default=("ours", "others"), choices=("ours", "others"))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows whose 'tool, settings' fit this (*, ?)")
    parser.add_argument("--target-bits", nargs="+", type=float, default=TARGET_BITS, metavar="BITS", help="of ours")
    parser.add_argument("--windows", type=int, default=24, help="to measure with (%(default)s)")
    parser.add_argument("--again", action="store_true", help="use nothing that is kept in the cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, all of them together")
    parser.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="run nothing, take these figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL over bits, .svg or .png")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.plot is not None:
        pyplot()  # before hours are spent
    if arguments.from_json is not None:
        points = load(arguments.from_json)
        for part in PARTS:
            print(*table(part, [one for one in points if one.part == part]), sep="\n")
        if arguments.json is not None:
            save(points, arguments.json)
    else:
        points = run_all(arguments)
    print(*verdicts(points), sep="\n")
    if arguments.plot is not None:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
