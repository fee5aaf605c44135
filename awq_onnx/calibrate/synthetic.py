"""Made-up inputs where nobody gives any: tokens, pictures, sound, vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awq_onnx.calibrate.feeds import ADVICE, Arrays, Input, Signature, named_sizes
from awq_onnx.calibrate.hints import Hints
from awq_onnx.errors import CalibrationError

PICTURES = "pixel_values"
SPECTROGRAM = "input_features"
SOUND = "input_values"
SHARED_LIGHT = 0.9  # of a picture's contrast is the same in all of its colours


def fill(wanted: Signature, given: Arrays, samples: int, tokens: int, hints: Hints, rng: np.random.Generator) -> Arrays:
    """`given` plus every input that does not follow from others, `samples` along axis 0 and `tokens` long if free.

    Raises CalibrationError where neither the graph nor `hints` tell how large an input is.
    """
    named = named_sizes(wanted, given)
    made = {
        one.name: _values(_named(one, named), wanted, (samples, tokens), hints, rng) for one in missing(wanted, given)
    }
    return {**given, **made}


def _named(one: Input, sizes: dict[str, int]) -> Input:
    """The input with the axes fixed that given inputs have too."""
    return one if one.dims is None else replace(one, dims=tuple(sizes.get(str(dim), dim) for dim in one.dims))


def missing(wanted: Signature, given: Arrays) -> list[Input]:
    """The inputs that `fill` would make."""
    made = [one for one in wanted.inputs if _is_made(one, wanted)]
    return [one for one in made if one.name not in given]


def _is_made(one: Input, wanted: Signature) -> bool:
    if one.is_past:
        return wanted.needs_past
    return one.is_tokens or (one.dtype.kind == "f" and not one.follows)


def _values(
    one: Input, wanted: Signature, free: tuple[int, int], hints: Hints, rng: np.random.Generator
) -> NDArray[Any]:
    """free: samples and tokens."""
    if one.is_tokens:
        shape = (free[0], one.fixed(1) or free[1])
        return _tokens(shape, wanted.vocabulary or hints.vocabulary or 2, hints.padding, rng)
    rank = 0 if one.dims is None else len(one.dims)
    if one.name == PICTURES or (rank == 4 and not one.is_past):
        made = _pictures(_picture_sizes(one, hints), free[0], rng)
    elif one.name == SPECTROGRAM and rank in (0, 3):
        made = np.stack([_natural(_spectrogram_sizes(one, free[1], hints), rng) for _ in range(free[0])])
    elif one.name == SOUND and rank in (0, 2):
        length = free[1] * hints.samples_a_token if hints.samples_a_token else hints.sampling_rate
        made = np.stack([_natural(_sized(one, (length,)), rng) for _ in range(free[0])])
    else:
        made = rng.standard_normal(_free_sizes(one, *free), dtype=np.float32)
    return made.astype(one.dtype)


def _tokens(shape: tuple[int, int], vocabulary: int, padding: int | None, rng: np.random.Generator) -> NDArray[Any]:
    """Any tokens but the padding: some models count their positions without it."""
    if padding is None or not 0 <= padding < vocabulary or vocabulary < 3:
        return rng.integers(0, vocabulary, shape)
    ids = rng.integers(0, vocabulary - 1, shape)
    return np.where(ids < padding, ids, ids + 1)


def _sized(one: Input, hinted: tuple[int | None, ...]) -> tuple[int, ...]:
    """The sizes of all axes but the first: as the graph fixes them, else as hinted."""
    sizes = [one.fixed(axis) or hint for axis, hint in enumerate(hinted, start=1)]
    for axis, size in enumerate(sizes, start=1):
        if size is None:
            raise unknown_size(one, axis)
    return tuple(size for size in sizes if size is not None)


def unknown_size(one: Input, axis: int) -> CalibrationError:
    """The error for an axis of which nothing says how large it is."""
    if one.dims is None:
        return CalibrationError(f"the model's input {one.name} has no shape: {ADVICE}")
    return CalibrationError(f"the model's input {one} does not say how large {one.dims[axis]} is: {ADVICE}")


def _picture_sizes(one: Input, hints: Hints) -> tuple[int, ...]:
    """(channels, height, width), or (height, width, channels) where the graph says so."""
    height, width = hints.image or (None, None)
    if one.fixed(1) is None and one.fixed(3) in (1, 3):
        return _sized(one, (height, width, hints.channels))
    return _sized(one, (hints.channels, height, width))


def _spectrogram_sizes(one: Input, tokens: int, hints: Hints) -> tuple[int, ...]:
    """(mel bins, frames), or (frames, mel bins) where the graph says so."""
    if one.fixed(1) is None and one.fixed(2) is not None and one.fixed(2) != hints.frames:
        return _sized(one, (tokens, None))
    return _sized(one, (hints.mel_bins, hints.frames))


def _pictures(sizes: tuple[int, ...], samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Pictures of mean 0 and variance 1 whose colours go together: (samples, *sizes)."""
    axis = 0 if sizes[0] <= sizes[-1] else 2  # of the colours
    return np.stack([_picture(sizes, axis, rng) for _ in range(samples)])


def _picture(sizes: tuple[int, ...], axis: int, rng: np.random.Generator) -> NDArray[np.float32]:
    flat = tuple(np.delete(sizes, axis))
    light = np.expand_dims(_natural(flat, rng), axis)
    colours = np.stack([_natural(flat, rng) for _ in range(sizes[axis])], axis)
    mixed: NDArray[np.float32] = np.sqrt(SHARED_LIGHT) * light + np.sqrt(1 - SHARED_LIGHT) * colours
    return mixed.astype(np.float32)


def _natural(sizes: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Noise whose amplitude falls with 1/frequency, as that of pictures and sound does; mean 0, variance 1."""
    frequencies = np.meshgrid(*(np.fft.fftfreq(size) for size in sizes), indexing="ij")
    distance = np.sqrt(sum(one**2 for one in frequencies))
    distance.flat[0] = np.inf  # no mean
    values = np.fft.ifftn(np.fft.fftn(rng.standard_normal(sizes)) / distance).real
    natural: NDArray[np.float32] = (values / (values.std() or 1)).astype(np.float32)
    return natural


def _free_sizes(one: Input, samples: int, tokens: int) -> list[int]:
    if one.dims is None:
        raise unknown_size(one, 0)
    return [_free_size(one, axis, dim, samples, tokens) for axis, dim in enumerate(one.dims)]


def _free_size(one: Input, axis: int, dim: int | str, samples: int, tokens: int) -> int:
    after_heads = one.is_past and axis == 2
    if axis == 0:
        return samples
    if isinstance(dim, int):
        return dim
    if (
        any(word in dim for word in ("seq", "length", "token"))
        or after_heads
        or (axis == 1 and len(one.dims or ()) == 3)
    ):
        return tokens
    raise unknown_size(one, axis)
