"""The CUDA kernels against the specification, reference.py: on an emulated GPU and, where there is one, a real one."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpus import Emulated, Gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from awq_onnx.errors import RuntimeFailedError
from awq_onnx.kernels import library, reference
from awq_onnx.kernels.launcher import FLOAT16, Launcher, Weight

Array = NDArray[Any]

TYPES = [pytest.param(np.float16, id="float16"), pytest.param(bfloat16, id="bfloat16")]
ZERO_POINTS = [pytest.param(False, id="symmetric"), pytest.param(True, id="zero points")]
SINGLE = pytest.param(np.float32, id="float32")  # which the simple kernels know
EPSILON = {np.dtype(np.float16): 2.0**-11, np.dtype(bfloat16): 2.0**-8, np.dtype(np.float32): 2.0**-24}  # of rounding
COMPARED = 700  # columns
MARGIN = 64  # elements around an output that must stay as they are
POISON = 0x7E5A  # NaN in float16, a large number in bfloat16


@dataclass(frozen=True)
class Case:
    """The tensors of a product, random, in memory. zero_points, bias: or None."""

    a: Array
    codes: Array
    scales: Array
    zero_points: Array | None
    bias: Array | None
    seed: int

    @staticmethod
    def random(
        M: int, N: int, K: int, block_size: int, dtype: Any, zero_points: bool = False, bias: bool = False
    ) -> Case:
        seed = secrets.randbits(32)
        rng = np.random.default_rng(seed)
        G = -(-K // block_size)
        return Case(
            rng.standard_normal((M, K)).astype(dtype),
            rng.integers(0, 256, (N, G, block_size // 2), np.uint8),
            (rng.standard_normal((N, G)) / 8).astype(dtype),
            rng.integers(0, 256, (N, -(-G // 2)), np.uint8) if zero_points else None,
            rng.standard_normal(N).astype(dtype) if bias else None,
            seed,
        )

    def of_columns(self, some: Array) -> Case:
        """The same for some columns of the output."""
        zero_points, bias = (None if one is None else one[some] for one in (self.zero_points, self.bias))
        return Case(self.a, self.codes[some], self.scales[some], zero_points, bias, self.seed)

    @property
    def weight(self) -> Array:
        return reference.dequantize(self.codes, self.scales, self.zero_points, self.a.shape[1]).astype(np.float64)

    @property
    def exact(self) -> Array:
        product = self.a.astype(np.float64) @ self.weight.T
        return product if self.bias is None else product + self.bias.astype(np.float64)

    @property
    def tolerance(self) -> Array:
        """What rounding every weight and the output to 16 bits, and sums in single precision, can do: (M, N).

        Rounding errors of weights add up as random ones do; 6 standard deviations are far beyond all elements here. So
        do those of K partial sums S, each of at most 2^-24 |S|, and S wanders as far as the terms take it (the root of
        its mean square is energy / sqrt(2)) while it goes to the result (|exact| / sqrt(3)).
        """
        epsilon, K = EPSILON[self.a.dtype], self.a.shape[1]
        energy, size = np.sqrt(np.square(self.a.astype(np.float64)) @ np.square(self.weight).T), np.abs(self.exact)
        sums = 2.0**-24 * np.sqrt(K / 3) * (energy / np.sqrt(2) + size / np.sqrt(3))
        return 6 * (epsilon * energy + sums) + 2 * epsilon * size + 1e-6


def product(device: Emulated | Gpu, case: Case, with_cublas: bool = False) -> Array:
    """What the device makes of a case, its output poisoned before, and nothing written around it."""
    M, N = case.a.shape[0], len(case.codes)
    words = case.a.dtype.itemsize // 2  # of 16 bits, in a number
    around = device.put(np.full(words * M * N + 2 * MARGIN, POISON, np.uint16))
    out = around[MARGIN : MARGIN + words * M * N]
    out = (out.view(np.float32) if words == 2 else out).reshape(M, N)
    tensors = [None if one is None else device.put(one) for one in (case.a, case.codes, case.scales)]
    more = [None if one is None else device.put(one) for one in (case.zero_points, case.bias)]
    cublas = device.cublas if with_cublas else 0
    device.launcher.matmul_nbits(*tensors, *more, out=out, cublas=cublas)
    whole = device.get(around)
    assert (whole[:MARGIN] == POISON).all(), f"written before the output (seed {case.seed})"
    assert (whole[-MARGIN:] == POISON).all(), f"written behind the output (seed {case.seed})"
    return np.ascontiguousarray(device.get(out)).view(case.a.dtype)


def check(device: Emulated | Gpu, case: Case, with_cublas: bool = False) -> None:
    """Of a wide output, columns drawn at random are compared, and all are written."""
    y = product(device, case, with_cublas)
    if y.shape[1] > COMPARED:
        assert (y.view(np.uint16) != POISON).all(), f"not all is written (seed {case.seed})"
        some = np.random.default_rng(case.seed).choice(y.shape[1], COMPARED, replace=False)
        y, case = y[:, some], case.of_columns(some)
    y = y.astype(np.float64)
    excess = np.abs(y - case.exact) / case.tolerance
    assert excess.max() <= 1, f"{excess.max()} x the tolerance (seed {case.seed})"  # nor is it NaN


# M, N, K; the ends of K and N fall into the middle of stages, chunks, words and tiles.
SMALL = [(1, 16, 256), (1, 40, 512), (2, 700, 1024), (3, 100, 576), (5, 17, 999), (8, 33, 1000), (1, 3, 40), (4, 16, 1)]
SMALL += [(1, 24, 4352), (2, 24, 4500)]  # several stages for each warp
LARGE = [(9, 100, 256), (16, 130, 2048), (20, 128, 576), (33, 33, 1000), (64, 17, 999), (70, 48, 300), (130, 600, 320)]


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("M", "N", "K"), SMALL)
def test_few_rows(
    device: Emulated | Gpu, M: int, N: int, K: int, block_size: int, dtype: Any, zero_points: bool
) -> None:
    check(device, Case.random(M, N, K, block_size, dtype, zero_points))


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize(("M", "N", "K"), LARGE)
def test_more_rows(
    device: Emulated | Gpu, M: int, N: int, K: int, block_size: int, dtype: Any, zero_points: bool
) -> None:
    check(device, Case.random(M, N, K, block_size, dtype, zero_points, bias=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device: Emulated | Gpu, data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, most), label=name) for name, most in (("M", 20), ("N", 90), ("K", 700)))
    block_size = data.draw(st.sampled_from([16, 32, 64, 128, 256]), label="block_size")
    dtype = data.draw(st.sampled_from([np.float16, bfloat16, np.float32]), label="dtype")
    zero_points, bias = data.draw(st.booleans(), label="zero_points"), data.draw(st.booleans(), label="bias")
    check(device, Case.random(M, N, K, block_size, dtype, zero_points, bias))


@pytest.mark.gpu
def test_cublas_is_found(real_gpu: Gpu) -> None:
    weight = Weight(64, 512, 32, FLOAT16)
    assert real_gpu.launcher.workspace_bytes(weight, 300, with_cublas=True) == 2 * 64 * 512


@pytest.mark.gpu
@pytest.mark.parametrize("zero_points", ZERO_POINTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64, 256, 1024])
@pytest.mark.parametrize(("N", "K"), [(4096, 11008), (1000, 5000), (50257, 768)])
def test_sizes_of_real_layers(
    real_gpu: Gpu, M: int, N: int, K: int, block_size: int, dtype: Any, zero_points: bool
) -> None:
    check(real_gpu, Case.random(M, N, K, block_size, dtype, zero_points), with_cublas=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*TYPES, SINGLE])
def test_many_rows_with_cublas(device: Emulated | Gpu, dtype: Any, bias: bool) -> None:
    check(device, Case.random(300, 40, 203, 32, dtype, True, bias), with_cublas=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_are_exact_but_for_rounding_the_output(device: Emulated | Gpu, dtype: Any) -> None:
    case = Case.random(4, 64, 1024, 32, dtype, zero_points=True)
    y = product(device, case).astype(np.float64)
    np.testing.assert_allclose(y, case.exact, rtol=1.01 * EPSILON[np.dtype(dtype)], atol=2e-4)


def test_a_row_is_the_same_whatever_rows_are_beside_it(device: Emulated | Gpu) -> None:
    case = Case.random(8, 48, 512, 64, np.float16)
    one = Case(case.a[3:4], case.codes, case.scales, None, None, case.seed)
    np.testing.assert_array_equal(product(device, case)[3:4], product(device, one))


def test_two_runs_give_the_same_bits(device: Emulated | Gpu) -> None:
    case = Case.random(16, 130, 2048, 32, np.float16)  # K is cut into parts here
    np.testing.assert_array_equal(product(device, case), product(device, case))


def test_leading_axes_stay(device: Emulated | Gpu) -> None:
    case = Case.random(6, 16, 256, 32, np.float16)
    a, codes, scales = map(device.put, (case.a.reshape(2, 3, 256), case.codes, case.scales))
    assert device.launcher.matmul_nbits(a, codes, scales).shape == (2, 3, 16)


def test_no_rows_are_no_work(device: Emulated | Gpu) -> None:
    case = Case.random(1, 16, 256, 32, np.float16)
    y = device.launcher.matmul_nbits(device.put(case.a)[:0], device.put(case.codes), device.put(case.scales))
    assert y.shape == (0, 16)


@pytest.mark.parametrize(
    ("M", "N", "K", "block_size", "launched"),
    [
        pytest.param(1, 64, 1024, 32, ["awq_gemv_f16_b32_whole"], id="one row"),
        pytest.param(8, 64, 1024, 128, ["awq_gemv_f16_b128_whole"], id="eight rows"),
        pytest.param(1, 64, 576, 32, ["awq_gemv_f16_b32"], id="K that is not of whole stages"),
        pytest.param(1, 64, 1024, 16, ["awq_plain_f16"], id="blocks of 16"),
        pytest.param(1, 64, 256, 256, ["awq_gemm_f16_128x16"], id="blocks of 256"),
        pytest.param(16, 64, 2048, 32, ["awq_gemm_f16_128x16", "awq_sum_splits_f16"], id="sixteen rows, K cut"),
        pytest.param(16, 2000, 512, 32, ["awq_gemm_f16_128x16"], id="tiles for every multiprocessor"),
        pytest.param(33, 64, 256, 32, ["awq_gemm_f16_128x64"], id="33 rows"),
        pytest.param(256, 64, 256, 32, ["awq_gemm_f16_128x64"], id="many rows, too few large tiles"),
        pytest.param(256, 200, 256, 32, ["awq_gemm_f16_128x128"], id="many rows"),
        pytest.param(20, 64, 250, 32, ["awq_plain_f16"], id="rows that are not aligned"),
        pytest.param(257, 16, 64, 32, ["awq_dequantize_f16", "cublas", "awq_add_bias_f16"], id="cuBLAS"),
    ],
)
def test_each_shape_has_its_kernel(
    emulated_gpu: Emulated, M: int, N: int, K: int, block_size: int, launched: list[str]
) -> None:
    emulated_gpu.launched()
    product(emulated_gpu, Case.random(M, N, K, block_size, np.float16, bias=True), with_cublas=True)
    assert emulated_gpu.launched() == launched


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_zero_points_may_start_anywhere(emulated_gpu: Emulated, shift: int, block_size: int) -> None:
    case = Case.random(2, 48, 512, block_size, np.float16, zero_points=True)
    assert case.zero_points is not None
    moved = emulated_gpu.put(np.concatenate([np.zeros(16, np.uint8), case.zero_points.ravel(), np.zeros(16, np.uint8)]))
    moved = moved[16 - shift :][: case.zero_points.size].reshape(case.zero_points.shape)
    moved[...] = case.zero_points
    y = emulated_gpu.launcher.matmul_nbits(emulated_gpu.put(case.a), emulated_gpu.put(case.codes), case.scales, moved)
    assert (np.abs(y - case.exact) <= case.tolerance).all()


@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("N", [3, 16])
def test_no_rows_need_no_workspace(emulated_gpu: Emulated, N: int, block_size: int) -> None:
    case = Case.random(1, N, 256, block_size, np.float16)
    y = emulated_gpu.launcher.matmul_nbits(case.a[:0], emulated_gpu.put(case.codes), case.scales)
    assert y.shape == (0, N)


def test_a_workspace_that_is_too_small_is_refused(emulated_gpu: Emulated) -> None:
    case = Case.random(16, 130, 2048, 32, np.float16)
    with pytest.raises(RuntimeFailedError, match="workspace is too small"):
        emulated_gpu.launcher.matmul_nbits(case.a, case.codes, case.scales, workspace=np.empty(16, np.uint8))


def test_a_driver_that_cannot_load_is_one_sentence(emulated_gpu: Emulated, tmp_path: Path) -> None:
    """The driver's reason is in it once, with the file that it is about."""
    other = tmp_path / "libcuda.so"
    other.symlink_to(emulated_gpu.driver)
    (tmp_path / "awq_sm_90.cubin").write_bytes(b"broken")
    with pytest.raises(
        RuntimeFailedError, match=r"^CUDA could not load /\S*awq_sm_90.cubin: the emulated driver says no"
    ):
        Launcher(library.path(), tmp_path, other)


