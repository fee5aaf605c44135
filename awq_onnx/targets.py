"""What runs the model, and what it wants of the file. docs/targets.md says why, with sources."""

from __future__ import annotations

from dataclasses import dataclass

MATMULNBITS, QDQ = FORMATS = ("matmulnbits", "qdq")
BITS = (4, 8, 2)
WHOLE_COLUMN = -1  # as a block size
BLOCK_SIZES = (16, 32, 64, 128, 256, WHOLE_COLUMN)
QDQ_BITS = (4, 8)  # DequantizeLinear has no 2-bit types before opset 25


@dataclass(frozen=True)
class Target:
    """format, block_size, symmetric: what a recipe has that does not say. formats, bits, block_sizes: all that it runs.

    only_symmetric: it knows no zero points but 0. tells_zero_points: they are written even where they are in the
    middle. positive_scales: it refuses others. whole_blocks: it refuses weights whose K is no multiple of the block
    size. bias_inside: whether a MatMulNBits may have one. in_browser: whether pages load the file, see `folder`.
    """

    format: str = MATMULNBITS
    block_size: int = 32
    symmetric: bool = False
    formats: tuple[str, ...] = FORMATS
    bits: tuple[int, ...] = BITS
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    only_symmetric: bool = False
    tells_zero_points: bool = False
    positive_scales: bool = False
    whole_blocks: bool = False
    bias_inside: bool = True
    in_browser: bool = False


CPU = "cpu"
TARGETS = {
    CPU: Target(),
    "cuda": Target(bits=(4, 8), block_sizes=(16, 32, 64, 128), bias_inside=False),
    "web": Target(bits=(4,), block_sizes=(32, 64, 128), bias_inside=False, in_browser=True),
    "dml": Target(bits=(4, 8), tells_zero_points=True, bias_inside=False),
    "tensorrt": Target(
        format=QDQ,
        block_size=64,
        symmetric=True,
        formats=(QDQ,),
        bits=(4,),
        block_sizes=(64, 128),
        only_symmetric=True,
        positive_scales=True,
        whole_blocks=True,
    ),
    "qnn": Target(
        format=QDQ,
        block_size=WHOLE_COLUMN,
        symmetric=True,
        formats=(QDQ,),
        bits=(4, 8),
        block_sizes=(WHOLE_COLUMN,),
        only_symmetric=True,
        positive_scales=True,
    ),
}
