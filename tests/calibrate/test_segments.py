"""Run part by part, a model yields the statistics that it yields as a whole."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import (
    Array,
    GraphBuilder,
    decoder_feed,
    gated_mlp,
    opened_with_groups,
    run,
    save,
    stand_ins_of,
    tiny_decoder,
    two_linears,
)

from awq_onnx import Recipe, quantize, runtime
from awq_onnx.calibrate import segments
from awq_onnx.calibrate.segments import Data, Saved, Segments
from awq_onnx.machine import Machine
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.sites import survey
from awq_onnx.passes.switch import StandIn, substitute
from awq_onnx.statistics import InputStatistics

Feed = dict[str, Array]
Statistics = dict[str, InputStatistics]

WHOLE = 1 << 30  # bytes: nothing here is cut for want of more
BUDGETS = (1, 10_000, 100_000, 400_000, 1_000_000)


@contextmanager
def in_parts(
    model: onnx.ModelProto, data: Data, budget_bytes: int = WHOLE, **options: Any
) -> Iterator[tuple[Segments, tuple[Group, ...]]]:
    """A model in parts, with a folder of its own; its groups."""
    with opened_with_groups(model) as (opened, groups), tempfile.TemporaryDirectory() as folder:
        yield Segments(opened, groups, data, folder=Path(folder), budget_bytes=budget_bytes, **options), groups


def run_all(model: onnx.ModelProto, data: Data, budget_bytes: int = WHOLE) -> tuple[Statistics, list[list[Array]]]:
    """The statistics by the name of the group's input, and what was measured."""
    with in_parts(model, data, budget_bytes) as (parts, groups):
        made = {group: statistics for finished in parts.run() for group, statistics in finished}
        assert set(made) == set(groups)
        found = {name: one for statistics in made.values() for name, one in statistics.items()}
        return found, [[np.array(values) for values in outputs] for outputs in parts.measured]


def collected(model: onnx.ModelProto, feeds: list[Feed], budget_bytes: int = WHOLE) -> Statistics:
    return run_all(model, Data(feeds), budget_bytes)[0]


def assert_same_bits(found: Statistics, expected: Statistics) -> None:
    assert set(found) == set(expected)
    for name, one in found.items():
        assert one.tokens == expected[name].tokens
        for field in ("second_moment", "act_mean", "act_max", "validation"):
            np.testing.assert_array_equal(getattr(one, field), getattr(expected[name], field), f"{field} of {name}")


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
OUTPUTS = ("logits", "present.1.key")


