"""An output folder holds all that clients want of a model, under the names they look for, and nothing of anybody else's
is lost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    LARGE_K,
    Array,
    assert_same_values,
    large_model,
    norm_and_readers,
    run,
    save,
    tiny_decoder,
    values_of,
)
from killing import Killed, killed_after

import awq_onnx
from awq_onnx import Recipe, output
from awq_onnx.cli.quantize import interrupted, look_at_places, parser
from awq_onnx.errors import OutputError
from awq_onnx.folder import Destination, destination, graph_paths
from awq_onnx.output import OutputFiles, work_folder
from awq_onnx.store import open_model

QUICK = Recipe(samples=2, sequence_length=8)
CONFIG = {"model_type": "llama", "hidden_size": 64}
BESIDE = {
    "config.json": json.dumps(CONFIG),
    "tokenizer_config.json": "{}",
    "vocab.txt": "a",
    "tokenizer.model": "bytes",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "1_Pooling/config.json": "{}",
}


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files(folder: Path) -> dict[str, bytes]:
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with what belongs to it, and what does not."""
    write_files(tmp_path / "in", BESIDE | {"notes.md": "mine", "pytorch_model.bin": "large"})
    return save(large_model(), tmp_path / "in" / "model.onnx")


def write(model: Path, folder: Path | str, *, web: bool = False, overwrite: bool = False, key: str = "key") -> Path:
    """Copy the model as it is; the file."""
    with open_model(model) as opened:
        where = destination(opened, folder, web=web)
        with OutputFiles(where, opened, overwrite=overwrite, key=key) as written:
            written.write(opened.model)
            written.publish()
    return where.graph


def feed() -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((2, 3, LARGE_K)).astype(np.float32)}


# What is in it


def test_what_belongs_to_the_model_goes_with_it(source: Path, tmp_path: Path) -> None:
    graph = write(source, f"{tmp_path}/out/")
    assert graph == tmp_path / "out" / "model.onnx"
    written = files(tmp_path / "out")
    assert set(written) == {"model.onnx", "model.onnx.data", *BESIDE}
    assert {name: written[name].decode() for name in BESIDE} == BESIDE
    assert_same_values(values_of(onnx.load(graph)), values_of(large_model()))


