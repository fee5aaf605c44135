"""All changes to the graph, after everything about them is decided."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from awq_onnx import codec, groups, labels, layouts, methods, report
from awq_onnx._version import __version__
from awq_onnx.groups import GroupResult, SiteResult
from awq_onnx.labels import Label
from awq_onnx.output import OutputFiles
from awq_onnx.passes import check, embedding, fold, opset, qdq, rewrite
from awq_onnx.passes.names import Names
from awq_onnx.passes.sites import Refusal, Site
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel
from awq_onnx.tables import TableResult
from awq_onnx.targets import QDQ


def apply(
    opened: OpenedModel,
    results: Sequence[GroupResult],
    packed_tables: Sequence[TableResult],
    files: OutputFiles,
    recipe: Recipe,
) -> None:
    """Divide, pack, replace and label; raises InternalError where the graph is not what it must be then."""
    model = opened.model
    before = check.outline_of(model.graph)
    divided = _fold(opened, results)
    _tell_divided(results)
    added = Counter({"Mul": _insert_muls(model.graph, results)})
    if recipe.format == QDQ:
        opset.raise_to(model, qdq.OPSET, qdq.IR_VERSION)
    scales: dict[tuple[str, bytes], ir.TensorProtocol] = {}
    names = Names(model.graph)
    for result in results:
        for site in result.sites:
            weight = _packed(site, divided.get(site.site), files, scales, recipe)
            label = Label.of(report.matmul_report(result, site))
            added += _replace(model, site, weight, names, label, site.site in divided, recipe)
    for one in packed_tables:
        tensors = [one.codes, one.scales, one.zero_points]
        looking_up = embedding.look_up(model.graph, one.table, tensors, one.bits, one.block_size)
        added += Counter({"GatherBlockQuantized": looking_up})
    model.metadata_props[labels.VERSION] = __version__
    model.metadata_props[labels.RECIPE] = json.dumps(recipe.to_dict())
    check.check(model.graph, before, added)


def _replace(
    model: ir.Model,
    site: SiteResult,
    weight: rewrite.PackedWeight,
    names: Names,
    label: Label,
    divided: bool,
    recipe: Recipe,
) -> Counter[str]:
    """The nodes of the recipe's format in the place of the layer; which were added. divided: whether the weight is, so
    that nothing can look up rows of the original in it.
    """
    metadata = label.metadata()
    doc_string = label.sentences(site.bits, site.block_size, zero_points=site.zero_points is not None)
    if recipe.format == QDQ:
        return qdq.to_dequantized(
            model.graph,
            site.site,
            weight,
            names,
            block_size=site.block_size,
            metadata=metadata,
            doc_string=doc_string,
        )
    gathers = [] if divided else methods.packed_lookups(site.site, recipe)
    layer, *added = rewrite.to_matmul_nbits(
        model,
        site.site,
        weight,
        block_size=site.block_size,
        bits=site.bits,
        accuracy_level=recipe.accuracy_level,
        metadata=metadata,
        doc_string=doc_string,
        bias_names=None if recipe.runs_on.bias_inside else names,
    )
    return Counter(node.op_type for node in (layer, *added)) + embedding.share(model, layer, gathers)


def _fold(opened: OpenedModel, results: Sequence[GroupResult]) -> dict[Site, codec.Float32]:
    """Fold every scale that is not 1 and goes somewhere; what the columns of each layer have to be divided by."""
    foldings = [
        fold.Folding(one.group, one.scale, tuple(zip(one.folded, one.divided, strict=True)))
        for one in results
        if not isinstance(one.folded, Refusal) and not np.all(one.scale == 1)
    ]
    quantized = {site for one in results for site in one.group.sites}
    return fold.fold_scales(opened.model.graph, foldings, partial(groups.read_weight, opened=opened), quantized)


def _insert_muls(graph: ir.Graph, results: Sequence[GroupResult]) -> int:
    """A Mul on every input whose scale goes nowhere else; how many."""
    readers: dict[tuple[ir.Value, Any], list[Site]] = {}
    factors: dict[Site, codec.Float32] = {}
    names = Names(graph)
    for result in results:
        for site in result.group.sites if result.multiplied else ():
            readers.setdefault((site.input, site.node.graph), []).append(site)
            factors[site] = np.reciprocal(result.scale)
    for (value, _), together in readers.items():
        fold.insert_mul(graph, value, together, factors[together[0]], names)
    return len(readers)


def _packed(
    site: SiteResult,
    divisor: codec.Float32 | None,
    files: OutputFiles,
    known: dict[tuple[str, bytes], ir.TensorProtocol],
    recipe: Recipe,
) -> rewrite.PackedWeight:
    """The packed tensors; dividing an output channel divides the scales of its blocks, exactly.

    known: the scales that were written, by codes and divisor: layers with one weight share them.
    """
    dtype = site.site.dtype.numpy()
    key = (site.codes.name or "", b"" if divisor is None else divisor.tobytes())  # codes are of one dtype
    if key not in known:
        scales: codec.Float32 = site.scales.numpy()
        scales = scales if divisor is None else scales / divisor
        known[key] = files.append(
            f"{site.name}.scales", layouts.scales_as_read(scales, dtype, recipe, per_axis=site.per_axis)
        )
    bias = groups.read_bias(site.site)
    if bias is not None:
        bias = (bias if divisor is None else bias / divisor).astype(dtype)
    return rewrite.PackedWeight(
        codes=site.codes,
        scales=known[key],
        zero_points=site.zero_points,
        bias=None if bias is None else files.append(f"{site.name}.bias", bias),
    )


def _tell_divided(results: Sequence[GroupResult]) -> None:
    """Say of each node that absorbed a scale whose it was."""
    for result in results:
        if isinstance(result.folded, Refusal) or np.all(result.scale == 1):
            continue
        told = labels.divided([site.name for site in result.group.sites])
        for absorber in result.folded:
            for node in fold.divided_nodes(absorber):
                node.metadata_props.update(told)
