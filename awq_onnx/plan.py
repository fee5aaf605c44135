"""What will be done to a model: decided from the graph, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from awq_onnx import groups, methods, sizing
from awq_onnx.codec import Format
from awq_onnx.errors import AlreadyQuantizedError, NothingToQuantizeError, RecipeError
from awq_onnx.passes import embedding, opset, qdq, sites
from awq_onnx.passes.absorb import Group, find_groups
from awq_onnx.passes.branches import separate_names
from awq_onnx.passes.embedding import Table
from awq_onnx.passes.experts import split_experts
from awq_onnx.passes.facts import facts_of
from awq_onnx.passes.inline import inline_functions
from awq_onnx.passes.pointwise import write_as_matmuls
from awq_onnx.passes.sites import Choice, Refusal, Site, Survey
from awq_onnx.recipe import Recipe, parse_override
from awq_onnx.store import OpenedModel
from awq_onnx.targets import QDQ

SCALE_BYTES = 9  # of a block: its scale twice, its zero point
STANDARD_TABLE = "standard ONNX has no node that looks up packed rows"


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
    choice = Choice(recipe.include, recipe.exclude, recipe.lm_head_bits is not None or recipe.has_size)
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
    found = find_groups(survey)
    formats = _formats(found, recipe)
    chosen, refused = _tables(model.graph, formats, recipe)
    return Plan(survey, found, formats, chosen, (*survey.kept, *refused), notes)


def _with_whole_blocks(survey: Survey, recipe: Recipe) -> Survey:
    """Without the layers that do not fill their blocks, where the target refuses such."""
    if not recipe.runs_on.whole_blocks:
        return survey
    odd = tuple(site for site in survey.sites if site.K % methods.format_of(site, recipe).block_size)
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


def _tables(
    graph: ir.Graph, formats: Mapping[Site, Format], recipe: Recipe
) -> tuple[tuple[tuple[Table, Format], ...], list[Refusal]]:
    """The tables to quantise, and the reasons why others stay. A table that is a layer's weight goes with the layer."""
    packed = {site.tensor: site for site in formats}
    chosen, refused = [], []
    for found in embedding.tables(graph):
        layer = packed.get(found.tensor)
        if layer is not None:
            reason = _why_apart(layer, formats[layer], recipe)
            refused += [] if reason is None else [Refusal(found.name, reason)]
        elif recipe.has_size and recipe.format == QDQ:
            refused.append(Refusal(found.name, STANDARD_TABLE))
        elif recipe.embedding_bits is not None or recipe.has_size:
            fmt = methods.format_of_table(found, recipe)
            if found.reason is not None or fmt is None:
                refused.append(Refusal(found.name, found.reason or f"its rows of {found.D} numbers fill no blocks"))
            else:
                chosen.append((found, fmt))
    return tuple(chosen), refused


def _why_apart(layer: Site, fmt: Format, recipe: Recipe) -> str | None:
    """Why the packed weight of a layer cannot be the table as well, which then stays beside it."""
    if recipe.format == QDQ:
        return STANDARD_TABLE
    if not embedding.lookups(layer):
        return f"its table is the weight of {layer.name} in another form"
    if not methods.packed_lookups(layer, recipe) or layer.K % fmt.stored_block_size:
        return f"its rows of {layer.K} numbers fill no blocks; the weight of {layer.name} is packed beside it"
    return None


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


def items_of(plan: Plan, recipe: Recipe) -> list[sizing.Item]:
    return sizing.items_of(plan.groups, plan.formats, plan.tables, recipe)


def estimated_bytes(opened: OpenedModel, plan: Plan) -> int:
    """About what the output takes on the disk: what is not quantised, the packed weights, their scales twice."""
    weights = {id(site.tensor): site for site in plan.survey.sites}.values()
    before = sum(site.tensor.nbytes for site in weights)
    packed = 0
    for site in weights:
        fmt = plan.formats[site]
        blocks = -(-site.K // fmt.stored_block_size)
        packed += site.N * blocks * (fmt.stored_block_size * fmt.bits // 8 + SCALE_BYTES)
    return max(opened.size_bytes - before, 0) + packed
