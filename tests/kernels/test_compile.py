"""Every kernel compiles for the GPUs that it is for, without a GPU; what it takes there is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq_onnx.errors import RuntimeFailedError
from awq_onnx.kernels import arrays
from awq_onnx.kernels import compile as compiler

SOURCES = sorted(compiler.HERE.glob("*.cu"))
REGISTERS = 255  # that a thread can have


@pytest.fixture(scope="module", params=[(80, one) for one in SOURCES] + [(90, one) for one in SOURCES], ids=str)
def compiled(request: pytest.FixtureRequest) -> compiler.MachineCode:
    capability, source = request.param
    options = () if source == compiler.MATMUL_NBITS else arrays.OPTIONS
    return compiler.compile_source(source, capability, *options)


def test_nothing_is_spilled_to_memory(compiled: compiler.MachineCode) -> None:
    assert compiled.resources
    assert [one for one in compiled.resources if one.spilled_bytes] == []
    assert all(0 < one.registers <= REGISTERS for one in compiled.resources)


def test_the_machine_code_is_a_whole_elf_file(compiled: compiler.MachineCode) -> None:
    code = compiled.cubin
    assert code[:4] == b"\x7fELF"
    fields = ((32, 8), (54, 2), (56, 2))  # of the ELF header: place and size
    program_headers, size, count = (int.from_bytes(code[at : at + n], "little") for at, n in fields)
    assert program_headers + size * count == len(code), "the last table ends with the file"


def test_files_are_named_by_what_they_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compiler.MachineCode(b"code", 90, ())
    monkeypatch.setattr(compiler, "compile_source", lambda *_: code)
    assert compiler.write_cubins(tmp_path / "new", 80, 90) == [
        tmp_path / "new" / "awq_sm_80.cubin",
        tmp_path / "new" / "awq_sm_90.cubin",
    ]
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["awq_sm_80.cubin", "awq_sm_90.cubin"]


def test_a_capability_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(RuntimeFailedError, match=r"cannot compile for compute capability 4\.2"):
        compiler.compile_source(compiler.MATMUL_NBITS, 42)