def test_blocks_that_do_not_exist_are_refused(emulated_gpu: Emulated) -> None:
    case = Case.random(1, 16, 240, 24, np.float16)
    with pytest.raises(RuntimeFailedError, match="block_size must be 16, 32, 64, 128 or 256"):
        emulated_gpu.launcher.matmul_nbits(case.a, case.codes, case.scales)


def test_codes_at_an_odd_address_are_refused(emulated_gpu: Emulated) -> None:
    case = Case.random(1, 16, 256, 32, np.float16)
    shifted = np.concatenate([np.zeros(1, np.uint8), case.codes.ravel()])[1:].reshape(case.codes.shape)
    with pytest.raises(RuntimeFailedError, match="multiple of 16 bytes"):
        emulated_gpu.launcher.matmul_nbits(case.a, shifted, case.scales)


def test_no_driver_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailedError, match=r"CUDA's driver cannot be opened .*NVIDIA GPU\?"):
        Launcher(library.path(), tmp_path, tmp_path / "libcuda.so.1")


def test_no_machine_code_is_one_sentence(emulated_gpu: Emulated, tmp_path: Path) -> None:
    other = tmp_path / "libcuda.so"
    other.symlink_to(emulated_gpu.driver)
    with pytest.raises(RuntimeFailedError, match=r"awq_sm_90.cubin, are not in .*python -m awq_onnx.kernels export"):
        Launcher(library.path(), tmp_path, other)
