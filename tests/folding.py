"""Fold scales out of the blue, round nothing, and see that the model computes what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from builders import Array, GraphBuilder, run
from onnx import helper

from awq_onnx.calibrate import channels
from awq_onnx.calibrate.straight import straighten
from awq_onnx.exact import fold_random_scales
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.branches import separate_names
from awq_onnx.passes.inline import inline_functions
from awq_onnx.passes.sites import Choice, Refusal, survey
from awq_onnx.store import open_model

Feed = dict[str, Array]


def microsoft(builder: GraphBuilder) -> onnx.ModelProto:
    """The model of a builder with nodes of com.microsoft, which onnx does not know."""
    graph = helper.make_graph(builder.nodes, "tiny", builder.inputs, builder.outputs, builder.initializers)
    opsets = [helper.make_opsetid("", builder.opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@dataclass(frozen=True)
class Folded:
    """divided: the absorbers that were divided, by name. caches: the outputs that are scaled now. refused: by the name
    of the group, at planning or at tracing."""

    model: onnx.ModelProto
    groups: Mapping[str, Group]
    divided: set[str]
    caches: set[str]
    refused: Mapping[str, Refusal]


def folded_at_random(
    model: onnx.ModelProto, feed: Feed, folder: Path, *, choice: Choice | None = None, seed: int = 1
) -> Folded:
    """Every fold of the plan, with random scales instead of searched ones."""
    with open_model(model) as opened:
        inline_functions(opened.model)
        separate_names(opened.model.graph)
        found = survey(opened.model, choice)
        groups = find_groups(found)
        straight = straighten(opened, found, feed)
        models = [ir.to_proto(straight.opened.model), *([straight.others] if straight.others is not None else [])]
        maps = channels.trace(models, folder, groups, found, feed)
        refused = {
            group.name: why
            for group in groups
            if isinstance(why := group.routes if isinstance(group.routes, Refusal) else maps[group], Refusal)
        }
        done = fold_random_scales(opened, groups, maps, seed)
        return Folded(
            ir.to_proto(opened.model),
            {group.name: group for group in groups},
            {route.absorber.name for group in done for route in group.routes},
            {name for group in done for name in group.caches},
            refused,
        )


def assert_close(actual: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = 2e-5) -> None:
    """The largest error of each output, as a part of its largest number."""
    for name, values in expected.items():
        largest = np.abs(values.astype(np.float64)).max(initial=1e-30)
        error = np.abs(actual[name].astype(np.float64) - values).max(initial=0) / largest
        assert error < tolerance, f"{name}: {error}"


def assert_folding_changes_nothing(
    model: onnx.ModelProto, feed: Feed, folder: Path, *, choice: Choice | None = None, tolerance: float = 2e-5
) -> Folded:
    """All outputs before and after, but for scaled caches."""
    folded = folded_at_random(model, feed, folder, choice=choice)
    expected = {name: values for name, values in run(model, feed).items() if name not in folded.caches}
    assert_close(run(folded.model, feed), expected, tolerance)
    return folded


def random_x(K: int, dtype: Any = np.float32) -> Feed:
    return {"x": np.random.default_rng(2).standard_normal((2, 5, K)).astype(dtype)}
