"""What the CUDA kernels of MatMulNBits take of a GPU, read off their machine code: no GPU is needed.

    python benchmarks/gpu_resources.py [--output FILE]        (nvidia-cuda-nvdisasm: pip install nvidia-cuda-nvdisasm)

Registers and spilled bytes are what ptxas reports. Instructions are those of the block with the tensor cores', for
capability 9.0: what a warp issues to multiply one stage, without the copies for the next. A multiprocessor issues four
in a clock. So the GEMV with blocks of 32, 288 instructions for a stage of 2304 bytes of W, takes 72 clocks of it, in
which an H200's memory brings 72 x 17 = 1220 bytes (4.3 TB/s over 132 multiprocessors of 1.9 GHz).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from awq_onnx.errors import AwqOnnxError, MissingPackageError
from awq_onnx.kernels import compile as compiler
from awq_onnx.kernels.compile import MachineCode

NVDISASM = "nvidia-cuda-nvdisasm"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
LABEL = re.compile(r"^\.L_x_\d+:", re.MULTILINE)
FUNCTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)
TENSOR_CORE = "HMMA"


@dataclass(frozen=True)
class Loop:
    """A block of instructions: how many, and how many of them are the tensor cores'."""

    instructions: int
    tensor_core: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers and instructions of the CUDA kernels, without a GPU.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    try:
        text = "\n".join(page()) + "\n"
    except AwqOnnxError as error:
        print(f"gpu_resources: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(text, end="")
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


def page() -> Iterator[str]:
    codes = [compiler.compile_source(compiler.MATMUL_NBITS, one) for one in compiler.CAPABILITIES]
    yield "# What the CUDA kernels take of a GPU\n"
    yield "Made by `make gpu-resources`; what the columns mean stands in `benchmarks/gpu_resources.py`.\n"
    registers_of = " | ".join(f"registers, {one.capability / 10}" for one in codes)
    yield f"| kernel | {registers_of} | spilled bytes | instructions | of tensor cores |"
    yield "|---|" + "---|" * (len(codes) + 3)
    loops = dict(_loops(_disassembled(codes[-1])))
    registers = [{one.kernel: one.registers for one in code.resources} for code in codes]
    spilled = _spilled(codes)
    for kernel in sorted(registers[-1]):
        loop = loops.get(kernel, Loop(0, 0))
        counts = f"{loop.instructions} | {loop.tensor_core}" if loop.tensor_core else "- | -"
        taken = " | ".join(str(one[kernel]) for one in registers)
        yield f"| {kernel.removeprefix('awq_')} | {taken} | {spilled[kernel]} | {counts} |"


def _spilled(codes: list[MachineCode]) -> Mapping[str, int]:
    """The most of any capability, in bytes."""
    most: dict[str, int] = {}
    for code in codes:
        for one in code.resources:
            most[one.kernel] = max(most.get(one.kernel, 0), one.spilled_bytes)
    return most


def _disassembled(code: MachineCode) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(code.cubin)
        return subprocess.run([str(_nvdisasm()), "-c", str(path)], check=True, stdout=subprocess.PIPE, text=True).stdout


def _nvdisasm() -> Path:
    try:
        files = metadata.files(NVDISASM) or []
    except metadata.PackageNotFoundError as error:
        raise MissingPackageError(f"there is no disassembler: pip install {NVDISASM}") from error
    (found,) = (Path(str(one.locate())) for one in files if one.name == "nvdisasm")
    found.chmod(0o755)  # pip installs it as data
    return found


def _loops(assembly: str) -> Iterator[tuple[str, Loop]]:
    parts = FUNCTION.split(assembly)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        blocks = [INSTRUCTION.findall(block) for block in LABEL.split(body)]
        loops = [Loop(len(block), sum(one.startswith(TENSOR_CORE) for one in block)) for block in blocks]
        yield name, max(loops, key=lambda loop: loop.tensor_core)


if __name__ == "__main__":
    main()
