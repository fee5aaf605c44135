"""The ordered steps of a quantisation."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from awq_onnx import (
    codec,
    folder,
    groups,
    labels,
    layouts,
    methods,
    partwise,
    report,
    resume,
    runtime,
    tables,
    targets,
    threads,
)
from awq_onnx._version import __version__
from awq_onnx.calibrate import channels, data
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.calibrate.data import Calibration, CalibrationData
from awq_onnx.calibrate.feeds import shortened, signature
from awq_onnx.calibrate.straight import Straight, straighten
from awq_onnx.codec import Format
from awq_onnx.comparison import Comparison, compare_outputs, compared_outputs
from awq_onnx.device import Device, device_of
from awq_onnx.errors import AlreadyQuantizedError, NothingToQuantizeError, RecipeError
from awq_onnx.execution_targets import QDQ
from awq_onnx.folder import Destination
from awq_onnx.footprint import footprint_of
from awq_onnx.groups import GroupResult, SiteResult
from awq_onnx.job import Job, Traced
from awq_onnx.labels import Label
from awq_onnx.machine import CPU, Machine, size_text
from awq_onnx.meter import Meter
from awq_onnx.output import OutputFiles
from awq_onnx.partwise import Outputs, Partwise
from awq_onnx.passes import check, constants, embedding, fold, opset, qdq, rewrite, sites
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.branches import separate_names
from awq_onnx.passes.embedding import Table
from awq_onnx.passes.experts import split_experts
from awq_onnx.passes.facts import facts_of
from awq_onnx.passes.inline import inline_functions
from awq_onnx.passes.names import Names
from awq_onnx.passes.pointwise import write_as_matmuls
from awq_onnx.passes.sites import Choice, Refusal, Site, Survey
from awq_onnx.progress import Progress, Silent
from awq_onnx.recipe import Recipe, parse_override
from awq_onnx.report import Report
from awq_onnx.store import ModelSource, OpenedModel, open_model
from awq_onnx.tables import TableResult
from awq_onnx.versions import versions

CALIBRATION, FORMATS = "calibration", "formats"  # their entries in the journal
SCALE_BYTES = 9  # of a block: its scale twice, its zero point
STANDARD_TABLE = "standard ONNX has no node that looks up packed rows"
COPIES = 3  # of a 4-bit model, about, in the session of an application


def quantize(
    model: ModelSource,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    calibration: Calibration = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantise the weights of `model` to 4 bits with AWQ and write it to `output` (and `output`.data).

    model: the path of a .onnx file, an onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph; it is not
    changed. output: a file; or a folder (one that is there, or a str with a separator at its end), where the model
    keeps its name and has config, tokenizer and what else belongs to it beside it. calibration: None (the model writes
    its own text, or what it reads is made up), the path of a .txt, .jsonl, .npz or .npy file, texts, token ids
    (samples, T), or arrays by input name. tokenizer: the folder of tokenizer.json, for text. machine: what to take of
    it.

    A run that was interrupted, or found the disk full, leaves a hidden folder beside `output`; the same call goes on
    from there. Raises ModelError, OutputError, CalibrationError, MissingPackageError, RuntimeFailedError (see
    `awq_onnx.errors`); no output is written then.
    """
    recipe, progress = recipe or Recipe(), progress or Silent()
    machine = machine or Machine()
    device = device_of(machine.device)
    with Meter() as meter, threads.limited(machine.threads), open_model(model) as opened:
        wanted = signature(opened.model.graph)
        key = resume.key(opened, wanted, recipe, calibration, tokenizer, machine.device)
        destination = folder.destination(opened, output, web=recipe.runs_on.in_browser)
        with OutputFiles(destination, opened, overwrite=overwrite, key=key) as files:
            job = Job(opened, wanted, recipe, files, device, machine.budget_bytes, progress)
            plan = make_plan(opened.model, recipe)
            outputs = [name for name in compared_outputs(wanted) if _is_made(opened.model.graph, name)]
            if recipe.chooses_formats:
                targets.check(_items(plan, recipe), opened, recipe)
            files.check_space(_estimated_bytes(opened, plan))
            if not files.done:
                groups.check_weights(plan.survey.sites, opened)
            with meter.stage("calibration data"):
                calibration_data = _calibration_data(job, calibration, tokenizer)
            traced = _trace(job, plan, calibration_data)
            if recipe.chooses_formats:
                with meter.stage("choose formats"):
                    plan = _to_target(job, plan, traced, outputs, calibration_data)
            with meter.stage("calibrate and search"):
                results, expected = _search(job, plan, traced, outputs, calibration_data)
            with meter.stage("write"):
                packed_tables = _packed_tables(job, plan)
                footprint_before = footprint_of(opened.model, opened.size_bytes)
                finished = _write(job, results, packed_tables)
            with meter.stage("measure"):
                comparison = _measure(job, finished, outputs, expected, calibration_data)
            size_after_bytes = files.publish()
        return Report(
            model=str(opened.path or report.IN_MEMORY),
            output=str(files.output),
            carried=tuple(one.target for one in destination.companions),
            recipe=recipe,
            calibration=calibration_data.source,
            matmuls=report.matmul_reports(results),
            groups=report.group_reports(results, recipe),
            tables=tuple(map(report.table_report, packed_tables)),
            kept=plan.kept,
            notes=(*plan.notes, *_notes(plan, recipe, size_after_bytes), *_left_behind(destination)),
            scaled_caches=_scaled_caches(results),
            size_before_bytes=opened.size_bytes,
            size_after_bytes=size_after_bytes,
            footprint_before=footprint_before,
            footprint_after=footprint_of(opened.model, size_after_bytes),
            comparison=comparison,
            total_seconds=meter.total_seconds,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_private_bytes,
            resident_memory_bytes=meter.peak_resident_bytes,
            given=_given(calibration, tokenizer, machine),
            versions=versions(),
        )


