"""MatMulNBits on a GPU: our kernels, onnxruntime's, cuBLAS in float16, and how fast memory can be copied.

    python benchmarks/gpu_matmul.py [--rows 1 8 64] [--sizes 4096x4096] [--block-size 32] [--zero-points]
                                    [--dtype float16] [--output FILE] [--device cuda]

Weights are random and so many that no cache holds them: three times the L2 cache, one after the other, then from the
first again. All are captured in a CUDA graph; a time is the median of its replays over the products in it. onnxruntime
runs a model of as many MatMulNBits nodes under its own CUDA graph, once with its kernels and once with ours.

    bandwidth  bytes of codes, scales, zero points, activations and outputs over the time of our kernels, and its share
               of that of a copy (bytes read and written)
    x ORT      onnxruntime's time over that of our kernels, both inside onnxruntime
    x cuBLAS   the time of cuBLAS with a float16 weight over that of our kernels, both outside of it
    error      of our output against onnxruntime's, ||ours - its|| / ||its||

`--device cpu` runs the onnxruntime part with the reference kernel in C, to try the script.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from awq_onnx import kernels
from awq_onnx.errors import AwqOnnxError, MissingPackageError
from awq_onnx.kernels import compile as compiler
from awq_onnx.kernels import library
from awq_onnx.kernels.launcher import Launcher, Weight
from awq_onnx.runtime import find_cuda, onnxruntime

SIZES = ("1024x4096", "4096x4096", "4096x11008", "8192x8192", "11008x4096", "28672x4096", "128256x4096")  # N x K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
CACHES = 3  # times the L2 cache: so many bytes of weights take turns
SHORTEST_RUN_S = 2e-3  # of a graph: what starting it costs is small beside that
GUESS_BYTES_PER_S = 1e12
MOST_PRODUCTS = 1000
REPLAYS, WARM_UPS = 20, 3
COPY_BYTES = 2 << 30

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """A product (M, K) by (K, N)."""

    M: int
    N: int
    K: int
    block_size: int
    zero_points: bool
    dtype: str  # float16 or bfloat16

    @property
    def G(self) -> int:
        return -(-self.K // self.block_size)

    @property
    def weight_bytes(self) -> int:
        return self.N * (self.G * (self.block_size // 2 + 2) + (-(-self.G // 2) if self.zero_points else 0))

    @property
    def moved_bytes(self) -> int:
        return self.weight_bytes + 2 * self.M * (self.N + self.K)

    def products(self, weights: int) -> int:
        """How many of them make a run long enough, a multiple of the weights."""
        rounds = SHORTEST_RUN_S * GUESS_BYTES_PER_S / self.moved_bytes / weights
        return weights * max(1, min(round(rounds), MOST_PRODUCTS // weights))


@dataclass(frozen=True)
class Row:
    """A line of the table; None where something is not there to be measured. Times in microseconds."""

    M: int
    N: int
    K: int
    ours: float | None = None
    bandwidth: str = "-"
    in_ort: float | None = None
    ort: float | None = None
    over_ort: float | None = None
    cublas: float | None = None
    over_cublas: float | None = None
    error: float | None = None


class Gpu:
    """Arrays of cupy, graphs of CUDA."""

    provider = "CUDAExecutionProvider"

    def __init__(self) -> None:
        folder = compiler.cubin_folder()  # says clearly what is missing
        import cupy

        self.cupy = cupy
        self.cublas = int(cupy.cuda.device.get_cublas_handle())  # and its library, which the launcher looks for
        self.launcher = Launcher(library.path(), folder)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.cublas.setStream(self.cublas, self.stream.ptr)
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name, self.l2_bytes = properties["name"].decode(), int(properties["l2CacheSize"])

    def put(self, array: Array) -> Any:
        return self.cupy.asarray(array)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def get(self, array: Any) -> Array:
        return np.asarray(array.get())

    def seconds(self, launch: Callable[[], object]) -> float:
        """Of a CUDA graph of what `launch` launches on our stream."""
        self.cupy.cuda.runtime.deviceSynchronize()  # what was sent on other streams is there
        with self.stream:
            launch()
            self.stream.synchronize()
            self.stream.begin_capture()
            launch()
            graph = self.stream.end_capture()
            times = []
            for replay in range(WARM_UPS + REPLAYS):
                start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(self.stream)
                graph.launch(self.stream)
                end.record(self.stream)
                end.synchronize()
                if replay >= WARM_UPS:
                    times.append(self.cupy.cuda.get_elapsed_time(start, end) / 1e3)
        return float(median(times))

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second."""
        source = self.cupy.zeros(COPY_BYTES, np.uint8)
        target = self.cupy.empty_like(source)
        return 2 * COPY_BYTES / self.seconds(lambda: self.cupy.copyto(target, source))


