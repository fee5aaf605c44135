"""What `python -m awq_onnx.kernels export` writes for other programs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from awq_onnx.errors import MissingPackageError
from awq_onnx.kernels import compile as compiler
from awq_onnx.kernels import library
from awq_onnx.kernels.__main__ import LIBRARY, main


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *(str(one) for one in arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Compute capabilities that kernels were compiled for; nothing is compiled."""
    asked: list[tuple[int, ...]] = []

    def write(folder: Path, *capabilities: int) -> list[Path]:
        asked.append(capabilities)
        folder.mkdir(parents=True, exist_ok=True)
        return [folder / compiler.cubin_name(one) for one in capabilities]

    monkeypatch.setattr(compiler, "write_cubins", write)
    return asked


def test_the_library_lies_beside_the_kernels(
    tmp_path: Path, asked_for: list[tuple[int, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "some" / "kernels"
    assert export(folder) == 0
    assert asked_for == [compiler.CAPABILITIES]
    assert [path.name for path in folder.iterdir()] == [LIBRARY]
    assert (folder / LIBRARY).read_bytes() == library.path().read_bytes()
    assert ctypes.CDLL(str(folder / LIBRARY)).awq_calls() == 0  # a library of its own
    assert capsys.readouterr().out.splitlines() == [
        str(folder / name) for name in ("awq_sm_80.cubin", "awq_sm_90.cubin", LIBRARY)
    ]


def test_capabilities_can_be_chosen(tmp_path: Path, asked_for: list[tuple[int, ...]]) -> None:
    assert export(tmp_path, "--capability", "89", "--capability", "120") == 0
    assert asked_for == [(89, 120)]


def test_what_is_there_is_replaced(tmp_path: Path, asked_for: list[tuple[int, ...]]) -> None:
    (tmp_path / LIBRARY).write_bytes(b"an older one")
    assert export(tmp_path) == 0
    assert asked_for
    assert (tmp_path / LIBRARY).read_bytes() == library.path().read_bytes()


def test_what_is_missing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MissingPackageError("compiling needs cupy")

    monkeypatch.setattr(compiler, "write_cubins", fail)
    assert export(tmp_path) == 6
    assert capsys.readouterr().err == "python -m awq_onnx.kernels: compiling needs cupy\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked_for: list[tuple[int, ...]]
) -> None:
    (tmp_path / "file").touch()
    assert export(tmp_path / "file") == 4
    assert asked_for
    assert capsys.readouterr().err.startswith(f"python -m awq_onnx.kernels: cannot write {tmp_path / 'file'}: ")