def _given(calibration: Calibration, tokenizer: str | os.PathLike[str] | None, machine: Machine) -> dict[str, str]:
    """What the command would be given beside the recipe, by option, and no default of it."""
    files = {"calibration": calibration, "tokenizer": tokenizer}
    given = {name: os.fspath(one) for name, one in files.items() if isinstance(one, str | os.PathLike)}
    return given if machine.device == CPU else given | {"device": machine.device}


@dataclass(frozen=True)
class Plan:
    """What will be done: every site, in groups that share a scale; the tables of embeddings, each with its format.

    formats: of the sites. kept: what could be quantised and is not. notes: what was done to the graph to find them.
    """

    survey: Survey
    groups: tuple[Group, ...]
    formats: Mapping[Site, Format]
    tables: tuple[tuple[Table, Format], ...]
    kept: tuple[Refusal, ...]
    notes: tuple[str, ...]


def make_plan(model: ir.Model, recipe: Recipe | None = None) -> Plan:
    """Look at the graph and read no weight. Layers that hide in functions, Convs and stacks of experts are brought out.

    Raises AlreadyQuantizedError, NothingToQuantizeError, RecipeError.
    """
    recipe = recipe or Recipe()
    choice = Choice(recipe.include, recipe.exclude, recipe.lm_head_bits is not None or recipe.has_target)
    notes = _brought_out(model, choice)
    quantized = sites.quantized_nodes(model.graph)
    if quantized:
        raise AlreadyQuantizedError(
            f"the model is quantised already: {sites.node_name(quantized[0])} is a {quantized[0].op_type}; "
            "start from the original model"
        )
    survey = _with_whole_blocks(sites.survey(model, choice), recipe)
    _check_patterns(recipe, survey)
    if not survey.sites:
        kept = "".join(f"; {one.what}: {one.reason}" for one in survey.kept[:3])
        raise NothingToQuantizeError(
            f"the model has no linear layer with a constant weight that can be quantised{kept}"
        )
    if recipe.format == QDQ:
        opset.check_raisable(model, qdq.OPSET)
    chosen, refused = _tables(model.graph, survey, recipe)
    found = find_groups(survey)
    return Plan(survey, found, _formats(found, recipe), chosen, (*survey.kept, *refused), notes)


def _with_whole_blocks(survey: Survey, recipe: Recipe) -> Survey:
    """Without the layers that do not fill their blocks, where the target refuses such."""
    if not recipe.runs_on.whole_blocks:
        return survey
    odd = {site for site in survey.sites if site.K % methods.format_of(site, recipe).block_size}
    reason = f"its inputs fill no whole blocks, which is all that {recipe.target} takes"
    return replace(
        survey,
        sites=tuple(site for site in survey.sites if site not in odd),
        kept=(*survey.kept, *(Refusal(site.name, reason) for site in survey.sites if site in odd)),
        floats=(*survey.floats, *odd),
    )


def _formats(found: Sequence[Group], recipe: Recipe) -> dict[Site, Format]:
    """Of every site; those that share a weight have that of the first."""
    layers = [sites for group in found for sites in groups.layers_of(group)]
    return {site: methods.format_of(sites[0], recipe) for sites in layers for site in sites}


