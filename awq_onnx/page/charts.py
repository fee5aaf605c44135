"""The charts of the page: Vega-Lite specifications without their data, which the page has by name.

Colours are those of the style sheet, by their CSS names, so that they follow light and dark. Charts with a parameter
`group` show the group of layers that the reader chose.
"""

from __future__ import annotations

from typing import Any

import altair as alt

OURS, PLAIN = "var(--ours)", "var(--plain)"
HEIGHT, BARS_HEIGHT = 260, 76
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif"  # as in the style sheet
FEW = 5  # ticks of an axis, about
WORST = 1.25  # of losses: what is above it does not matter
KINDS = {  # of bytes: the colour and the name of each field of a `Footprint`
    "codes": ("var(--kind-1)", "codes of layers"),
    "scales": ("var(--kind-2)", "scales"),
    "zero_points": ("var(--kind-3)", "zero points"),
    "layers": ("var(--kind-4)", "layers in floats"),
    "lm_head": ("var(--kind-5)", "lm_head"),
    "embedding": ("var(--kind-6)", "embedding"),
    "rest": ("var(--kind-7)", "everything else"),
}


def specifications() -> dict[str, dict[str, Any]]:
    """Every chart by its name; it reads the data of that name."""
    charts = {
        "overview": overview(),
        "channels": channels(),
        "losses": losses(),
        "errors": errors(),
        "footprint": footprint(),
    }
    return {
        name: _styled(chart, BARS_HEIGHT if name == "footprint" else HEIGHT).to_dict() for name, chart in charts.items()
    }


def overview() -> Any:
    """How far the loudest channel of each group stands out; a click chooses the group."""
    base = alt.Chart(alt.NamedData("overview")).encode(x=_in_order("groups of layers"))
    pick = alt.selection_point(name="pick", fields=["id"], on="click", empty=False)
    points = base.transform_fold(["before", "after"], as_=["when", "peak"]).mark_circle(size=42, opacity=1)
    return alt.layer(
        base.mark_rule(color="var(--line)").encode(y=alt.Y("before:Q").scale(type="log"), y2="after:Q"),
        base.transform_filter("datum.id == group").mark_rule(color="var(--ours)", strokeDash=[3, 3]),
        points.encode(
            y=alt.Y("peak:Q", title="loudest channel / median", axis=_decades("~s")).scale(type="log"),
            color=_two("when", before="before scaling", after="after"),
        ),
        base.mark_rule(strokeWidth=8, opacity=0)  # what can be pointed at, over the whole height
        .encode(
            tooltip=[
                alt.Tooltip("label:N", title="layers"),
                alt.Tooltip("before:Q", format=".3~s"),
                alt.Tooltip("after:Q", format=".3~s"),
                alt.Tooltip("alpha:Q", format=".2f"),
            ]
        )
        .add_params(pick),
    ).add_params(_group())


def channels() -> Any:
    """mean|x| of every channel of the chosen group, before and after its scale."""
    return (
        alt.Chart(alt.NamedData("channels"))
        .transform_filter("datum.id == group")
        .transform_flatten(["channel", "before", "after"])
        .transform_fold(["before", "after"], as_=["when", "activation"])
        .transform_filter("datum.activation > 0")
        .mark_line(strokeWidth=1.4, interpolate="step")
        .encode(
            x=alt.X("channel:Q", title="input channel", axis=alt.Axis(grid=False), scale=alt.Scale(nice=False)),
            y=alt.Y("activation:Q", title="mean |x|", axis=_decades("~g")).scale(type="log"),
            color=_two("when", before="before scaling", after="after"),
            tooltip=[
                alt.Tooltip("channel:Q", title="channel"),
                alt.Tooltip("before:Q", format=".3~g"),
                alt.Tooltip("after:Q", format=".3~g"),
            ],
        )
        .add_params(_group())
    )


