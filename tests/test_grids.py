"""The grid of a block: over its whole range, clipped, or fitted."""

from __future__ import annotations

import numpy as np
from builders import Array, activations, every_format, statistics_of, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_onnx import codec, grids
from awq_onnx.codec import Format

property_test = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def weighted_error(blocks: Array, h: Array, centred: Array, grid: codec.Grid) -> Array:
    """sum h e^2 of every block: float64 (G, N)."""
    error = codec.dequantize(centred, grid).astype(np.float64) - blocks
    return np.asarray((h * error**2).sum(axis=1))


@st.composite
def blocks_and_costs(draw: st.DrawFn, block_size: int) -> tuple[Array, Array]:
    """Weights (G, b, N) of many kinds, and what an error on each row costs (G, b, 1)."""
    rng = np.random.default_rng(draw(seeds))
    G, N = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    blocks = rng.standard_normal((G, block_size, N)) ** draw(st.sampled_from([1, 2, 3, 5]))
    blocks *= rng.random(blocks.shape) < draw(st.sampled_from([0.05, 0.5, 1]))
    blocks = (blocks * draw(st.sampled_from([1e-3, 1, 1e3]))).astype(np.float32)
    if draw(st.booleans()):
        blocks = np.rint(blocks * 4) / 4
    h = np.exp(draw(st.sampled_from([0, 1, 4])) * rng.standard_normal((G, block_size, 1)))
    h *= rng.random(h.shape) < draw(st.sampled_from([0.1, 1]))
    return blocks, h.astype(np.float32)


@every_format
@property_test
@given(data=st.data())
def test_a_refit_never_costs_more_than_the_plain_grid(fmt: Format, data: st.DataObject) -> None:
    blocks, h = data.draw(blocks_and_costs(fmt.block_size))
    plain = codec.minmax_grid(blocks, fmt)
    before = weighted_error(blocks, h, codec.centred_codes(blocks, plain), plain)
    after = weighted_error(blocks, h, *grids.fit(blocks, h, fmt))
    energy = (h * blocks.astype(np.float64) ** 2).sum(axis=1)  # refit compares in single precision
    assert (after <= before * (1 + 1e-5) + 2e-6 * energy).all()


@every_format
@property_test
@given(data=st.data())
def test_a_refitted_grid_can_be_stored(fmt: Format, data: st.DataObject) -> None:
    blocks, h = data.draw(blocks_and_costs(fmt.block_size))
    centred, grid = grids.fit(blocks, h, fmt)
    codes = centred + grid.zero_points[:, None, :]
    assert ((codes >= 0) & (codes <= 15) & (codes % 1 == 0)).all()
    assert not fmt.symmetric or (grid.zero_points == 8).all()
    stored = codec.pack_scales(grid.scales, fmt.scale_dtype).astype(np.float32)
    np.testing.assert_array_equal(stored.T, grid.scales)
    assert np.isfinite(stored).all()
    assert (stored != 0).all()


@every_format
def test_a_refit_gains_on_normal_weights(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((4, fmt.block_size, 50)).astype(np.float32)
    h = np.ones((4, fmt.block_size, 1), np.float32)
    plain = codec.minmax_grid(blocks, fmt)
    before = weighted_error(blocks, h, codec.centred_codes(blocks, plain), plain).sum()
    assert weighted_error(blocks, h, *grids.fit(blocks, h, fmt)).sum() < 0.93 * before


# Clipping


def clipped_error(blocks: Array, moments: Array, centred: Array, grid: codec.Grid) -> Array:
    """e' M e of every block: float64 (G, N)."""
    error = codec.dequantize(centred, grid).astype(np.float64) - blocks
    return np.einsum("gbn,gbc,gcn->gn", error, moments.astype(np.float64), error)


def clipped_to(blocks: Array, ratio: float, fmt: Format) -> tuple[Array, codec.Grid]:
    bound = np.float32(ratio) * np.abs(blocks).max(axis=1, keepdims=True)
    grid = codec.minmax_grid(np.clip(blocks, -bound, bound), fmt)
    return codec.centred_codes(blocks, grid), grid


@every_format
@property_test
@given(seed=seeds)
def test_of_all_ranges_the_one_with_the_least_error_of_the_output_is_taken(fmt: Format, seed: int) -> None:
    rng = np.random.default_rng(seed)
    K = 3 * fmt.block_size
    blocks = codec.to_blocks(weight(rng, K, 5) ** 3, fmt.block_size)
    statistics = statistics_of(activations(rng, K, outliers=2))
    moments = statistics.block_moments(np.ones(K, np.float32), fmt.block_size)
    tried = [clipped_error(blocks, moments, *clipped_to(blocks, ratio, fmt)) for ratio in grids.CLIPS]
    found = clipped_error(blocks, moments, *grids.clip(blocks, moments, fmt))
    np.testing.assert_allclose(found, np.min(tried, axis=0), rtol=1e-3)


@every_format
def test_where_nothing_is_gained_by_clipping_the_whole_range_stays(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-8, 8, (2, fmt.block_size, 4)).astype(np.float32)
    steps[:, 0], steps[:, 1] = -8, 7
    moments = np.repeat(np.eye(fmt.block_size, dtype=np.float32)[None], 2, axis=0)
    centred, grid = grids.clip(steps / 8, moments, fmt)
    np.testing.assert_array_equal(codec.dequantize(centred, grid), steps / 8)


@every_format
def test_one_weight_far_off_the_others_is_clipped_where_its_channel_is_quiet(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((1, fmt.block_size, 1)).astype(np.float32)
    blocks[0, 3] = 12
    loud = np.eye(fmt.block_size, dtype=np.float32)[None]
    quiet = loud.copy()
    quiet[0, 3, 3] = 1e-4
    largest = [np.abs(codec.dequantize(*grids.clip(blocks, moments, fmt))).max() for moments in (loud, quiet)]
    assert largest[0] > 9
    assert largest[1] < 8
