"""Run part by part, a model yields the statistics that it yields as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, decoder_feed, gated_mlp, run, tiny_decoder, two_linears

from awq_onnx.calibrate import segments
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.sites import survey
from awq_onnx.statistics import InputStatistics
from awq_onnx.store import OpenedModel, open_model

Feed = dict[str, Array]
Statistics = dict[str, InputStatistics]


@contextmanager
def opened_with_groups(model: onnx.ModelProto) -> Iterator[tuple[OpenedModel, tuple[Group, ...]]]:
    with open_model(model) as opened:
        yield opened, find_groups(survey(opened.model))


def collected(model: onnx.ModelProto, feeds: list[Feed], budget_bytes: int = segments.BUDGET_BYTES) -> Statistics:
    """The statistics by the name of the group's input."""
    with opened_with_groups(model) as (opened, groups):
        parts = segments.collect(opened, groups, feeds, budget_bytes=budget_bytes)
        made = {group: statistics for finished in parts for group, statistics in finished}
        assert set(made) == set(groups)
        return {name: one for statistics in made.values() for name, one in statistics.items()}


def tapped(model: onnx.ModelProto, feed: Feed) -> Feed:
    """The inputs of all groups, from one run of the whole model with more outputs."""
    groups = find_groups(survey(ir.from_proto(model)))
    names = {value.name or "" for group in groups for value in group.inputs}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - set(feed)))
    return {name: values for name, values in {**feed, **run(copy, feed)}.items() if name in names}