def _tables(graph: ir.Graph, survey: Survey, recipe: Recipe) -> tuple[tuple[tuple[Table, Format], ...], list[Refusal]]:
    """The tables to quantise, and the reasons why others stay. A table that is a layer's weight goes with the layer."""
    packed = {site.tensor: site for site in survey.sites}
    if recipe.format == QDQ:
        wanted = (one for one in embedding.tables(graph) if recipe.has_target or one.tensor in packed)
        return (), [Refusal(one.name, STANDARD_TABLE) for one in wanted]
    if recipe.embedding_bits is None and not recipe.has_target:
        return (), []
    chosen, refused = [], []
    for found in embedding.tables(graph):
        layer = packed.get(found.tensor)
        if layer is not None:
            if not embedding.lookups(layer):
                refused.append(Refusal(found.name, f"its table is the weight of {layer.name} in another form"))
            continue
        fmt = methods.format_of_table(found, recipe)
        if found.reason is not None or fmt is None:
            refused.append(Refusal(found.name, found.reason or f"its rows of {found.D} numbers fill no blocks"))
        else:
            chosen.append((found, fmt))
    return tuple(chosen), refused


def _brought_out(model: ir.Model, choice: Choice) -> tuple[str, ...]:
    """Rewrite what hides linear layers; a sentence for each thing that the user will see in the graph."""
    inline_functions(model)
    separate_names(model.graph)
    convs = write_as_matmuls(model.graph)
    stacks = split_experts(model, facts_of(model), choice)
    notes = []
    if convs:
        notes.append(f"{convs} 1x1 Convs were written as MatMuls, the Transposes around them removed")
    if stacks:
        notes.append(f"{stacks} stacks of experts were split into a MatMul each, with a Split and a Concat around")
    return tuple(notes)


def _check_patterns(recipe: Recipe, survey: Survey) -> None:
    names = [site.name for site in (*survey.sites, *survey.floats)] + [one.what for one in survey.kept]
    for option, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if names and not any(sites.fits(name, pattern) for name in names):
                raise RecipeError(f"{option} {pattern!r} fits no layer of the model; they have names like {names[0]}")
    for text in recipe.override:
        pattern = parse_override(text)[0]
        if survey.sites and not any(sites.fits(site.name, pattern) for site in survey.sites):
            kept = [one for one in survey.kept if sites.fits(one.what, pattern)]
            why = f"{kept[0].what}: {kept[0].reason}" if kept else f"they have names like {names[0]}"
            raise RecipeError(f"override {text!r} fits no layer that is quantised; {why}")


def _calibration_data(job: Job, calibration: Calibration, tokenizer: str | os.PathLike[str] | None) -> CalibrationData:
    """What an interrupted run had, or new data."""
    files = job.files
    if CALIBRATION in files.done:
        finished = sum(name.startswith(partwise.GROUP) for name in files.done)
        had = f"{finished} group{'s' * (finished != 1)} of layers" if finished else "its calibration data"
        job.progress.note(f"Going on from an interrupted run, which had finished {had}.")
        return CalibrationData.kept(files.done[CALIBRATION], files.work)
    loaded = data.load(job.opened, job.wanted, job.recipe, calibration, tokenizer, job.progress, job.device)
    files.record(CALIBRATION, loaded.keep(files))
    return loaded


def _trace(job: Job, plan: Plan, calibration_data: CalibrationData) -> Traced:
    runtime.give_back_memory()
    job.progress.stage("Tracing channels")
    straight = straighten(job.opened, plan.survey, calibration_data.feeds[0])
    return Traced(straight.opened, trace_channels(plan, straight, calibration_data))


def _search(
    job: Job, plan: Plan, traced: Traced, outputs: list[str], calibration_data: CalibrationData
) -> tuple[list[GroupResult], list[Outputs]]:
    """The results of all groups, and the `outputs` of the model for what is held out."""
    job.progress.stage("Calibrating and searching")
    parts = Partwise(job, traced, plan.groups, plan.formats)
    return parts.run(calibration_data, outputs, job.progress.advance)


def _to_target(job: Job, plan: Plan, traced: Traced, outputs: Sequence[str], calibration_data: CalibrationData) -> Plan:
    """The plan with the formats that reach the target of the recipe."""
    items = _items(plan, job.recipe)
    if FORMATS not in job.files.done:
        job.progress.stage("Choosing formats")
        with job.files.failures():
            losses = targets.estimated_losses(items, plan.groups, calibration_data, job, traced, outputs)
            chosen = targets.choose(items, losses, job.opened, job.recipe)
        job.files.record(FORMATS, {"chosen": [item.formats.index(f) for item, f in zip(items, chosen, strict=True)]})
    formats = [item.formats[at] for item, at in zip(items, job.files.done[FORMATS]["chosen"], strict=True)]
    of_sites = {site: fmt for item, fmt in zip(items, formats, strict=True) for site in item.sites}
    of_tables = tuple((item.table, fmt) for item, fmt in zip(items, formats, strict=True) if item.table)
    plan = replace(plan, formats=of_sites, tables=of_tables)
    job.files.check_space(_estimated_bytes(job.opened, plan))
    return plan