class Processor:
    """Arrays of numpy, to try the script."""

    provider = "CPUExecutionProvider"
    name, l2_bytes = "the processor", 1 << 16

    def put(self, array: Array) -> Array:
        return array

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    def get(self, array: Array) -> Array:
        return array


class Tensors:
    """The activations and as many weights as take turns, on the device."""

    def __init__(self, problem: Problem, device: Gpu | Processor) -> None:
        rng = np.random.default_rng(0)
        count = max(2, -(-CACHES * device.l2_bytes // problem.weight_bytes))
        shape = (count, problem.N, problem.G, problem.block_size // 2)
        self.a = device.put(_floats(rng, (problem.M, problem.K), problem.dtype, 1.0))
        self.codes = device.put(rng.integers(0, 256, shape, np.uint8))
        self.scales = device.put(_floats(rng, shape[:3], problem.dtype, problem.K**-0.5 / 5))
        packed = (count, problem.N, -(-problem.G // 2))
        self.zero_points = device.put(rng.integers(0, 256, packed, np.uint8)) if problem.zero_points else None
        self.count = count


def _floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, std: float) -> Array:
    """bfloat16 as uint16: cupy needs to know nothing of it."""
    values = rng.standard_normal(shape, np.float32) * np.float32(std)
    if dtype == "float16":
        return values.astype(np.float16)
    from ml_dtypes import bfloat16

    return values.astype(bfloat16).view(np.uint16)


def ours(problem: Problem, tensors: Tensors, device: Gpu) -> float:
    """Seconds of one product with our kernels, outside of onnxruntime."""
    cupy, launcher = device.cupy, device.launcher
    y = cupy.empty((problem.M, problem.N), tensors.a.dtype)
    onnx_type = 10 if problem.dtype == "float16" else 16
    weight = Weight(problem.N, problem.K, problem.block_size, onnx_type)
    workspace = cupy.empty(max(16, launcher.workspace_bytes(weight, problem.M, True)), np.uint8)
    products = problem.products(tensors.count)

    def launch() -> None:
        for i in range(products):
            which = i % tensors.count
            zero_points = None if tensors.zero_points is None else tensors.zero_points[which]
            launcher.matmul_nbits(
                tensors.a,
                tensors.codes[which],
                tensors.scales[which],
                zero_points,
                out=y,
                workspace=workspace,
                cublas=device.cublas,
                stream=device.stream.ptr,
            )

    return device.seconds(launch) / products


def cublas(problem: Problem, device: Gpu) -> float | None:
    """Seconds of one product with a weight of float16; None for bfloat16, of which cupy makes no random numbers."""
    if problem.dtype != "float16":
        return None
    cupy = device.cupy
    count = max(2, -(-CACHES * device.l2_bytes // (2 * problem.N * problem.K)))
    a = cupy.random.standard_normal((problem.M, problem.K), np.float32).astype(np.float16)
    weights = [cupy.random.standard_normal((problem.N, problem.K), np.float32).astype(np.float16) for _ in range(count)]
    y = cupy.empty((problem.M, problem.N), np.float16)
    products = problem.products(count)
    multiply = _gemm(device, problem, a.data.ptr, y.data.ptr)

    def launch() -> None:
        for i in range(products):
            multiply(weights[i % count].data.ptr)

    return device.seconds(launch) / products


def _gemm(device: Gpu, problem: Problem, a: int, y: int) -> Callable[[int], None]:
    """y = a W' in float16 for the address of a weight: cuBLAS itself, for cupy has no part in a capture.

    What cuBLAS takes for columns are rows here: it makes y' = W a'. Constants as in cuBLAS' documentation.
    """
    version = device.cupy.cuda.runtime.runtimeGetVersion() // 1000
    gemm = ctypes.CDLL(f"libcublas.so.{version}").cublasGemmEx
    address, number = ctypes.c_void_p, ctypes.c_int
    matrix = (address, number, number)  # type, leading dimension
    gemm.argtypes = (address, *[number] * 5, address, *matrix, *matrix, address, *matrix, number, number)
    one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
    M, N, K = problem.M, problem.N, problem.K
    half, single, any_algorithm = 2, 68, -1

    def multiply(weight: int) -> None:
        status = gemm(
            device.cublas, 1, 0, N, M, K, one, weight, half, K, a, half, K, zero, y, half, N, single, any_algorithm
        )
        assert status == 0, f"cuBLAS fails with status {status}"

    return multiply


def inside_onnxruntime(
    problem: Problem, tensors: Tensors, device: Gpu | Processor, with_ours: bool
) -> tuple[float, Array]:
    """Seconds of one node, and what it computes."""
    products = problem.products(tensors.count)
    running = _session(_model(problem, products, tensors.count), device, with_ours)
    element = np.float16 if problem.dtype == "float16" else np.uint16
    outputs = [device.put(np.zeros((problem.M, problem.N), element)) for _ in range(min(products, tensors.count))]
    binding = running.io_binding()
    where = "cuda" if isinstance(device, Gpu) else "cpu"
    kind = _element_type(problem)

    def bind(put: Callable[..., None], name: str, array: Any, element_type: int) -> None:
        put(name, where, 0, element_type, list(array.shape), device.address(array))

    bind(binding.bind_input, "A", tensors.a, kind)
    for i in range(tensors.count):
        bind(binding.bind_input, f"B{i}", tensors.codes[i], TensorProto.UINT8)
        bind(binding.bind_input, f"scales{i}", tensors.scales[i], kind)
        if tensors.zero_points is not None:
            bind(binding.bind_input, f"zero_points{i}", tensors.zero_points[i], TensorProto.UINT8)
    for i in range(products):
        bind(binding.bind_output, f"Y{i}", outputs[i % len(outputs)], kind)
    times = []
    for replay in range(WARM_UPS + REPLAYS):
        start = time.perf_counter()
        running.run_with_iobinding(binding)
        if replay >= WARM_UPS:
            times.append(time.perf_counter() - start)
    return median(times) / products, device.get(outputs[0]).view(_numpy_type(problem)).astype(np.float32)


def _session(model: onnx.ModelProto, device: Gpu | Processor, with_ours: bool) -> Any:
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 3
    gpu = isinstance(device, Gpu)
    if with_ours:
        kernels.register(options, device="cuda" if gpu else "cpu")
    providers = [(device.provider, {"enable_cuda_graph": "1"} if gpu else {})]
    return onnxruntime().InferenceSession(model.SerializeToString(), options, providers=providers)


def _model(problem: Problem, products: int, weights: int) -> onnx.ModelProto:
    """So many MatMulNBits nodes side by side; activations and weights are inputs."""
    kind, packed = _element_type(problem), problem.block_size // 2
    inputs = [helper.make_tensor_value_info("A", kind, [problem.M, problem.K])]
    for i in range(weights):
        shape = [problem.N, problem.G]
        inputs.append(helper.make_tensor_value_info(f"B{i}", TensorProto.UINT8, [*shape, packed]))
        inputs.append(helper.make_tensor_value_info(f"scales{i}", kind, shape))
        if problem.zero_points:
            row = [problem.N, -(-problem.G // 2)]
            inputs.append(helper.make_tensor_value_info(f"zero_points{i}", TensorProto.UINT8, row))
    nodes = [_node(problem, i, i % weights) for i in range(products)]
    outputs = [helper.make_tensor_value_info(f"Y{i}", kind, [problem.M, problem.N]) for i in range(products)]
    graph = helper.make_graph(nodes, "products", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _node(problem: Problem, number: int, weight: int) -> onnx.NodeProto:
    inputs = ["A", f"B{weight}", f"scales{weight}", *([f"zero_points{weight}"] if problem.zero_points else [])]
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [f"Y{number}"],
        domain="com.microsoft",
        K=problem.K,
        N=problem.N,
        block_size=problem.block_size,
        bits=4,
    )


def _element_type(problem: Problem) -> int:
    return int(TensorProto.FLOAT16 if problem.dtype == "float16" else TensorProto.BFLOAT16)


def _numpy_type(problem: Problem) -> Any:
    return helper.tensor_dtype_to_np_dtype(_element_type(problem))


def measured(problem: Problem, device: Gpu | Processor, copy_bandwidth: float | None, with_ort: bool) -> Row:
    tensors = Tensors(problem, device)
    row: dict[str, Any] = {}
    if isinstance(device, Gpu):
        seconds = ours(problem, tensors, device)
        rate = problem.moved_bytes / seconds
        share = f" {rate / copy_bandwidth:.0%}" if copy_bandwidth else ""
        row.update(ours=1e6 * seconds, bandwidth=f"{rate / 1e12:.2f} TB/s{share}")
        reference = cublas(problem, device)
        if reference is not None:
            row.update(cublas=1e6 * reference, over_cublas=reference / seconds)
    if with_ort:
        row.update(_beside_onnxruntime(problem, tensors, device))
    return Row(problem.M, problem.N, problem.K, **row)


def _beside_onnxruntime(problem: Problem, tensors: Tensors, device: Gpu | Processor) -> dict[str, Any]:
    its_seconds, its = inside_onnxruntime(problem, tensors, device, with_ours=False)
    seconds, y = inside_onnxruntime(problem, tensors, device, with_ours=True)
    error = float(np.linalg.norm(y - its) / np.linalg.norm(its))
    return {"in_ort": 1e6 * seconds, "ort": 1e6 * its_seconds, "over_ort": its_seconds / seconds, "error": error}


HEADINGS = ("M", "N", "K", "ours, µs", "bandwidth", "ours in ORT, µs", "ORT, µs", "x ORT", "cuBLAS, µs", "x cuBLAS")


def _cells(row: Row) -> Iterator[str]:
    for one in fields(row):
        value = getattr(row, one.name)
        if value is None:
            yield "-"
        elif one.name == "error":
            yield f"{value:.1e}"
        else:
            yield f"{value:.2f}" if isinstance(value, float) else str(value)


@contextmanager
def table(output: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that prints a line, and keeps it for the file."""
    lines: list[str] = []

    def write(line: str) -> None:
        print(line, flush=True)
        lines.append(line + "\n")

    yield write
    if output is not None:
        output.write_text("".join(lines), encoding="utf-8")


def _has_provider(device: Gpu | Processor) -> bool:
    try:
        return find_cuda() if isinstance(device, Gpu) else bool(onnxruntime())
    except MissingPackageError:
        return False


def run(arguments: argparse.Namespace) -> None:
    device = Gpu() if arguments.device == "cuda" else Processor()
    with_ort = _has_provider(device)
    copied = device.copy_bandwidth() if isinstance(device, Gpu) else None
    with table(arguments.output) as write:
        about = f"{device.name}; blocks of {arguments.block_size}; {arguments.dtype}"
        about += "; zero points" if arguments.zero_points else "; symmetric"
        about += f"; copy {copied / 1e12:.2f} TB/s" if copied else ""
        about += f"; onnxruntime {onnxruntime().__version__}" if with_ort else "; no onnxruntime with this device"
        write(about + "\n")
        write("| " + " | ".join((*HEADINGS, "error")) + " |")
        write("|" + "---|" * (len(HEADINGS) + 1))
        for size in arguments.sizes:
            N, K = map(int, size.split("x"))
            for M in arguments.rows:
                problem = Problem(M, N, K, arguments.block_size, arguments.zero_points, arguments.dtype)
                row = measured(problem, device, copied, with_ort)
                write("| " + " | ".join(_cells(row)) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="MatMulNBits on a GPU beside onnxruntime and cuBLAS.")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="of activations")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxK", help="of weights")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument("--zero-points", action="store_true")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    try:
        run(parser.parse_args(argv))
    except AwqOnnxError as error:
        print(f"gpu_matmul: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