def assert_statistics_of(found: InputStatistics, rows: Array) -> None:
    """rows (T, K): everything that was fed to the input."""
    x = rows.astype(np.float64)
    assert found.tokens == len(x)
    np.testing.assert_allclose(found.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * np.square(x).mean())
    np.testing.assert_allclose(found.act_mean, np.abs(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.act_max, np.abs(x).max(axis=0), rtol=1e-5)


def rows_of(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


IDS = np.random.default_rng(0).integers(0, 160, (6, 9))


@pytest.mark.parametrize("budget_bytes", [1, segments.BUDGET_BYTES])
def test_statistics_are_those_of_one_run_of_the_whole_model(budget_bytes: int) -> None:
    model = tiny_decoder()
    feeds = [decoder_feed(model, IDS[:4]), decoder_feed(model, IDS[4:])]
    found = collected(model, feeds, budget_bytes)
    expected = tapped(model, decoder_feed(model, IDS))
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert_statistics_of(found[name], rows_of(values))


@pytest.mark.parametrize("budget_bytes", [1, 10_000, 60_000])
def test_statistics_are_the_same_bits_for_any_number_of_parts(budget_bytes: int) -> None:
    model = tiny_decoder()
    feeds = [decoder_feed(model, IDS[:4]), decoder_feed(model, IDS[4:])]
    whole = collected(model, feeds)
    for name, one in collected(model, feeds, budget_bytes).items():
        np.testing.assert_array_equal(one.second_moment, whole[name].second_moment, name)
        np.testing.assert_array_equal(one.act_mean, whole[name].act_mean, name)
        np.testing.assert_array_equal(one.act_max, whole[name].act_max, name)


@pytest.mark.parametrize("budget_bytes", [1, 10_000])
def test_a_half_precision_model_is_cut_too(budget_bytes: int) -> None:
    """On a CPU onnxruntime rounds to fp16 where a part ends and not within: not the same bits, but nearly."""
    model = tiny_decoder(dtype=np.float16)
    whole = collected(model, [decoder_feed(model, IDS)])
    for name, one in collected(model, [decoder_feed(model, IDS)], budget_bytes).items():
        expected = whole[name].second_moment
        assert np.abs(one.second_moment - expected).max() < 0.01 * np.abs(expected).max()


def test_a_smaller_budget_makes_more_parts() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        counts = [len(segments.cut(opened.model.graph, groups, budget)) for budget in (1, 10_000, 60_000, 1 << 30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 1


def test_the_parts_are_the_needed_nodes_in_order() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        order = {node: position for position, node in enumerate(opened.model.graph)}
        for budget_bytes in (1, 10_000, 1 << 30):
            parts = segments.cut(opened.model.graph, groups, budget_bytes)
            positions = [order[node] for part in parts for node in part.nodes]
            assert positions == sorted(set(positions))
            assert [name for part in parts for name in part.taps] == [group.inputs[0].name for group in groups]


def test_nodes_after_the_last_tap_are_in_no_part() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        (part,) = segments.cut(opened.model.graph, groups, 1 << 30)
    names = {node.name for node in part.nodes}
    assert "/layers.1/mlp/Mul" in names  # the input of the last down_proj
    assert not names & {"/layers.1/mlp/down_proj/MatMul", "/norm/Mul_1", "/lm_head/MatMul"}
    assert "logits" not in part.makes


def test_what_nobody_reads_any_more_is_dropped() -> None:
    """At the end only the mask is alive: everything else has been read for the last time."""
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        parts = segments.cut(opened.model.graph, groups, 10_000)
        alive = {value.name for value in opened.model.graph.inputs}
        most = 0
        for part in parts:
            assert set(part.reads) <= alive
            alive |= set(part.makes)
            most = max(most, len(alive))
            alive -= part.dead_after
    assert alive == {"attention_mask"}
    assert most < 20


def test_groups_come_with_their_part_and_the_parts_one_by_one() -> None:
    model, fractions = tiny_decoder(), list[float]()
    with opened_with_groups(model) as (opened, groups):
        feeds = [decoder_feed(model, IDS)]
        parts = segments.collect(opened, groups, feeds, budget_bytes=1, advance=fractions.append)
        first = next(found for found in parts if found)
        assert [group for group, _ in first] == [groups[0]]
        assert sum(fractions) < 0.5  # later parts have not run yet
        later = [[group for group, _ in found] for found in parts if found]
    assert later == [[group] for group in groups[1:]]
    assert sum(fractions) == pytest.approx(1)


def test_an_input_of_the_model_that_feeds_a_matmul_is_a_tap() -> None:
    model = two_linears(lambda b, x: b.add("Tanh", x)).model()
    feed: Feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)}
    found = collected(model, [feed], budget_bytes=1)
    assert_statistics_of(found["x"], rows_of(feed["x"]))
    assert len(found) == 2


def test_a_model_that_is_one_matmul_needs_no_session() -> None:
    builder = GraphBuilder()
    builder.output(builder.linear(builder.input("x", ["rows", 32]), 32, 8, "only"))
    feed: Feed = {"x": np.random.default_rng(1).standard_normal((7, 32)).astype(np.float32)}
    assert_statistics_of(collected(builder.model(), [feed])["x"], feed["x"])


def test_padding_is_left_out() -> None:
    model = tiny_decoder()
    feed = decoder_feed(model, IDS[:2])
    feed["attention_mask"][1, 4:] = 0
    real = feed["attention_mask"].astype(bool)
    found = collected(model, [feed])
    for name, values in tapped(model, feed).items():
        assert_statistics_of(found[name], values[real])
    assert {one.tokens for one in found.values()} == {13}


def test_padding_is_left_out_of_every_part() -> None:
    model = tiny_decoder()
    feed = decoder_feed(model, IDS[:2])
    feed["attention_mask"][0, :3] = 0
    assert {one.tokens for one in collected(model, [feed], budget_bytes=1).values()} == {15}


def test_rows_that_overflowed_do_not_spoil_the_sums() -> None:
    model = gated_mlp().model()
    x: Array = np.random.default_rng(1).standard_normal((1, 5, 64)).astype(np.float32)
    x[0, 2] = np.inf
    for one in collected(model, [{"x": x}]).values():
        assert one.tokens == 4
        assert np.isfinite(one.second_moment).all()


# Graphs with more than plain nodes

FLOAT = onnx.TensorProto.FLOAT


def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    output = onnx.helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)
    return onnx.helper.make_graph(nodes, name, [], [output])


def one_if(builder: GraphBuilder, x: str) -> str:
    """If flag: relu(x) + c, else abs(x): x is made in the outer graph, c is one of its initializers."""
    builder.input("flag", [], np.bool_)
    builder.constant(np.arange(32.0), "c")
    make = onnx.helper.make_node
    yes = branch("yes", [make("Relu", [x], ["relu"]), make("Add", ["relu", "c"], ["sum"])])
    return builder.add("If", "flag", then_branch=yes, else_branch=branch("no", [make("Abs", [x], ["abs"])]))


def nested_ifs(builder: GraphBuilder, x: str) -> str:
    """The same with the branches inside another If."""
    builder.input("flag", [], np.bool_)
    make = onnx.helper.make_node
    inner = make(
        "If",
        ["flag"],
        ["inner"],
        then_branch=branch("yes", [make("Relu", [x], ["relu"]), make("Neg", ["relu"], ["neg"])]),
        else_branch=branch("no", [make("Abs", [x], ["abs"])]),
    )
    other = branch("other", [make("Abs", [x], ["other_abs"])])
    return builder.add("If", "flag", then_branch=branch("outer", [inner]), else_branch=other)


def constant_numbers(builder: GraphBuilder, x: str) -> str:
    """Constants in the short forms that torch's newer exporter writes."""
    make = onnx.helper.make_node
    builder.nodes.append(make("Constant", [], ["shape"], value_ints=[0, 0, 32]))
    builder.nodes.append(make("Constant", [], ["two"], value_float=2.0))
    return builder.add("Reshape", builder.add("Exp", builder.add("Mul", x, "two")), "shape")


def skipped_output(builder: GraphBuilder, x: str) -> str:
    """A node of which only one of two outputs is wanted, the other has no name."""
    node = onnx.helper.make_node("Dropout", [x], ["dropped", ""])
    builder.nodes.append(node)
    return builder.add("Tanh", "dropped")


@pytest.mark.parametrize("budget_bytes", [1, segments.BUDGET_BYTES])
@pytest.mark.parametrize(
    ("middle", "flag"),
    [
        (one_if, True),
        (one_if, False),
        (nested_ifs, True),
        (nested_ifs, False),
        (constant_numbers, None),
        (skipped_output, None),
    ],
)
def test_any_graph_is_cut(middle: Callable[[GraphBuilder, str], str], flag: bool | None, budget_bytes: int) -> None:
    def around(builder: GraphBuilder, x: str) -> str:
        return builder.add("Tanh", middle(builder, builder.add("Tanh", x)))

    model = two_linears(around).model()
    feed: Feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)}
    if flag is not None:
        feed["flag"] = np.array(flag)
    found = collected(model, [feed], budget_bytes)
    for name, values in tapped(model, feed).items():
        assert_statistics_of(found[name], rows_of(values))


