"""What exporters make of real architectures (models/tiny.py): layers found, scales folded, nothing lost, nothing added.

benchmarks/coverage.py does the same for all architectures and exporters. The models are built once, then cached.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from builders import Array

import awq_onnx
from awq_onnx import Recipe, runtime
from awq_onnx.calibrate import data
from awq_onnx.calibrate.data import CalibrationData
from awq_onnx.calibrate.feeds import Feed, Signature, complete, signature
from awq_onnx.calibrate.straight import straighten
from awq_onnx.exact import fold_random_scales
from awq_onnx.pipeline import trace_channels
from awq_onnx.plan import make_plan
from awq_onnx.progress import Silent
from awq_onnx.store import OpenedModel, open_model

pytestmark = pytest.mark.real

MODELS = Path(__file__).parent.parent / "models"
RECIPE = Recipe(samples=2, sequence_length=8)
TOLERANCE = 1e-4  # of the largest number of an output


@dataclass(frozen=True)
class Row:
    """What one file comes to. norms, layers: quantised layers whose scale goes into a norm, into a layer before.

    unfolded: the others, by the reason. heads: how many heads are normalised right behind a layer, by its columns.
    """

    quantised: int
    norms: int
    layers: int
    unfolded: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ("lm_head",)
    caches: int = 0
    heads: Mapping[int, int] = field(default_factory=dict)


ADD = "Add comes before, which cannot be divided"
SIGMOID = "Sigmoid comes before, which cannot be divided"
RESIDUAL = "Add reads the same input"
OUTPUT = "what comes before is an output of the model as well"
INPUT = "the input is an input of the model"
TWICE = f"one weight, used twice: {INPUT}"
CONCAT = "Concat comes before, which cannot be divided"
KEPT = {"it is the lm_head, which stays as it is": "lm_head", "it chooses experts: a router stays as it is": "router"}
MOE = ("router", "router", "lm_head")

EXPECTED = {
    "llama-optimum": Row(14, norms=10, layers=4, caches=2),
    "gpt2-optimum": Row(8, norms=4, layers=2, unfolded={ADD: 2}, caches=2),
    "phi3-torchscript": Row(8, norms=4, layers=4),
    "falcon-torchscript": Row(8, norms=4, layers=2, unfolded={ADD: 2}),
    "gemma3-dynamo": Row(14, norms=10, layers=4, heads={128: 4, 64: 2}),
    "qwen3_moe-optimum": Row(32, norms=22, layers=10, kept=MOE, caches=2, heads={128: 4, 64: 2}),
    "t5-optimum/encoder_model": Row(14, norms=10, layers=4, kept=()),
    "t5-optimum/decoder_model": Row(22, norms=12, layers=2, unfolded={OUTPUT: 4, INPUT: 4}),
    "t5-optimum/decoder_with_past_model": Row(18, norms=12, layers=2, unfolded={CONCAT: 2, INPUT: 2}),
    "t5-optimum/decoder_model_merged": Row(
        40, norms=24, layers=8, unfolded={INPUT: 4, TWICE: 4}, kept=("lm_head", "lm_head"), caches=2
    ),
    "bert-optimum": Row(12, norms=0, layers=2, unfolded={RESIDUAL: 8, ADD: 2}, kept=()),
    "vit-optimum": Row(12, norms=8, layers=2, unfolded={ADD: 2}),
    "clip-torchscript": Row(26, norms=18, layers=4, unfolded={SIGMOID: 4}, kept=()),
    "mistral-dynamo23": Row(14, norms=10, layers=4),
    "mixtral-dynamo": Row(32, norms=22, layers=10, kept=MOE),
}
every_file = pytest.mark.parametrize("name", EXPECTED)

BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny
for name in sys.argv[2:]:
    print(tiny.build(*name.rsplit("-", 1))[0].parent)
"""


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """The folder of each model, all built in one process of their own: exporters warn, and torch takes long to load."""
    names = list(dict.fromkeys(name.split("/")[0] for name in EXPECTED))
    words = [sys.executable, "-c", BUILD, str(MODELS), *names]
    built = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(names, map(Path, built.stdout.splitlines()), strict=True))


