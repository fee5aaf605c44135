"""What a run tells: the choice of layers, Muls that were added or would help, bits, notes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import GraphBuilder, gated_mlp, norm_and_readers, run, save, tiny_decoder

import awq_onnx
from awq_onnx import Recipe, Report
from awq_onnx.errors import NothingToQuantizeError, RecipeError

QUICK = Recipe(samples=2, sequence_length=8, accuracy_level=0)


def report_of(model: onnx.ModelProto, folder: Path, recipe: Recipe = QUICK, **options: object) -> Report:
    return awq_onnx.quantize(save(model, folder / "model.onnx"), folder / "out.onnx", recipe, **options)  # type: ignore[arg-type]


def rows(report: Report, label: str) -> list[str]:
    return [text for one, text in report.rows() if one == label]


def op_types(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


# Which layers


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        pytest.param((), (), 14, id="everything"),
        pytest.param(("*/mlp/*",), (), 6, id="one part"),
        pytest.param(("*q_proj*", "*k_proj*"), (), 4, id="two parts"),
        pytest.param((), ("/layers.0/*",), 7, id="all but a layer"),
        pytest.param(("*_proj*",), ("*/mlp/*", "*o_proj*"), 6, id="one part without another"),
        pytest.param(("/layers.?/[qk]_proj/*",), (), 4, id="any pattern of a shell"),
    ],
)
def test_layers_are_chosen_by_the_names_of_their_nodes(
    tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], left: int
) -> None:
    report = report_of(tiny_decoder(), tmp_path, replace(QUICK, include=include, exclude=exclude))
    assert len(report.matmuls) == left
    assert len(report.kept) == 15 - left
    assert op_types(tmp_path / "out.onnx")["MatMulNBits"] == left


def test_what_was_left_alone_is_told_with_the_option_that_says_so(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path, replace(QUICK, include=("*_proj*",), exclude=("*/mlp/*",)))
    reasons = {one.reason for one in report.kept}
    assert reasons == {"--exclude */mlp/* names it", "it is the lm_head, which stays as it is"}
    assert rows(report, "Left alone") == [
        "6 layers, /layers.0/mlp/gate_proj/MatMul first: --exclude */mlp/* names it",
        "/lm_head/MatMul: it is the lm_head, which stays as it is",
    ]


def test_a_layer_that_no_include_names_says_so(tmp_path: Path) -> None:
    report = report_of(norm_and_readers().model(), tmp_path, replace(QUICK, include=("reader_1",)))
    assert [(one.what, one.reason) for one in report.kept] == [("reader_0", "no --include names it")]


@pytest.mark.parametrize("setting", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_an_error_and_leaves_nothing(tmp_path: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"{setting} '\*attention\*' fits no layer of the model"):
        report_of(norm_and_readers().model(), tmp_path, replace(QUICK, **{setting: ("*reader*", "*attention*")}))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_patterns_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingToQuantizeError, match=r"--exclude \* names it"):
        report_of(norm_and_readers().model(), tmp_path, replace(QUICK, exclude=("*",)))


def test_a_pattern_fits_whole_names_and_capitals() -> None:
    assert awq_onnx.passes.sites.fits("/layers.0/mlp/up_proj/MatMul", "*/mlp/*")
    assert not awq_onnx.passes.sites.fits("/layers.0/mlp/up_proj/MatMul", "mlp")
    assert not awq_onnx.passes.sites.fits("/layers.0/mlp/up_proj/MatMul", "*/MLP/*")


def test_a_node_without_a_name_is_named_after_what_it_makes_for_patterns_too(tmp_path: Path) -> None:
    model = norm_and_readers().model()
    for node in model.graph.node:
        node.name = ""
    report = report_of(model, tmp_path, replace(QUICK, exclude=("*of y0",)))
    assert [one.name for one in report.matmuls] == ["MatMul of y1"]


def test_excluded_layers_that_share_a_norm_are_compensated(tmp_path: Path) -> None:
    """The norm is divided for the other, and the excluded one computes what it did."""
    model = norm_and_readers().model()
    report = report_of(model, tmp_path, replace(QUICK, exclude=("reader_1",)))
    assert [(one.fold, one.alpha > 0) for one in report.matmuls] == [("norm gain", True)]
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)}
    np.testing.assert_allclose(run(tmp_path / "out.onnx", feed)["y1"], run(model, feed)["y1"], rtol=1e-4, atol=1e-4)


# Muls


def unabsorbed(*, dtype: type = np.float32) -> onnx.ModelProto:
    """x -> norm -> Sub -> two MatMuls: a scale is worth much, and Sub lets none through."""
    builder = GraphBuilder(dtype=dtype)
    normed = builder.rms_norm(builder.input("x", ["batch", "sequence", 64]), 64, "norm")
    shifted = builder.add("Sub", normed, builder.constant(np.full(64, 0.25)), name="sub")
    for index, columns in enumerate((48, 32)):
        weight = builder.weight(64, columns, f"w{index}")
        builder.output(builder.add("MatMul", shifted, weight, name=f"reader_{index}", to=f"y{index}"))
    return builder.model()


def given(model: onnx.ModelProto) -> dict[str, object]:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    return {"calibration": {"x": np.random.default_rng(1).standard_normal((16, 8, 64)).astype(dtype)}}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_mul_takes_the_scale_that_nothing_absorbs(tmp_path: Path, dtype: type) -> None:
    model = unabsorbed(dtype=dtype)
    without = report_of(model, tmp_path, **given(model))
    muls = op_types(tmp_path / "out.onnx")["Mul"]
    with_mul = report_of(model, tmp_path, replace(QUICK, allow_mul=True), overwrite=True, **given(model))
    assert op_types(tmp_path / "out.onnx")["Mul"] == muls + 1  # one for the input of both
    assert muls == op_types(tmp_path / "model.onnx")["Mul"]

    for before, after in zip(without.matmuls, with_mul.matmuls, strict=True):
        assert (before.alpha, before.fold, before.blocked_by) == (0, None, "sub")
        assert before.mul_gain is not None
        assert (after.fold, after.folded_into, after.reason) == ("Mul", "a Mul on its input", None)
        assert after.alpha > 0
        assert after.error < 0.9 * before.error
    sums = [np.sum([one.error**2 for one in report.matmuls]) for report in (without, with_mul)]
    assert without.matmuls[0].mul_gain == pytest.approx(np.sqrt(sums[1] / sums[0]), rel=0.1)


def test_the_summary_tells_what_a_mul_would_bring_and_then_what_it_brought(tmp_path: Path) -> None:
    model = unabsorbed()
    without = report_of(model, tmp_path, **given(model))
    (advice,) = rows(without, "")
    assert advice.startswith("--allow-mul would bring 2 of them to 0.")
    assert rows(without, "Scales") == ["none could be folded; the weights are rounded as they are"]
    with_mul = report_of(model, tmp_path, replace(QUICK, allow_mul=True), overwrite=True, **given(model))
    assert rows(with_mul, "") == rows(with_mul, "Not scaled") == []
    (scales,) = rows(with_mul, "Scales")
    assert scales.startswith("folded: 2 into a Mul on the input; mean alpha ")
    assert scales.endswith("; Mul nodes added")


def test_the_quantised_model_is_as_near_with_muls_as_its_layers_say(tmp_path: Path) -> None:
    model = unabsorbed()
    feed = {"x": np.random.default_rng(2).standard_normal((4, 8, 64)).astype(np.float32)}
    errors = []
    for allow_mul in (False, True):
        report_of(model, tmp_path, replace(QUICK, allow_mul=allow_mul), overwrite=True, **given(model))
        expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
        errors.append(sum(np.square(actual[name] - values).sum() for name, values in expected.items()))
    assert errors[1] < 0.8 * errors[0]


def test_no_mul_is_added_where_a_norm_absorbs(tmp_path: Path) -> None:
    model = gated_mlp().model()
    report = report_of(model, tmp_path, replace(QUICK, allow_mul=True), **given(model))
    assert {one.fold for one in report.matmuls} == {"norm gain", "MatMul"}
    assert {one.mul_gain for one in report.matmuls} == {None}
    assert op_types(tmp_path / "out.onnx")["Mul"] == op_types(tmp_path / "model.onnx")["Mul"]


def test_no_mul_is_added_where_it_would_not_help(tmp_path: Path) -> None:
    """Channels that are all the same need no scale."""
    builder = GraphBuilder()
    builder.output(builder.linear(builder.input("x", ["batch", "sequence", 64]), 64, 32, "layer"))
    model = builder.model()
    x = np.random.default_rng(1).choice([-1, 1], (16, 8, 64)).astype(np.float32)
    report = report_of(model, tmp_path, replace(QUICK, allow_mul=True), calibration={"x": x})
    (layer,) = report.matmuls
    assert (layer.fold, layer.alpha) == (None, 0)
    assert "Mul" not in op_types(tmp_path / "out.onnx")
    assert rows(report, "") == []


def test_an_input_of_the_model_can_have_a_mul(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.output(builder.linear(builder.input("x", ["batch", "sequence", 64]), 64, 32, "layer"))
    model = builder.model()
    x = np.random.default_rng(1).standard_normal((16, 8, 64)).astype(np.float32)
    x[:, :, ::13] *= 40
    report = report_of(model, tmp_path, replace(QUICK, allow_mul=True), calibration={"x": x})
    assert [one.fold for one in report.matmuls] == ["Mul"]
    expected, actual = run(model, {"x": x}).popitem()[1], run(tmp_path / "out.onnx", {"x": x}).popitem()[1]
    assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


def test_what_else_reads_the_input_of_a_mul_sees_it_unscaled(tmp_path: Path) -> None:
    """An output of the model that is the input of a layer as well, and a layer that stays in float."""
    model = unabsorbed()
    shifted = next(node.output[0] for node in model.graph.node if node.name == "sub")
    model.graph.output.append(onnx.helper.make_tensor_value_info(shifted, 1, ["batch", "sequence", 64]))
    recipe = replace(QUICK, allow_mul=True, exclude=("reader_1",))
    report = report_of(model, tmp_path, recipe, **given(model))
    assert [one.fold for one in report.matmuls] == ["Mul"]
    feed = {"x": np.random.default_rng(2).standard_normal((4, 8, 64)).astype(np.float32)}
    expected, actual = run(model, feed), run(tmp_path / "out.onnx", feed)
    for name in (shifted, "y1"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_name_that_a_mul_would_get_may_be_taken(tmp_path: Path) -> None:
    model = unabsorbed()
    shifted = next(node.output[0] for node in model.graph.node if node.name == "sub")
    model.graph.node.append(onnx.helper.make_node("Neg", [shifted], [f"{shifted}.scaled"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info(f"{shifted}.scaled", 1, ["batch", "sequence", 64]))
    report = report_of(model, tmp_path, replace(QUICK, allow_mul=True), **given(model))
    assert [one.fold for one in report.matmuls] == ["Mul", "Mul"]


def test_layers_in_both_branches_of_an_if_get_a_mul_each(tmp_path: Path) -> None:
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 64])
    length = builder.add("Gather", builder.add("Shape", x), builder.constant(1, dtype=np.int64), axis=0)
    short = builder.add("Less", length, builder.constant(20, dtype=np.int64))
    bodies = []
    for kind in ("then", "else"):
        node = make("MatMul", [x, builder.weight(64, 32, f"{kind}.w")], [f"{kind}.y"], name=kind)
        bodies.append(onnx.helper.make_graph([node], kind, [], [value(f"{kind}.y", 1, None)]))
    builder.nodes.append(make("If", [short], ["y"], name="if", then_branch=bodies[0], else_branch=bodies[1]))
    builder.output("y", ["batch", "sequence", 32])
    model = builder.model()
    rng = np.random.default_rng(1)
    x_values = rng.standard_normal((16, 30, 64)).astype(np.float32)
    x_values[:, :, ::13] *= 40
    recipe = replace(QUICK, allow_mul=True)
    report = report_of(model, tmp_path, recipe, calibration={"x": x_values[:, :8]})
    assert [one.fold for one in report.matmuls] == ["Mul", "Mul"]
    for tokens in (8, 30):
        feed = {"x": x_values[:, :tokens]}
        expected, actual = run(model, feed)["y"], run(tmp_path / "out.onnx", feed)["y"]
        assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


# Bits, notes, JSON


@pytest.mark.parametrize(
    ("lm_head", "counts"),
    [
        ("none", "14 MatMuls to 4 bits, block"),
        ("8", "14 MatMuls to 4 bits, 1 more to 8 bits, block"),
        ("4", "15 MatMuls to 4 bits, block"),
    ],
)
def test_bits_are_counted(tmp_path: Path, lm_head: str, counts: str) -> None:
    report = report_of(tiny_decoder(), tmp_path, replace(QUICK, lm_head=lm_head))
    assert rows(report, "Quantised")[0].startswith(counts)
    nodes = [node for node in onnx.load(tmp_path / "out.onnx").graph.node if node.op_type == "MatMulNBits"]
    stored = Counter(one.i for node in nodes for one in node.attribute if one.name == "bits")
    assert stored == Counter(one.bits for one in report.matmuls)


def test_a_model_of_eight_bits_alone_is_counted_so(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path, replace(QUICK, lm_head="8", include=("*lm_head*",)))
    assert rows(report, "Quantised")[0].startswith("1 MatMuls to 8 bits, block size 32")


def test_an_ordinary_model_has_no_notes(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path)
    assert report.notes == ()
    assert rows(report, "Note") == []


def test_notes_are_told(tmp_path: Path) -> None:
    report = replace(report_of(norm_and_readers().model(), tmp_path), notes=("one thing", "another"))
    assert rows(report, "Note") == ["one thing", "another"]
    assert json.loads(report.to_json())["notes"] == ["one thing", "another"]


def test_the_recipe_of_a_report_makes_it_again_through_json(tmp_path: Path) -> None:
    recipe = replace(QUICK, lm_head="8", exclude=("*/mlp/*",), allow_mul=True)
    report = report_of(tiny_decoder(layers=1), tmp_path, recipe)
    assert Recipe(**json.loads(report.to_json())["recipe"]) == recipe
    (stored,) = (one.value for one in onnx.load(tmp_path / "out.onnx").metadata_props if one.key == "awq_onnx.recipe")
    assert Recipe(**json.loads(stored)) == recipe


def test_json_has_every_number_of_every_layer(tmp_path: Path) -> None:
    model = unabsorbed()
    report = report_of(model, tmp_path, **given(model))
    read = json.loads(report.to_json())["matmuls"]
    assert read == [vars(one) for one in report.matmuls]
    assert read[0]["mul_gain"] < 1
    assert read[0]["bits"] == 4


def test_json_makes_the_same_report_again(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path, replace(QUICK, embedding="8", exclude=("*/mlp/*",), allow_mul=True))
    assert Report.from_json(report.to_json()) == report


def test_json_holds_no_number_that_json_has_not(tmp_path: Path) -> None:
    """What was not tried, and what a broken model makes."""
    report = report_of(norm_and_readers(columns=(600, 32)).model(), tmp_path)
    assert None in report.groups[0].losses
    broken = replace(report, comparison=replace(report.comparison, relative_error=float("nan")))
    read = json.loads(broken.to_json(), parse_constant=pytest.fail)
    assert read["comparison"]["relative_error"] is None
    assert read["groups"][0]["losses"].count(None) == report.groups[0].losses.count(None)
    assert np.isnan(Report.from_json(broken.to_json()).comparison.relative_error)


def test_lists_of_numbers_take_one_line_and_texts_are_left_alone(tmp_path: Path) -> None:
    notes = ("[\n  1,\n  2\n]", "a, [ 1,  2 ]")
    report = replace(report_of(norm_and_readers().model(), tmp_path), notes=notes)
    written = report.to_json()
    assert any(line.strip().startswith('"losses": [') and line.count(",") > 20 for line in written.splitlines())
    assert json.loads(written) == report.to_dict()
    assert tuple(json.loads(written)["notes"]) == notes


def test_groups_tell_of_every_layer_once_with_its_losses_and_channels(tmp_path: Path) -> None:
    report = report_of(tiny_decoder(), tmp_path)
    assert tuple(name for group in report.groups for name in group.matmuls) == tuple(m.name for m in report.matmuls)
    alphas = {one.name: one.alpha for one in report.matmuls}
    for group in report.groups:
        assert {alphas[name] for name in group.matmuls} == {group.alpha}
        assert len(group.alphas) == len(group.losses) == 21
        assert group.salience is not None
        best = min(loss for loss in group.losses if loss is not None)
        assert group.losses[group.alphas.index(group.alpha)] in (best, group.losses[0])


def test_a_scale_makes_the_loudest_channel_less_loud(tmp_path: Path) -> None:
    report = report_of(norm_and_readers().model(), tmp_path)
    (group,) = report.groups
    assert group.alpha > 0
    assert group.salience is not None
    before = max(group.salience.before) / group.salience.median_before
    assert max(group.salience.after) / group.salience.median_after < before
    assert group.salience.loudest[0].scale > 1


def test_what_the_command_was_given_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((4, 8, 64)).astype(np.float32))
    model = norm_and_readers().model()
    report = report_of(model, tmp_path, replace(QUICK, allow_mul=True), calibration=tmp_path / "x.npz")
    assert report.given == {"output": str(tmp_path / "out.onnx"), "calibration": str(tmp_path / "x.npz")}
    assert report.command() == [
        "awq-onnx",
        str(tmp_path / "model.onnx"),
        "--output",
        str(tmp_path / "out.onnx"),
        "--calibration",
        str(tmp_path / "x.npz"),
        *("--accuracy-level", "0", "--allow-mul", "--samples", "2", "--sequence-length", "8"),
    ]
    of_memory = report_of(model, tmp_path, overwrite=True, **given(model))
    assert of_memory.given is of_memory.command() is None
    assert report.versions["numpy"] == np.__version__
