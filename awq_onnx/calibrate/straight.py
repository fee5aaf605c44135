"""A model as calibration runs it: of every If around layers only the branch that the data take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.passes import branches
from awq_onnx.passes.sites import Survey
from awq_onnx.store import OpenedModel


@dataclass(frozen=True)
class Straight:
    """opened: the model along the branches that are taken. others: along the other ones, None where there are none."""

    opened: OpenedModel
    others: onnx.ModelProto | None


def straighten(opened: OpenedModel, survey: Survey, feed: Feed) -> Straight:
    """The model without the Ifs that hold layers, decided as for `feed`. Ifs in the bodies of others stay."""
    conditions = branches.conditions(opened.model.graph, [site.node for site in survey.sites])
    model = ir.to_proto(opened.model) if conditions else onnx.ModelProto()
    choices = _choices(model, conditions, opened, feed) if conditions else {}
    if not choices:
        return Straight(opened, None)
    taken = ir.from_proto(branches.take(model, choices))
    return Straight(
        replace(opened, model=taken), branches.take(model, {name: not chosen for name, chosen in choices.items()})
    )


def _choices(model: onnx.ModelProto, conditions: list[str], opened: OpenedModel, feed: Feed) -> dict[str, bool]:
    """What each condition is; those that are made inside a body are left out."""
    small = branches.condition_model(model, conditions)
    names = [output.name for output in small.graph.output]
    if not names:
        return {}
    known = {name: bool(feed[name].all()) for name in names if name in feed}
    asked = [name for name in names if name not in known]
    if asked:
        session = runtime.session(small.SerializeToString(), opened.folder)
        wanted = {value.name for value in session.get_inputs()}
        made = runtime.run(session, asked, {name: values for name, values in feed.items() if name in wanted})
        known.update((name, bool(values.all())) for name, values in zip(asked, made, strict=True))
    return known