def path_of(folders: Mapping[str, Path], name: str) -> Path:
    folder, _, file = name.partition("/")
    return folders[folder] / f"{file or 'model'}.onnx"


@every_file
def test_random_scales_change_no_output(folders: dict[str, Path], name: str) -> None:
    with open_model(path_of(folders, name)) as opened:
        wanted, original = signature(opened.model.graph), opened.serialize()
        plan = make_plan(opened.model, RECIPE)
        heads = Counter[int]()
        for site in plan.survey.sites:
            if site.head_size is not None:
                heads[site.N] = site.N // site.head_size
        loaded = data.load(opened, wanted, RECIPE, None, None, Silent())
        maps = trace_channels(plan, straighten(opened, plan.survey, loaded.feeds[0]), loaded)
        before = outputs(original, opened, wanted, loaded)
        folded = fold_random_scales(opened, plan.groups, maps)
        after = outputs(opened.serialize(), opened, wanted, loaded)
    scaled = {cache for group in folded for cache in group.caches}
    assert len(folded) > 0
    assert len(scaled) == EXPECTED[name].caches
    assert dict(heads) == EXPECTED[name].heads
    for one, other in zip(before, after, strict=True):
        for output in one.keys() - scaled:
            assert difference(one[output], other[output]) < TOLERANCE, output
        assert all(difference(one[cache], other[cache]) > 0.1 for cache in scaled)


def outputs(model: bytes, opened: OpenedModel, wanted: Signature, loaded: CalibrationData) -> list[Feed]:
    """All outputs for a sample; where caches come back, for one more token after it too."""
    session = runtime.session(model, opened.folder, fuse=False)
    feed = loaded.held_out[0]
    made = [outputs_of(session, wanted, feed)]
    if wanted.caches and not wanted.needs_past:
        past = {name: made[0][present] for name, present in wanted.caches}
        given = {one.name: feed[one.name] for one in wanted.inputs if not one.follows or one.name[:8] == "encoder_"}
        more = complete(wanted, {**given, wanted.text: feed[wanted.text][:, :1]}, past)
        made.append(outputs_of(session, wanted, more))
    return made


def outputs_of(session: object, wanted: Signature, feed: Feed) -> Feed:
    return dict(zip(wanted.outputs, runtime.run(session, list(wanted.outputs), feed), strict=True))


def difference(one: Array, other: Array) -> float:
    """The largest, relative to the largest number."""
    return float(np.abs(one - other).max(initial=0) / np.abs(one).max(initial=1e-30))


@every_file
def test_the_four_bit_model_runs_and_says_what_became_of_every_layer(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path, output, row = path_of(folders, name), tmp_path / "int4.onnx", EXPECTED[name]
    report = awq_onnx.quantize(path, output, RECIPE)  # which loads and runs the result
    folds = Counter(one.fold for one in report.matmuls)
    assert (len(report.matmuls), folds["norm gain"], folds["MatMul"]) == (row.quantised, row.norms, row.layers)
    assert Counter(one.reason for one in report.matmuls if one.reason) == row.unfolded
    assert sorted(KEPT[one.reason] for one in report.kept) == sorted(row.kept)
    before, after = op_types(path), op_types(output)
    assert after["MatMulNBits"] == row.quantised
    assert not after - before - Counter({"MatMulNBits": row.quantised})  # no Mul, nothing
    assert np.isfinite(report.comparison.relative_error)
    assert report.comparison.relative_error > 0
    errors = [one.error / one.plain_error for one in report.matmuls]
    assert np.exp(np.mean(np.log(errors))) < 0.9


def op_types(path: Path) -> Counter[str]:
    """Of all nodes, those in functions wherever they are called."""
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    return Counter(node.op_type for node in nodes(ir.from_proto(model)))


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
