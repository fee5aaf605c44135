"""What the page says in words and tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from awq_onnx.comparison import Comparison
from awq_onnx.machine import size_text
from awq_onnx.page.charts import KINDS
from awq_onnx.page.content import Content
from awq_onnx.recipe import UNSCALED
from awq_onnx.report import MatMulReport, by_reason, formats, layer_ratio, seconds_text

WORST = 12  # layers that are shown first


@dataclass(frozen=True)
class Figure:
    """A number that matters first: what it is, the number, what to know of it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Kind:
    """A line of the table of bytes; before: None where that is not known."""

    name: str
    colour: str
    before: int | None
    after: int


@dataclass(frozen=True)
class Summary:
    """figures: the header. formats: what the layers are quantised to. kinds: where the bytes went. worst: the layers
    with the largest error, that first. left, unscaled: a reason each, with the names that it holds for; left None
    where that is not known. searched: whether scales were.
    """

    figures: tuple[Figure, ...]
    formats: str
    kinds: tuple[Kind, ...]
    worst: tuple[MatMulReport, ...]
    left: dict[str, list[str]] | None
    unscaled: dict[str, list[str]]
    searched: bool


def summary_of(content: Content) -> Summary:
    searched = content.recipe.method not in UNSCALED
    unscaled = [(one.reason, one.name) for one in content.matmuls if one.reason is not None and searched]
    kept = content.kept
    return Summary(
        figures=tuple(_figures(content)),
        formats=formats(content.matmuls, content.recipe),
        kinds=_kinds(content),
        worst=tuple(sorted(content.matmuls, key=lambda one: -one.error)[:WORST]),
        left=None if kept is None else by_reason((one.reason, one.what) for one in kept),
        unscaled=by_reason(unscaled),
        searched=searched,
    )


def percent(share: float) -> str:
    """Two digits or more: 0.83%, 8.3%, 83.1%."""
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.{1 if size_bytes >= 1e5 else 3}f}" if size_bytes else "–"


def _figures(content: Content) -> list[Figure]:
    before, after = content.size_before_bytes, content.size_after_bytes
    smaller = f"{before / after:.1f} times smaller than {size_text(before)}" if before else "graph and data file"
    figures = [Figure("Size", size_text(after), smaller)]
    if content.comparison is not None:
        figures += _measured(content.comparison)
    ratio = layer_ratio(content.matmuls)
    figures.append(Figure("Layer error", f"{ratio:.2f} ×", "that of plain rounding, geometric mean"))
    figures.append(Figure("Layers", str(len(content.matmuls)), "MatMuls that are quantised"))
    if content.total_seconds is not None:
        peak = content.peak_memory_bytes
        note = f"{size_text(peak)} of memory at the peak" if peak else "the whole run"
        figures.append(Figure("Time", seconds_text(content.total_seconds), note))
    return figures


def _measured(comparison: Comparison) -> list[Figure]:
    """How far the outputs are from the original's, on what was held out."""
    if comparison.kl_mean is None or comparison.top1 is None:
        distance = comparison.cosine_distance
        note = f"relative, over {comparison.windows} held-out samples"
        figures = [Figure("Output error", percent(comparison.relative_error), note)]
        return figures if distance is None else [*figures, Figure("1 − cosine", f"{distance:.4f}", "mean over tokens")]
    text = comparison.perplexity_original is not None
    unit, choice = ("token", "Same next token") if text else ("answer", "Same answer")
    spread = f"± {comparison.kl_se:.2g} " if comparison.kl_se is not None else ""
    figures = [
        Figure("KL divergence", f"{comparison.kl_mean:.2g}", f"{spread}nats per {unit}, mean"),
        Figure(choice, percent(comparison.top1), f"of {comparison.tokens} held-out {unit}s"),
    ]
    if comparison.perplexity_original is not None and comparison.perplexity_quantized is not None:
        note = f"original {comparison.perplexity_original:.2f}"
        figures.append(Figure("Perplexity", f"{comparison.perplexity_quantized:.2f}", note))
    return figures


def _kinds(content: Content) -> tuple[Kind, ...]:
    before = asdict(content.footprint_before) if content.footprint_before else {}
    after = asdict(content.footprint_after)
    kinds = (Kind(name, colour, before.get(kind), after[kind]) for kind, (colour, name) in KINDS.items())
    return tuple(kind for kind in kinds if kind.before or kind.after)