@pytest.mark.parametrize("budget_bytes", [1, WHOLE])
def test_statistics_are_those_of_one_run_of_the_whole_model(budget_bytes: int) -> None:
    model = tiny_decoder()
    feeds = [decoder_feed(model, IDS[:4]), decoder_feed(model, IDS[4:])]
    found = collected(model, feeds, budget_bytes)
    expected = tapped(model, decoder_feed(model, IDS))
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert_statistics_of(found[name], rows_of(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_statistics_and_outputs_are_the_same_bits_for_any_budget(dtype: type) -> None:
    """A half-precision model too, though onnxruntime keeps some of its values in fp32 from node to node."""
    model = tiny_decoder(dtype=dtype)
    data = Data([decoder_feed(model, IDS[:2]), decoder_feed(model, IDS[2:4])], [decoder_feed(model, IDS[4:])], OUTPUTS)
    whole, measured = run_all(model, data)
    for budget_bytes in BUDGETS:
        found, outputs = run_all(model, data, budget_bytes)
        assert_same_bits(found, whole)
        for one, expected in zip(outputs[0], measured[0], strict=True):
            np.testing.assert_array_equal(one, expected, f"{budget_bytes}")


def test_a_half_precision_model_runs_in_fp32() -> None:
    model = tiny_decoder(dtype=np.float16)
    feed = decoder_feed(model, IDS)
    found, ((logits, _),) = run_all(model, Data([feed], [feed], OUTPUTS), 1)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, run(model, feed)["logits"], atol=0.05)
    for name, values in tapped(model, feed).items():
        np.testing.assert_allclose(found[name].act_max, np.abs(rows_of(values)).max(axis=0), rtol=0.01, atol=0.01)


def test_groups_come_with_their_part_and_the_parts_one_by_one() -> None:
    model, fractions = tiny_decoder(), list[float]()
    with in_parts(model, Data([decoder_feed(model, IDS)]), 1) as (parts, groups):
        running = parts.run(advance=fractions.append)
        first = next(found for found in running if found)
        assert [group for group, _ in first] == [groups[0]]
        assert sum(fractions) < 0.5  # later parts have not run yet
        later = [[group for group, _ in found] for found in running if found]
    assert later == [[group] for group in groups[1:]]
    assert sum(fractions) == pytest.approx(1)


def test_before_a_part_runs_room_is_made_for_it() -> None:
    model, room = tiny_decoder(), list[int]()
    with in_parts(model, Data([decoder_feed(model, IDS)]), 1) as (parts, _):
        sizes = [part.size_bytes for part in parts.parts]
        for count, _found in enumerate(parts.run(make_room=room.append)):
            assert len(room) == min(count + 1, len(sizes))
    assert room == sizes
    assert max(sizes) >= 4 * 96 * 96  # the moments of down_proj


def test_groups_that_are_not_wanted_any_more_do_not_come() -> None:
    model = tiny_decoder()
    whole = collected(model, [decoder_feed(model, IDS)])
    with opened_with_groups(model) as (opened, groups), tempfile.TemporaryDirectory() as folder:
        data = Data([decoder_feed(model, IDS)])
        some = Segments(opened, groups, data, folder=Path(folder), budget_bytes=1, finished=groups[::2])
        found = {group: one for finished in some.run() for group, one in finished}
    assert list(found) == list(groups[1::2])
    left = {name: one for statistics in found.values() for name, one in statistics.items()}
    assert_same_bits(left, {name: whole[name] for name in left})


def test_a_map_for_pieces_of_work_adds_up_every_input_of_a_part() -> None:
    model, added = tiny_decoder(), list[str]()

    def spread(work: Callable[[str], None], items: Sequence[str]) -> Iterator[None]:
        added.extend(items)
        return map(work, items)

    with in_parts(model, Data([decoder_feed(model, IDS)]), spread=spread) as (parts, groups):
        for _ in parts.run():
            pass
    assert sorted(added) == sorted(value.name or "" for group in groups for value in group.inputs)


# What is measured


@pytest.mark.parametrize("budget_bytes", BUDGETS)
def test_what_is_measured_is_in_no_sum_and_alone_goes_on_to_the_outputs(
    monkeypatch: pytest.MonkeyPatch, budget_bytes: int
) -> None:
    model = tiny_decoder()
    feeds, held_out = [decoder_feed(model, IDS[at : at + 1]) for at in range(3)], decoder_feed(model, IDS[3:])
    ran: Counter[str] = Counter()
    original = runtime.run

    def watched(session: Any, outputs: list[str], feed: Feed) -> list[Array]:
        ran.update(outputs)
        return original(session, outputs, feed)

    monkeypatch.setattr(runtime, "run", watched)
    found, measured = run_all(model, Data(feeds, [held_out], ("logits",)), budget_bytes)
    assert_same_bits(found, collected(model, feeds))
    assert ran["logits"] == 1
    ((logits,),) = measured
    np.testing.assert_allclose(logits, run(model, held_out)["logits"], rtol=1e-4, atol=1e-5)


def test_an_output_that_is_an_input_of_a_group_is_measured_before_the_end() -> None:
    """y is made on the way to the second layer: nothing is left for a tail."""
    builder = two_linears(lambda b, x: b.add("Tanh", x, to="middle"))
    builder.output("middle", ["batch", "sequence", 32])
    model = builder.model()
    feeds = [{"x": np.random.default_rng(seed).standard_normal((2, 5, 32)).astype(np.float32)} for seed in range(2)]
    for budget_bytes in BUDGETS:
        _, ((middle,),) = run_all(model, Data(feeds[:1], feeds[1:], ("middle",)), budget_bytes)
        np.testing.assert_allclose(middle, run(model, feeds[1])["middle"], rtol=1e-5)


def layers_of_inputs() -> onnx.ModelProto:
    """Two layers, each of an input of the model."""
    builder = GraphBuilder()
    products = [builder.linear(builder.input(name, ["rows", 32]), 32, 8, f"of_{name}") for name in ("a", "b")]
    builder.output(builder.add("Add", *products, to="y"), ["rows", 8])
    return builder.model()


@pytest.mark.parametrize("budget_bytes", [1, WHOLE])
@pytest.mark.parametrize("outputs", [(), ("y",)])
def test_a_model_whose_only_layers_read_its_inputs(budget_bytes: int, outputs: tuple[str, ...]) -> None:
    rng = np.random.default_rng(2)
    feeds = [{name: rng.standard_normal((5, 32)).astype(np.float32) for name in ("a", "b")} for _ in range(3)]
    found, measured = run_all(layers_of_inputs(), Data(feeds[:2], feeds[2:], outputs), budget_bytes)
    for name in ("a", "b"):
        assert_statistics_of(found[name], np.concatenate([feed[name] for feed in feeds[:2]]))
        np.testing.assert_array_equal(found[name].validation, feeds[1][name])
    assert len(measured) == 1
    for values in measured[0]:
        np.testing.assert_allclose(values, run(layers_of_inputs(), feeds[2])["y"], rtol=1e-5, atol=1e-6)


# Values in files


def test_values_that_do_not_fit_into_memory_lie_in_files_while_they_are_alive() -> None:
    model = tiny_decoder()
    most = {}
    for budget_bytes in (1, WHOLE):
        with opened_with_groups(model) as (opened, groups), tempfile.TemporaryDirectory() as folder:
            data = Data([decoder_feed(model, IDS)], [decoder_feed(model, IDS)], ("logits",))
            parts = Segments(opened, groups, data, folder=Path(folder), budget_bytes=budget_bytes)
            counts = [len(list(Path(folder).iterdir())) for _ in parts.run()]
            most[budget_bytes] = max(counts)
            assert counts[-1] == (2 if budget_bytes == 1 else 0)  # of what is measured: the mask, the logits
    assert most == {1: max(most.values()), WHOLE: 0}
    assert most[1] > 2


# Going on


def test_a_run_goes_on_from_whatever_part_it_was_saved_after(tmp_path: Path) -> None:
    model = tiny_decoder()
    data = Data([decoder_feed(model, IDS[:2]), decoder_feed(model, IDS[2:4])], [decoder_feed(model, IDS[4:])], OUTPUTS)
    whole, measured = run_all(model, data)
    with opened_with_groups(model) as (opened, groups):
        first = Segments(opened, groups, data, folder=tmp_path, budget_bytes=1)
        found: dict[Group, Any] = {}
        for count, made in enumerate(first.run()):
            found.update(made)
            if not first.can_be_saved or count % 3:
                continue
            end = first.save(tmp_path / f"values-{count}.npz")
            saved = Saved.read(tmp_path / f"values-{count}.npz", end, 3)
            assert saved is not None
            (tmp_path / f"{count}").mkdir()
            second = Segments(
                opened,
                groups,
                data,
                folder=tmp_path / f"{count}",
                budget_bytes=(1, 100_000, WHOLE)[count % 9 // 3],
                finished=list(found),
                saved=saved,
            )
            assert sum(len(part.nodes) for part in second.parts) + end == sum(len(one.nodes) for one in first.parts)
            rest = {group: one for others in second.run() for group, one in others}
            assert list(rest) == [group for group in groups if group not in found]
            both = {
                name: one for some in (found, rest) for statistics in some.values() for name, one in statistics.items()
            }
            assert_same_bits(both, whole)
            for one, expected in zip(second.measured[0], measured[0], strict=True):
                np.testing.assert_array_equal(one, expected)
        assert count > 9


def test_saving_leaves_one_file() -> None:
    model = tiny_decoder()
    with in_parts(model, Data([decoder_feed(model, IDS)])) as (parts, _), tempfile.TemporaryDirectory() as folder:
        next(parts.run())
        parts.save(Path(folder) / "values-1.npz")
        assert [path.name for path in Path(folder).iterdir()] == ["values-1.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", bytes(4)], ids=repr)
def test_saved_values_that_cannot_be_read_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "values-1.npz").write_bytes(content)
    assert Saved.read(tmp_path / "values-1.npz", 3, 1) is None


