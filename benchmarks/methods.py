"""The methods of 4-bit quantisation side by side on SmolLM2, in one run: writes docs/methods.md and its pictures.

    python benchmarks/methods.py [--only methods salient tokens text fp16] [--best] [--seconds 200]
        [--json methods.json] [--output docs/methods.md]
    python benchmarks/methods.py --from-json methods.json [--output docs/methods.md]

Measured is KL(original || int4) in nats on text that calibrated nothing: 24 windows of 256 tokens of CPython's
documentation, accuracy level 0. +- is the standard error over windows, of a ratio too (windows resampled in pairs).
All methods calibrate on the same tokens: text that the model wrote itself, with `awq_onnx.calibrate`, as the command
without data does it; other text or random ids where the page says so.

What is measured is kept in the file of --json after every model, and the text that the model wrote beside it: a run
goes on with what is missing; --seconds ends one early. The second form makes the page again without measuring anything;
docs/methods.json, which is written beside the page, has the figures of all that is on it.
A model takes one to three minutes of two cores that are shared, and there are about fifty. Seconds are those of one
run: they want an idle machine, KL does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from common import held_out_text, legal_text, size_bytes, trained_model
from methods_page import WINDOWS, write_page
from numpy.typing import NDArray
from others import calibration_ids
from salient import measured_channels
from variants import (
    FP16_MODEL,
    FP32_MODEL,
    ITSELF,
    LENGTH,
    LICENCES,
    OTHER,
    OWN,
    PROSE,
    RANDOM,
    SALIENT,
    SAMPLE_COUNTS,
    SECTIONS,
    Found,
    Variant,
    wanted_variants,
)

import awq_onnx
from awq_onnx import Recipe, runtime
from awq_onnx.calibrate import data, prose
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import MASK, TOKENS, complete, signature
from awq_onnx.comparison import compare_outputs, compared_outputs
from awq_onnx.progress import Silent
from awq_onnx.store import open_model

Tokens: TypeAlias = NDArray[np.int64]

MOST_SAMPLES = max(SAMPLE_COUNTS)
SALIENT_SAMPLES = 8  # enough for one mean of each channel
HELD_OUT_SHARE = 16  # awq-onnx keeps one sample in so many to measure with


@dataclass(frozen=True)
class Original:
    """A trained model and what it makes of the windows, which stays in memory: 50 MB for each."""

    name: str

    @cached_property
    def path(self) -> Path:
        return trained_model(self.name)

    @cached_property
    def windows(self) -> Tokens:
        """(WINDOWS, LENGTH)"""
        return held_out_text(self.path, WINDOWS, LENGTH)

    @cached_property
    def _logits(self) -> list[list[NDArray[Any]]]:
        with open_model(self.path) as opened:
            wanted = signature(opened.model.graph)
            session = runtime.session(opened.serialize(), opened.folder)
            feeds = [complete(wanted, {wanted.text: one[None]}) for one in self.windows]
            return [runtime.run(session, compared_outputs(wanted), feed) for feed in feeds]

    def compared(self, quantized: Path) -> dict[str, Any]:
        """What `awq_onnx.compare` finds, without running the original again."""
        with open_model(self.path) as opened:
            wanted = signature(opened.model.graph)
        feeds = [complete(wanted, {wanted.text: one[None]}) for one in self.windows]
        session = runtime.client_session(quantized)
        return compare_outputs(compared_outputs(wanted), self._logits, session, feeds, wanted).to_dict()


@dataclass(frozen=True)
class Texts:
    """What to calibrate with. own: the file for the text that the model wrote."""

    model: Path
    own: Path

    def sequences(self, text: str, samples: int) -> Calibration:
        """So many sequences of LENGTH tokens, and those that the command holds out."""
        rows = samples + max(1, samples // HELD_OUT_SHARE)
        if text == ITSELF:
            return None
        if text == OTHER:
            return calibration_ids(self.model, rows, LENGTH)
        if text == LICENCES:
            return calibration_ids(self.model, rows, LENGTH, legal_text())
        if text == PROSE:
            return prose.windows(self.model, None, None, rows, LENGTH)
        if text == RANDOM:
            return np.random.default_rng(0).integers(0, self._vocabulary, (rows, LENGTH))
        return {name: values[:rows] for name, values in self._written.items()}

    @cached_property
    def _vocabulary(self) -> int:
        with open_model(self.model) as opened:
            return signature(opened.model.graph).vocabulary or 0

    @cached_property
    def _written(self) -> dict[str, Tokens]:
        if not self.own.exists():
            _say(f"the model writes {MOST_SAMPLES} sequences")
            np.savez(self.own, **written(self.model, MOST_SAMPLES))  # type: ignore[arg-type]
        with np.load(self.own) as arrays:
            return {name: arrays[name] for name in arrays.files}


def written(model: Path, samples: int) -> dict[str, Tokens]:
    """The text that the command calibrates with where nothing is given, what it holds out included; a mask tells what
    of it counts. Few samples are the first of many, since the model writes 17 side by side.
    """
    with open_model(model) as opened:
        loaded = data.load(opened, signature(opened.model.graph), Recipe(samples=samples), None, None, Silent())
    return {name: np.concatenate([feed[name] for feed in loaded.all_feeds]) for name in (TOKENS, MASK)}


def measure(variant: Variant, original: Original, texts: Texts) -> dict[str, Any]:
    """Make the 4-bit model, compare it; figures for JSON."""
    recipe = Recipe(accuracy_level=0, samples=variant.samples, **variant.settings)
    calibration = texts.sequences(variant.text, variant.samples)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int4.onnx"
        report = awq_onnx.quantize(original.path, output, recipe, calibration=calibration)
        return {
            **original.compared(output),
            "size": size_bytes(output),
            "layers": len(report.matmuls),
            "better_than_plain": sum(one.error < one.plain_error for one in report.matmuls),
            "mean_alpha": float(np.mean([one.alpha for one in report.matmuls])),
            "seconds": dict(report.seconds),
            "total_seconds": report.total_seconds,
        }


class Results:
    """What was measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: Found = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, figures: dict[str, Any]) -> None:
        self.found[key] = figures
        self.save(self._path)

    def save(self, path: Path) -> None:
        unfinished = path.with_suffix(".tmp")
        lines = (f"{json.dumps(key)}: {json.dumps(figures)}" for key, figures in self.found.items())
        unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        unfinished.replace(path)