# Rows for validation


@pytest.mark.parametrize(
    ("feeds", "chosen"),
    [
        (1, []),
        (2, [1]),
        (3, [1]),
        (4, [2]),
        (5, [4]),
        (7, [4]),
        (8, [4]),
        (12, [4]),
        (13, [4, 12]),
        (16, [4, 12]),
        (100, [4, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92]),
    ],
)
def test_one_feed_in_eight_is_for_validation_and_never_the_only_one(feeds: int, chosen: list[int]) -> None:
    assert list(segments._validation_rows(feeds)) == chosen


@pytest.mark.parametrize("feeds", [1, 2, 7, 8, 16, 100, 1000])
def test_the_feeds_for_validation_share_the_rows_that_are_kept(feeds: int) -> None:
    counts = segments._validation_rows(feeds).values()
    assert sum(counts) <= segments.VALIDATION_ROWS
    assert len(set(counts)) <= 1
    assert feeds == 1 or sum(counts) > segments.VALIDATION_ROWS - len(counts)


@pytest.mark.parametrize("budget_bytes", [1, segments.BUDGET_BYTES])
def test_whole_feeds_are_kept_for_validation_and_the_same_for_every_input(budget_bytes: int) -> None:
    model = tiny_decoder()
    feeds = [decoder_feed(model, IDS[at : at + 2]) for at in (0, 2, 4)]
    kept = tapped(model, feeds[1])
    for name, one in collected(model, feeds, budget_bytes).items():
        assert one.validation is not None
        np.testing.assert_allclose(one.validation, rows_of(kept[name]), rtol=1e-4, atol=1e-5)


def test_of_a_long_feed_for_validation_few_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "VALIDATION_ROWS", 6)
    model = tiny_decoder()
    for one in collected(model, [decoder_feed(model, IDS[:4]), decoder_feed(model, IDS[4:])]).values():
        assert one.validation is not None
        assert len(one.validation) == 6  # every third of 18
        assert one.tokens == 36 + 6


def test_padding_is_not_kept_for_validation() -> None:
    model = tiny_decoder()
    feeds = [decoder_feed(model, IDS[:2]), decoder_feed(model, IDS[2:4])]
    feeds[1]["attention_mask"][1, 4:] = 0
    for one in collected(model, feeds).values():
        assert one.validation is not None
        assert len(one.validation) == 13


def test_one_feed_alone_leaves_nothing_for_validation() -> None:
    model = tiny_decoder()
    assert all(one.validation is None for one in collected(model, [decoder_feed(model, IDS)]).values())
