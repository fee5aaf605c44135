"""What the CUDA kernels take of a GPU, read off their machine code: no GPU is needed.

    python benchmarks/gpu_resources.py [--output FILE]        (nvidia-cuda-nvdisasm: pip install nvidia-cuda-nvdisasm)

Registers and spilled bytes are what ptxas reports. Instructions are those of the loop over stages, for capability 9.0:
all between its first and its last, both sides of a branch, the copies for the next stage. Where the compiler put two
versions of a loop into one, both count. A multiprocessor issues four instructions in a clock, and an H200's memory
brings it about 17 bytes (4.3 TB/s over 132 multiprocessors of 1.9 GHz). A stage of the GEMV with blocks of 32 is 2304
bytes of W, with zero points 2368: what takes less than 4 x 2304 / 17 = 542 instructions waits for memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from awq_onnx.errors import AwqOnnxError, MissingPackageError
from awq_onnx.kernels import arrays
from awq_onnx.kernels import compile as compiler
from awq_onnx.kernels.compile import MachineCode, Resources

NVDISASM = "nvidia-cuda-nvdisasm"
INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)[^;]*);"
)
TARGET = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
LABEL = re.compile(r"^(\.L_x_\d+):")
FUNCTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)
TENSOR_CORE = "HMMA"
FOR_ARRAYS = ("compensate", "cholesky")  # the sources of kernels/arrays.py


@dataclass(frozen=True)
class Loop:
    """How many instructions, and how many of them are the tensor cores'."""

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
    others = [
        [compiler.compile_source(compiler.HERE / f"{name}.cu", one, *arrays.OPTIONS) for name in FOR_ARRAYS]
        for one in compiler.CAPABILITIES
    ]
    yield "# What the CUDA kernels take of a GPU\n"
    yield "Made by `make gpu-resources`; what the columns mean stands in `benchmarks/gpu_resources.py`.\n"
    registers_of = " | ".join(f"registers, {one.capability / 10}" for one in codes)
    yield f"| kernel | {registers_of} | spilled bytes | instructions | of tensor cores |"
    yield "|---|" + "---|" * (len(codes) + 3)
    loops = dict(_loops(_disassembled(codes[-1])))
    taken = [
        [one for made in (code, *more) for one in made.resources] for code, more in zip(codes, others, strict=True)
    ]
    registers = [{one.kernel: one.registers for one in resources} for resources in taken]
    spilled = _spilled(taken)
    for kernel in sorted(registers[-1]):
        loop = loops.get(kernel, Loop(0, 0))
        counts = f"{loop.instructions} | {loop.tensor_core}" if loop.tensor_core else "- | -"
        of_a_thread = " | ".join(str(one[kernel]) for one in registers)
        yield f"| {kernel.removeprefix('awq_')} | {of_a_thread} | {spilled[kernel]} | {counts} |"


def _spilled(taken: Iterable[Iterable[Resources]]) -> Mapping[str, int]:
    """The most of any capability, in bytes."""
    most: dict[str, int] = {}
    for resources in taken:
        for one in resources:
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
        instructions, labels = _listing(body)
        loops = [_loop(instructions, *ends) for ends in _jumps_back(instructions, labels)]
        yield name, max(loops, key=lambda loop: (loop.tensor_core, -loop.instructions), default=Loop(0, 0))


def _listing(body: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Names and texts of instructions, and at which of them each label stands."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found["name"], found["text"]))
    return instructions, labels


def _jumps_back(instructions: list[tuple[str, str]], labels: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    for at, (_, text) in enumerate(instructions):
        target = TARGET.search(text)
        if target and labels.get(target[1], at + 1) <= at:
            yield labels[target[1]], at + 1


def _loop(instructions: list[tuple[str, str]], first: int, last: int) -> Loop:
    names = [name for name, _ in instructions[first:last]]
    return Loop(len(names), sum(name.startswith(TENSOR_CORE) for name in names))


if __name__ == "__main__":
    main()
