"""onnxruntime, the only module that imports it."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from ml_dtypes import bfloat16

from awq_onnx.errors import MissingPackageError, RuntimeFailedError
from awq_onnx.threads import limit
from awq_onnx.widen import BFLOAT16, HALF, float32_twin

Providers: TypeAlias = "Sequence[tuple[str, Mapping[str, str]]]"  # names and options, best first

CPU_PROVIDERS: Providers = (("CPUExecutionProvider", {}),)
EXACT = {"use_tf32": "0"}  # TF32 would round factors to 10 bits
CUDA_PROVIDERS: Providers = (("CUDAExecutionProvider", EXACT), *CPU_PROVIDERS)
LARGEST_GRAPH_BYTES = 64 << 20  # files above hold weights: no bfloat16 model of ours is one
# Of a model's bytes, about, in a session that is fast: fused and ordered weights, those of float16 as float32.
COPIES = 3


def onnxruntime() -> ModuleType:
    """The module onnxruntime, whichever package brought it."""
    try:
        import onnxruntime as module
    except ImportError as error:
        raise MissingPackageError(
            "onnxruntime is not installed: pip install 'awq-onnx[cpu]', or 'awq-onnx[gpu]' on a machine with CUDA"
        ) from error
    if not hasattr(module, "InferenceSession"):
        raise MissingPackageError(
            "the installed onnxruntime is incomplete (onnxruntime and onnxruntime-gpu overwrite each other): "
            "pip uninstall both, then pip install 'awq-onnx[cpu]' or 'awq-onnx[gpu]'"
        )
    checked: ModuleType = module
    return checked


def find_cuda() -> bool:
    """Whether onnxruntime has its CUDA provider. The libraries that it needs are loaded where they came as packages,
    which no loader looks into.
    """
    module = onnxruntime()
    if CUDA_PROVIDERS[0][0] not in module.get_available_providers():
        return False
    if hasattr(module, "preload_dlls"):  # onnxruntime 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            module.preload_dlls()
    return True


def session(
    model: bytes,
    folder: Path,
    *,
    fuse: bool = True,
    prepack: bool = False,
    half: bool = True,
    spin: bool = True,
    reuse: bool = True,
    providers: Providers = CPU_PROVIDERS,
) -> Any:
    """An InferenceSession that leaves the weights where they are, memory-mapped; a GPU copies them.

    model: a serialised ModelProto whose external data lie in `folder` (no links, see `store`). fuse: whether
    onnxruntime may merge nodes, which changes the last bits of what they compute, and copy constants for that. prepack:
    whether it may copy every weight into the order that its kernels read fastest. half: whether a float16 model runs as
    it is, not as its float32 twin. spin: whether threads wait busily for the next node, which is fast alone and slow
    beside other threads. reuse: whether values may take the memory of others, which takes time to plan that grows with
    the square of the nodes.
    """
    options = _options()
    if not fuse:
        options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        # Weights of half precision are cast right before they are read; by default all of them are, first of all.
        options.execution_order = onnxruntime().ExecutionOrder.PRIORITY_BASED
    options.enable_mem_reuse = reuse
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return _create(float32_twin(model, BFLOAT16 if half else HALF), options, providers)


def client_session(model: Path, providers: Providers = CPU_PROVIDERS) -> Any:
    """An InferenceSession as an application would make it, with no time spent on planning memory. For a bfloat16 model,
    which the CPU cannot run, that of its float32 twin.
    """
    if model.stat().st_size < LARGEST_GRAPH_BYTES:
        graph = model.read_bytes()
        twin = float32_twin(graph)
        if twin is not graph:
            return session(twin, model.resolve().parent, providers=providers)
    options = _options()
    options.enable_mem_reuse = False
    return _create(model, options, providers)


def run(running: Any, outputs: list[str] | None, feeds: dict[str, Any]) -> list[Any]:
    """`running.run`, its failures as RuntimeFailedError; bfloat16 arrays go in as the float32 of a twin."""
    feeds = {name: one.astype(np.float32) if one.dtype == bfloat16 else one for name, one in feeds.items()}
    try:
        results: list[Any] = running.run(outputs, feeds)
    except Exception as error:  # onnxruntime raises classes of its own, all from Exception
        raise RuntimeFailedError(f"onnxruntime failed while running the model: {first_line(error)}") from error
    return results


def evaluate(model: bytes, folder: Path) -> Any:
    """The only output, an array, of a model without inputs; its references lie in `folder`."""
    (made,) = run(session(model, folder, fuse=False), None, {})
    return made


def give_back_memory() -> None:
    """Return what closed sessions have freed to the system: glibc keeps it in the heap, and peaks add up."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def first_line(error: Exception) -> str:
    """What an exception of onnxruntime says, without its newlines."""
    return " ".join(str(error).split())[:500]


def _options() -> Any:
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4  # errors are raised as well; logged, they would tear the progress display
    options.intra_op_num_threads = limit() or 0  # 0: as many as onnxruntime thinks best
    options.enable_cpu_mem_arena = False  # the arena never gives memory back
    return options


def _create(model: bytes | Path, options: Any, providers: Providers) -> Any:
    source = model if isinstance(model, bytes) else str(model)
    try:
        created = onnxruntime().InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        raise RuntimeFailedError(f"onnxruntime cannot load the model: {first_line(error)}") from error
    wanted = providers[0][0]
    if wanted not in created.get_providers():  # it goes on without one that cannot start
        raise RuntimeFailedError(
            f"onnxruntime could not start its {wanted}; a library of CUDA is missing, or does not fit"
        )
    return created