def test_saved_values_that_are_missing_or_cut_short_are_none(tmp_path: Path) -> None:
    model = tiny_decoder()
    with in_parts(model, Data([decoder_feed(model, IDS)])) as (parts, _):
        next(parts.run())
        end = parts.save(tmp_path / "values-1.npz")
    whole = (tmp_path / "values-1.npz").read_bytes()
    assert Saved.read(tmp_path / "values-1.npz", end, 1) is not None
    assert Saved.read(tmp_path / "values-2.npz", end, 1) is None
    for share in (0.01, 0.5, 0.999):
        (tmp_path / "values-1.npz").write_bytes(whole[: int(len(whole) * share)])
        assert Saved.read(tmp_path / "values-1.npz", end, 1) is None


# The order of groups


def early_and_late() -> onnx.ModelProto:
    """norm -> A1 -> Tanh -> B -> Tanh -> C, and at the end of the graph norm -> Relu -> A2: a group with A1."""
    builder = GraphBuilder()
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 32]), 32, "norm")
    first = builder.add("Tanh", builder.linear(normed, 32, 32, "A1"), name="tanh_1")
    second = builder.add("Tanh", builder.linear(first, 32, 32, "B"), name="tanh_2")
    builder.output(builder.linear(second, 32, 24, "C"), ["batch", "sequence", 24])
    builder.output(builder.linear(builder.add("Relu", normed, name="relu"), 32, 16, "A2"), ["batch", "sequence", 16])
    return builder.model()


