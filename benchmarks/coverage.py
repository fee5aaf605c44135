"""What awq-onnx does with every architecture of models/tiny.py, by every exporter, and with the real models.

    python benchmarks/coverage.py [NAME ...] [--output docs/coverage.md]

NAME: rows to do, an architecture (llama) or a pattern of whole names (llama-*, *-dynamo, trained-*); all without. A row
tells, for one .onnx file: how many linear layers with a constant weight there are, counted here and not by awq-onnx;
how many it quantises, and what it folds their scales into; what folding changes when nothing is rounded, with random
scales; and whether onnxruntime runs the 4-bit model. Each row is done in a process of its own; models that are missing
are built by their recipes. Ends with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from common import RECIPES, ROOT, script
from numpy.typing import NDArray

import awq_onnx
from awq_onnx import runtime
from awq_onnx.calibrate import data
from awq_onnx.calibrate.feeds import Feed, Signature, complete, signature
from awq_onnx.calibrate.straight import straighten
from awq_onnx.exact import fold_random_scales
from awq_onnx.passes.sites import node_name
from awq_onnx.pipeline import trace_channels
from awq_onnx.plan import Plan, make_plan
from awq_onnx.progress import Silent
from awq_onnx.store import OpenedModel, open_model

RECIPE = awq_onnx.Recipe(samples=4, sequence_length=16)
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}  # of the folded model's outputs, relative to the largest
SHARE = 0.95  # of the linear weights are to be quantised
ON_PURPOSE = ("it is the lm_head", "it chooses experts")  # how the reasons begin of what stays unless it is asked for
LINEAR_OPS = frozenset({"MatMul", "Gemm", "FusedMatMul", "Einsum", "Attention", "MoE", "FusedGemm"})
SECONDS = 900  # a row may take
TRAINED = {f"trained-{name}": recipe for name, recipe in RECIPES.items()}
HEAD = (
    "| model | linear layers | quantised | of weights | kept | folded into norms | into layers | not folded "
    "| Muls added | folding differs by | 4 bits run |\n|---|"
    + "---:|" * 3
    + "---|"
    + "---:|" * 2
    + "---|---:|---:|---|"
)


@dataclass(frozen=True)
class Row:
    """What one .onnx file came to.

    layers: linear layers with a constant weight. share: of their weights that are quantised, without those kept on
    purpose. kept, unfolded: number of layers by reason. unseen: layers that awq-onnx does not speak of. difference: of
    the outputs, when scales are folded and nothing is rounded. error: what stopped it, then the rest means nothing.
    """

    model: str
    layers: int = 0
    quantised: int = 0
    share: float = 0.0
    kept: Mapping[str, int] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    gains: int = 0
    before: int = 0
    unfolded: Mapping[str, int] = field(default_factory=dict)
    muls: int = 0
    difference: float = 0.0
    error: str | None = None
    not_exported: str | None = None

    @property
    def fails(self) -> bool:
        kind = "fp16" if "fp16" in self.model else "fp32"
        wrong = self.difference > TOLERANCE[kind] or self.muls or self.unseen
        return self.not_exported is None and bool(self.error is not None or wrong)


# One row, in a process of its own


def measure(model: str, path: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        difference, sizes = fold_and_compare(path, Path(folder))
        runtime.give_back_memory()
        output = Path(folder) / "int4.onnx"
        report = awq_onnx.quantize(path, output, RECIPE)
        assert_runs(path, output)
        muls = count_muls(output) - count_muls(path)
    kept = {one.what: one.reason for one in report.kept}
    folds = Counter(one.fold for one in report.matmuls)
    known = Counter([*(one.name for one in report.matmuls), *(one.what for one in report.kept)])
    counted = Counter(name for name, _ in sizes)
    wanted = sum(size for name, size in sizes if not kept.get(name, "").startswith(ON_PURPOSE))
    return Row(
        model=model,
        layers=(counted | known).total(),
        quantised=len(report.matmuls),
        share=sum(size for name, size in sizes if name in known.keys() - kept.keys()) / (wanted or 1),
        kept=Counter(one.reason for one in report.kept),
        unseen=tuple(counted - known),
        gains=folds["norm gain"],
        before=folds["MatMul"],
        unfolded=Counter(one.reason for one in report.matmuls if one.reason),
        muls=muls,
        difference=difference,
    )


def fold_and_compare(path: Path, work: Path) -> tuple[float, list[tuple[str, int]]]:
    """The largest difference of an output when random scales are folded; `constant_layers`."""
    with open_model(path) as opened:
        wanted, original = signature(opened.model.graph), opened.serialize()
        plan = make_plan(opened.model, RECIPE)
        sizes = constant_layers(opened.model)
        loaded = data.load(opened, wanted, RECIPE, None, None, Silent())
        expected = run_all(runtime.session(original, opened.folder, fuse=False), wanted, loaded.held_out)
        scaled = _fold(opened, plan, loaded, work / "folded.onnx")
    folded = runtime.session((work / "folded.onnx").read_bytes(), work, fuse=False)
    actual = run_all(folded, wanted, loaded.held_out)
    pairs = (
        (one[name], other[name])
        for one, other in zip(expected, actual, strict=True)
        for name in one.keys() - scaled
        if one[name].dtype.kind == "f"
    )
    return max(relative_difference(*pair) for pair in pairs), sizes


def _fold(opened: OpenedModel, plan: Plan, loaded: data.CalibrationData, output: Path) -> set[str]:
    """Fold random scales and save the model; the caches that are scaled now."""
    maps = trace_channels(plan, straighten(opened, plan.survey, loaded.feeds[0]), loaded)
    folded = fold_random_scales(opened, plan.groups, maps)
    ir.save(opened.model, output, external_data=f"{output.name}.data")
    return {name for group in folded for name in group.caches}


def run_all(session: Any, wanted: Signature, feeds: Sequence[Feed]) -> list[dict[str, NDArray[Any]]]:
    """All outputs for every feed; where caches come back, for one more token after it too."""
    results = []
    for feed in feeds:
        results.append(_outputs(session, wanted, feed))
        if wanted.caches and not wanted.needs_past:
            results.append(_outputs(session, wanted, _one_more(wanted, feed, results[-1])))
    return results


def _outputs(session: Any, wanted: Signature, feed: Feed) -> dict[str, NDArray[Any]]:
    return dict(zip(wanted.outputs, runtime.run(session, list(wanted.outputs), feed), strict=True))


def _one_more(wanted: Signature, feed: Feed, before: Mapping[str, NDArray[Any]]) -> Feed:
    """The feed that goes on from what a run returned."""
    past = {name: before[present] for name, present in wanted.caches}
    given = {one.name: feed[one.name] for one in wanted.inputs if not one.follows or one.name.startswith("encoder_")}
    return complete(wanted, {**given, wanted.text: feed[wanted.text][:, :1]}, past)


def relative_difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference over the largest number; infinite where one of them is not finite and the other is."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(other)):
        return float("inf")
    largest = np.abs(one[finite]).max(initial=0)
    return float(np.abs(one[finite] - other[finite]).max(initial=0) / (largest or 1))


def constant_layers(model: ir.Model) -> list[tuple[str, int]]:
    """Names of nodes that multiply something by a constant with two axes, each with how many numbers that has.

    Branches may have nodes with one name. Found without the survey of awq-onnx, to see what that overlooks.
    """
    sizes: dict[ir.Value, int] = {}
    found = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        inputs = [_constant_size(value, sizes) for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (inputs and None not in inputs and not node.op_type.startswith("Random")):
            largest = max((size for size in inputs if size is not None), default=_attribute_size(node))
            sizes.update((value, largest) for value in node.outputs)
        elif _multiplies(node):
            weights = [size for value in node.inputs if (size := _weight_size(value, sizes)) is not None]
            if weights:
                found.append((node_name(node), max(weights)))
    return found


def _multiplies(node: ir.Node) -> bool:
    """Whether it is a matrix product, or a convolution that is one: of a single point."""
    if node.op_type != "Conv":
        return node.op_type in LINEAR_OPS
    kernel = node.inputs[1].shape if node.inputs[1] is not None else None
    return kernel is not None and all(size == 1 for size in kernel[2:])


def _constant_size(value: ir.Value | None, sizes: Mapping[ir.Value, int]) -> int | None:
    if value is None:
        return None
    return int(value.const_value.size) if value.const_value is not None else sizes.get(value)


def _weight_size(value: ir.Value | None, sizes: Mapping[ir.Value, int]) -> int | None:
    """The size of a constant that has two axes or more; of a computed one the shape may not be known."""
    size = _constant_size(value, sizes)
    shape = None if value is None else value.const_value.shape if value.const_value is not None else value.shape
    axes = 2 if shape is None else sum(not isinstance(axis, int) or axis > 1 for axis in shape)
    return size if axes > 1 else None


def _attribute_size(node: ir.Node) -> int:
    value = node.attributes.get("value")
    return int(value.as_tensor().size) if value is not None else 1


def count_muls(path: Path) -> int:
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    return sum(node.op_type == "Mul" for node in _nodes(model.graph))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def assert_runs(path: Path, quantised: Path) -> None:
    """An ordinary session takes the 4-bit model and makes finite numbers where the original does."""
    with open_model(path) as opened:
        wanted = signature(opened.model.graph)
        feed = data.load(opened, wanted, RECIPE, None, None, Silent()).held_out[0]
        expected = _outputs(runtime.session(opened.serialize(), opened.folder), wanted, feed)
    actual = _outputs(runtime.client_session(quantised), wanted, feed)
    for name, values in expected.items():
        assert values.shape == actual[name].shape, f"the 4-bit model's {name} has another shape"
        assert np.isfinite(actual[name]).all() or not np.isfinite(values).all(), (
            f"the 4-bit model's {name} is not finite"
        )


# All rows


def wanted_names(patterns: Sequence[str]) -> list[str]:
    """The names of all models, tiny ones first, that one of the patterns fits."""
    tiny = script("models/tiny.py")
    names = [f"{name}-{exporter}" for name in tiny.architectures() for exporter in tiny.EXPORTERS]
    chosen = [
        name
        for name in (*names, *TRAINED)
        if not patterns or any(fnmatchcase(name, one) or name.rpartition("-")[0] == one for one in patterns)
    ]
    return chosen or sys.exit(f"coverage.py: no model has a name like {' '.join(patterns)}; they are like {names[0]}")


def rows_of(name: str) -> Iterator[Row]:
    """A row for each .onnx file of a model."""
    architecture, _, exporter = name.rpartition("-")
    reason = None if name in TRAINED else script("models/tiny.py").FAILS.get((architecture, exporter))
    if reason is not None:
        yield Row(name, not_exported=reason)
        return
    recipe = TRAINED.get(name) or ("tiny.py", architecture, "--exporter", exporter)
    built = _run([str(ROOT / "models" / recipe[0]), *recipe[1:], "--print-path"])
    if built.returncode:
        yield Row(name, error=f"not built: {_last_line(built)}")
        return
    paths = [Path(line) for line in built.stdout.splitlines()]
    for path in paths:
        row = name if len(paths) == 1 else f"{name}/{path.stem.removesuffix('_model')}"
        done = _run([__file__, "--measure", row, str(path)])
        yield Row(**json.loads(done.stdout)) if not done.returncode else Row(row, error=_last_line(done))


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"took more than {SECONDS} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    return lines[-1].removeprefix("awq_onnx.errors.")[:300].replace("|", "/")


def document(rows: Sequence[Row]) -> str:
    """The whole page: what was reached, the table, the reasons."""
    measured = [row for row in rows if row.error is None and row.not_exported is None]
    marks = {reason: _mark(number) for number, reason in enumerate(_reasons(measured))}
    parts = ["\n".join(summary(rows, measured)), "\n".join([HEAD, *(table_row(row, marks) for row in rows)])]
    if marks:
        parts.append("\n".join(reasons_table(measured, marks)))
    return "\n\n".join(parts)


def summary(rows: Sequence[Row], measured: Sequence[Row]) -> Iterator[str]:
    yield f"{len(measured)} of {len(rows)} rows quantised and run; awq-onnx {awq_onnx.__version__}."
    few = [row for row in measured if row.share < SHARE]
    met = f"below it: {', '.join(f'{row.model} {row.share:.0%}' for row in few)}" if few else "met in every row"
    yield (
        f"* Goal, {SHARE:.0%} of the linear weights quantised (lm_heads and routers, which stay unless asked for, "
        f"are not counted): {met}."
    )
    folded, layers = sum(row.gains + row.before for row in measured), sum(row.quantised for row in measured)
    yield (
        f"* Goal, every input's scale folded or shown to be impossible to fold: {folded} of {layers} layers have it "
        f"folded, {layers - folded} have a reason below."
    )
    for kind, tolerance in TOLERANCE.items():
        found = [row.difference for row in measured if ("fp16" in row.model) == (kind == "fp16")]
        if found:
            yield f"* Folding alone changes {kind} outputs by {max(found):.1e} at most; allowed {tolerance:g}."
    wrong = [row.model for row in rows if row.fails]
    if wrong:
        yield f"* Failing: {', '.join(wrong)}."


def table_row(row: Row, marks: Mapping[str, str]) -> str:
    if row.not_exported is not None:
        return f"| {row.model} | not exported: {row.not_exported} |" + " |" * 9
    if row.error is not None:
        return f"| {row.model} | **{row.error}** |" + " |" * 9
    unseen = f"; **not seen: {', '.join(row.unseen)}**" if row.unseen else ""
    wrong = "**" if row.fails else ""
    return (
        f"| {row.model} | {row.layers} | {row.quantised} | {row.share:.0%} | {_counts(row.kept, marks)}{unseen} "
        f"| {row.gains} | {row.before} | {_counts(row.unfolded, marks)} | {row.muls} "
        f"| {wrong}{row.difference:.1e}{wrong} | yes |"
    )


def _counts(reasons: Mapping[str, int], marks: Mapping[str, str]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: marks[item[0]])
    return ", ".join(f"{count} ({marks[reason]})" for reason, count in ordered) or "0"


def reasons_table(rows: Sequence[Row], marks: Mapping[str, str]) -> Iterator[str]:
    kept, unfolded = _total(row.kept for row in rows), _total(row.unfolded for row in rows)
    yield "| | reason | layers kept | not folded | rows | first in |\n|---|---|---:|---:|---:|---|"
    for reason, mark in marks.items():
        where = [row.model for row in rows if reason in row.kept or reason in row.unfolded]
        counts = f"{kept[reason] or ''} | {unfolded[reason] or ''}"
        yield f"| {mark} | {reason} | {counts} | {len(where)} | {where[0]} |"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Every reason once: why layers are kept, then why scales are not folded, the commonest first."""
    kept, unfolded = _total(row.kept for row in rows), _total(row.unfolded for row in rows)
    return list(dict.fromkeys(reason for counts in (kept, unfolded) for reason, _ in counts.most_common()))


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total


