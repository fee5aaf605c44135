"""Custom execution inside onnxruntime: whose kernel runs a node, what it computes, what is refused and how."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbits
import numpy as np
import onnx
import onnxruntime
import pytest
from gpus import Emulated
from nbits import MICROSOFT, OURS, Array, Node, node

from awq_onnx import kernels
from awq_onnx.errors import MissingPackageError, RecipeError, RuntimeFailedError
from awq_onnx.kernels import library

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LIBRARY = ctypes.CDLL(str(library.path()))
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}  # relative to the largest output
DTYPES = [pytest.param(np.float32, id="float32"), pytest.param(np.float16, id="float16")]


def options(device: str | None = "cpu", **settings: Any) -> Any:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4  # what is refused is raised as well
    if device is not None:
        kernels.register(made, device, **settings)
    return made


def emulated_options(emulated: Emulated, folder: Path | None = None, driver: Path | None = None) -> Any:
    """The way of the CUDA kernels, on the processor."""
    made = options(None)
    library.configure_and_register(
        made, library.path(), CPU, driver=driver or emulated.driver, folder=folder or emulated.folder
    )
    return made


def session(model: onnx.ModelProto, made: Any, providers: Any = (CPU,)) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString(), made, providers=list(providers))


def calls() -> int:
    return int(LIBRARY.awq_calls())


def check(one: Node, running: Any, *leading: int, ours: bool = True) -> None:
    """It computes what the specification says, and the kernel that was meant to run did."""
    a = one.activations(*leading)
    before = calls()
    (y,) = running.run(None, {"x": a})
    assert calls() - before == ours
    assert y.dtype == a.dtype
    close(y, one.expected(a), TOLERANCE[one.dtype])


def close(y: Array, expected: Array, tolerance: float) -> None:
    assert y.shape == expected.shape
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", [MICROSOFT, OURS])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_our_kernel_takes_the_place_of_onnxruntimes(dtype: Any, domain: str, zero_points: bool, bias: bool) -> None:
    one = node(dtype=dtype, domain=domain, zero_points=zero_points, bias=bias)
    check(one, session(one.model(), options()), 3)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("K", "N"), [(256, 8), (1, 1), (259, 7)])
def test_every_block_size_and_odd_shapes(block_size: int, K: int, N: int) -> None:
    one = node(K, N, block_size, zero_points=True, bias=True)
    check(one, session(one.model(), options()), 2)


def test_one_session_takes_any_number_of_rows_and_axes() -> None:
    one = node()
    running = session(one.model(rank=3), options())
    for leading in [(1, 1), (2, 5), (1, 33), (0, 4), (3, 0)]:
        check(one, running, *leading)
    check(one, session(one.model(rank=1), options()))


def test_shapes_are_known_before_it_runs() -> None:
    """As with onnxruntime's own op: it plans memory by them."""
    graph = node().model(rank=3)
    del graph.graph.output[0].type.tensor_type.shape.dim[:]
    graph.graph.output[0].type.tensor_type.ClearField("shape")
    assert session(graph, options()).get_outputs()[0].shape == ["axis_0", "axis_1", 5]


def test_a_session_without_registration_keeps_onnxruntimes_kernel_beside_one_with_it() -> None:
    one = node(zero_points=True)
    plain, registered = session(one.model(), options(None)), session(one.model(), options())
    for running, ours in ((plain, False), (registered, True), (plain, False)):
        check(one, running, 3, ours=ours)
    check(one, session(one.model(), options(None)), 3, ours=False)


def test_without_replace_only_our_domain_is_served() -> None:
    both = nbits.model(node(name="theirs", bits=8), node(name="ours", domain=OURS))
    before = calls()
    ours = session(both, options(replace=False)).run(["y1"], {"x": node().activations(3)})[0]
    assert calls() == before + 1
    close(ours, node().expected(node().activations(3)), TOLERANCE[np.dtype(np.float32)])


def test_configuring_for_other_sessions_changes_none_that_is_there(emulated_gpu: Emulated) -> None:
    one = node(dtype=np.float16, zero_points=True)
    on_cpu, on_gpu = session(one.model(), options()), session(one.model(), emulated_options(emulated_gpu))
    emulated_gpu.launched()
    check(one, on_cpu, 3)
    assert emulated_gpu.launched() == []
    check(one, on_gpu, 3)
    assert emulated_gpu.launched() == ["awq_plain_f16"]


def test_options_serve_many_sessions_and_can_go_before_them() -> None:
    one = node()
    made = options()
    running = [session(one.model(), made) for _ in range(3)]
    del made
    for each in running:
        check(one, each, 2)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("M", "kernels_run"), [(1, ["gemv"]), (40, ["gemm", "sum"])])
