"""What a page tells, wherever that is known from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from awq_onnx._version import __version__
from awq_onnx.comparison import Comparison
from awq_onnx.footprint import Footprint
from awq_onnx.passes.sites import Refusal
from awq_onnx.recipe import Recipe
from awq_onnx.report import GroupReport, MatMulReport, Report, TableReport


@dataclass(frozen=True)
class Content:
    """The fields are those of a `Report`; None where the source does not tell. command: a line of a shell."""

    output: str
    size_after_bytes: int
    footprint_after: Footprint
    matmuls: tuple[MatMulReport, ...]
    recipe: Recipe
    version: str = __version__
    tables: tuple[TableReport, ...] = ()
    groups: tuple[GroupReport, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None
    command: str | None = None
    calibration: str | None = None
    kept: tuple[Refusal, ...] | None = None
    size_before_bytes: int | None = None
    footprint_before: Footprint | None = None
    comparison: Comparison | None = None
    total_seconds: float | None = None
    peak_memory_bytes: int | None = None

    @classmethod
    def of(cls, report: Report) -> Content:
        """All of a report."""
        values = {name: getattr(report, name) for name in cls.__dataclass_fields__ if name != "command"}
        command = report.command()
        return cls(**values, command=None if command is None else shlex.join(command))
