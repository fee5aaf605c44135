"""How close to the original at how many bits: awq-onnx beside every other tool that makes 4-bit ONNX models.

    python benchmarks/front.py [--parts layers front] [--tools ours others] [--only PATTERN] [--json FILE]
    python benchmarks/front.py --from-json FILE [FILE ...] [--plot docs/front.svg]

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
another tool it is told whether it lies above our curve: straight lines between our points, in log KL. What
onnxruntime-genai's builder makes is compared with the fp32 model that it builds, which takes other inputs and is the
same function.

awq-onnx is calibrated with text that the model wrote itself, as without any option; that text is written once. Other
tools get the 32 windows of 256 tokens of numpy's documentation that rivals.py gives them, which is closer to what is
measured on. others.py tells how each is called; what was measured is kept in the cache by version and settings
(--again: anew). A tool that takes longer than 15 minutes is stopped. Seconds are of its whole process, on a machine
that need not be idle; for times see rivals.py.

onnxruntime's GPTQ counts as its RTN: it reads the half of a triangular matrix that is zero, so no error is made up for.
With onnxruntime 1.32 the seven layers of one block had the same bytes whatever they were calibrated with; the whole
model, on one window of 256 tokens, differed from RTNWeightOnlyQuantConfig's in 0.016% of the bytes of the packed
weights, and KL was 0.2626 of both, over 8 windows.

All of it takes hours of two cores; a second run only what awq-onnx takes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import held_out_text, size_bytes, smollm2, trained_model, with_accuracy_level
from numpy.typing import NDArray
from others import (
    INT4_TOOLS,
    LM_HEAD,
    Call,
    at_opset_21,
    cache_folder,
    calibration_ids,
    last_line,
    with_own_head,
)
from pictures import pyplot, save_picture

import awq_onnx
from awq_onnx.calibrate import data
from awq_onnx.calibrate.feeds import TOKENS, signature
from awq_onnx.progress import Silent
from awq_onnx.recipe import BEST, DEFAULT, Recipe
from awq_onnx.store import open_model

OURS = "awq-onnx"
LAYERS, FRONT = PARTS = ("layers", "front")
LENGTH = 256  # of windows to calibrate on and to measure with
SAMPLES = 32
LIMIT_SECONDS = 15 * 60
OUR_LAYERS = ((DEFAULT, 32), (DEFAULT, 64), (BEST, 128))  # quality and block size
TARGET_BITS = (3.5, 4.0, 4.3, 4.7, 5.0, 5.5, 6.0, 7.0, 8.5)
RIVAL_BLOCK = "block 32"  # of the other tools, with which our larger blocks are compared
STYLES = (("s", "C0"), ("D", "C1"), ("^", "C2"), ("v", "C4"), ("P", "C5"), ("X", "C6"), ("*", "C8"))  # of other tools
HEADERS = {
    LAYERS: "| layers: tool | settings | bits of their weights | KL, mean +-SE | top-1 | size | seconds |",
    FRONT: "| whole model: tool | settings | bits | KL, mean +-SE | top-1 | size | seconds |",
}


@dataclass(frozen=True)
class Measured:
    """bits: of a weight. All but the seconds are None where `trouble` tells what went wrong."""

    seconds: float
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    bits: float | None = None
    size: int | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Point:
    part: str
    tool: str
    settings: str
    measured: Measured

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.settings}"

    @property
    def is_ours(self) -> bool:
        return self.tool == OURS

    def at(self) -> tuple[float, float] | None:
        """Bits and KL."""
        one = self.measured
        return None if one.bits is None or one.kl is None else (one.bits, one.kl)


@dataclass(frozen=True)
class Job:
    """run: makes the model at a path. key: of what is kept of the result; empty: nothing. original: the trained model
    that it is compared with.
    """

    part: str
    tool: str
    settings: str
    run: Callable[[Path], None]
    key: str = ""
    original: str = "smollm2"

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.settings}"


@dataclass(frozen=True)
class Bench:
    """What all runs share. folder: for the copies of the model and the token ids that other tools get."""

    model: Path
    windows: NDArray[np.int64]
    folder: Path
    again: bool

    def given(self, call: Call, own_head: bool) -> Path:
        """The model as a tool gets it."""
        path = self.model
        if own_head:
            path = self._made("own_head.onnx", lambda output: with_own_head(self.model, output))
        if call.tool not in INT4_TOOLS:
            return path
        return self._made(f"opset21_{own_head}.onnx", lambda output: at_opset_21(path, output))

    def ids(self) -> Path:
        """Of the text that other tools are calibrated with."""
        return self._made("ids.npy", lambda output: np.save(output, calibration_ids(self.model, SAMPLES, LENGTH)))

    def own_text(self) -> Path:
        """Token ids that the model wrote itself, as many as the best quality takes; kept in the cache."""
        path = (self.folder if self.again else cache_folder("front")) / "own-text.npy"
        if not path.exists():
            with open_model(self.model) as opened:
                recipe = Recipe(quality=BEST, sequence_length=LENGTH)
                written = data.load(opened, signature(opened.model.graph), recipe, None, None, Silent())
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.concatenate([feed[TOKENS] for feed in written.all_feeds]))
        return path

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path


class ToolError(Exception):
    """Another tool failed, or took too long."""


# What is run.


def our_jobs(bench: Bench, targets: Sequence[float]) -> Iterator[Job]:
    for quality, block_size in OUR_LAYERS:
        recipe = Recipe(quality=quality, block_size=block_size, accuracy_level=0)
        yield _ours(bench, LAYERS, f"{quality}, block {block_size}", recipe)
    for bits in targets:
        yield _ours(bench, FRONT, f"--target-bits {bits:g}", Recipe(target_bits=bits, accuracy_level=0))


def _ours(bench: Bench, part: str, settings: str, recipe: Recipe) -> Job:
    def run(output: Path) -> None:
        awq_onnx.quantize(bench.model, output, recipe, calibration=np.load(bench.own_text()))

    return Job(part, OURS, settings, run)


def other_jobs(bench: Bench) -> Iterator[Job]:
    yield from _onnxruntime_layers(bench)
    yield from _modelopt_layers(bench)
    for block in (32, 128):
        yield _other(bench, LAYERS, "NNCF AWQ", f"block {block}", Call("nncf", {"block_size": block, "ratio": 1.0}))
    yield from _onnxruntime_front(bench)
    yield from _genai_front(bench)
    yield from _modelopt_front(bench)
    yield from _nncf_front(bench)


def _onnxruntime_layers(bench: Bench) -> Iterator[Job]:
    for block in (32, 64, 128):
        for method, tool in (("rtn", "ORT RTN"), ("hqq", "ORT HQQ"), ("k_quant", "ORT k_quant")):
            call = Call("onnxruntime", {"method": method, "block_size": block})
            yield _other(bench, LAYERS, tool, f"block {block}", call)


def _modelopt_layers(bench: Bench) -> Iterator[Job]:
    plain: dict[str, Any] = {"method": "awq_lite", "block_size": 32}
    yield _other(bench, LAYERS, "ModelOpt awq_lite", "block 32, symmetric", Call("modelopt", plain))
    zeros = {**plain, "zero_points": True}
    yield _other(bench, LAYERS, "ModelOpt awq_lite", "block 32", Call("modelopt", zeros))
    yield _other(bench, LAYERS, "ModelOpt awq_full", "block 32", Call("modelopt", {**zeros, "method": "awq_full"}))
    clip = {**plain, "method": "awq_clip", "windows": 2}
    yield _other(bench, LAYERS, "ModelOpt awq_clip", "block 32, symmetric", Call("modelopt", clip))


def _onnxruntime_front(bench: Bench) -> Iterator[Job]:
    for block in (16, 32, 64, 128):
        both = {"block_size": block, "gather": block, "whole": True}
        for method, tool in (("rtn", "ORT RTN"), ("k_quant", "ORT k_quant"), ("hqq", "ORT HQQ")):
            yield _other(bench, FRONT, tool, f"{block}", Call("onnxruntime", {"method": method, **both}), True)
    variants = {"last": [LM_HEAD], "mixed": _mixed(bench.model)}
    for block in (32, 128):
        for name, layers in variants.items():
            settings = {"method": "k_quant", "block_size": block, "gather": 32, "whole": True, "eight_bits": layers}
            yield _other(bench, FRONT, "ORT k_quant", f"{name} {block}", Call("onnxruntime", settings), True)


def _mixed(model: Path) -> list[str]:
    """The layers that onnxruntime-genai's builder gives 8 bits as k_quant_mixed, by their names in optimum's export."""
    names = {node.name for node in onnx.load(model, load_external_data=False).graph.node if node.op_type == "MatMul"}
    count = sum(name.endswith("/mlp/down_proj/MatMul") for name in names)
    chosen = [i for i in range(count) if i < count / 8 or i >= 7 * count / 8 or (i - round(count / 8)) % 3 == 2]
    own = [f"/model/layers.{i}/{layer}/MatMul" for i in chosen for layer in ("self_attn/v_proj", "mlp/down_proj")]
    assert names.issuperset(own)
    return [*own, LM_HEAD]


def _genai_front(bench: Bench) -> Iterator[Job]:
    """One table for lm_head and embedding, of 8 bits in the variants."""
    for method, name in (("k_quant", ""), ("k_quant_last", "last "), ("k_quant_mixed", "mixed ")):
        for block in (32, 128) if name else (16, 32, 64):
            call = Call("genai", {"method": method, "block_size": block})
            yield _other(bench, FRONT, "genai k_quant", f"{name}{block}", call)


def _modelopt_front(bench: Bench) -> Iterator[Job]:
    for block in (32, 128):
        both = {"block_size": block, "gather": 32, "whole": True, "zero_points": True, "method": "awq_lite"}
        yield _other(bench, FRONT, "ModelOpt awq_lite", f"{block}", Call("modelopt", both), True)


def _nncf_front(bench: Bench) -> Iterator[Job]:
    """Embedding and lm_head have 8 bits by default."""
    whole: dict[str, Any] = {"block_size": 32, "whole": True}
    for ratio in (1.0, 0.8, 0.5):
        call = Call("nncf", {**whole, "ratio": ratio})
        yield _other(bench, FRONT, "NNCF AWQ", f"32, ratio {ratio:g}", call)
    four = Call("nncf", {**whole, "ratio": 1.0, "all_layers": True})
    yield _other(bench, FRONT, "NNCF AWQ", "32, all layers", four, True)
    eight = Call("nncf", {"mode": "INT8_ASYM", "aware": False, "whole": True})
    yield _other(bench, FRONT, "NNCF INT8", "columns", eight)


def _other(bench: Bench, part: str, tool: str, settings: str, call: Call, own_head: bool = False) -> Job:
    def run(output: Path) -> None:
        command = call.command(bench.given(call, own_head), bench.ids(), output)
        log = output.with_suffix(".log")
        try:
            with log.open("wb") as printed:
                subprocess.run(command, stdout=printed, stderr=printed, timeout=LIMIT_SECONDS, check=True)
        except subprocess.TimeoutExpired:
            raise ToolError(f"stopped after {LIMIT_SECONDS // 60} minutes") from None
        except subprocess.CalledProcessError as error:
            raise ToolError(f"exit code {error.returncode}: {last_line(log)}") from None

    measuring = [importlib.metadata.version("onnxruntime"), *bench.windows.shape, SAMPLES, LENGTH, own_head, part]
    settings += ", own head" if own_head else ""
    original = "smollm2-genai" if call.tool == "genai" else "smollm2"
    return Job(part, tool, settings, run, f"{call.key()} {measuring}", original)


# How it is measured.


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
            return Measured(time.perf_counter() - start, trouble=str(error).splitlines()[0])
        bits = layer_bits(output) if job.part == LAYERS else file_bits(bench.model, output)
        return Measured(seconds, comparison.kl_mean, comparison.kl_se, comparison.top1, bits, size_bytes(output))


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


# What is told of it.


def row(point: Point) -> str:
    one, start = point.measured, f"| {point.tool} | {point.settings} |"
    if one.kl is None or one.kl_se is None or one.bits is None or one.top1 is None or one.size is None:
        return f"{start} - | {one.trouble} | - | - | {one.seconds:.0f} |"
    kl = f"{one.kl:.4f} +-{one.kl_se:.4f}"
    return f"{start} {one.bits:.3f} | {kl} | {one.top1:.1%} | {one.size / 1e6:.1f} MB | {one.seconds:.0f} |"


def table(part: str, points: Iterator[Point] | Sequence[Point]) -> Iterator[str]:
    """Markdown, line by line as points are known; nothing where there are none."""
    for number, point in enumerate(points):
        if number == 0:
            yield f"\n{HEADERS[part]}\n|---|---|---|---|---|---|---|"
        yield row(point)


def verdicts(points: Sequence[Point]) -> Iterator[str]:
    yield from layers_verdict([one for one in points if one.part == LAYERS and one.at()])
    yield from front_verdict([one for one in points if one.part == FRONT and one.at()])


def layers_verdict(points: Sequence[Point]) -> Iterator[str]:
    """Each of ours beside blocks of 32 of every other tool."""
    rivals = [one for one in points if not one.is_ours and one.settings.startswith(RIVAL_BLOCK)]
    if not rivals:
        return
    best = min(rivals, key=lambda one: one.measured.kl or 0)
    yield f"\nThe best of other tools at {RIVAL_BLOCK} is {best.name}, KL {best.measured.kl:.4f}:"
    for one in points:
        if one.is_ours and one.measured.kl is not None and best.measured.kl:
            yield f"  {one.name}: {one.measured.bits:.2f} bits, {one.measured.kl / best.measured.kl:.2f} of its KL"


def front_verdict(points: Sequence[Point]) -> Iterator[str]:
    """Whether each point of another tool lies above our curve."""
    curve = curve_of(points)
    if len(curve) < 2:
        return
    yield "\nOther tools beside our curve, in multiples of its KL at the same bits:"
    for one in points:
        where = one.at()
        if one.is_ours or where is None:
            continue
        ours = kl_at(curve, where[0])
        if ours is None:
            yield f"  {one.name}: {where[0]:.2f} bits are outside of our curve"
            continue
        place = "above" if where[1] > ours else "BELOW"
        yield f"  {one.name}: {place}, {where[1] / ours:.2f} x {ours:.4f} at {where[0]:.2f} bits"


def curve_of(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Bits and KL of ours, sorted."""
    return sorted(where for one in points if one.part == FRONT and one.is_ours and (where := one.at()))