def test_the_way_of_the_cuda_kernels(emulated_gpu: Emulated, zero_points: bool, M: int, kernels_run: list[str]) -> None:
    """M = 40 needs scratch memory for sums over parts of K."""
    one = node(2048, 64, 32, np.float16, zero_points=zero_points, bias=True)
    running = session(one.model(), emulated_options(emulated_gpu))
    emulated_gpu.launched()
    check(one, running, M)
    assert [name.split("_")[1] for name in emulated_gpu.launched()] == kernels_run


def test_bfloat16_goes_the_way_of_the_cuda_kernels(emulated_gpu: Emulated) -> None:
    from ml_dtypes import bfloat16

    one = node(64, 32, 32, bfloat16, bias=True)
    graph = one.model()
    for value in (graph.graph.input[0], graph.graph.output[0]):  # no arrays of bfloat16 go in and out of Python
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    wrap_in_casts(graph)
    emulated_gpu.launched()
    a = one.activations(3)
    (y,) = session(graph, emulated_options(emulated_gpu)).run(None, {"x": a.astype(np.float32)})
    assert emulated_gpu.launched() == ["awq_gemv_bf16_b32"]
    close(y, one.expected(a), 2.0**-6)


def wrap_in_casts(model: onnx.ModelProto) -> None:
    graph = model.graph
    (inner,) = graph.node
    inner.input[0], inner.output[0] = "x_inside", "y_inside"
    before = onnx.helper.make_node("Cast", ["x"], ["x_inside"], to=onnx.TensorProto.BFLOAT16)
    after = onnx.helper.make_node("Cast", ["y_inside"], ["y0"], to=onnx.TensorProto.FLOAT)
    graph.node.insert(0, before)
    graph.node.append(after)


def test_one_session_runs_in_many_threads() -> None:
    one = node(2048, 64, 32, np.float16)
    running = session(one.model(), options())
    inputs = [one.activations(9 + index) for index in range(4)]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda a: running.run(None, {"x": a})[0], inputs))
    for a, y in zip(inputs, outputs, strict=True):
        close(y, one.expected(a), TOLERANCE[one.dtype])


REFUSED = [
    pytest.param(node(bits=8), r"8 bits, .* know 4: .*adopt", id="8 bits"),
    pytest.param(node(bits=2), r"2 bits, .* know 4: .*adopt", id="2 bits"),
    pytest.param(node(group_index=np.zeros(40, np.int32)), "g_idx.*adopt", id="g_idx"),
    pytest.param(node(zero_points=True, domain=OURS, group_index=np.zeros(40, np.int32)), "g_idx", id="our domain"),
]


@pytest.mark.parametrize(("one", "reason"), REFUSED)
def test_what_no_kernel_serves_is_refused_when_the_session_is_created(one: Node, reason: str) -> None:
    with pytest.raises(Exception, match=f"cannot run the MatMulNBits node 'the/node': .*{reason}"):
        session(one.model(), options())


def test_zero_points_as_floats_are_refused() -> None:
    one = node()
    one.zero_points = np.full(one.scales.shape, 8, np.float32)
    with pytest.raises(
        Exception, match=r"'the/node': its zero points are not uint8, .*quantize the model with awq-onnx"
    ):
        session(one.model(), options())


@pytest.mark.parametrize("wrong", ["codes", "scales", "zero_points", "bias"])
def test_tensors_of_a_wrong_size_are_refused(wrong: str) -> None:
    one = node(zero_points=True, bias=True)
    setattr(one, wrong, np.concatenate([getattr(one, wrong)] * 2, axis=-1))
    with pytest.raises(Exception, match=rf"{wrong.replace('_', ' ')}.* are \d+ numbers, .* the model is broken"):
        session(one.model(), options())


@pytest.mark.parametrize(("wrong", "dtype"), [("codes", np.int32), ("scales", np.float16), ("bias", np.float16)])
def test_tensors_of_a_wrong_type_are_refused(wrong: str, dtype: Any) -> None:
    one = node(bias=True)
    graph = one.model()
    (tensor,) = (found for found in graph.graph.initializer if found.name.endswith(wrong))
    tensor.CopyFrom(nbits.tensor(tensor.name, getattr(one, wrong).astype(dtype)))
    with pytest.raises(Exception, match=rf"'the/node': its {wrong}.* are not of (uint8|the type that A has)"):
        session(graph, options())


