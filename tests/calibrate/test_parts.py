"""Parts of a graph: cut by size, with all and only what leads to the inputs of the groups; any piece runs alone."""

from __future__ import annotations

import numpy as np
import pytest
from builders import decoder_feed, opened_with_groups, run, tiny_decoder

from awq_onnx import runtime
from awq_onnx.calibrate.parts import Piece, cut, extract, needed, reads

WHOLE = 1 << 30  # bytes: nothing here is cut for want of more


def test_a_smaller_budget_makes_more_parts() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        counts = [len(cut(opened.model.graph, groups, part_bytes)) for part_bytes in (0, 30_000, 60_000, WHOLE)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 1


def test_the_parts_are_the_needed_nodes_in_order() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        order = {node: position for position, node in enumerate(opened.model.graph)}
        for part_bytes in (0, 10_000, WHOLE):
            parts = cut(opened.model.graph, groups, part_bytes)
            positions = [order[node] for part in parts for node in part.nodes]
            assert positions == sorted(set(positions))
            assert [name for part in parts for name in part.taps] == [group.inputs[0].name for group in groups]


def test_nodes_after_the_last_tap_are_in_no_part() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        (part,) = cut(opened.model.graph, groups, WHOLE)
    names = {node.name for node in part.nodes}
    assert "/layers.1/mlp/Mul" in names  # the input of the last down_proj
    assert not names & {"/layers.1/mlp/down_proj/MatMul", "/norm/Mul_1", "/lm_head/MatMul"}
    assert "logits" not in part.makes


def test_what_nobody_reads_any_more_is_dropped() -> None:
    """At the end only the mask is alive: everything else has been read for the last time."""
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        parts = cut(opened.model.graph, groups, 10_000)
        alive = {value.name for value in opened.model.graph.inputs}
        most = 0
        for part in parts:
            assert set(part.reads) <= alive
            alive |= set(part.makes)
            most = max(most, len(alive))
            alive -= part.dead_after
    assert alive == {"attention_mask"}
    assert most < 20


def test_the_parts_for_the_outputs_alone_come_last() -> None:
    with opened_with_groups(tiny_decoder()) as (opened, groups):
        for part_bytes in (0, 10_000, WHOLE):
            parts = cut(opened.model.graph, groups, part_bytes, ("logits",))
            assert [part.tail for part in parts] == [False] * (len(parts) - 1) + [True]
            assert not parts[-1].taps
            assert "/lm_head/MatMul" in {node.name for node in parts[-1].nodes}
            assert parts[-1].makes == ("logits",)
            assert parts[-1].end == sum(len(part.nodes) for part in parts)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_two_pieces_one_after_the_other_make_what_the_whole_makes(share: float) -> None:
    model = tiny_decoder()
    feed = decoder_feed(model, np.arange(12).reshape(2, 6))
    with opened_with_groups(model) as (opened, _):
        reading = {node: reads(node) for node in opened.model.graph}
        nodes = needed(reading, {"logits"})
        middle = int(share * len(nodes))
        made = [output.name or "" for node in nodes[:middle] for output in node.outputs]
        read = dict.fromkeys(name for node in nodes[middle:] for name in reading[node])
        left = tuple(name for name in read if name in made)
        first = Piece(tuple(nodes[:middle]), tuple(feed), left)
        last = Piece(tuple(nodes[middle:]), tuple(name for name in read if name in (*left, *feed)), ("logits",))
        alive = dict(feed)
        for piece in (first, last):
            session = runtime.session(extract(opened.model, piece, alive).SerializeToString(), opened.folder)
            made_now = runtime.run(session, list(piece.makes), {name: alive[name] for name in piece.reads})
            alive.update(zip(piece.makes, made_now, strict=True))
    np.testing.assert_allclose(alive["logits"], run(model, feed)["logits"], rtol=1e-5, atol=1e-5)
