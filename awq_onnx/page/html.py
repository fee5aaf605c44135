"""The page of its template, its style sheet, its script and the charts."""

from __future__ import annotations

import re
from functools import cache

import jinja2
import vl_convert
from markupsafe import Markup

from awq_onnx.page import charts, summary
from awq_onnx.page.content import Content
from awq_onnx.page.data import data_of

TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "style.css", "page.js"


def html_of(content: Content) -> str:
    """Whatever a model's names hold, it is text in the page, never markup or script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("awq_onnx.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": summary.percent,
        "megabytes": summary.megabytes,
        "filename": _filename,
        "breakable": _breakable,
        "setting": _setting,
    }
    data = data_of(content)
    return environment.get_template(TEMPLATE).render(
        content=content,
        summary=summary.summary_of(content),
        charts={name: chart for name, chart in charts.specifications().items() if data[name]},
        data=data,
        style=_part(environment, STYLE),
        script=_part(environment, SCRIPT),
        library=_library(),
    )


def _filename(path: str) -> str:
    return re.split(r"[/\\\\]", path)[-1]


def _breakable(name: str) -> Markup:
    """A name that a line may end in, after a slash or a dot."""
    return Markup("<wbr>").join(re.split(r"(?<=[/.])", name))  # which escapes the parts


def _setting(value: object) -> str:
    """A value of a recipe."""
    if isinstance(value, tuple):
        return ", ".join(value) or "–"
    return "–" if value is None else str(value)


def _part(environment: jinja2.Environment, name: str) -> str:
    """A file of ours beside the template, as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed, about 0.9 MB: all that the script beside it calls."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