def _items(plan: Plan, recipe: Recipe) -> list[targets.Item]:
    return targets.items_of(plan.groups, plan.formats, plan.tables, recipe)


def trace_channels(
    plan: Plan, straight: Straight, calibration_data: CalibrationData
) -> dict[Group, ChannelMap | Refusal]:
    """For every group with an absorber, which of its channels arrives where; or why that is not known."""
    opened = straight.opened
    feed = shortened(calibration_data.held_out[0], signature(opened.model.graph))
    models = [ir.to_proto(opened.model), *([straight.others] if straight.others is not None else [])]
    return channels.trace(models, opened.folder, plan.groups, plan.survey, feed)


def _packed_tables(job: Job, plan: Plan) -> list[TableResult]:
    """The tables of embeddings, written."""
    results = []
    for number, (table, fmt) in enumerate(plan.tables):
        name = f"table {number}"
        if name not in job.files.done:
            job.files.record(name, tables.write_table(table, fmt, job.opened, job.files))
        results.append(tables.result_of(job.files.done[name], table, job.files.work))
    return results


def _write(job: Job, results: Sequence[GroupResult], packed_tables: Sequence[TableResult]) -> Path:
    """The finished model, not yet in its place."""
    job.progress.stage("Writing the model")
    _edit(job.opened, results, packed_tables, job.files, job.recipe)
    return job.files.write(job.opened.model)


def _edit(
    opened: OpenedModel,
    results: Sequence[GroupResult],
    packed_tables: Sequence[TableResult],
    files: OutputFiles,
    recipe: Recipe,
) -> None:
    """All changes to the graph, after everything about them is decided."""
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


def _is_made(graph: ir.Graph, output: str) -> bool:
    """Whether an output is no constant."""
    return all(constants.stored(value) is None for value in graph.outputs if value.name == output)


def _estimated_bytes(opened: OpenedModel, plan: Plan) -> int:
    """About what the output takes on the disk: what is not quantised, the packed weights, their scales twice."""
    weights = {id(site.tensor): site for site in plan.survey.sites}.values()
    before = sum(site.tensor.nbytes for site in weights)
    packed = 0
    for site in weights:
        fmt = plan.formats[site]
        blocks = -(-site.K // fmt.stored_block_size)
        packed += site.N * blocks * (fmt.stored_block_size * fmt.bits // 8 + SCALE_BYTES)
    return max(opened.size_bytes - before, 0) + packed


def _measure(
    job: Job,
    finished: Path,
    outputs: list[str],
    expected: list[Outputs],
    calibration_data: CalibrationData,
) -> Comparison:
    """onnxruntime runs the result before it is published."""
    job.progress.stage("Measuring the result")
    session = _session_of(finished, job.files.written_bytes, job.budget_bytes, job.device)
    held_out = calibration_data.held_out
    return compare_outputs(outputs, expected, session, held_out, job.wanted, job.progress.advance)


def _session_of(finished: Path, size_bytes: int, budget_bytes: int, device: Device) -> Any:
    """As an application would open it, where memory allows that."""
    runtime.give_back_memory()
    if COPIES * size_bytes <= budget_bytes:
        return runtime.client_session(finished, device.providers)
    return runtime.session(finished.read_bytes(), finished.parent.resolve(), fuse=False, providers=device.providers)


def _notes(plan: Plan, recipe: Recipe, size_after_bytes: int) -> list[str]:
    notes = []
    if any(site.dtype == ir.DataType.BFLOAT16 for site in plan.survey.sites):
        notes.append("onnxruntime runs bfloat16 on CUDA only; here the models were run and compared as float32")
    if recipe.target_size is not None and size_after_bytes > recipe.target_size:
        notes.append(f"the model came out larger than the {size_text(recipe.target_size)} that were wanted")
    return notes


def _left_behind(destination: Destination) -> list[str]:
    if not destination.left:
        return []
    return [f"not carried over: {', '.join(destination.left)}; quantise or copy the rest of the model into there too"]


def _scaled_caches(results: Sequence[GroupResult]) -> int:
    return sum(len(one.group.caches) for one in results if not isinstance(one.folded, Refusal) and one.alpha > 0)
