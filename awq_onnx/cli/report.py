"""Make the page of a quantisation again: of the JSON that it printed, or of the model that it made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from awq_onnx import page
from awq_onnx.cli.display import show
from awq_onnx.cli.options import NOTHING, PROG, Parser
from awq_onnx.errors import AwqOnnxError, ReportFileError

if TYPE_CHECKING:
    from awq_onnx.page.content import Content

MODEL_SUFFIX = ".onnx"
EPILOG = """\
examples:
  awq-onnx model.onnx --json > model.json; awq-onnx report model.json       all that the run knew
  awq-onnx report model_int4.onnx -o report.html                            what the model tells of itself

exit codes: those of awq-onnx --help; 3 also where SOURCE cannot be made a page of
"""


def parser() -> argparse.ArgumentParser:
    parser = Parser(f"{PROG} report", "One page of HTML about a quantisation, to be read offline.", EPILOG)
    parser.add_argument(
        "source", type=Path, help="the JSON that awq-onnx --json printed, or a .onnx file that awq-onnx made"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page (default: SOURCE with the ending .html)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the page if it exists")
    return parser


def run(arguments: argparse.Namespace) -> int:
    place = _place(arguments)
    page.check(place, overwrite=arguments.force, beside=[arguments.source])
    page.write(place, _content(arguments.source))
    show(str(place))
    return 0


def interrupted(arguments: argparse.Namespace) -> str:  # noqa: ARG001
    return NOTHING


def _place(arguments: argparse.Namespace) -> Path:
    given: Path | None = arguments.output
    source: Path = arguments.source
    if not source.name:
        raise ReportFileError(f"{source} is a folder; name the JSON of a run, or a .onnx file")
    return given or source.with_suffix(page.SUFFIXES[0])


def _content(source: Path) -> Content:
    from awq_onnx.page.content import Content
    from awq_onnx.report import Report

    if source.suffix.lower() == MODEL_SUFFIX:
        from awq_onnx.page.model import content_of

        return content_of(source)
    try:
        return Content.of(Report.from_json(source.read_text(encoding="utf-8")))
    except OSError as error:
        raise ReportFileError(f"{source} cannot be read: {error.strerror}") from error
    except (AwqOnnxError, UnicodeDecodeError) as error:
        raise ReportFileError(f"{source} cannot be made a page of: {error}") from error
