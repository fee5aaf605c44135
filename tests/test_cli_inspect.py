"""The command `awq-onnx inspect` as a person sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import save, tiny_decoder

import awq_onnx
from awq_onnx import Recipe
from awq_onnx.cli import main
from awq_onnx.cli.alike import alike, pattern

QUICK = Recipe(samples=2, sequence_length=8)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tiny_decoder(), tmp_path / "model.onnx")


@pytest.fixture
def output(source: Path) -> Path:
    awq_onnx.quantize(source, source.with_name("out.onnx"), QUICK)
    return source.with_name("out.onnx")


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    assert ended.value.code == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_layers_that_are_alike_stand_in_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, source).splitlines()
    (line,) = [one for one in lines if "q_proj" in one]
    told = " ".join(line.split())
    assert told == "2 x /layers.{0-1}/q_proj/MatMul 64 x 64 4 32 33 kB 5 kB"
    assert lines[lines.index(line) - 1] == "Scale folded into /layers.{0-1}/input_layernorm/Mul_1"


def test_what_stays_and_the_size_are_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, source)
    assert "Quantised     14 layers\n" in text
    assert "Left alone    /lm_head/MatMul: it is the lm_head, which stays as it is\n" in text
    assert "Would become  about " in text


def test_all_gives_every_layer_a_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, source, "--all").count("q_proj") == 2


def test_of_a_quantised_model_alpha_and_errors_are_shown(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, output)
    assert f"Quantised  14 layers by awq-onnx {awq_onnx.__version__}\n" in text
    assert "samples 2, sequence_length 8" in text
    row = next(line for line in text.splitlines() if "gate_proj" in line).split()
    assert row[:8] == ["2", "x", "/layers.{0-1}/mlp/gate_proj/MatMul", "64", "x", "96", "4", "32"]
    error, plain = map(float, row[-2:])
    assert 0 < error < plain


def test_json_holds_what_python_gives(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads(json.dumps(awq_onnx.inspect(source).to_dict()))
    assert json.loads(shown(capsys, source, "--json")) == expected


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, tmp_path / "none.onnx", code=3)
    assert told == f"awq-onnx: {tmp_path / 'none.onnx'} does not exist\n"


def test_a_wrong_option_names_the_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, "model.onnx", "--alll", code=2)
    assert told == "awq-onnx: unrecognized arguments: --alll; see awq-onnx inspect --help\n"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["/a.0/b", "/a.1/b", "/a.2/b"], "/a.{0-2}/b"),
        (["/a.0/b", "/a.5/b"], "/a.*/b"),
        (["/a.0/b2", "/a.1/b2"], "/a.{0-1}/b2"),
        (["/a.10/b"], "/a.10/b"),
        (["no number"], "no number"),
    ],
)
def test_names_become_a_pattern(names: list[str], told: str) -> None:
    assert pattern(names) == told


def test_what_differs_beside_the_numbers_is_not_alike() -> None:
    rows = [("a.0", 1), ("a.1", 1), ("a.2", 2), ("b.0", 1)]
    assert alike(rows, lambda row: row[0], lambda row: row[1]) == [rows[:2], rows[2:3], rows[3:]]


def test_the_settings_of_quantising_are_taken(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, source, "--block-size", "128", "--exclude", "*/layers.0/*", "--lm-head", "8")
    assert " 96 x 64     4    128 " in text
    assert "/lm_head/MatMul " in text
    assert "Left alone    7 layers, /layers.0/q_proj/MatMul first: --exclude */layers.0/* names it\n" in text
    assert shown(capsys, source, "--bits", "3", code=2).startswith("awq-onnx: argument --bits: invalid choice: 3")


def test_a_size_that_cannot_be_reached_is_told_as_by_quantising(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "target_size 20 kB is too small" in shown(capsys, source, "--target-size", "20KB", code=2)


def test_where_formats_are_chosen_the_bytes_of_a_layer_are_open(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line for line in shown(capsys, source, "--target-size", "10MB").splitlines() if "q_proj" in line]
    assert [row.split()[-5:] for row in rows] == [["-", "-", "33", "kB", "-"]]


def test_a_reader_who_has_seen_enough_is_no_fault(source: Path) -> None:
    program = f"{sys.executable} -m awq_onnx inspect {source} --json | head -c 1"
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (ended.stdout, ended.stderr) == ("{", "")
