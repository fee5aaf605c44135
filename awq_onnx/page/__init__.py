"""The page of a quantisation: one file of HTML that is read offline, with its charts and all that they need inside.

    awq_onnx.write_page(report, "report.html")

Altair (Vega-Lite) draws, since its charts are data that a reader can point at, and its colours can be the style
sheet's; vl-convert has its JavaScript, so that nothing is fetched. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from awq_onnx.errors import MissingPackageError, OutputError

if TYPE_CHECKING:
    from awq_onnx.page.content import Content
    from awq_onnx.report import Report

PACKAGES = {"altair": "altair", "jinja2": "jinja2", "vl_convert": "vl-convert-python"}  # module: what pip calls it
SUFFIXES = (".html", ".htm")


def check(place: Path, *, overwrite: bool, beside: Iterable[Path] = (), made: Path | None = None) -> None:
    """Whether a page can be made there, before time is spent. beside: files that the same command reads or writes.
    made: the folder that it makes.

    Raises MissingPackageError, OutputError.
    """
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(f"a report needs {', '.join(missing)}: pip install 'awq-onnx[report]'")
    if place.suffix.lower() not in SUFFIXES:
        raise OutputError(f"the report {place} is a page of HTML; give it a name that ends in {SUFFIXES[0]}")
    if place.parent == made and not place.parent.exists():
        return
    if not place.parent.is_dir():
        raise OutputError(f"the folder {place.parent} for the report does not exist")
    if place.is_dir():
        raise OutputError(f"{place} is a folder, where the report has to be written; choose another name")
    if place.resolve() in {one.resolve() for one in beside}:
        raise OutputError(f"the report {place} has the name of another file of this command; choose another name")
    if place.exists() and not overwrite:
        raise OutputError(f"{place} exists already; choose another name, or overwrite it with --force")
    if not os.access(place.parent, os.W_OK):
        raise OutputError(f"cannot write {place}: its folder is not yours to write to; choose another")


def render(content: Content) -> str:
    """The page. Raises MissingPackageError."""
    from awq_onnx.page.html import html_of

    return html_of(content)


def write_page(report: Report, place: str | os.PathLike[str]) -> None:
    """Write the page of a run, whole or not at all. Raises MissingPackageError, OutputError."""
    from awq_onnx.page.content import Content

    write(Path(place), Content.of(report))


def write(place: Path, content: Content) -> None:
    """Put the page there, whole or not at all. Raises MissingPackageError, OutputError."""
    html, unfinished = render(content), place.with_name(f".{place.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(place)
    except OSError as error:
        raise OutputError(f"cannot write the report {place}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