def _mark(number: int) -> str:
    """a, b, ... z, ba, bb, ..."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return (_mark(number // 26) if number >= 26 else "") + letters[number % 26]


INTRODUCTION = """# Coverage

Made by `python benchmarks/coverage.py --output docs/coverage.md`. Each row is one .onnx file: a tiny model of random
weights with planted outliers (`models/tiny.py`), or a trained one (`models/README.md`).

* linear layers: nodes that multiply by a constant matrix, counted in the graph without awq-onnx; quantised: those that
  became MatMulNBits; of weights: the share of the layers' weights, without lm_heads and routers.
* folded into norms, into layers: quantised layers whose input scale goes into a norm before, or into a linear layer
  before. Letters stand for the reasons in the table at the end.
* folding differs by: the largest difference of any output, relative to the largest number of that output, when random
  scales between 1/e and e are folded and nothing is rounded; with key/value caches also for a token that follows.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What awq-onnx does with every architecture and exporter.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, or patterns of names (default: all)")
    parser.add_argument("--output", type=Path, help="write the page here too")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(vars(measure(arguments.measure[0], Path(arguments.measure[1])))))
        return
    rows = []
    for name in wanted_names(arguments.names):
        start = time.perf_counter()
        for row in rows_of(name):
            rows.append(row)
            told = row.error or row.not_exported or f"{row.quantised} of {row.layers}, folding {row.difference:.1e}"
            print(f"{row.model}: {told} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    page = document(rows)
    print(page)
    if arguments.output:
        arguments.output.write_text(f"{INTRODUCTION}\n{page}\n")
    sys.exit(any(row.fails for row in rows))


if __name__ == "__main__":
    main()
