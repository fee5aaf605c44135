"""--report and `awq-onnx report` as a user meets them."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from builders import save, tiny_decoder

from awq_onnx import Report, page, pipeline
from awq_onnx.cli import main
from awq_onnx.errors import OutputError

QUICK = ("--samples", "2", "--sequence-length", "8", "--quiet")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    return tmp_path


def exits(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(one) for one in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_a_run_writes_its_page_and_its_json_makes_the_same_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exits(folder / "model.onnx", *QUICK, "--json", "--report", folder / "report.html") == 0
    (folder / "run.json").write_text(capfd.readouterr().out)
    assert exits("report", folder / "run.json") == 0
    assert capfd.readouterr().out == f"{folder / 'run.html'}\n"
    assert (folder / "run.html").read_bytes() == (folder / "report.html").read_bytes()
    assert names(folder) == ["model.onnx", "model_int4.onnx", "model_int4.onnx.data", *names(folder)[3:]]


def test_a_model_makes_a_page_too(report: Report, tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    assert exits("report", report.output, "-o", place) == 0
    assert report.matmuls[0].name in place.read_text(encoding="utf-8")
    assert exits("report", report.output, "-o", place, "--force") == 0


def test_a_page_that_fails_at_the_end_costs_no_model(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write the report: No space left on device")

    monkeypatch.setattr(page, "write", full)
    assert exits(folder / "model.onnx", *QUICK, "--json", "--report", folder / "report.html") == 4
    out, err = capfd.readouterr()
    assert Report.from_json(out).output == str(folder / "model_int4.onnx")
    assert err.endswith(f"No space left on device; the model {folder / 'model_int4.onnx'} is finished all the same\n")
    assert names(folder) == ["model.onnx", "model_int4.onnx", "model_int4.onnx.data"]


def test_an_interruption_while_the_page_is_written_says_that_the_model_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "render", Mock(side_effect=KeyboardInterrupt))
    assert exits(folder / "model.onnx", *QUICK, "--report", folder / "report.html") == 130
    output = folder / "model_int4.onnx"
    assert capfd.readouterr().err.endswith(f"the model {output} is finished, the page about it is not\n")
    assert names(folder) == ["model.onnx", "model_int4.onnx", "model_int4.onnx.data"]


# Refused before any work is done


def one_sentence(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("awq-onnx: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipeline, "quantize", never)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere/report.html", "does not exist"),
        ("report", "give it a name that ends in .html"),
        ("model.onnx", "give it a name that ends in .html"),
        ("model_int4.onnx.data", "give it a name that ends in .html"),
        ("folder.html", "is a folder"),
        ("old.html", "exists already; choose another name, or overwrite it with --force"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_a_page_that_cannot_be_written_is_refused_first(
    folder: Path, capfd: pytest.CaptureFixture[str], place: str, told: str
) -> None:
    (folder / "folder.html").mkdir()
    (folder / "old.html").write_text("old")
    before = names(folder)
    assert exits(folder / "model.onnx", *QUICK, "--report", folder / place) == 4
    assert told in one_sentence(capfd)
    assert names(folder) == before
    assert (folder / "old.html").read_text() == "old"


@pytest.mark.usefixtures("no_work")
def test_a_page_never_takes_the_place_of_another_file_of_the_command(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """However these are called."""
    place, model = folder / "page.html", folder / "model.html"
    shutil.copy(folder / "model.onnx", model)
    for arguments in ((model, "--report", model), (folder / "model.onnx", "-o", place, "--report", place)):
        assert exits(*arguments, "--force", *QUICK) == 4
        assert "has the name of another file of this command" in one_sentence(capfd)


@pytest.mark.parametrize("module", ["altair", "jinja2", "vl_convert"])
@pytest.mark.usefixtures("no_work")
def test_a_package_that_is_missing_is_told_first(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("awq_onnx.page.find_spec", lambda name: None if name == module else found(name))
    assert exits(folder / "model.onnx", *QUICK, "--report", folder / "report.html") == 6
    assert "pip install 'awq-onnx[report]'" in one_sentence(capfd)
    assert exits("report", folder / "model.onnx") == 6
    assert "pip install 'awq-onnx[report]'" in one_sentence(capfd)
    assert names(folder) == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.json", None, "No such file or directory"),
        ("folder.json", "", "Is a directory"),
        ("empty.json", b"", "no report that awq-onnx --json printed"),
        ("list.json", b"[1]", "the report is no Report"),
        ("other.json", b'{"a": 1}', "the report has no model"),
        ("deep.json", b"[" * 100_000, "no report that awq-onnx --json printed"),
        ("bytes.json", b"\xff\xfe", "cannot be made a page of"),
        ("model.onnx", b"", "is empty"),
    ],
)
def test_a_source_that_is_none_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes | str | None, told: str
) -> None:
    if content == "":
        (tmp_path / name).mkdir()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    before = names(tmp_path)
    assert exits("report", tmp_path / name) == 3
    assert told in one_sentence(capfd)
    assert names(tmp_path) == before


def test_a_model_that_is_not_quantised_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exits("report", folder / "model.onnx") == 3
    assert "does not tell how it was quantised, as the models that awq-onnx makes do" in one_sentence(capfd)
    assert names(folder) == ["model.onnx"]


def test_a_page_may_go_into_the_folder_that_is_made(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = folder / "made"
    assert exits(folder / "model.onnx", *QUICK, "-o", f"{made}/", "--report", made / "report.html") == 0
    assert names(made) == ["model.onnx", "model.onnx.data", "report.html"]
    assert f"Page          {made / 'report.html'}\n" in capfd.readouterr().out


def test_the_command_on_the_page_makes_the_folder_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exits(folder / "model.onnx", *QUICK, "-o", f"{folder}/made/", "--json") == 0
    command = Report.from_json(capfd.readouterr().out).command()
    assert command is not None
    before = {path.name: path.read_bytes() for path in (folder / "made").iterdir()}
    for path in (folder / "made").iterdir():
        path.unlink()
    (folder / "made").rmdir()
    assert exits(*command[1:]) == 0
    assert {path.name: path.read_bytes() for path in (folder / "made").iterdir()} == before