def test_a_folder_that_is_there_needs_no_separator(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    write(source, tmp_path / "out")
    assert files(tmp_path / "out")["precious"] == b"mine"
    assert (tmp_path / "out" / "config.json").exists()


def test_an_output_that_is_a_file_has_nothing_beside_it_but_its_data(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "copy.onnx")
    assert {one.name for one in tmp_path.iterdir()} == {"in", "copy.onnx", "copy.onnx.data"}


@pytest.mark.usefixtures("source")
def test_links_are_followed(tmp_path: Path) -> None:
    """The cache of the hub is full of them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("model.onnx", "config.json"):
        (snapshot / name).symlink_to(tmp_path / "in" / name)
    write(snapshot / "model.onnx", f"{tmp_path}/out/")
    assert set(files(tmp_path / "out")) == {"model.onnx", "model.onnx.data", "config.json"}
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_repository_of_the_hub_keeps_its_layout(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "onnx").mkdir()
    source = source.rename(tmp_path / "in" / "onnx" / "model.onnx")
    write(source, f"{tmp_path}/out/")
    assert set(files(tmp_path / "out")) == {"onnx/model.onnx", "onnx/model.onnx.data", *BESIDE}


def test_a_model_in_memory_is_called_model(tmp_path: Path) -> None:
    report = awq_onnx.quantize(tiny_decoder(layers=1), f"{tmp_path}/out/", QUICK)
    assert report.output == str(tmp_path / "out" / "model.onnx")
    assert set(files(tmp_path / "out")) == {"model.onnx", "model.onnx.data"}
    assert report.carried == ()


def test_the_report_tells_what_went_with_the_model_and_what_did_not(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"config.json": "{}", "generation_config.json": "{}"})
    source = save(tiny_decoder(layers=1), tmp_path / "in" / "decoder_model.onnx")
    for name in ("decoder_model_fp16.onnx", "encoder_model.onnx", "encoder_model_fp16.onnx"):
        (tmp_path / "in" / name).write_bytes(b"")
    report = awq_onnx.quantize(source, f"{tmp_path}/out/", QUICK)
    assert report.carried == ("config.json", "generation_config.json")
    assert ("Carried over", "config.json, generation_config.json") in report.rows()
    (note,) = report.notes
    assert note.startswith("not carried over: encoder_model.onnx; ")


def test_a_part_that_is_in_the_folder_already_is_not_missing(source: Path, tmp_path: Path) -> None:
    save(large_model(), tmp_path / "in" / "encoder_model.onnx")
    save(large_model(), tmp_path / "in" / "somebody_elses.onnx")
    source = source.rename(source.with_name("decoder_model.onnx"))
    with open_model(source) as opened:
        assert destination(opened, f"{tmp_path}/out/").left == ("encoder_model.onnx",)
    write(tmp_path / "in" / "encoder_model.onnx", f"{tmp_path}/out/")
    with open_model(source) as opened:
        assert destination(opened, f"{tmp_path}/out/").left == ()


# onnxruntime-genai


def genai(**parts: str) -> str:
    return json.dumps(
        {"model": {name: {"filename": file, "layers": 2} for name, file in parts.items()} | {"type": "x"}}
    )


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        pytest.param({"decoder": "model.onnx"}, {"decoder": "model.onnx"}, id="as it is"),
        pytest.param({"decoder": "other.onnx"}, {"decoder": "model.onnx"}, id="another name"),
        pytest.param({"decoder": "a.onnx", "vision": "b.onnx"}, {"decoder": "a.onnx", "vision": "b.onnx"}, id="parts"),
    ],
)
def test_genai_finds_the_model(source: Path, tmp_path: Path, parts: dict[str, str], named: dict[str, str]) -> None:
    (tmp_path / "in" / "genai_config.json").write_text(genai(**parts))
    write(source, f"{tmp_path}/out/")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config == json.loads(genai(**named))


@pytest.mark.parametrize("content", ["", "[1]", '{"model": 3}', '{"model": {"decoder": 3}}', "\xff"])
def test_a_configuration_of_genai_that_is_none_is_carried_over_as_it_is(
    source: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "in" / "genai_config.json").write_bytes(content.encode("latin-1"))
    write(source, f"{tmp_path}/out/")
    assert (tmp_path / "out" / "genai_config.json").read_bytes() == content.encode("latin-1")


# transformers.js


def web_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert {name: value for name, value in config.items() if name != "transformers.js_config"} == CONFIG
    told: dict[str, Any] = config["transformers.js_config"]
    return told


def test_for_the_web_the_model_is_one_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "genai_config.json").write_text(genai(decoder="model.onnx"))
    graph = write(source, f"{tmp_path}/out/", web=True)
    assert set(files(tmp_path / "out")) == {"onnx/model_q4.onnx", *BESIDE}
    assert web_config(tmp_path / "out") == {"dtype": "q4", "use_external_data_format": {}}
    assert onnx.load(graph, load_external_data=False) == onnx.ModelProto.FromString(graph.read_bytes())
    assert_same_values(values_of(onnx.load(graph)), values_of(large_model()))
    expected, actual = run(large_model(), feed()), run(graph, feed())
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("content", ["", "[1]", "\xff"])
def test_a_configuration_that_is_none_is_carried_over_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(output, "PROTOBUF_BYTES", 100_000)
    (tmp_path / "in" / "config.json").write_bytes(content.encode("latin-1"))
    write(source, f"{tmp_path}/out/", web=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == content.encode("latin-1")


def test_a_quantised_model_for_the_web_is_the_plain_one_in_one_file(tmp_path: Path) -> None:
    source = save(tiny_decoder(), tmp_path / "model.onnx")
    awq_onnx.quantize(source, tmp_path / "int4.onnx", QUICK)
    plain, web = tmp_path / "int4.onnx", write(tmp_path / "int4.onnx", f"{tmp_path}/out/", web=True)
    assert onnx.load(web).graph.node == onnx.load(plain).graph.node
    assert_same_values(values_of(onnx.load(web)), values_of(onnx.load(plain)))


def test_a_file_for_the_web_is_one_file_too(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "copy.onnx", web=True)
    assert {one.name for one in tmp_path.iterdir()} == {"in", "copy.onnx"}


def test_half_precision_has_another_name_and_cache(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"config.json": json.dumps(CONFIG)})
    source = save(tiny_decoder(dtype=np.float16), tmp_path / "in" / "decoder_model_merged.onnx")
    write(source, f"{tmp_path}/out/", web=True)
    assert set(files(tmp_path / "out")) == {"onnx/decoder_model_merged_q4f16.onnx", "config.json"}
    told = web_config(tmp_path / "out")
    assert told["dtype"] == "q4f16"
    assert told["kv_cache_dtype"] == {"q4f16": "float16"}


def test_what_is_too_large_for_one_file_has_its_weights_where_transformers_js_looks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PROTOBUF_BYTES", 100_000)
    graph = write(source, f"{tmp_path}/out/", web=True)
    assert {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"} < set(files(tmp_path / "out"))
    assert web_config(tmp_path / "out")["use_external_data_format"] == {"model_q4.onnx": True}
    assert_same_values(values_of(onnx.load(graph)), values_of(large_model()))


def test_a_smaller_model_takes_the_place_of_one_with_external_data(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(output, "PROTOBUF_BYTES", 100_000)
        write(source, f"{tmp_path}/out/", web=True)
    write(source, f"{tmp_path}/out/", web=True, overwrite=True)
    assert "onnx/model_q4.onnx_data" not in files(tmp_path / "out")
    assert web_config(tmp_path / "out")["use_external_data_format"] == {}


def test_the_parts_of_a_model_share_one_configuration(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part needs no --force for config.json, and forgets nothing of the first."""
    told = {"transformers.js_config": {"use_external_data_format": {"model.onnx": True}, "free": 1}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG | told))
    small = save(norm_and_readers(K=32).model(), tmp_path / "in" / "encoder_model.onnx")
    monkeypatch.setattr(output, "PROTOBUF_BYTES", 100_000)
    write(source, f"{tmp_path}/out/", web=True)
    write(small, f"{tmp_path}/out/", web=True)
    expected = {"use_external_data_format": {"model_q4.onnx": True}, "free": 1, "dtype": "q4"}
    assert web_config(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param('{"pad": 1}', {"pad": 1, "chat_template": "{{ messages }} …"}, id="none"),
        pytest.param('{"chat_template": null}', {"chat_template": "{{ messages }} …"}, id="empty"),
        pytest.param('{"chat_template": "own"}', {"chat_template": "own"}, id="one of its own"),
    ],
)
def test_transformers_js_finds_the_template_of_chats(
    source: Path, tmp_path: Path, before: str, after: dict[str, Any]
) -> None:
    write_files(tmp_path / "in", {"tokenizer_config.json": before, "chat_template.jinja": "{{ messages }} …"})
    write(source, f"{tmp_path}/out/", web=True)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == after
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }} …"


