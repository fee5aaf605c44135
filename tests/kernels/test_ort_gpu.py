"""Custom execution inside onnxruntime on a GPU: on its stream, and under its CUDA graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from gpus import gpu
from nbits import Node, node

from awq_onnx import kernels

CUDA = "CUDAExecutionProvider"
TOLERANCE = 5e-3  # relative to the largest output

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def a_gpu() -> None:
    gpu()
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has no CUDA: pip install onnxruntime-gpu in its place")


def session(one: Node, **provider_options: str) -> Any:
    options = onnxruntime.SessionOptions()
    kernels.register(options)
    return onnxruntime.InferenceSession(one.model().SerializeToString(), options, providers=[(CUDA, provider_options)])


def check(one: Node, y: Any, a: Any) -> None:
    expected = one.expected(a)
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("M", [1, 7, 40, 300])
def test_a_session_on_cuda(M: int, zero_points: bool) -> None:
    """M = 300 may go to cuBLAS, on the session's handle."""
    one = node(2048, 264, 32, np.float16, zero_points=zero_points, bias=True)
    a = one.activations(M)
    check(one, session(one).run(None, {"x": a})[0], a)


@pytest.mark.parametrize("M", [1, 40, 300])
def test_a_captured_graph_reads_what_its_input_holds_now(M: int) -> None:
    one = node(2048, 256, 32, np.float16, zero_points=True, bias=True)
    running = session(one, enable_cuda_graph="1")
    x = onnxruntime.OrtValue.ortvalue_from_numpy(one.activations(M), "cuda", 0)
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([M, one.N], np.float16, "cuda", 0)
    binding = running.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y0", y)
    for factor in (1, 2, -1, 0.5):  # the first runs warm up and capture, the others replay
        a = (factor * one.activations(M)).astype(np.float16)
        x.update_inplace(a)
        running.run_with_iobinding(binding)
        check(one, y.numpy(), a)
