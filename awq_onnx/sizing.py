"""A size for the whole model: which layer gets how many bits, in blocks of which size.

On a few sequences every layer is rounded in one format, and what each format does to what the layer makes is estimated
(`groups.try_group`). What that rounding costs the output is measured (`awq_onnx.sensitivity`), layer by layer. For the
other formats it is taken in proportion: these are the losses of a knapsack (`awq_onnx.allocate`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import onnx_ir as ir

from awq_onnx import groups, methods, sensitivity, stand_ins, tables
from awq_onnx.allocate import Option, allocate
from awq_onnx.calibrate.data import CalibrationData
from awq_onnx.calibrate.segments import Data, Segments, Statistics
from awq_onnx.codec import Format
from awq_onnx.errors import RecipeError
from awq_onnx.job import Job, Traced, submit
from awq_onnx.machine import size_text
from awq_onnx.output import alignment
from awq_onnx.passes import constants, embedding
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.embedding import Table
from awq_onnx.passes.sites import Site
from awq_onnx.passes.switch import StandIn
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel
from awq_onnx.threads import Spread, Workers, usable_cores

FEEDS = 2  # of the calibration data, some sequences each
BITS = (4, 2, 8)  # the first of these and of the block sizes is the format that is tried
BLOCK_SIZES = (32, 16, 64, 128)
NODE_BYTES = 2048  # more than a node with its metadata takes
MEASURING = 0.5  # of the work, about; the rest is estimating

TRIALS = "trials"  # the folder of what is tried


@dataclass(frozen=True)
class _Tried:
    """losses: of each format. stand_in: the layer in the first one."""

    losses: tuple[float, ...]
    stand_in: StandIn


Trials = dict[Site, _Tried]


@dataclass(frozen=True)
class Item:
    """What has one format: the layers that share a weight, or a table.

    gathers: the lookups in it. shape: (K, N). plain: its format where nothing is chosen. formats: those to choose from.
    """

    sites: tuple[Site, ...]
    table: Table | None
    gathers: tuple[ir.Node, ...]
    shape: tuple[int, int]
    plain: Format
    formats: tuple[Format, ...]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def places(self) -> list[str]:
        """The names of the values that it makes."""
        return [site.output.name or "" for site in self.sites] + [node.outputs[0].name or "" for node in self.gathers]

    @property
    def values(self) -> list[ir.Value]:
        """Its weight, or its table, in the graph."""
        return [self.table.value] if self.table else [site.weight for site in self.sites]

    @property
    def stored_bytes(self) -> int:
        """What the tensors take that it is made of now."""
        return sum({id(one): one.nbytes for value in self.values for one in _stored(value)}.values())


def items_of(
    plan: Sequence[Group], formats: Mapping[Site, Format], chosen: Sequence[tuple[Table, Format]], recipe: Recipe
) -> list[Item]:
    """Everything that gets a format. formats, chosen: what it would be where nothing is chosen."""
    items = []
    for group in plan:
        for sites in groups.layers_of(group):
            first, plain = sites[0], formats[sites[0]]
            fills = first.K % plain.stored_block_size == 0
            gathers = tuple(methods.packed_lookups(first, recipe)) if fills else ()
            fixed = any(recipe.overrides(site.name) for site in sites)
            given = recipe.lm_head_bits if first.is_head else None
            bits = _bits(given, recipe, looked_up=first.is_head or bool(gathers))
            filled = first.K if gathers or recipe.runs_on.whole_blocks else None
            offered = (plain,) if fixed else _offered(plain, bits, recipe, filled)
            items.append(Item(sites, None, gathers, (first.K, first.N), plain, offered))
    for table, fmt in chosen:
        offered = _offered(fmt, _bits(recipe.embedding_bits, recipe, looked_up=True), recipe, table.D)
        items.append(Item((), table, table.readers, (table.D, table.V), fmt, offered))
    return items


def _bits(given: int | None, recipe: Recipe, *, looked_up: bool) -> tuple[int, ...]:
    if given is not None:
        return (given,)
    return tuple(bits for bits in (methods.LOOKED_UP_BITS if looked_up else BITS) if bits in recipe.all_bits)


def _offered(plain: Format, bits: Sequence[int], recipe: Recipe, filled: int | None) -> tuple[Format, ...]:
    """filled: the length of rows that have to fill their blocks; None where they need not."""
    sizes = [size for size in BLOCK_SIZES if size in recipe.runs_on.block_sizes]
    blocks = [replace(plain, block_size=size, stored=None) for size in sizes] or [plain]
    formats = [replace(blocked, bits=count) for count, blocked in product(bits, blocks)]
    fitting = [one for one in formats if filled is None or filled % one.block_size == 0]
    return tuple(fitting) if plain in fitting else (*fitting, plain)


def wanted_bytes(items: Sequence[Item], opened: OpenedModel, recipe: Recipe) -> int:
    """About what the model will take, in the formats that are told or up to the target."""
    others = _others_bytes(items, opened)
    most = sum(max(_bytes(item, fmt, recipe) for fmt in item.formats) for item in items)
    return others + min(_budget_bytes(items, others, recipe), most)


def check(items: Sequence[Item], opened: OpenedModel, recipe: Recipe) -> None:
    """Raises RecipeError where not even the smallest formats reach the target."""
    others = _others_bytes(items, opened)
    least = sum(min(_bytes(item, fmt, recipe) for fmt in item.formats) for item in items)
    if least <= _budget_bytes(items, others, recipe):
        return
    if recipe.target_size is not None:
        raise RecipeError(
            f"target_size {size_text(recipe.target_size)} is too small: the least that the model can have is "
            f"{size_text(least + others)}, of which {size_text(others)} are not quantised"
        )
    bits = 8 * (least - NODE_BYTES * len(items)) / sum(item.weights for item in items)
    raise RecipeError(f"target_bits {recipe.target_bits} is too small: the least that the model can have is {bits:.2f}")


def estimated_losses(
    items: Sequence[Item],
    plan: Sequence[Group],
    data: CalibrationData,
    job: Job,
    traced: Traced,
    outputs: Sequence[str],
) -> list[list[float]]:
    """About what the output loses, by the item and its format; the target has no part in it. outputs: of the model, to
    measure at.
    """
    folder = job.files.work / TRIALS
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir()
    trials = _trials(items, plan, data, job, traced, folder)
    measured = sensitivity.measure(
        traced.straight,
        [place for item in items for place in item.places],
        {site.output.name or "": tried.stand_in for site, tried in trials.items()},
        [sensitivity.window_of(data.feeds, job.wanted)],  # not what the result will be measured with
        list(outputs),
        job.wanted,
        providers=job.device.providers,
        advance=lambda part: job.progress.advance(MEASURING * part),
    )
    shutil.rmtree(folder)
    relative = {site.output.name or "": tried.losses[0] for site, tried in trials.items()}
    costs = {place: loss / (relative.get(place, 1.0) or 1.0) for place, loss in measured.items() if loss > 0}
    unknown = sorted(costs.values())[len(costs) // 2] if costs else 1.0  # in the body of a Loop, or never reached
    estimated = []
    for item in items:
        cost = sum(costs[place] for place in item.places if place in costs) or unknown
        table = item.table
        lost = tables.losses_of(table, item.formats, job.opened) if table else trials[item.sites[0]].losses
        estimated.append([cost * loss for loss in lost])
    return estimated


def choose(
    items: Sequence[Item], losses: Sequence[Sequence[float]], opened: OpenedModel, recipe: Recipe
) -> list[Format]:
    """The format of every item, of the least loss that the target allows; see `check`. losses: of its formats."""
    options = [
        [Option(_bytes(item, fmt, recipe), loss) for fmt, loss in zip(item.formats, lost, strict=True)]
        for item, lost in zip(items, losses, strict=True)
    ]
    chosen = allocate(options, _budget_bytes(items, _others_bytes(items, opened), recipe))
    assert chosen is not None
    return [item.formats[at] for item, at in zip(items, chosen, strict=True)]


def _budget_bytes(items: Sequence[Item], others: int, recipe: Recipe) -> int:
    """What all items together may take: without a target what their plain formats take. others: bytes of the rest."""
    if recipe.target_size is not None:
        return recipe.target_size - others
    if recipe.target_bits is not None:
        return int(recipe.target_bits * sum(item.weights for item in items) / 8) + NODE_BYTES * len(items)
    return sum(_bytes(item, item.plain, recipe) for item in items)


def _others_bytes(items: Sequence[Item], opened: OpenedModel) -> int:
    """What stays of the source: all but the tensors that the items are made of, and that nothing else looks up."""
    looked_up = {gather for item in items for gather in item.gathers}
    stay = {
        id(one)
        for table in embedding.tables(opened.model.graph)
        if not looked_up.issuperset(node for node in table.readers if node.op_type == "Gather")
        for one in _stored(table.value)
    }
    gone = {id(one): one.nbytes for item in items for value in item.values for one in _stored(value)}
    return opened.size_bytes - sum(nbytes for tensor, nbytes in gone.items() if tensor not in stay)


def _stored(value: ir.Value) -> Iterator[ir.TensorProtocol]:
    """The tensors in the file that a value is made of."""
    node = value.producer()
    if value.is_initializer() or node is None or not node.inputs:
        tensor = constants.stored(value)
        if tensor is not None:
            yield tensor
        return
    for one in node.inputs:
        if one is not None:
            yield from _stored(one)


def _bytes(item: Item, fmt: Format, recipe: Recipe) -> int:
    """Codes, scales and zero points; for a size of the file with the largest gaps before them."""
    sizes = fmt.sizes(*item.shape)
    gaps = sum(map(alignment, sizes)) if recipe.target_size is not None else 0
    return sum(sizes) + gaps + NODE_BYTES


def _trials(
    items: Sequence[Item],
    plan: Sequence[Group],
    data: CalibrationData,
    job: Job,
    traced: Traced,
    folder: Path,
) -> Trials:
    """What each format of every layer loses, on a few sequences, and the layer in the first of them."""
    formats = {site: item.formats for item in items for site in item.sites}
    numbers = {site: number for number, site in enumerate(formats)}
    found: list[Future[Trials]] = []

    def attempt(group: Group, statistics: Statistics, workers: Workers) -> None:
        def work(spread: Spread) -> Trials:
            wanted = {site: formats[site] for site in group.sites}
            maps, recipe, opened, device = traced.maps.get(group), job.recipe, job.opened, job.device
            with device.turn:
                found = groups.try_group(
                    group, maps, statistics, wanted, recipe, opened, random=data.random, spread=spread, device=device
                )
            paths = {site: folder / f"{numbers[site]}.npz" for site in found}
            return {site: _Tried(one.losses, stand_ins.of_trial(site, one, paths[site])) for site, one in found.items()}

        found.append(submit(workers, group, work))

    def advance(part: float) -> None:
        job.progress.advance((1 - MEASURING) * part)

    with Workers(usable_cores(), job.budget_bytes) as workers:
        run = Segments(
            traced.straight,
            plan,
            Data(data.feeds[:FEEDS]),
            folder=job.files.work,
            budget_bytes=job.budget_bytes,
            spread=workers.spread,
            device=job.device,
        )
        for known in run.run(make_room=workers.make_room, advance=advance):
            while known:
                attempt(*known.pop(0), workers)
            job.opened.let_go()
        return {site: trial for one in found for site, trial in one.result().items()}