def test_other_clients_find_it_in_its_own_file(source: Path, tmp_path: Path) -> None:
    write(source, f"{tmp_path}/out/")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == BESIDE["tokenizer_config.json"]


def test_a_tokenizer_without_a_template_of_chats_is_carried_over_as_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "chat_template.jinja").unlink()
    write(source, f"{tmp_path}/out/", web=True)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == BESIDE["tokenizer_config.json"]


def test_a_template_is_put_into_the_folder_of_other_clients_but_replaces_no_other(source: Path, tmp_path: Path) -> None:
    write(source, f"{tmp_path}/out/")
    write(source, f"{tmp_path}/out/", web=True)
    assert "chat_template" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    write_files(tmp_path / "other", {"tokenizer_config.json": '{"chat_template": "mine"}'})
    with pytest.raises(OutputError, match=r"tokenizer_config\.json exists already and is another"):
        write(source, f"{tmp_path}/other/", web=True)


# Nothing is lost, nothing is left


@pytest.mark.parametrize("name", ["config.json", "vocab.txt"])
def test_another_file_of_that_name_is_not_replaced_unasked(source: Path, tmp_path: Path, name: str) -> None:
    write_files(tmp_path / "out", {name: '{"another": 1}'})
    before = files(tmp_path)
    with pytest.raises(OutputError, match=rf"{name} exists already and is another .* --force"):
        write(source, tmp_path / "out")
    assert files(tmp_path) == before
    write(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / name).read_text() == BESIDE[name]


def test_the_same_file_may_be_there(source: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "out", BESIDE)
    write(source, tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"model.onnx", "model.onnx.data", *BESIDE}


def test_a_model_that_is_there_is_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "out", {"model.onnx": "precious"})
    with pytest.raises(OutputError, match=r"model\.onnx exists already; .* --force"):
        write(source, tmp_path / "out")
    assert files(tmp_path / "out") == {"model.onnx": b"precious"}


@pytest.mark.parametrize("web", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_the_model_is_refused(source: Path, tmp_path: Path, web: bool, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to("in")
    before = files(tmp_path)
    for folder in (f"{tmp_path}/in/", f"{tmp_path}/in", f"{tmp_path}/link/", f"{tmp_path}/in/../in"):
        with pytest.raises(OutputError, match="is the folder of the model that is read"):
            write(source, folder, web=web, overwrite=overwrite)
    assert files(tmp_path) == before


def test_the_repository_of_the_model_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "onnx").mkdir()
    source = source.rename(tmp_path / "in" / "onnx" / "model.onnx")
    for folder in ("in/", "in/onnx/"):
        with pytest.raises(OutputError, match="is the folder of the model that is read"):
            write(source, f"{tmp_path}/{folder}", overwrite=True)


def test_a_file_is_no_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="is a file, where the output has to make a folder"):
        write(source, f"{tmp_path}/out/")
    with pytest.raises(OutputError, match="cannot write"):
        write(source, f"{tmp_path}/out/deeper/")


