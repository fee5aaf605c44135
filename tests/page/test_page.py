"""What the page holds, and that a model's names are text in it and never markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import onnx
import pytest
from builders import GraphBuilder, save, tiny_decoder

import awq_onnx
from awq_onnx import Recipe, Report, page
from awq_onnx.errors import OutputError, ReportFileError
from awq_onnx.page.content import Content
from awq_onnx.page.data import data_of, label
from awq_onnx.page.model import content_of
from awq_onnx.passes.sites import Refusal

FEW = {"samples": 2, "sequence_length": 8}
EVIL = '</script><img src=x onerror="alert(1)">&\'"{{ 7 * 7 }}'


def text_of(html: str) -> str:
    """What a reader sees, tables and lists included, spaces made one."""
    html = html.replace("<wbr>", "")
    body = re.sub(r"<(script|style).*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def embedded(html: str, name: str) -> object:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return page.render(Content.of(report))


@pytest.fixture(scope="module")
def text(html: str) -> str:
    return text_of(html)


def unabsorbed() -> onnx.ModelProto:
    """Nothing comes before the layer that could take its scale."""
    builder = GraphBuilder()
    builder.output(builder.linear(builder.input("x", ["batch", "sequence", 64]), 64, 32, "layer"))
    return builder.model()


# Content


def test_every_layer_is_named_with_its_errors(report: Report, text: str) -> None:
    for one in report.matmuls:
        assert one.name in text
        assert f"{one.error:.1%}" in text
        assert f"{one.plain_error:.1%}" in text


def test_what_was_left_alone_stands_there_with_its_reason(report: Report, text: str) -> None:
    assert {one.reason for one in report.kept} == {
        "it is the lm_head, which stays as it is",
        "--exclude /layers.1/mlp/* names it",
    }
    for one in report.kept:
        assert one.what in text
        assert one.reason in text


def test_layers_without_a_scale_stand_there_with_their_reason(tmp_path: Path) -> None:
    made = awq_onnx.quantize(unabsorbed(), tmp_path / "out.onnx", Recipe(**FEW))
    assert made.matmuls[0].reason is not None
    text = text_of(page.render(Content.of(made)))
    assert f"1 quantised without a scale: {made.matmuls[0].reason} layer" in text


def test_the_figures_that_matter_first_are_those_of_the_report(report: Report, text: str) -> None:
    comparison = report.comparison
    assert comparison.kl_mean is not None
    assert comparison.top1 is not None
    assert f"KL divergence {comparison.kl_mean:.2g}" in text
    assert f"Same next token {comparison.top1:.1%}" in text
    assert f"Layers {len(report.matmuls)} MatMuls that are quantised" in text
    assert f"{report.size_before_bytes / report.size_after_bytes:.1f} times smaller" in text


def test_recipe_command_versions_and_calibration_stand_there(report: Report, text: str) -> None:
    assert "--exclude '/layers.1/mlp/*' --samples 3 --sequence-length 8" in text
    assert f"sequence_length {report.recipe.sequence_length}" in text
    assert f"seed {report.recipe.seed}" in text
    assert report.calibration in text
    for name, version in {**report.versions, "awq-onnx": report.version}.items():
        assert f"{name} {version}" in text


def test_the_charts_have_the_numbers_of_the_report(report: Report, html: str) -> None:
    data = embedded(html, "page-data")
    assert isinstance(data, dict)
    assert [one["ours"] for one in data["errors"]] == [one.error for one in report.matmuls]
    assert [one["alpha"] for one in data["groups"]] == [one.alpha for one in report.groups]
    for group, shown in zip(report.groups, data["losses"], strict=True):
        assert shown["loss"][0] == 1
        assert min(shown["loss"]) == pytest.approx(min(filter(None, group.losses)) / group.losses[0])  # type: ignore[operator]
    for group, channels in zip(report.groups, data["channels"], strict=True):
        assert group.salience is not None
        assert channels["before"] == list(group.salience.before)
    megabytes = sum(one["megabytes"] for one in data["footprint"] if one["when"] == "after")
    assert megabytes == pytest.approx(report.size_after_bytes / 1e6)
    assert set(embedded(html, "page-charts")) == {"overview", "channels", "losses", "errors", "footprint"}  # type: ignore[call-overload]


def test_nothing_is_fetched(html: str) -> None:
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", html, flags=re.DOTALL)
    assert set(re.findall(r'(?:href|src|url)\s*[=(]\s*"?([^">]*)', markup)) == {"data:,"}
    assert "default-src 'none'" in html


def test_the_page_of_the_same_report_is_the_same(report: Report, html: str) -> None:
    assert page.render(Content.of(Report.from_json(report.to_json()))) == html


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_method_without_scales_says_so(tmp_path: Path, method: str) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    made = awq_onnx.quantize(path, tmp_path / "out.onnx", Recipe(method=method, **FEW))  # type: ignore[arg-type]
    text = text_of(page.render(Content.of(made)))
    assert f"No alpha was searched with method {method}." in text
    assert f"Method {method} has no scales." in text


def test_an_embedding_that_is_quantised_is_told(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    made = awq_onnx.quantize(path, tmp_path / "out.onnx", Recipe(embedding="8", **FEW))  # type: ignore[arg-type]
    (table,) = made.tables
    assert f"The embedding {table.name} ({table.V} × {table.D}) has 8 bits" in text_of(page.render(Content.of(made)))


# Names


def test_names_with_markup_in_them_are_text(report: Report) -> None:
    matmuls = tuple(replace(one, name=f"{EVIL}{at}", folded_into=EVIL) for at, one in enumerate(report.matmuls))
    groups = tuple(replace(one, matmuls=(EVIL, f"{EVIL}b")) for one in report.groups)
    evil = replace(
        report,
        model=EVIL,
        output=EVIL,
        matmuls=matmuls,
        groups=groups,
        kept=(Refusal(EVIL, EVIL),),
        notes=(EVIL,),
        calibration=EVIL,
        versions={EVIL: EVIL},
    )
    html = page.render(Content.of(evil))
    usual = page.render(Content.of(report))
    for tag in ("<img", "</script"):
        assert html.count(tag) == usual.count(tag)
    assert text_of(html).count(EVIL) > 2 * len(matmuls)
    assert embedded(html, "page-data")["errors"][0]["name"] == f"{EVIL}0"  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/a/q/MatMul", "/a/k/MatMul"], "/a/{q, k}/MatMul"),
        (["/a/MatMul"], "/a/MatMul"),
        (["q", "k"], "{q, k}"),
        (["/a/b", "/a/b/c"], "/a/b/{, c}"),
        ([f"/e.{n}/up" for n in range(9)], "/{e.0, e.1, e.2, e.3, 5 more}/up"),
    ],
)
def test_a_group_is_called_by_what_its_names_share(names: list[str], expected: str) -> None:
    assert label(names) == expected


# Of a model file


def test_a_model_tells_what_its_nodes_hold(report: Report, run_folder: Path) -> None:
    content = content_of(run_folder / "model_int4.onnx")
    assert content.recipe == report.recipe
    assert content.footprint_after == report.footprint_after
    assert content.size_after_bytes == report.size_after_bytes
    assert [one.name for one in content.matmuls] == [one.name for one in report.matmuls]
    for told, one in zip(content.matmuls, report.matmuls, strict=True):
        assert (told.K, told.N, told.bits, told.block_size) == (one.K, one.N, one.bits, one.block_size)
        assert (told.alpha, told.folded_into) == (pytest.approx(one.alpha), one.folded_into)
        assert told.error == pytest.approx(one.error, abs=1e-5)


def test_a_model_tells_why_a_layer_has_no_scale(tmp_path: Path) -> None:
    made = awq_onnx.quantize(unabsorbed(), tmp_path / "out.onnx", Recipe(**FEW))
    assert made.matmuls[0].reason is not None
    told = {(one.name, one.reason, one.blocked_by) for one in content_of(tmp_path / "out.onnx").matmuls}
    assert told == {(one.name, one.reason, one.blocked_by) for one in made.matmuls}


def test_what_a_model_cannot_tell_is_said(run_folder: Path, report: Report) -> None:
    text = text_of(page.render(content_of(run_folder / "model_int4.onnx")))
    for sentence in (
        "This page is made of the model file alone.",
        "A model file does not hold what calibration saw of its channels.",
        "A model file does not hold what was refused, and why.",
        "A model file does not hold the name of the original",
        report.matmuls[0].name,
    ):
        assert sentence in text


def changed_models(path: Path) -> Iterator[onnx.ModelProto]:
    """Without a recipe; with one that is none; with an error that is no number."""
    for key, value in (("awq_onnx.recipe", None), ("awq_onnx.recipe", "[1]"), ("awq_onnx.recipe", '{"bits": 5}')):
        model = onnx.load(path, load_external_data=False)
        (entry,) = (one for one in model.metadata_props if one.key == key)
        entry.value, entry.key = value or entry.value, key if value else "other"
        yield model
    model = onnx.load(path, load_external_data=False)
    entry = next(one for node in model.graph.node for one in node.metadata_props if one.key == "awq_onnx.error")
    entry.value = "small"
    yield model


def test_a_model_that_does_not_tell_is_refused(run_folder: Path, report: Report) -> None:
    place = run_folder / "changed.onnx"
    for model in changed_models(Path(report.output)):
        onnx.save(model, place)
        with pytest.raises(ReportFileError, match="does not tell how it was quantised"):
            content_of(place)
    place.unlink()


# Writing


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "report.html"
    place.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"cannot write the report .*: No space left on device"):
            page.write(place, Content.of(report))
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    assert place.read_text() == "old"
    page.write(place, Content.of(report))
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    assert place.read_text(encoding="utf-8") == page.render(Content.of(report))


def test_data_are_small(report: Report) -> None:
    """A large model has hundreds of groups: each may take a few kilobytes."""
    assert len(json.dumps(data_of(Content.of(report)))) < 8000 * len(report.groups)