def x_feeds(count: int) -> list[Feed]:
    return [{"x": np.random.default_rng(at).standard_normal((2, 9, 32)).astype(np.float32)} for at in range(count)]


def test_the_order_of_groups_does_not_depend_on_the_budget() -> None:
    """The group of A1 and A2 is first in the plan, and last to be known."""
    for budget_bytes in (1, 1 << 16, 1 << 20, WHOLE):
        with in_parts(early_and_late(), Data(x_feeds(2)), budget_bytes) as (parts, groups):
            assert [[site.name for site in group.sites] for group in groups] == [
                ["A1/MatMul", "A2/MatMul"],
                ["B/MatMul"],
                ["C/MatMul"],
            ]
            assert [group for found in parts.run() for group, _ in found] == [groups[1], groups[2], groups[0]]


def test_the_output_does_not_depend_on_the_budget_where_a_group_waits(tmp_path: Path) -> None:
    path = save(early_and_late(), tmp_path / "model.onnx")
    data = {"x": np.concatenate([feed["x"] for feed in x_feeds(4)])}
    written = set()
    for budget_bytes in (1, 1 << 16, 1 << 20, WHOLE):
        output = tmp_path / "out.onnx"
        quantize(path, output, calibration=data, overwrite=True, machine=Machine(memory_budget=budget_bytes))
        written.add((output.read_bytes(), (tmp_path / "out.onnx.data").read_bytes()))
    assert len(written) == 1


def test_nothing_is_saved_while_a_group_waits_for_an_input() -> None:
    with in_parts(early_and_late(), Data(x_feeds(2)), 1) as (parts, groups):
        could = [(parts.can_be_saved, {group for group, _ in found}) for found in parts.run()]
    assert not all(can for can, _ in could)
    known_at = next(at for at, (_, found) in enumerate(could) if groups[0] in found)
    assert all(can for can, _ in could[known_at:])
    first_tap = next(at for at, (can, _) in enumerate(could) if not can)
    assert not any(can for can, _ in could[first_tap:known_at])


# Graphs of any kind


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


@pytest.mark.parametrize("budget_bytes", [1, WHOLE])
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


@pytest.mark.parametrize("budget_bytes", [1, WHOLE])
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


