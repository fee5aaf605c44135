"""The checks after the rewrite find what a faulty rewrite would leave behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builders import norm_and_readers

from awq_onnx.errors import InternalError
from awq_onnx.passes import check, rewrite
from awq_onnx.passes.rewrite import PackedWeight
from awq_onnx.passes.sites import survey

K, N, BLOCK = 80, 48, 32  # three blocks: the zero points fill one and a half bytes of two
CODES, SCALES, ZERO_POINTS = (N, 3, BLOCK // 2), (N, 3), (N, 2)


def original() -> ir.Model:
    return ir.from_proto(norm_and_readers(K=K, columns=(N,)).model())


def rewritten(
    model: ir.Model,
    codes: tuple[int, ...] = CODES,
    scales: tuple[int, ...] = SCALES,
    zero_points: tuple[int, ...] | None = ZERO_POINTS,
) -> check.Outline:
    """Rewrite the one site with tensors of these shapes; what the graph was before."""
    before = check.outline_of(model.graph)
    (site,) = survey(model).sites
    weight = PackedWeight(
        ir.Tensor(np.zeros(codes, np.uint8), name="codes"),
        ir.Tensor(np.ones(scales, np.float32), name="scales"),
        None if zero_points is None else ir.Tensor(np.zeros(zero_points, np.uint8), name="zero_points"),
    )
    rewrite.to_matmul_nbits(model, site, weight, block_size=BLOCK, bits=4, accuracy_level=4, metadata={})
    return before


@pytest.mark.parametrize("zero_points", [ZERO_POINTS, None])
def test_a_faithful_rewrite_passes(zero_points: tuple[int, ...] | None) -> None:
    model = original()
    before = rewritten(model, zero_points=zero_points)
    check.check(model.graph, before, {"MatMulNBits": 1})


def test_a_graph_that_was_not_touched_passes() -> None:
    graph = original().graph
    check.check(graph, check.outline_of(graph), {})


@pytest.mark.parametrize(
    ("codes", "scales", "zero_points", "faulty"),
    [
        ((N, 3 * BLOCK // 2), SCALES, ZERO_POINTS, 1),
        ((N, 2, BLOCK // 2), SCALES, ZERO_POINTS, 1),
        (CODES, (3, N), ZERO_POINTS, 2),
        (CODES, (N * 3,), ZERO_POINTS, 2),
        (CODES, SCALES, (N * 3 // 2,), 3),
        (CODES, SCALES, (N, 3), 3),
    ],
)
def test_a_packed_tensor_of_the_wrong_shape_is_found(
    codes: tuple[int, ...], scales: tuple[int, ...], zero_points: tuple[int, ...], faulty: int
) -> None:
    model = original()
    before = rewritten(model, codes, scales, zero_points)
    with pytest.raises(InternalError, match=f"input {faulty} of reader_0 is not"):
        check.check(model.graph, before, {"MatMulNBits": 1})


def append(graph: ir.Graph, op_type: str) -> None:
    graph.append(ir.node(op_type, [graph.outputs[0]]))


@pytest.mark.parametrize("op_type", ["Mul", "Cast", "MatMulNBits"])
def test_an_added_node_is_found(op_type: str) -> None:
    model = original()
    before = rewritten(model)
    append(model.graph, op_type)
    with pytest.raises(InternalError, match="nodes were added"):
        check.check(model.graph, before, {"MatMulNBits": 1})


def test_a_matmul_that_was_lost_is_found() -> None:
    model = original()
    before = check.outline_of(model.graph)
    (node,) = (node for node in model.graph if node.name == "reader_0")
    model.graph.outputs[0] = node.inputs[0]  # type: ignore[assignment]
    model.graph.outputs[0].name = "y0"
    model.graph.remove(node, safe=True)
    with pytest.raises(InternalError, match="1 layers replaced"):
        check.check(model.graph, before, {})


def rename_output(graph: ir.Graph) -> None:
    graph.outputs[0].name = "renamed"


def rename_input(graph: ir.Graph) -> None:
    graph.inputs[0].name = "renamed"


def drop_output(graph: ir.Graph) -> None:
    graph.outputs.pop()


@pytest.mark.parametrize("damage", [rename_output, rename_input, drop_output])
def test_other_inputs_or_outputs_are_found(damage: Callable[[ir.Graph], None]) -> None:
    model = original()
    before = rewritten(model)
    damage(model.graph)
    with pytest.raises(InternalError, match="the inputs or outputs of the model changed"):
        check.check(model.graph, before, {"MatMulNBits": 1})
