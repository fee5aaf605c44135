"""reference.c, the kernel for the CPU, against reference.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from nbits import Array, Node, node

from awq_onnx import kernels
from awq_onnx.kernels import library
from awq_onnx.kernels.launcher import Call, Weight

DTYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10, np.dtype(bfloat16): 16}
EPSILON = {np.dtype(np.float32): 2.0**-20, np.dtype(np.float16): 2.0**-10, np.dtype(bfloat16): 2.0**-7}
SOURCES = sorted(Path(kernels.__file__).parent.glob("*.c"))


def product(a: Array, one: Node) -> Array:
    y = np.full((len(a), one.N), 77, one.dtype)
    tensors = (a, one.codes, one.scales, one.zero_points, one.bias, y)
    pointers = [None if values is None else values.ctypes.data for values in tensors]
    weight = Weight(one.N, one.K, one.block_size, DTYPES[one.dtype])
    call = Call(len(a), *pointers, None, 0, None, None)
    multiply = ctypes.CDLL(str(library.path())).awq_reference
    multiply.restype = ctypes.c_char_p
    assert multiply(ctypes.byref(weight), ctypes.byref(call)) is None
    return y


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    one = node(
        data.draw(st.integers(1, 300), "K"),
        data.draw(st.integers(1, 9), "N"),
        data.draw(st.sampled_from([16, 32, 64, 128, 256]), "block size"),
        data.draw(st.sampled_from(list(DTYPES)), "type"),
        zero_points=data.draw(st.booleans(), "zero points"),
        bias=data.draw(st.booleans(), "bias"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    a = one.activations(data.draw(st.integers(0, 4), "M"))
    expected = one.expected(a)
    size = np.abs(a.astype(np.float32)) @ np.abs(np.ones((one.K, one.N), np.float32)) + np.abs(expected)
    assert np.all(np.abs(product(a, one).astype(np.float32) - expected) <= EPSILON[one.dtype] * size)


def same_bits(y: Array, exact: Array) -> None:
    """y is `exact`, float32, rounded. A sum begins with 0, so that -0 becomes 0."""
    expected = (exact + np.float32(0)).astype(y.dtype)
    numbers = ~np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), ~numbers)
    np.testing.assert_array_equal(y[numbers].view(np.uint16), expected[numbers].view(np.uint16))


def identity(dtype: Any, scale: Any = 1) -> Node:
    """A weight (1, 1): `scale`."""
    return Node(1, 16, np.full((1, 1, 8), 0x99, np.uint8), np.array([[scale]], dtype))


@pytest.mark.filterwarnings("ignore:invalid")
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_every_number_of_16_bits_is_read_and_written_as_it_is(dtype: Any) -> None:
    a = np.arange(1 << 16).astype(np.uint16).view(dtype)[:, None]
    same_bits(product(a, identity(dtype)), a.astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("scale", [1 / 3, 0.9995, 1.7, 2.0**-14])
def test_numbers_are_rounded_to_the_nearest_even_one(dtype: Any, scale: float) -> None:
    a = np.arange(1 << 16).astype(np.uint16).view(dtype)[:, None]
    factor = np.array(scale, dtype).astype(np.float32)  # a product of two needs 22 bits: it is exact before
    same_bits(product(a, identity(dtype, scale)), a.astype(np.float32) * factor)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_library_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    compilers = [found for found in map(shutil.which, ("gcc", "clang")) if found]
    if not compilers:
        pytest.skip("there is no C compiler")
    for compiler in compilers:
        command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-c", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "object")], check=True)