# Behind quantised layers


def rounded_layers(model: onnx.ModelProto, folder: Path) -> dict[str, StandIn]:
    """Stand-ins for the layers of all groups, by what they make; far from the originals."""
    save(model, folder / "model.onnx")
    recipe = Recipe(method="rtn", bits=2, samples=2, sequence_length=8, accuracy_level=0)
    quantize(folder / "model.onnx", folder / "rounded.onnx", recipe, calibration=IDS, overwrite=True)
    return stand_ins_of(folder / "rounded.onnx")


def behind(layers: dict[str, StandIn], asked: list[str] | None = None) -> Callable[[Collection[str]], Any]:
    def stand_ins(made: Collection[str]) -> dict[str, StandIn]:
        if asked is not None:
            asked.extend(made)
        return {name: layers[name] for name in made}

    return stand_ins


def drifting(model: onnx.ModelProto, layers: dict[str, StandIn], budget_bytes: int = WHOLE) -> Statistics:
    data = Data([decoder_feed(model, IDS[:3]), decoder_feed(model, IDS[3:])])
    with in_parts(model, data, budget_bytes, stand_ins=behind(layers)) as (parts, _):
        return {name: one for known in parts.run() for _, found in known for name, one in found.items()}


def test_what_reaches_a_layer_is_what_the_layers_before_make_once_they_are_rounded(tmp_path: Path) -> None:
    model = tiny_decoder()
    layers = rounded_layers(model, tmp_path)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    groups = find_groups(survey(ir.from_proto(model)))
    names = [value.name or "" for group in groups for value in group.inputs]
    for one in (changed, model):
        one.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    substitute(changed, layers)
    feed = decoder_feed(model, IDS)
    original, rounded = run(model, feed), run(changed, feed)
    del model.graph.output[-len(names) :]
    found = drifting(model, layers)
    assert found[names[0]].drift is None  # nothing is quantised before the first layers
    for name in names[1:]:
        x, y = rows_of(rounded[name]), rows_of(original[name])
        assert not np.allclose(x, y, atol=1e-3)
        np.testing.assert_allclose(found[name].act_max, np.abs(x).max(axis=0), rtol=1e-2, atol=1e-3)
        assert found[name].tokens == len(x)
        np.testing.assert_allclose(
            found[name].drift, x.T @ (y - x) / len(x), rtol=1e-2, atol=1e-3 * np.square(x).mean()
        )
        assert found[name].validation_drift is not None


def test_no_budget_changes_a_bit_of_that(tmp_path: Path) -> None:
    model = tiny_decoder()
    layers = rounded_layers(model, tmp_path)
    whole = drifting(model, layers)
    for budget_bytes in BUDGETS:
        found = drifting(model, layers, budget_bytes)
        assert_same_bits(found, whole)
        for name, one in found.items():
            for field in ("drift", "validation_drift"):
                np.testing.assert_array_equal(getattr(one, field), getattr(whole[name], field))


def test_layers_are_asked_for_once_their_group_has_come(tmp_path: Path) -> None:
    model = tiny_decoder()
    layers, asked, come = rounded_layers(model, tmp_path), list[str](), set[str]()
    data = Data([decoder_feed(model, IDS)])
    with in_parts(model, data, 1, stand_ins=behind(layers, asked)) as (parts, groups):
        for known in parts.run():
            assert come.issuperset(asked)
            come.update(site.output.name or "" for group, _ in known for site in group.sites)
    last = {site.output.name for site in groups[-1].sites}  # nothing that counts comes after these
    assert sorted(asked) == sorted(set(layers) - last)


def test_what_is_measured_knows_of_no_rounded_layer(tmp_path: Path) -> None:
    model = tiny_decoder()
    layers, feed = rounded_layers(model, tmp_path), decoder_feed(model, IDS)
    with in_parts(model, Data([feed], [feed], ("logits",)), stand_ins=behind(layers)) as (parts, _):
        for _ in parts.run():
            pass
        ((logits,),) = parts.measured
    np.testing.assert_allclose(logits, run(model, feed)["logits"], rtol=1e-4, atol=1e-5)
