"""A comparison as people read it, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq_onnx.calibrate import given
from awq_onnx.cli.display import two_columns
from awq_onnx.comparison import Comparison, WorstToken
from awq_onnx.errors import CalibrationError, MissingPackageError
from awq_onnx.machine import size_text
from awq_onnx.pair import PairReport
from awq_onnx.speed import Speed

SHOWN = 5  # of the worst tokens
CHARACTERS, TOKENS = 44, 8  # of the text before such a token, or token ids: they fit into a line of 80 characters
NO_CHARACTER = "\ufffd"  # a piece of one, decoded
EMPTY = ("", "")
Rows = list[tuple[str, str]]


class Reader:
    """Tells token ids as text; without a tokenizer, and for pieces of characters, as numbers."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer

    @property
    def can_read(self) -> bool:
        return self._tokenizer is not None

    def text(self, ids: Sequence[int]) -> str:
        decoded: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return decoded

    def context(self, one: WorstToken) -> str:
        """Where it is, for people."""
        if not one.context:
            return f"in sample {one.window}"
        if not self.can_read:
            return f"after the tokens ... {' '.join(map(str, one.context[-TOKENS:]))}"
        text = self.text(one.context).strip(NO_CHARACTER)
        return f"after {text!r}" if len(text) <= CHARACTERS else f"after ...{text[-CHARACTERS:]!r}"

    def choice(self, token: int, one: WorstToken) -> str:
        if not one.context:
            return f"class {token}"
        text = self.text([token]) if self.can_read else NO_CHARACTER
        return f"token {token}" if NO_CHARACTER in text or not text else repr(text)


def reader(original: Path, tokenizer: Path | None) -> Reader:
    """With the tokenizer of the model, where there is one. Raises CalibrationError, MissingPackageError where the one
    that is named cannot be read.
    """
    try:
        return Reader(given.load_tokenizer(original, tokenizer))
    except (CalibrationError, MissingPackageError):
        if tokenizer is not None:
            raise
        return Reader()


def as_json(report: PairReport, original: Path, quantized: Path, reader: Reader) -> str:
    """Everything, the worst tokens with their text where a tokenizer tells it."""
    values = report.to_dict()
    for name, path in (("original", original), ("quantized", quantized)):
        values[name]["path"] = str(path)
    for one in values["comparison"]["worst"]:
        if reader.can_read and one["context"]:
            texts = {name: reader.text([one[name]]) for name in ("original", "quantized")}
            one["text"] = {"context": reader.text(one["context"]), **texts}
    return json.dumps(values, indent=2)


def as_text(report: PairReport, original: Path, quantized: Path, reader: Reader) -> str:
    comparison = report.comparison
    rows = [
        ("Original", str(original)),
        ("Quantised", str(quantized)),
        ("Compared on", report.data),
        EMPTY,
        *_distances(comparison),
        EMPTY,
        *_side_by_side(report),
    ]
    worst = [line for one in comparison.worst[:SHOWN] for line in _worst(one, reader)]
    return two_columns([*rows, EMPTY, *worst] if worst else rows)


def _distances(comparison: Comparison) -> Rows:
    turned = comparison.cosine_distance
    cosine = f", cosine distance {turned:.3g}" if turned is not None else ""
    error = ("Output error", f"{comparison.relative_error:.3g} relative{cosine}")
    if comparison.kl_mean is None:
        return [error]
    unit, answer = ("sample", "class") if comparison.perplexity_original is None else ("token", "next token")
    se, median = "", ""
    if comparison.kl_se is not None:
        se, median = f" +-{comparison.kl_se:.2g}", f", median of the windows {comparison.kl_median:.3g}"
    return [
        ("KL", f"{comparison.kl_mean:.3g}{se} nats per {unit}{median}"),
        ("Agreement", f"the same likeliest {answer} for {comparison.top1:.1%} of {comparison.tokens} {unit}s"),
        error,
    ]


def _side_by_side(report: PairReport) -> Rows:
    one, other, comparison = report.original, report.quantized, report.comparison
    table = [("", "original", "quantised", "")]
    table.append(
        _beside("Size", one.size_bytes, other.size_bytes, size_text(one.size_bytes), size_text(other.size_bytes))
    )
    first, second = comparison.perplexity_original, comparison.perplexity_quantized
    if first is not None and second is not None:
        table.append(_beside("Perplexity", first, second, f"{first:.2f}", f"{second:.2f}"))
    if one.speed is not None and other.speed is not None:
        label = "Decoding" if one.speed.decoding else "Speed"
        speeds = one.speed.per_second, other.speed.per_second
        table.append(_beside(label, *speeds, _speed(one.speed), _speed(other.speed), ", roughly"))
    widths = [max(len(line[at]) for line in table) for at in (1, 2)]
    return [(label, f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}") for label, a, b, c in table]


def _beside(
    label: str, one: float, other: float, text: str, other_text: str, more: str = ""
) -> tuple[str, str, str, str]:
    return label, text, other_text, f"{other / one:.2f} x{more}"


def _speed(speed: Speed) -> str:
    return f"{speed.per_second:.{0 if speed.per_second >= 100 else 1}f} {speed.unit}/s"


def _worst(one: WorstToken, reader: Reader) -> Rows:
    return [
        ("Worst", f"KL {one.kl:.3g} {reader.context(one)}:"),
        (
            "Worst",
            f"original {reader.choice(one.original, one)} {one.original_probability:.0%}, "
            f"quantised {reader.choice(one.quantized, one)} {one.quantized_probability:.0%}",
        ),
    ]
