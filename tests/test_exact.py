"""exact.py: it shows that a plan folds without loss, and it notices where something is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, norm_and_readers, run, tiny_decoder, two_linears

from awq_onnx import exact, groups
from awq_onnx.calibrate import channels
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.exact import SPREAD, fold_random_scales
from awq_onnx.passes import fold
from awq_onnx.passes.absorb import Group
from awq_onnx.plan import make_plan
from awq_onnx.recipe import Recipe
from awq_onnx.store import open_model

IDS: Array = np.random.default_rng(3).integers(0, 160, (3, 10))
Feed = dict[str, Array]


def x_of(K: int = 64) -> Feed:
    return {"x": np.random.default_rng(1).standard_normal((2, 5, K)).astype(np.float32)}


def folded(
    model: onnx.ModelProto, feed: Feed, recipe: Recipe | None = None, seed: int = 0
) -> tuple[onnx.ModelProto, list[Group]]:
    with open_model(model) as opened:
        plan = make_plan(opened.model, recipe)
        maps = channels.trace([ir.to_proto(opened.model)], opened.folder, plan.groups, plan.survey, feed)
        done = fold_random_scales(opened, plan.groups, maps, seed)
        made = ir.to_proto(opened.model)
        for value in made.graph.initializer:  # the references go with the folder
            assert value.data_location != onnx.TensorProto.EXTERNAL
    return made, done


def difference(model: onnx.ModelProto, feed: Feed, recipe: Recipe | None = None, seed: int = 0) -> float:
    """The largest of any output but a cache, relative to the largest number."""
    made, done = folded(model, feed, recipe, seed)
    scaled = {name for group in done for name in group.caches}
    before, after = run(model, feed), run(made, feed)
    return max(
        float(np.abs(after[name] - values).max() / np.abs(values).max())
        for name, values in before.items()
        if name not in scaled
    )


def relu(builder: GraphBuilder, x: str) -> str:
    return builder.add("Relu", x)


def decoder() -> tuple[onnx.ModelProto, Feed]:
    model = tiny_decoder(layers=1, bias=True)
    return model, decoder_feed(model, IDS)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_folds_without_loss(seed: int) -> None:
    model, feed = decoder()
    assert difference(model, feed, seed=seed) < 1e-5


def test_every_group_with_an_absorber_is_folded_and_named() -> None:
    _, done = folded(*decoder())
    assert [group.name for group in done] == [
        f"/layers.0/{name}/MatMul" for name in ("q_proj", "o_proj", "mlp/gate_proj", "mlp/down_proj")
    ]
    assert [name for group in done for name in group.caches] == ["present.0.value"]


def test_groups_without_an_absorber_are_left_out() -> None:
    builder = GraphBuilder()
    builder.output(builder.linear(builder.input("x", ["b", "s", 64]), 64, 8, "layer"))
    made, done = folded(builder.model(), x_of())
    assert done == []
    np.testing.assert_array_equal(run(made, x_of()).popitem()[1], run(builder.model(), x_of()).popitem()[1])


def test_scales_are_far_enough_from_one_to_show() -> None:
    scale = exact._random_scale(np.arange(4096), np.random.default_rng(0))
    assert scale.dtype == np.float32
    assert 1 / SPREAD <= scale.min() < 0.4
    assert 2.5 < scale.max() <= SPREAD


def test_channels_that_come_from_one_share_a_scale() -> None:
    scale = exact._random_scale(np.array([2, 0, 2, 1, 0]), np.random.default_rng(0))
    assert scale[0] == scale[2]
    assert scale[1] == scale[4]
    assert len(set(scale.tolist())) == 3


# It notices what is forgotten


def test_a_gain_that_is_not_divided_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "divide_vector", lambda *_: None)
    assert difference(norm_and_readers().model(), x_of()) > 0.1


def test_one_forgotten_channel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    divide = fold.divide

    def but_one(values: Array, scale: Array) -> Array:
        forgotten = scale.copy()
        forgotten[7] = 1
        return divide(values, forgotten)

    monkeypatch.setattr(fold, "divide", but_one)
    assert difference(norm_and_readers().model(), x_of()) > 1e-3


def test_a_bias_that_is_not_divided_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_linears(relu, bias=True).model()
    assert difference(model, x_of(32)) < 1e-5
    monkeypatch.setattr(fold, "divide_vector", lambda *_: None)
    assert difference(model, x_of(32)) > 1e-2


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_weight_that_is_not_rescaled_is_noticed(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    rescale = fold.rescale_layer

    def half(graph: Any, site: Any, weight: Any, rows: Any, columns: Any) -> None:
        rescale(graph, site, weight, None if side == "rows" else rows, None if side == "columns" else columns)

    monkeypatch.setattr(fold, "rescale_layer", half)
    assert difference(gated_mlp().model(), x_of()) > 1e-2


def test_a_layer_in_float_that_is_not_compensated_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = norm_and_readers().model(), Recipe(exclude=("reader_1",))
    assert difference(model, x_of(), recipe) < 1e-5
    rescale = fold.rescale_layer

    def but_floats(graph: Any, site: Any, *rest: Any) -> None:
        if site.name != "reader_1":
            rescale(graph, site, *rest)

    monkeypatch.setattr(fold, "rescale_layer", but_floats)
    assert difference(model, x_of(), recipe) > 0.1


def test_channels_in_the_wrong_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """v -> o with the channels of two heads exchanged."""
    model, feed = decoder()
    right = groups.divisor

    def exchanged(absorber: Any, sources: ChannelMap, scale: Array) -> Array:
        made = right(absorber, sources, scale)
        return np.roll(made, 1) if absorber.name.endswith("v_proj/MatMul") else made

    monkeypatch.setattr(groups, "divisor", exchanged)
    assert difference(model, feed) > 1e-2


def test_another_reader_that_is_overlooked_is_noticed(tmp_path: Path) -> None:
    """The plan refuses such a group; were it made all the same, an output would change."""
    builder = norm_and_readers()
    with open_model(builder.model()) as opened:
        plan = make_plan(opened.model)
    builder.output(builder.add("Tanh", builder.nodes[-1].input[0], name="spy", to="z"), ["batch", "sequence", 64])
    model = builder.model()
    with open_model(model) as opened:
        fresh = make_plan(opened.model)
        assert not channels.trace([ir.to_proto(opened.model)], tmp_path, fresh.groups, fresh.survey, x_of())
    del model.graph.node[-1], model.graph.output[-1]
    with open_model(model) as opened:
        plan = make_plan(opened.model)
        maps = channels.trace([ir.to_proto(opened.model)], tmp_path, plan.groups, plan.survey, x_of())
        fold_random_scales(opened, plan.groups, maps)
        made = ir.to_proto(opened.model)
    for one in (made, model):
        one.graph.node.append(builder.nodes[-1])
        one.graph.output.append(builder.outputs[-1])
    before, after = run(model, x_of()), run(made, x_of())
    np.testing.assert_allclose(after["y0"], before["y0"], rtol=1e-3, atol=1e-3)
    assert np.abs(after["z"] - before["z"]).max() > 0.1