def test_a_folder_in_the_place_of_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"config\.json is a folder"):
        write(source, tmp_path / "out", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_told_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "vocab.txt").chmod(0)
    with pytest.raises(OutputError, match=r"vocab\.txt cannot be read: Permission denied"):
        write(source, f"{tmp_path}/out/")
    assert not (tmp_path / "out").exists()


def stop(source: Path, folder: str, error: BaseException, *, finished: bool) -> None:
    with open_model(source) as opened:
        where = destination(opened, folder)
        with OutputFiles(where, opened, overwrite=False, key="key") as written:
            if finished:
                written.record("one", {})
            raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=repr)
def test_a_folder_of_which_nothing_came_is_removed_again(source: Path, tmp_path: Path, error: BaseException) -> None:
    before = files(tmp_path)
    with pytest.raises(type(error)):
        stop(source, f"{tmp_path}/new/deeper/", error, finished=False)
    assert files(tmp_path) == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(type(error)):
        stop(source, f"{tmp_path}/old/", error, finished=False)
    assert (tmp_path / "old").is_dir()


def test_an_interrupted_run_keeps_its_folder_and_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    arguments = parser().parse_args([str(source), "-o", f"{tmp_path}/out/"])
    assert interrupted(arguments) == "nothing was written"
    look_at_places(arguments)
    assert interrupted(arguments) == "nothing was written"
    with pytest.raises(KeyboardInterrupt):
        stop(source, f"{tmp_path}/out/", KeyboardInterrupt(), finished=True)
    assert [one.name for one in (tmp_path / "out").iterdir()] == [".model.onnx.unfinished"]
    assert interrupted(arguments) == "the same command goes on from here"
    with open_model(source) as opened:
        where = destination(opened, f"{tmp_path}/out/")
        with OutputFiles(where, opened, overwrite=False, key="key") as written:
            assert set(written.done) == {"one"}
            written.write(opened.model)
            written.publish()
    assert set(files(tmp_path / "out")) == {"model.onnx", "model.onnx.data", *BESIDE}


@pytest.mark.parametrize("web", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_command_knows_where_an_output_may_be_without_opening_the_model(
    tmp_path: Path, web: bool, dtype: type
) -> None:
    source = save(tiny_decoder(dtype=dtype), tmp_path / "model.onnx")
    for where in (f"{tmp_path}/out/", str(tmp_path / "out.onnx")):
        with open_model(source) as opened:
            assert destination(opened, where, web=web).graph in graph_paths(source, where)


@pytest.mark.skipif(sys.platform == "win32", reason="closes a lock as the system would")
@pytest.mark.parametrize("web", [False, True])
def test_a_run_that_was_killed_while_it_published_is_undone_by_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: bool
) -> None:
    """Even where other files lie beside the model by then."""
    old = {"config.json": '{"old": 1}', "vocab.txt": "old", "model.onnx": "old", "onnx/model_q4.onnx": "old"}
    write_files(tmp_path / "out", old)
    before, count = files(tmp_path / "out"), 0
    while True:
        (tmp_path / "in" / "merges.txt").unlink(missing_ok=True)
        with pytest.raises(Killed):
            publish_killed(source, tmp_path / "out", web, count, monkeypatch)
        (tmp_path / "in" / "merges.txt").write_text("came meanwhile")
        with open_model(source) as opened:
            where = destination(opened, tmp_path / "out", web=web)
            with OutputFiles(where, opened, overwrite=True, key="other") as next_run:
                here = {name: content for name, content in files(tmp_path / "out").items() if ".unfinished" not in name}
                if next_run._published or here != before:
                    break
        assert files(tmp_path / "out") == before
        count += 1
    assert count > len(BESIDE)
    assert here["config.json"] != before["config.json"]
    assert_same_values(values_of(onnx.load(where.graph)), values_of(large_model()))
    assert not work_folder(where.graph).exists()


def publish_killed(source: Path, folder: Path, web: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(source) as opened:
        where = destination(opened, folder, web=web)
        with OutputFiles(where, opened, overwrite=True, key="key") as files:
            files.write(opened.model)
            with killed_after(count, monkeypatch):
                files.publish()
                raise Killed


def test_room_for_the_weights_is_counted_twice_where_they_go_into_one_file(source: Path, tmp_path: Path) -> None:
    with open_model(source) as opened:
        whole = Destination(tmp_path / "out.onnx", whole=True)
        with OutputFiles(whole, opened, overwrite=False) as files, pytest.raises(OutputError, match="about 2000000000"):
            files.check_space(10**18)
