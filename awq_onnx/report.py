"""What was done, what was refused and why, what it cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from awq_onnx._version import __version__
from awq_onnx.comparison import Comparison
from awq_onnx.errors import ReportFileError
from awq_onnx.footprint import Footprint
from awq_onnx.groups import GroupResult, SiteResult
from awq_onnx.machine import size_text
from awq_onnx.methods import candidates_of
from awq_onnx.passes.absorb import Gain
from awq_onnx.passes.sites import Refusal
from awq_onnx.plain import built, plain
from awq_onnx.recipe import EVERY_FORMULA, UNSCALED, Recipe, option
from awq_onnx.salience import BINS, Salience
from awq_onnx.tables import TableResult
from awq_onnx.targets import CPU, QDQ, WHOLE_COLUMN

IN_MEMORY = "a model in memory"  # the name of one that came from no file


@dataclass(frozen=True)
class MatMulReport:
    """One quantised MatMul: K in, N out, `bits` a weight, `block_size` weights with one scale.

    alpha: exponent of its input's scale; 0 is no scale. scale_from: what that was made of, as in the recipe.
    folded_into: the node that was divided, fold: what kind of node that is ("norm gain", "MatMul", or a "Mul" that was
    added). Where there is none, reason: why, blocked_by: what is in the way, mul_gain: what its error would be
    multiplied by if --allow-mul added one.
    error, plain_error: ||X E|| / ||X W|| on the calibration data, as shipped and for plain rounding
    (round-to-nearest) without a scale.
    """

    name: str
    K: int
    N: int
    bits: int
    block_size: int
    alpha: float
    scale_from: str
    folded_into: str | None
    fold: str | None
    reason: str | None
    blocked_by: str | None
    mul_gain: float | None
    error: float
    plain_error: float


@dataclass(frozen=True)
class TableReport:
    """One quantised embedding (V, D). error: ||W - W'|| / ||W||."""

    name: str
    V: int
    D: int
    bits: int
    block_size: int
    error: float


@dataclass(frozen=True)
class GroupReport:
    """Layers whose inputs share one scale, made of `scale_from` to the power of `alpha`.

    matmuls: their names. losses: about what plain rounding loses at each of `alphas`, in squares of the layers'
    outputs, None where that was not tried; both are empty where no scale was searched. salience: of the channels of
    their inputs, None where calibration did not run them.
    """

    matmuls: tuple[str, ...]
    alpha: float
    scale_from: str
    alphas: tuple[float, ...]
    losses: tuple[float | None, ...]
    salience: Salience | None


@dataclass(frozen=True)
class Report:
    """The outcome of `quantize`. Sizes in bytes, times in seconds; memory is None where it cannot be measured.

    carried: the files of the model that went with it into the output folder, relative to that.
    peak_memory_bytes is private memory: what mapped files take is not in it, resident_memory_bytes has both. given:
    what the command was given beside the recipe, by option;
    None where data in memory were among it. versions: of what computed, by package.
    """

    model: str
    output: str
    recipe: Recipe
    calibration: str
    matmuls: tuple[MatMulReport, ...]
    tables: tuple[TableReport, ...]
    groups: tuple[GroupReport, ...]
    kept: tuple[Refusal, ...]
    notes: tuple[str, ...]
    scaled_caches: int
    size_before_bytes: int
    size_after_bytes: int
    footprint_before: Footprint
    footprint_after: Footprint
    comparison: Comparison
    total_seconds: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    resident_memory_bytes: int | None = None
    carried: tuple[str, ...] = ()
    given: Mapping[str, str] | None = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON; None for what is no finite number."""
        values: dict[str, Any] = plain(self)
        return values

    def to_json(self) -> str:
        """Lists of numbers in one line each."""
        return _NUMBERS.sub(_in_one_line, json.dumps(self.to_dict(), indent=2, allow_nan=False))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises ReportFileError where it is none."""
        try:
            report: Report = built(cls, json.loads(text), "the report")
            report.check()
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise ReportFileError(f"this is no report that awq-onnx --json printed: {error}") from error
        return report

    def check(self) -> None:
        """Raises ValueError where it is not whole."""
        if not self.matmuls:
            raise ValueError("it has no matmuls")
        for group in self.groups:
            if not group.matmuls or len(group.losses) != len(group.alphas):
                raise ValueError("it has a group without matmuls, or with losses of other alphas")

    def command(self) -> list[str] | None:
        """The words of the command that does the same again; None where it had data from memory."""
        if self.model == IN_MEMORY or self.given is None:
            return None
        given = [word for name, value in self.given.items() for word in option(name, value)]
        return ["awq-onnx", self.model, *given, *self.recipe.arguments()]

    def rows(self) -> list[tuple[str, str]]:
        """The summary: what a person wants to know, a label and a text each."""
        rows = [
            (
                "Output",
                f"{self.output}, {size_text(self.size_after_bytes)} (original {size_text(self.size_before_bytes)})",
            ),
            *((("Carried over", ", ".join(self.carried)),) if self.carried else ()),
            ("Quantised", formats(self.matmuls, self.recipe)),
            *(("", f"{one.name} to {one.bits} bits, block size {one.block_size}") for one in self.tables),
            ("Scales", _scales(self.matmuls, self.recipe)),
        ]
        rows += [("Left alone", text) for text in grouped((one.reason, one.what) for one in self.kept)]
        searched = self.recipe.method not in UNSCALED
        unscaled = ((one.reason, one.name) for one in self.matmuls if one.reason is not None and searched)
        rows += [("Not scaled", text) for text in grouped(unscaled)]
        rows += [("", text) for text in _mul_advice(self.matmuls)]
        rows += [("Note", note) for note in self.notes]
        if self.scaled_caches:
            rows.append(
                (
                    "Caches",
                    f"{self.scaled_caches} values of the key/value cache are scaled: do not mix with the original's",
                )
            )
        rows += [
            ("Calibration", self.calibration),
            ("Layer error", f"{layer_ratio(self.matmuls):.2f} x that of plain rounding (geometric mean of ||X E||)"),
            ("Output error", _output_error(self.comparison)),
            ("Cost", f"{seconds_text(self.total_seconds)}{_memory(self)}"),
        ]
        return rows


