"""A rounded layer lies in the file as the node of its format reads it, and can be read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, norm_and_readers, save
from builders import weight as random_weight

from awq_onnx import Recipe, codec, layouts
from awq_onnx.codec import Format
from awq_onnx.journal import Entry
from awq_onnx.output import OutputFiles
from awq_onnx.rounding import Rounded
from awq_onnx.store import described, open_model

K, N = 72, 5
FLOAT32 = np.dtype(np.float32)


def rounded(fmt: Format) -> Rounded:
    blocks = codec.to_blocks(random_weight(np.random.default_rng(0), K, N), fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    return Rounded.of(codec.centred_codes(blocks, grid), grid)


def written(folder: Path, fmt: Format, recipe: Recipe) -> tuple[Entry, dict[str, ir.Tensor]]:
    """The journal's entry, and the tensors with what they hold."""
    path = save(norm_and_readers().model(), folder / "model.onnx")
    with open_model(path) as opened, OutputFiles(folder / "out.onnx", opened, overwrite=True) as files:
        entry = layouts.write("w", rounded(fmt), fmt, (K, N), files, recipe)
        references = {name: described(value, files.work) for name, value in entry.items() if isinstance(value, dict)}
        tensors = {name: ir.Tensor(one.numpy().copy(), dtype=one.dtype) for name, one in references.items()}
    return entry, tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize(
    ("block_size", "stored"), [(16, None), (32, None), (80, 16), (128, None)], ids=["16", "32", "column", "128"]
)
def test_a_layer_for_dequantize_linear_is_read_back_as_matmul_nbits_has_it(
    tmp_path: Path, bits: int, symmetric: bool, block_size: int, stored: int | None
) -> None:
    fmt = Format(block_size, symmetric, FLOAT32, bits, stored, explicit=True)
    plain, tensors = written(tmp_path, fmt, Recipe())
    expected = layouts.as_matmul_nbits(
        tensors["codes"], tensors["zero_points"], tensors["scales"].numpy(), bits, plain["block_size"]
    )
    matrix, tensors = written(tmp_path, replace(fmt, explicit=False), Recipe(format="qdq"))
    actual = layouts.as_matmul_nbits(
        tensors["codes"], tensors.get("zero_points"), tensors["scales"].numpy(), bits, matrix["block_size"]
    )
    for one, other in zip(actual[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    assert actual[3] == expected[3] == fmt.stored_block_size


@pytest.mark.parametrize("bits", [4, 8])
def test_explicit_zero_points_of_matmul_nbits_are_all_in_the_middle(tmp_path: Path, bits: int) -> None:
    fmt = Format(32, True, FLOAT32, bits)
    assert "zero_points" not in written(tmp_path, fmt, Recipe())[1]
    zero_points = written(tmp_path, replace(fmt, explicit=True), Recipe())[1]["zero_points"].numpy()
    blocks = codec.unpack_zero_points(zero_points, 3, bits)
    assert blocks.shape == (N, 3)
    assert (blocks == codec.middle_code(bits)).all()


def test_explicit_zero_points_of_dequantize_linear_are_zeros(tmp_path: Path) -> None:
    fmt = Format(32, True, FLOAT32, 4, explicit=True)
    zero_points = written(tmp_path, fmt, Recipe(format="qdq"))[1]["zero_points"]
    assert zero_points.dtype == ir.DataType.INT4
    assert zero_points.shape == ir.Shape([3, N])
    values: Array = zero_points.numpy()
    assert not values.astype(int).any()


def test_a_scale_for_a_whole_column_is_one_dimensional(tmp_path: Path) -> None:
    recipe = Recipe(format="qdq")
    entry, tensors = written(tmp_path, Format(80, False, FLOAT32, 4, 16), recipe)
    assert entry["per_axis"]
    assert tensors["codes"].shape == ir.Shape([K, N])
    assert tensors["zero_points"].shape == ir.Shape([N])
    assert layouts.scales_as_read(tensors["scales"].numpy(), np.float16, recipe, per_axis=True).shape == (N,)