@pytest.mark.parametrize("block_size", [8, 24, 512])
def test_a_block_size_that_does_not_exist_is_refused(block_size: int) -> None:
    with pytest.raises(Exception, match="'the/node': block_size must be 16, 32, 64, 128 or 256"):
        session(node(1024, 3, block_size).model(), options())


def test_float32_is_served_by_the_simple_cuda_kernel(emulated_gpu: Emulated) -> None:
    """Exports in float16 have such nodes too, behind attention that is computed in float32."""
    emulated_gpu.launched()
    one = node()
    (y,) = session(one.model(), emulated_options(emulated_gpu)).run(None, {"x": one.activations(3)})
    close(y, one.expected(one.activations(3)), TOLERANCE[np.dtype(np.float32)])
    assert emulated_gpu.launched() == ["awq_plain_f32"]


def test_weights_that_are_no_constants_are_refused() -> None:
    graph = node().model()
    codes = graph.graph.initializer[0]
    del graph.graph.initializer[0]
    shape = ["n", *codes.dims[1:]]
    graph.graph.input.append(onnx.helper.make_tensor_value_info(codes.name, codes.data_type, shape))
    with pytest.raises(Exception, match=r"the shape of its codes B is not known .*: make them constants"):
        session(graph, options())


def test_rows_of_another_length_are_an_error_when_it_runs() -> None:
    graph = node().model()
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "k"
    with pytest.raises(Exception, match="the rows of A have 48 numbers, not the 40"):
        session(graph, options()).run(None, {"x": np.zeros((2, 48), np.float32)})


def test_without_machine_code_a_session_is_refused(emulated_gpu: Emulated, tmp_path: Path) -> None:
    driver = tmp_path / "driver.so"  # another name: what was opened once stays open
    driver.symlink_to(emulated_gpu.driver)
    made = emulated_options(emulated_gpu, tmp_path, driver)
    with pytest.raises(Exception, match=r"'the/node': .*awq_sm_90.cubin, are not in .*export"):
        session(node(dtype=np.float16).model(), made)


def test_without_a_driver_a_session_is_refused(emulated_gpu: Emulated, tmp_path: Path) -> None:
    made = emulated_options(emulated_gpu, driver=tmp_path / "none.so")
    with pytest.raises(Exception, match="'the/node': CUDA's driver cannot be opened"):
        session(node(dtype=np.float16).model(), made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", [MICROSOFT, OURS])
def test_registered_for_cuda_a_session_on_the_cpu_is_refused(tmp_path: Path, dtype: Any, domain: str) -> None:
    """onnxruntime looks for no kernel of its own then, although it has one: the op's types are told otherwise."""
    made = options(None)
    library.configure_and_register(made, library.path(), CUDA, folder=tmp_path)
    with pytest.raises(Exception, match=r"'the/node': .*registered for CUDA.*providers=\['CUDAExecutionProvider'\]"):
        session(node(dtype=dtype, domain=domain).model(), made)


def test_registered_for_cuda_a_model_without_such_nodes_runs_on_the_cpu(tmp_path: Path) -> None:
    made = options(None)
    library.configure_and_register(made, library.path(), CUDA, folder=tmp_path, replace=False)
    check(node(), session(node().model(), made), 3, ours=False)


def test_registering_twice_is_an_error() -> None:
    with pytest.raises(RuntimeFailedError, match="registered with these session options already: make new ones"):
        kernels.register(options(), "cpu")


def test_a_device_that_is_none_is_an_error() -> None:
    with pytest.raises(RecipeError, match="device must be one of cuda, cpu, not 'tpu'"):
        kernels.register(onnxruntime.SessionOptions(), "tpu")


def test_without_the_library_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"C library was not built .* install one .*pip install"):
        kernels.register(onnxruntime.SessionOptions(), "cpu")


def test_an_onnxruntime_that_is_too_old_is_told_so() -> None:
    said: list[bytes] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda _, message: said.append(message) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda wanted: ctypes.addressof(table) if wanted <= 17 else None
    )
    version = ctypes.create_string_buffer(b"1.17.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(one, ctypes.c_void_p) for one in (get_api, get_version)))
    register = LIBRARY.RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == [b"awq-onnx's kernels need onnxruntime 1.18 or later, this is 1.17.3"]


def test_a_provider_without_kernels_is_an_error() -> None:
    configure = LIBRARY.awq_configure
    configure.restype = ctypes.c_char_p
    assert configure(b"DmlExecutionProvider", None, None) == b"there are no kernels for DmlExecutionProvider"


def test_nothing_heavy_is_imported_for_the_names() -> None:
    told = "import sys, awq_onnx.kernels; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "cupy"} & set(loaded)
    assert dir(kernels) == ["Adoption", "Left", "adopt", "register"]
