"""What an error inside a model does to its outputs: at these, or at what the layer reads that makes the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from awq_onnx import vocabulary
from awq_onnx.calibrate.feeds import Feed, Signature
from awq_onnx.codec import Float32
from awq_onnx.comparison import real_rows
from awq_onnx.likelihood import Rows, log_probabilities, mean_kl
from awq_onnx.passes.facts import facts_of
from awq_onnx.passes.sites import Site, maker_of
from awq_onnx.store import OpenedModel
from awq_onnx.vocabulary import VocabularySample


def large_head(opened: OpenedModel, wanted: Signature) -> Site | None:
    """The layer whose output the logits are, but for a bias or a type, where its columns are many."""
    logits = next(value for value in opened.model.graph.outputs if value.name == wanted.logits)
    head = maker_of(logits, facts_of(opened.model))
    return head if head is not None and head.N > vocabulary.SAMPLE_SIZE else None


class Judge(Protocol):
    """What an error does to what is looked at, in one window."""

    def expecting(self, values: Feed) -> Judge:
        """The judge who takes these for right."""

    def loss(self, values: Feed) -> float | None:
        """With these values; None where there is nothing to compare."""


@dataclass(frozen=True)
class OutputJudge:
    """Of outputs. expected: of each that holds floats rows (R, C); of logits the logarithms of probabilities."""

    outputs: Sequence[str]
    window: Feed
    wanted: Signature
    expected: tuple[Rows, ...] = ()

    def expecting(self, values: Feed) -> OutputJudge:
        rows = self._rows(values)
        if rows and self._are_logits(rows[0]):
            rows = (log_probabilities(rows[0]),)
        return replace(self, expected=rows)

    def loss(self, values: Feed) -> float | None:
        if not self.expected:
            return None
        rows = self._rows(values)
        if self._are_logits(rows[0]):
            return mean_kl(self.expected[0], rows[0])
        both = [
            (one, other, np.isfinite(one) & np.isfinite(other)) for one, other in zip(self.expected, rows, strict=True)
        ]
        energy = sum(float(np.square(one[finite]).sum()) for one, _, finite in both)
        error = sum(float(np.square(one[finite] - other[finite]).sum()) for one, other, finite in both)
        return error / (energy or 1.0)

    def _rows(self, values: Feed) -> tuple[Rows, ...]:
        made = (values[name] for name in self.outputs)
        return tuple(real_rows(one, self.window, self.wanted) for one in made if one.dtype.kind == "f")

    def _are_logits(self, rows: Rows) -> bool:
        return self.wanted.logits is not None and rows.shape[1] > 1


@dataclass(frozen=True)
class HeadJudge:
    """Of what a layer reads that makes logits of it. columns: those of its weight that belong to the tokens of
    `sample`, float32 (K, S). expected: rows (R, K).
    """

    head: Site
    window: Feed
    wanted: Signature
    sample: VocabularySample
    columns: Float32
    expected: Rows | None = None

    @classmethod
    def of(cls, head: Site, values: Feed, window: Feed, wanted: Signature, opened: OpenedModel) -> HeadJudge:
        """values: that and the logits, without an error."""
        sample = VocabularySample.of(real_rows(values[wanted.logits or ""], window, wanted), vocabulary.SAMPLE_SIZE)
        weight = opened.read(head.tensor)
        columns = weight[sample.ids].T if head.transposed else weight[:, sample.ids]
        return cls(head, window, wanted, sample, np.float32(head.factor) * columns.astype(np.float32))

    def expecting(self, values: Feed) -> HeadJudge:
        return replace(self, expected=self._rows(values))

    def loss(self, values: Feed) -> float:
        assert self.expected is not None, "a judge expects something before it judges"
        return self.sample.mean_kl((self._rows(values) - self.expected) @ self.columns)

    def _rows(self, values: Feed) -> Rows:
        return real_rows(values[self.head.input.name or ""], self.window, self.wanted)