def missing(sections: Sequence[str], found: Found, *, best: bool) -> Iterator[Variant]:
    """Variants that were not measured yet, each once."""
    every = [one for section in sections for one in wanted_variants(section, best=best)]
    yield from {one.key: one for one in every if one.key not in found}.values()


def measure_all(arguments: argparse.Namespace, results: Results) -> bool:
    """Whether everything is there now; False where time ran out."""
    end = time.monotonic() + arguments.seconds
    originals = {name: Original(name) for name in (FP32_MODEL, FP16_MODEL)}
    first = originals[FP32_MODEL]
    texts = Texts(first.path, arguments.json.with_suffix(".own.npz"))
    if SALIENT in arguments.only and SALIENT not in results.found:
        sequences = texts.sequences(OWN, SALIENT_SAMPLES)
        results.add(SALIENT, measured_channels(first.path, sequences, SALIENT_SAMPLES, first.compared))
    for variant in list(missing(arguments.only, results.found, best=arguments.best)):
        if time.monotonic() > end:
            return False
        figures = measure(variant, originals[variant.model], texts)
        results.add(variant.key, figures)
        _say(f"{variant.key}: KL {figures['kl_mean']:.4f}, {figures['total_seconds']:.0f} s")
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods of 4-bit quantisation side by side.")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, help="what to measure (all)")
    parser.add_argument("--best", action="store_true", help="the preset best too, which takes a quarter of an hour")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep figures here, and go on from those it holds")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, take these figures")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page here, the rest beside it")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.json is None:
            arguments.json = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "methods.json"
        results = Results(arguments.from_json or arguments.json)
        complete_now = arguments.from_json is not None or measure_all(arguments, results)
    if arguments.output is not None:
        write_page(results.found, arguments.output)
        results.save(arguments.output.with_suffix(".json"))
    sys.exit(not complete_now)


if __name__ == "__main__":
    main()
