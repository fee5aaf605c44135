"""Kernels of the search, run on the processor, against the loops of numpy that they stand for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import FLOAT16, FLOAT32, Array, activations, statistics_of, weight
from foreign import Foreign
from on_cpu import kernel_on_cpu, with_kernels

from awq_onnx import codec, compensate, symmetric
from awq_onnx.codec import Format, Grid
from awq_onnx.compensate import FEW_ROWS, ROWS, THREADS, Compensation
from awq_onnx.kernels import arrays
from awq_onnx.kernels.arrays import OPTIONS, kernel_for, text_of
from awq_onnx.symmetric import PANEL

FORMATS = [Format(32, False, FLOAT16), Format(32, True, FLOAT32), Format(16, False, FLOAT32, 8)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=["zero points", "symmetric", "8 bits"])
POISON = np.float32(1e30)


def task(K: int, n: int, fmt: Format) -> tuple[Array, Grid, Compensation]:
    """A weight, a grid that is a little too tight for it, and errors that pass on to all channels."""
    rng = np.random.default_rng(K + n)
    w = weight(rng, K, n)
    plain = codec.minmax_grid(codec.to_blocks(w, fmt.block_size), fmt)
    grid = Grid(codec.round_scales(plain.scales * np.float32(0.8), fmt.scale_dtype), plain.zero_points, fmt.bits)
    return w, grid, compensate._Ordered.of(statistics_of(activations(rng, K)), np.ones(K, np.float32)).compensation(0.1)


@every_format
@pytest.mark.parametrize("n", [1, THREADS - 1, THREADS, 2 * THREADS + 3])
@pytest.mark.parametrize("K", [1, 5, FEW_ROWS])
def test_few_channels_get_the_same_codes_to_the_last_bit_of_the_error(
    K: int, n: int, fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(*rounded_twice(K, n, fmt, monkeypatch), exactly=True)


@every_format
@pytest.mark.parametrize("n", [1, THREADS + 1])
@pytest.mark.parametrize("K", [FEW_ROWS + 1, 50, ROWS - 1, ROWS, ROWS + 1, 300])
def test_many_channels_get_the_same_codes_but_where_sums_round_otherwise(
    K: int, n: int, fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(*rounded_twice(K, n, fmt, monkeypatch), exactly=False)


Channels = compensate._Channels


def rounded_twice(K: int, n: int, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> tuple[Channels, Channels]:
    """By numpy and by the kernel, what they write poisoned before."""
    w, grid, compensation = task(K, n, fmt)
    made = []
    for prepare in (lambda _: None, with_kernels):
        prepare(monkeypatch)
        wanted, codes = w[compensation.order], np.full((len(grid.scales) * fmt.block_size, n), POISON)
        one = Channels(compensation, compensation.order, grid, fmt.block_size, wanted, np.full_like(w, POISON), codes)
        for start, stop in reversed(list(symmetric.runs(K, ROWS))):
            targets = wanted[start:stop] - compensation.feedback[stop:, start:stop].T @ one.errors[stop:]
            one.round(start, stop, targets)
            assert (one.errors[:start] == POISON).all()
        made.append(one)
    return made[0], made[1]


def assert_same(expected: Channels, actual: Channels, *, exactly: bool) -> None:
    K = len(expected.wanted)
    assert (actual.codes[K:] == POISON).all()  # the padding is nobody's
    same = (actual.codes == expected.codes).mean()
    assert same == 1 if exactly else same > 0.995
    if exactly:
        np.testing.assert_array_equal(actual.errors, expected.errors)
    blocks = actual.compensation.order // actual.block_size
    ordered = actual.codes[actual.compensation.order]
    np.testing.assert_array_equal(actual.errors, ordered * actual.grid.scales[blocks] - actual.wanted)


def test_on_the_diagonal_and_above_it_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid, compensation = task(150, 70, FORMATS[0])
    with_kernels(monkeypatch)
    spoiled = np.where(np.tri(150, k=-1, dtype=bool), compensation.feedback, np.float32(np.nan))
    codes, same = (
        compensate.round_weight(w, grid, 32, Compensation(compensation.order, feedback))
        for feedback in (compensation.feedback, spoiled)
    )
    np.testing.assert_array_equal(codes, same)


def test_a_grid_that_is_part_of_a_wider_one_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid, compensation = task(64, 100, FORMATS[0])
    expected = compensate.round_weight(w, grid, 32, compensation)[:, :, 10:80]
    with_kernels(monkeypatch)
    part = Grid(grid.scales[:, 10:80], grid.zero_points[:, 10:80], grid.bits)
    np.testing.assert_array_equal(compensate.round_weight(w[:, 10:80], part, 32, compensation), expected)


@pytest.mark.parametrize("n", [1, 2, 7, 33, PANEL])
def test_the_factor_of_a_block_and_its_inverse_are_those_of_numpy(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(n).standard_normal((3 * n, n))
    correlations = np.corrcoef(rows.T).reshape(n, n).astype(np.float32)
    spoiled = np.where(np.tri(n, dtype=bool), correlations, np.float32(np.nan))
    with_kernels(monkeypatch)
    factor, inverse = symmetric._factor_and_inverse(np.asfortranarray(spoiled))
    expected = np.linalg.cholesky(correlations.astype(np.float64))
    np.testing.assert_allclose(factor, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(inverse, np.linalg.inv(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("K", [PANEL - 1, PANEL + 1, 3 * PANEL])
def test_a_large_factor_is_made_of_such_blocks(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    correlations = np.corrcoef(np.random.default_rng(K).standard_normal((K, 3 * K))).astype(np.float32)
    here, there = correlations.copy(), correlations.copy()
    symmetric.cholesky(here, 0.1)
    with_kernels(monkeypatch)
    symmetric.cholesky(there, 0.1)
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)


def test_a_matrix_that_has_no_factor_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels(monkeypatch)
    factor, inverse = symmetric._factor_and_inverse(np.array([[1, 2], [2, 1]], np.float32))
    assert np.isnan(factor).any()
    assert np.isnan(inverse).any()


def number(source: str, name: str) -> int:
    found = re.search(rf"constexpr int {name} = (\d+);", text_of(source))
    assert found is not None
    return int(found[1])


def test_sources_and_their_callers_count_alike() -> None:
    assert number("compensate", "COLUMNS") == THREADS
    assert number("compensate", "ROWS") == ROWS
    assert number("compensate", "FEW") == FEW_ROWS
    assert number("cholesky", "WIDEST") == PANEL


def test_arrays_in_memory_and_those_of_strangers_have_no_kernel() -> None:
    for one in (np.empty(3), Foreign(np.empty(3))):
        assert kernel_for(one, "compensate", "round_channels") is None


def test_cupy_compiles_a_source_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...]) -> None:
            compiled.append((code, options))

        def get_function(self, name: str) -> Callable[..., Any]:
            return SimpleNamespace(name=name)  # type: ignore[return-value]

    cupy = ModuleType("cupy")
    cupy.RawModule = RawModule  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(arrays, "_module", arrays.cache(arrays._module.__wrapped__))
    array = type("ndarray", (), {"__module__": "cupy"})()
    for name in ("round_channels", "another"):
        assert kernel_for(array, "compensate", name).name == name  # type: ignore[union-attr]
    assert compiled == [(text_of("compensate"), OPTIONS)]


def test_the_emulated_kernel_is_the_one_that_was_asked_for() -> None:
    with pytest.raises(AssertionError):
        kernel_on_cpu(None, "compensate", "no such kernel")((1,), (1,), ())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", ["compensate", "cholesky"])
def test_kernels_compile_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    (tmp_path / "kernel.cu").write_text(text_of(source))
    command = [nvcc, f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *OPTIONS, "-o", "kernel.cubin", "kernel.cu"]
    told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told
