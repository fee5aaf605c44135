"""What the nodes of a quantised model say of themselves: for Netron, and for `inspect`, which reads it again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from awq_onnx.report import MatMulReport

ALPHA = "awq_onnx.alpha"
SCALE_FROM = "awq_onnx.scale_from"
FOLDED_INTO = "awq_onnx.folded_into"
ERROR = "awq_onnx.error"
PLAIN_ERROR = "awq_onnx.error_of_plain_rounding"
DIVIDED = "awq_onnx.divided_by_the_scale_of"  # on the node that absorbed it
VERSION, RECIPE = "awq_onnx.version", "awq_onnx.recipe"  # of the model
NOTHING = re.compile(r"nothing: (?P<reason>.*?) \((?P<blocked_by>.*)\)", re.DOTALL)  # in the place of a node's name
SCALES = {
    "mean": "mean|x|^{alpha:g}",
    "max": "max|x|^{alpha:g} / max|w|^{rest:g}",
    "weights": "mean|x|^{alpha:g} / mean(|w| / max|w|)^{rest:g}",
}


@dataclass(frozen=True)
class Label:
    """What is known of one quantised layer; the fields are those of `report.MatMulReport`."""

    alpha: float
    scale_from: str
    folded_into: str | None
    reason: str | None
    blocked_by: str | None
    error: float
    plain_error: float

    @classmethod
    def of(cls, row: MatMulReport) -> Label:
        return cls(**{one.name: getattr(row, one.name) for one in fields(cls)})

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Label | None:
        """The label that `metadata` made; None where there is none, or not a whole one."""
        try:
            into = metadata[FOLDED_INTO]
            refused = NOTHING.fullmatch(into)
            return cls(
                alpha=float(metadata[ALPHA]),
                scale_from=metadata[SCALE_FROM],
                folded_into=None if refused else into,
                reason=refused["reason"] if refused else None,
                blocked_by=refused["blocked_by"] if refused else None,
                error=float(metadata[ERROR]),
                plain_error=float(metadata[PLAIN_ERROR]),
            )
        except (KeyError, ValueError):
            return None

    def metadata(self) -> dict[str, str]:
        """The properties of the node."""
        return {
            ALPHA: f"{self.alpha:g}",
            SCALE_FROM: self.scale_from,
            FOLDED_INTO: self.folded_into or f"nothing: {self.reason} ({self.blocked_by})",
            ERROR: f"{self.error:.5f}",
            PLAIN_ERROR: f"{self.plain_error:.5f}",
        }

    def sentences(self, bits: int, block_size: int, *, zero_points: bool) -> str:
        """The doc string of the node, for a person who never heard of the properties. In lines: Netron breaks none."""
        zeros = "with zero points" if zero_points else "without zero points"
        return "\n".join(
            (
                f"{bits}-bit weight, in blocks of {block_size} along K {zeros}.",
                *self._scale(),
                f"||X E|| / ||X W|| = {self.error:.3g}; plain rounding {self.plain_error:.3g}.",
            )
        )

    def _scale(self) -> tuple[str, ...]:
        if self.alpha == 0:
            return ("Its input is not scaled.",)
        scale = SCALES[self.scale_from].format(alpha=self.alpha, rest=1 - self.alpha)
        return ("Input divided by s, weight times s; s is folded into", f"{self.folded_into},", f"s = {scale}.")


def divided(readers: Sequence[str]) -> dict[str, str]:
    """The properties of a node that absorbed the scale of these layers."""
    return {DIVIDED: ", ".join(readers)}
