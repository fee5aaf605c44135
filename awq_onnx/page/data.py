"""The numbers behind the charts, as rows of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from typing import Any

from awq_onnx.footprint import Footprint
from awq_onnx.page.charts import KINDS
from awq_onnx.page.content import Content
from awq_onnx.plain import plain
from awq_onnx.report import GroupReport
from awq_onnx.salience import Salience

NAMED = 4  # layers of a group that are named in a label
Rows = list[dict[str, Any]]


def data_of(content: Content) -> dict[str, Rows]:
    """What each chart shows, by its name; no rows where nothing is known."""
    groups = list(enumerate(content.groups))
    seen = [(at, one, one.salience) for at, one in groups if one.salience is not None]
    rows = {
        "overview": [_peaks(at, group, salience) for at, group, salience in seen if salience.median_before > 0],
        "channels": [_channels(at, salience) for at, _, salience in seen],
        "losses": [_losses(at, group) for at, group in groups if group.losses and group.losses[0]],
        "errors": [
            {"id": at, "name": one.name, "plain": one.plain_error, "ours": one.error}
            for at, one in enumerate(content.matmuls)
        ],
        "footprint": [
            *(_bytes("before", content.footprint_before) if content.footprint_before else []),
            *_bytes("after", content.footprint_after),
        ],
        "groups": [_group(at, one) for at, one in groups],
    }
    made: dict[str, Rows] = plain(rows)
    return made


def label(names: Sequence[str]) -> str:
    """Names that differ in some parts between slashes: /layers.0/{q_proj, k_proj}/MatMul."""
    parts = [name.split("/") for name in names]
    before = [first for first, *_ in takewhile(_same, zip(*parts, strict=False))]
    rests = [part[len(before) :] for part in parts]
    after = [first for first, *_ in takewhile(_same, zip(*(rest[::-1] for rest in rests), strict=False))][::-1]
    if len(names) == 1:
        return names[0]
    inner = ["/".join(rest[: len(rest) - len(after)]) for rest in rests]
    more = f", {len(inner) - NAMED} more" if len(inner) > NAMED else ""
    return "/".join([*before, f"{{{', '.join(inner[:NAMED])}{more}}}", *after])


def _same(parts: tuple[str, ...]) -> bool:
    return len(set(parts)) == 1


def _peaks(at: int, group: GroupReport, salience: Salience) -> dict[str, Any]:
    """How far the loudest channel stands out."""
    return {
        "id": at,
        "label": label(group.matmuls),
        "alpha": group.alpha,
        "before": max(salience.before) / salience.median_before,
        "after": max(salience.after) / salience.median_after,
    }


def _channels(at: int, salience: Salience) -> dict[str, Any]:
    return {
        "id": at,
        "channel": list(range(0, salience.K, salience.width)),
        "before": salience.before,
        "after": salience.after,
    }


def _losses(at: int, group: GroupReport) -> dict[str, Any]:
    """Over the loss at alpha 0, where it was tried."""
    tried = [
        (alpha, loss / (group.losses[0] or 1)) for alpha, loss in zip(group.alphas, group.losses, strict=True) if loss
    ]
    return {
        "id": at,
        "label": label(group.matmuls),
        "chosen": group.alpha,
        "alpha": [alpha for alpha, _ in tried],
        "loss": [loss for _, loss in tried],
    }


def _bytes(when: str, footprint: Footprint) -> Rows:
    return [
        {"when": when, "order": order, "kind": KINDS[kind][1], "megabytes": size / 1e6}
        for order, (kind, size) in enumerate(asdict(footprint).items())
        if size
    ]


def _group(at: int, group: GroupReport) -> dict[str, Any]:
    """What the page says of the group that the reader chooses."""
    return {
        "id": at,
        "label": label(group.matmuls),
        "alpha": group.alpha,
        "scale_from": group.scale_from,
        "width": group.salience.width if group.salience else 1,
        "loudest": group.salience.loudest if group.salience else (),
    }
