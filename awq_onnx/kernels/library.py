"""The C library of this folder: where it lies, and its registration with a session of onnxruntime."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path
from typing import Any

from awq_onnx.errors import InternalError, MissingPackageError, RecipeError, RuntimeFailedError

NAME = "awq_onnx.kernels.ort_op"  # no module: a library that setuptools builds as if it were one
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
REPLACE = "awq_onnx.replace"  # the entry of a session's configuration that ort_op.c looks for

_registering = threading.Lock()  # what is configured counts for the next registration of the process


def path() -> Path:
    """The file of the library. Raises MissingPackageError where the install could not build it."""
    found = importlib.util.find_spec(NAME)
    if found is None or found.origin is None:
        raise MissingPackageError(
            "the kernels' C library was not built when awq-onnx was installed, for want of a C compiler: install one "
            "(gcc or clang), then pip install --force-reinstall --no-cache-dir --no-deps awq-onnx"
        )
    return Path(found.origin)


def register(session_options: Any, device: str = "cuda", *, replace: bool = True) -> None:
    """Let the sessions that are made with these options run `MatMulNBits` on our kernels.

    session_options: an onnxruntime.SessionOptions. device: "cuda"; "cpu" is the plain reference, far slower than
    onnxruntime's own and only for tests. replace: whether every com.microsoft::MatMulNBits is served, so that a session
    whose model has one that cannot be is refused; False: only the nodes that `adopt` has moved to our domain.

    Raises MissingPackageError without the library, or for "cuda" without a GPU and what compiles for it;
    RuntimeFailedError where the kernels are registered with the options already.
    """
    if device not in PROVIDERS:
        raise RecipeError(f"device must be one of {', '.join(PROVIDERS)}, not {device!r}")
    library = path()
    configure_and_register(session_options, library, PROVIDERS[device], folder=_folder(device), replace=replace)


def configure_and_register(
    session_options: Any,
    library: Path,
    provider: str,
    *,
    driver: Path | None = None,
    folder: Path | None = None,
    replace: bool = True,
) -> None:
    """`register`, of a library of one's own, with a driver of one's own: what tests need."""
    if not replace:
        session_options.add_session_config_entry(REPLACE, "0")
    with _registering:
        _configure(library, provider, driver, folder)
        try:
            session_options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime raises classes of its own, all from Exception
            raise RuntimeFailedError(f"onnxruntime does not take the kernels: {error}") from error


def _configure(library: Path, provider: str, driver: Path | None, folder: Path | None) -> None:
    configure = ctypes.CDLL(str(library)).awq_configure
    configure.argtypes = [ctypes.c_char_p] * 3
    configure.restype = ctypes.c_char_p
    error = configure(provider.encode(), *(None if one is None else str(one).encode() for one in (driver, folder)))
    if error:
        raise InternalError(error.decode())


def _folder(device: str) -> Path | None:
    if device != "cuda":
        return None
    from awq_onnx import runtime
    from awq_onnx.kernels.compile import cubin_folder

    folder = cubin_folder()
    runtime.find_cuda()  # whoever has session options has onnxruntime; which providers a session takes, it says itself
    return folder
