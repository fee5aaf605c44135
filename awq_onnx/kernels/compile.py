"""From CUDA C++ to machine code, by NVRTC through cupy: needs neither a GPU nor a CUDA toolkit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awq_onnx.errors import InternalError, MissingPackageError, RuntimeFailedError

HERE = Path(__file__).parent
MATMUL_NBITS = HERE / "matmul_nbits.cu"
HEADERS = ("params.h", "primitives.cuh", "codes.cuh", "gemv.cuh", "gemm.cuh", "plain.cuh")
CAPABILITIES = (80, 90)  # what `export` makes code for: it runs on later GPUs of the same generation too
REPORT = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a thread of a kernel takes. spilled_bytes: written to and read from memory for want of registers."""

    kernel: str
    registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class MachineCode:
    """cubin: what the driver loads. capability: of the GPUs it is for, 90 for 9.0."""

    cubin: bytes
    capability: int
    resources: tuple[Resources, ...]


def compile_source(source: Path, capability: int, *options: str) -> MachineCode:
    """The kernels of a source file beside this one for GPUs of a compute capability.

    options: of NVRTC. Raises MissingPackageError without cupy and NVRTC, RuntimeFailedError where NVRTC knows no such
    capability.
    """
    nvrtc = _nvrtc()
    if capability not in nvrtc.getSupportedArchs():
        raise RuntimeFailedError(f"NVRTC {_version(nvrtc)} cannot compile for compute capability {capability / 10}")
    texts = [(HERE / name).read_bytes() for name in HEADERS]
    program = nvrtc.createProgram(source.read_text(encoding="utf-8"), source.name, texts, [h.encode() for h in HEADERS])
    try:
        every = (f"--gpu-architecture=sm_{capability}", "--std=c++17", "--ptxas-options=-v", *options)
        try:
            nvrtc.compileProgram(program, every)
        except nvrtc.NVRTCError as error:
            raise InternalError(f"{source.name} does not compile: {nvrtc.getProgramLog(program)}") from error
        return MachineCode(_cubin(nvrtc, program), capability, tuple(_resources(nvrtc.getProgramLog(program))))
    finally:
        nvrtc.destroyProgram(program)


def cubin_folder() -> Path:
    """A folder with the kernels of `matmul_nbits.cu` for the GPU at hand: compiled when they are asked for the first
    time, kept in $AWQ_ONNX_CACHE, or else ~/.cache/awq-onnx. Raises MissingPackageError where there is no GPU."""
    folder = cache_folder() / "kernels" / _fingerprint()
    capability = _capability()
    if not (folder / cubin_name(capability)).exists():
        write_cubins(folder, capability)
    return folder


def write_cubins(folder: Path, *capabilities: int) -> list[Path]:
    """Compiles `matmul_nbits.cu` for each capability and writes the files that launch.c looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for capability in capabilities:
        path = folder / cubin_name(capability)
        _write_whole(path, compile_source(MATMUL_NBITS, capability).cubin)
        written.append(path)
    return written


def cubin_name(capability: int) -> str:
    return f"awq_sm_{capability}.cubin"


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()  # opens the library
    except Exception as error:  # cupy's own classes
        raise MissingPackageError(
            "compiling the CUDA kernels needs cupy and NVRTC: pip install 'awq-onnx[gpu]' nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def _version(nvrtc: Any) -> str:
    return ".".join(map(str, nvrtc.getVersion()))


def _cubin(nvrtc: Any, program: Any) -> bytes:
    """cupy takes the last byte for the end of a text and drops it."""
    cubin: bytes = nvrtc.getCUBIN(program)
    return cubin + b"\0"


def _resources(log: str) -> Iterator[Resources]:
    for match in REPORT.finditer(log):
        yield Resources(match["name"], int(match["registers"]), int(match["stores"]) + int(match["loads"]))


def _capability() -> int:
    try:
        import cupy

        return int(cupy.cuda.Device().compute_capability)
    except Exception as error:  # no cupy, no driver, no GPU
        reason = " ".join(str(error).split())[:200]
        raise MissingPackageError(
            f"the CUDA kernels need an NVIDIA GPU and cupy, pip install 'awq-onnx[gpu]' ({reason})"
        ) from error


def cache_folder() -> Path:
    """What can be made again is kept there: $AWQ_ONNX_CACHE, or else ~/.cache/awq-onnx."""
    root = os.environ.get("AWQ_ONNX_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "awq-onnx"


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in (MATMUL_NBITS.name, *HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _write_whole(path: Path, content: bytes) -> None:
    """Other processes see the whole file or none."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(unfinished).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(unfinished).unlink()
        raise