def kl_at(curve: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Straight lines in log KL; None outside."""
    if not curve[0][0] <= bits <= curve[-1][0]:
        return None
    return float(np.exp(np.interp(bits, [x for x, _ in curve], [math.log(kl) for _, kl in curve])))


def plot(points: Sequence[Point], path: Path) -> None:
    """KL over bits of the whole model: our curve, and every other tool's points."""
    shown = [one for one in points if one.part == FRONT and one.at()]
    if not shown:
        sys.exit("front.py: nothing to plot: there is no point of the whole model")
    figure, axes = pyplot().subplots(figsize=(9, 6), layout="constrained")
    curve = curve_of(shown)
    if curve:
        axes.plot(*zip(*curve, strict=True), "C3-", marker="o", markersize=6, linewidth=2.5, label=OURS, zorder=3)
    others = {tool: [one for one in shown if one.tool == tool] for tool in tools_of(shown)}
    for tool, style in zip(others, cycle(STYLES), strict=False):
        _scatter(axes, others[tool], tool, *style)
    _label(axes)
    save_picture(figure, path)


def tools_of(points: Sequence[Point]) -> list[str]:
    """The other tools, in order."""
    return list(dict.fromkeys(one.tool for one in points if not one.is_ours))


def _scatter(axes: Any, points: Sequence[Point], tool: str, marker: str, colour: str) -> None:
    places = [where for one in points if (where := one.at())]
    axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=7, label=tool, zorder=2)
    for one, where in zip(points, places, strict=True):
        text = one.settings.removesuffix(", own head")
        axes.annotate(text, where, xytext=(6, 3), textcoords="offset points", fontsize="small", color=colour)


def _label(axes: Any) -> None:
    axes.set(yscale="log", xlabel="bits of a weight, everything in the file counted", ylabel="KL to the original, nats")
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")


def save(points: Sequence[Point], path: Path) -> None:
    path.write_text(json.dumps([asdict(one) for one in points], indent=2) + "\n")


def load(paths: Sequence[Path]) -> list[Point]:
    """Of all files; of a point that is in several the last counts."""
    entries = [entry for path in paths for entry in json.loads(path.read_text())]
    points = [Point(**{**entry, "measured": Measured(**entry["measured"])}) for entry in entries]
    return list({(one.part, one.name): one for one in points}.values())


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, after every row")
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
    else:
        points = run_all(arguments)
    print(*verdicts(points), sep="\n")
    if arguments.plot is not None:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