BINS_IN_ALL, LEAST_BINS = 1 << 15, 16  # of channels of all groups; of one
_NUMBERS = re.compile(r"\[\n\s+([^][{}\"]+)\n\s+\]")  # a string holds no line break


def _in_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"


def matmul_reports(results: Iterable[GroupResult]) -> tuple[MatMulReport, ...]:
    """A row for each MatMul, in graph order."""
    return tuple(matmul_report(result, site) for result in results for site in result.sites)


def group_reports(results: Sequence[GroupResult], recipe: Recipe) -> tuple[GroupReport, ...]:
    """In graph order; where there are many, each with fewer bins of channels."""
    bins = max(LEAST_BINS, BINS_IN_ALL // len(results)) if results else BINS
    return tuple(_group_report(result, recipe, bins) for result in results)


def _group_report(result: GroupResult, recipe: Recipe, bins: int) -> GroupReport:
    return GroupReport(
        matmuls=tuple(site.site.name for site in result.sites),
        alpha=result.alpha,
        scale_from=result.formula,
        alphas=candidates_of(recipe).alphas if result.losses else (),
        losses=result.losses,
        salience=result.salience and result.salience.coarser(bins),
    )


def table_report(result: TableResult) -> TableReport:
    table = result.table
    return TableReport(table.name, table.V, table.D, result.bits, result.block_size, result.error)


def matmul_report(result: GroupResult, site: SiteResult) -> MatMulReport:
    """The row of one MatMul of a group."""
    refusal = result.folded if isinstance(result.folded, Refusal) and not result.multiplied else None
    return MatMulReport(
        name=site.site.name,
        K=site.site.K,
        N=site.site.N,
        bits=site.bits,
        block_size=site.block_size,
        alpha=result.alpha,
        scale_from=result.formula,
        folded_into=_places(result),
        fold=_kind(result),
        reason=refusal.reason if refusal else None,
        blocked_by=refusal.what if refusal else None,
        mul_gain=None if refusal is None or result.mul_loss is None else float(np.sqrt(result.mul_loss)),
        error=_relative(site.loss, site.energy),
        plain_error=_relative(site.plain_loss, site.energy),
    )


def _places(result: GroupResult) -> str | None:
    if result.multiplied:
        return "a Mul on its input"
    return None if isinstance(result.folded, Refusal) else ", ".join(one.name for one in result.folded)


def _kind(result: GroupResult) -> str | None:
    if result.multiplied:
        return "Mul"
    if isinstance(result.folded, Refusal):
        return None
    return "norm gain" if isinstance(result.folded[0], Gain) else "MatMul"


def _relative(loss: float, energy: float) -> float:
    return float(np.sqrt(max(loss, 0) / energy)) if energy > 0 else 0.0


def _scales(matmuls: Iterable[MatMulReport], recipe: Recipe) -> str:
    """How many MatMuls have their scale where."""
    folded = [one for one in matmuls if one.fold is not None]
    if recipe.method in UNSCALED:
        return f"none, as method {recipe.method} has it"
    if not folded:
        return "none could be folded; the weights are rounded as they are"
    counts = Counter(one.fold for one in folded)
    parts = ", ".join(f"{count} into {_PLACES[kind]}" for kind, count in counts.items() if kind is not None)
    added = "Mul nodes added" if "Mul" in counts else "no node added"
    made = Counter(one.scale_from for one in folded if one.alpha > 0) if recipe.scale_from == EVERY_FORMULA else {}
    formulas = "; from " + ", ".join(f"{name} {count}" for name, count in made.items()) if made else ""
    return f"folded: {parts}; mean alpha {np.mean([one.alpha for one in folded]):.2f}{formulas}; {added}"


_PLACES = {"norm gain": "norm gains", "MatMul": "the MatMul before", "Mul": "a Mul on the input"}
MUL_HELPS = 0.97  # of the error: below that a Mul is worth telling of


def _mul_advice(matmuls: Iterable[MatMulReport]) -> list[str]:
    """What --allow-mul would bring, where it would bring something."""
    gains = [one.mul_gain for one in matmuls if one.mul_gain is not None and one.mul_gain < MUL_HELPS]
    if not gains:
        return []
    mean = float(np.exp(np.mean(np.log(np.maximum(gains, 1e-6)))))
    return [f"--allow-mul would bring {len(gains)} of them to {mean:.2f} x the error, with a Mul at run time"]


def grouped(refused: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each reason, with how many nodes it holds for and the first of them."""
    return [
        f"{names[0]}: {reason}" if len(names) == 1 else f"{len(names)} layers, {names[0]} first: {reason}"
        for reason, names in by_reason(refused).items()
    ]


def by_reason(refused: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that each reason holds for."""
    reasons: dict[str, list[str]] = {}
    for reason, name in refused:
        reasons.setdefault(reason, []).append(name)
    return reasons


def seconds_text(seconds: float) -> str:
    """For people: 9.6 s, or 96 s."""
    return f"{seconds:{'.1f' if seconds < 10 else '.0f'}} s"


def layer_ratio(matmuls: Iterable[MatMulReport]) -> float:
    ratios = [one.error / one.plain_error for one in matmuls if one.plain_error > 0 and one.error > 0]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0


def _output_error(comparison: Comparison) -> str:
    if comparison.kl_mean is None:
        turned = comparison.cosine_distance
        distance = f", cosine distance {turned:.5f}" if turned is not None else ""
        return f"{comparison.relative_error:.4f} relative{distance}, over {comparison.windows} held-out samples"
    error = f" +-{comparison.kl_se:.2g}" if comparison.kl_se is not None else ""
    text = comparison.perplexity_original is not None  # else classes of a picture, a sound, a whole text
    unit, choice = ("token", "next token") if text else ("answer", "answer")
    return (
        f"KL {comparison.kl_mean:.2g}{error} nats per {unit}, same {choice} {comparison.top1:.1%} "
        f"({comparison.tokens} held-out {unit}s)"
    )


def formats(matmuls: Sequence[MatMulReport], recipe: Recipe) -> str:
    """210 MatMuls to 4 bits, 1 more to 8 bits, block size 32, with zero points, accuracy level 4."""
    first, *others = Counter(one.bits for one in matmuls).most_common()
    counts = [f"{first[1]} MatMuls to {first[0]} bits", *(f"{count} more to {bits} bits" for bits, count in others)]
    sizes = sorted({one.block_size for one in matmuls})
    blocks = f"block size{'s' * (len(sizes) > 1)} {', '.join(map(str, sizes))}"
    if recipe.format == QDQ and all(one.block_size >= one.K for one in matmuls):
        blocks = "a scale for each column"
    elif recipe.block_size == WHOLE_COLUMN and not recipe.chooses_formats:
        blocks += ", most with a scale for each column"
    kind = "symmetric" if recipe.symmetric else "with zero points"
    nodes = "DequantizeLinear (QDQ)" if recipe.format == QDQ else f"accuracy level {recipe.accuracy_level}"
    target = [] if recipe.target == CPU else [f"for {recipe.target}"]
    return ", ".join([*counts, blocks, kind, nodes, *target])


def _memory(report: Report) -> str:
    if report.peak_memory_bytes is None or report.resident_memory_bytes is None:
        return ""
    return (
        f", peak memory {size_text(report.peak_memory_bytes)} "
        f"({size_text(report.resident_memory_bytes)} with the pages of mapped files)"
    )