def losses() -> Any:
    """The loss at each alpha over that at 0: of all groups in the back, of the chosen one in front."""
    base = (
        alt.Chart(alt.NamedData("losses"))
        .transform_flatten(["alpha", "loss"])
        .transform_filter(f"datum.loss < {WORST}")
        .encode(
            x=alt.X("alpha:Q", title="alpha", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(grid=False, tickCount=FEW)),
            y=alt.Y("loss:Q", title="loss / loss without a scale", scale=alt.Scale(domain=[0, WORST])),
            detail="id:N",
        )
    )
    tooltip = [
        alt.Tooltip("label:N", title="layers"),
        alt.Tooltip("alpha:Q", format=".2f"),
        alt.Tooltip("loss:Q", format=".3f"),
    ]
    chosen = base.transform_filter("datum.id == group").encode(tooltip=tooltip)
    return alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.45, color=PLAIN),
        base.transform_filter("abs(datum.alpha - datum.chosen) < 1e-6")
        .mark_circle(size=18, opacity=0.8, color=PLAIN)
        .encode(tooltip=tooltip),
        chosen.mark_line(strokeWidth=2, color=OURS),
        chosen.mark_circle(size=40, opacity=1, color=OURS),
        chosen.transform_filter("abs(datum.alpha - datum.chosen) < 1e-6").mark_point(
            size=160, strokeWidth=2, color=OURS
        ),
    ).add_params(_group())


def errors() -> Any:
    """||X E|| / ||X W|| of every layer: plain rounding, and ours."""
    base = alt.Chart(alt.NamedData("errors")).encode(x=_in_order("layers"))
    points = base.transform_fold(["plain", "ours"], as_=["which", "error"]).mark_circle(size=30, opacity=1)
    return alt.layer(
        base.mark_rule(color="var(--line)").encode(y="plain:Q", y2="ours:Q"),
        points.encode(
            y=alt.Y(
                "error:Q", title="relative error", axis=alt.Axis(format="~%", tickCount=FEW), scale=alt.Scale(zero=True)
            ),
            color=_two("which", plain="plain rounding", ours="awq-onnx"),
            tooltip=[
                alt.Tooltip("name:N", title="layer"),
                alt.Tooltip("plain:Q", format=".2%", title="plain rounding"),
                alt.Tooltip("ours:Q", format=".2%", title="awq-onnx"),
            ],
        ),
    )


def footprint() -> Any:
    """Bytes by kind, before and after."""
    names, colours = [name for _, name in KINDS.values()], [colour for colour, _ in KINDS.values()]
    return (
        alt.Chart(alt.NamedData("footprint"))
        .mark_bar(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("megabytes:Q", title="MB", axis=alt.Axis(format="~s", tickCount=FEW)),
            y=alt.Y("when:N", title=None, sort=None, axis=alt.Axis(labelFontSize=13)),
            order=alt.Order("order:Q"),
            color=alt.Color("kind:N", legend=None, scale=alt.Scale(domain=names, range=colours)),
            tooltip=["kind:N", alt.Tooltip("megabytes:Q", format=",.1f", title="MB"), "when:N"],
        )
    )


def _in_order(what: str) -> alt.X:
    axis = alt.Axis(tickMinStep=1, grid=False)
    return alt.X("id:Q", title=f"{what}, in the order of the graph", axis=axis, scale=alt.Scale(nice=False))


def _decades(form: str) -> alt.Axis:
    """A logarithmic axis with lines and labels at 0.1, 1, 10 alone."""
    whole = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"
    shown = f"{whole} ? datum.label : ''"
    colour = {"condition": {"test": whole, "value": "var(--faint)"}, "value": "transparent"}
    return alt.Axis(tickCount=FEW, format=form, labelExpr=shown, gridColor=colour, tickColor=colour)


def _group() -> alt.Parameter:
    return alt.param(name="group", value=0)


def _two(field: str, **named: str) -> alt.Color:
    """Plain grey for the first of two series, the accent for the second. named: what each value is called."""
    labels = " : ".join(f"datum.value == '{value}' ? '{name}'" for value, name in named.items()) + " : ''"
    legend = alt.Legend(title=None, orient="top", labelExpr=labels, symbolType="circle", symbolSize=60)
    return alt.Color(f"{field}:N", legend=legend, scale=alt.Scale(domain=list(named), range=[PLAIN, OURS]))


def _styled(chart: Any, height: int) -> Any:
    return (
        chart.properties(
            width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
        )
        .configure(background="transparent", padding=0, font=FONT)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="var(--soft)",
            titleColor="var(--soft)",
            gridColor="var(--faint)",
            domainColor="var(--line)",
            tickColor="var(--line)",
            labelFontSize=11,
            titleFontSize=12,
            titleFontWeight="normal",
            labelOverlap=True,
        )
        .configure_legend(labelColor="var(--text)", labelFontSize=12)
    )
