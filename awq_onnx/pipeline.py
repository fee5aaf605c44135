"""The ordered steps of a quantisation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from awq_onnx import (
    edit,
    folder,
    groups,
    partwise,
    report,
    resume,
    runtime,
    sizing,
    tables,
    threads,
)
from awq_onnx.calibrate import channels, data
from awq_onnx.calibrate.channels import ChannelMap
from awq_onnx.calibrate.data import Calibration, CalibrationData
from awq_onnx.calibrate.feeds import shortened, signature
from awq_onnx.calibrate.straight import Straight, straighten
from awq_onnx.comparison import Comparison, compare_outputs, compared_outputs
from awq_onnx.device import Device, device_of
from awq_onnx.folder import Destination
from awq_onnx.footprint import footprint_of
from awq_onnx.groups import GroupResult
from awq_onnx.job import Job, Traced
from awq_onnx.machine import CPU, Machine, size_text
from awq_onnx.meter import Meter
from awq_onnx.output import OutputFiles
from awq_onnx.partwise import Outputs, Partwise
from awq_onnx.passes import constants
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.sites import Refusal
from awq_onnx.plan import Plan, estimated_bytes, items_of, make_plan
from awq_onnx.progress import Progress, Silent
from awq_onnx.recipe import Recipe
from awq_onnx.report import Report
from awq_onnx.store import ModelSource, open_model
from awq_onnx.tables import TableResult
from awq_onnx.versions import versions

CALIBRATION, FORMATS = "calibration", "formats"  # their entries in the journal


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
                sizing.check(items_of(plan, recipe), opened, recipe)
            files.check_space(estimated_bytes(opened, plan))
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
            given=_given(output, calibration, tokenizer, machine),
            versions=versions(),
        )


def _given(
    output: str | os.PathLike[str],
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
    machine: Machine,
) -> dict[str, str] | None:
    """What the command would be given beside the recipe, by option, and no default of it."""
    if calibration is not None and not isinstance(calibration, str | os.PathLike):
        return None
    whole = os.path.join(output, "") if folder.is_folder(output) else output  # noqa: PTH118 (ends with a separator)
    files = {"output": whole, "calibration": calibration, "tokenizer": tokenizer}
    given = {name: os.fspath(one) for name, one in files.items() if one is not None}
    return given if machine.device == CPU else given | {"device": machine.device}


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
    items = items_of(plan, job.recipe)
    if FORMATS not in job.files.done:
        job.progress.stage("Choosing formats")
        with job.files.failures():
            losses = sizing.estimated_losses(items, plan.groups, calibration_data, job, traced, outputs)
            chosen = sizing.choose(items, losses, job.opened, job.recipe)
        job.files.record(FORMATS, {"chosen": [item.formats.index(f) for item, f in zip(items, chosen, strict=True)]})
    formats = [item.formats[at] for item, at in zip(items, job.files.done[FORMATS]["chosen"], strict=True)]
    of_sites = {site: fmt for item, fmt in zip(items, formats, strict=True) for site in item.sites}
    of_tables = tuple((item.table, fmt) for item, fmt in zip(items, formats, strict=True) if item.table)
    plan = replace(plan, formats=of_sites, tables=of_tables)
    job.files.check_space(estimated_bytes(job.opened, plan))
    return plan


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
    edit.apply(job.opened, results, packed_tables, job.files, job.recipe)
    return job.files.write(job.opened.model)


def _is_made(graph: ir.Graph, output: str) -> bool:
    """Whether an output is no constant."""
    return all(constants.stored(value) is None for value in graph.outputs if value.name == output)


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
    if runtime.COPIES * size_bytes <= budget_bytes:
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
