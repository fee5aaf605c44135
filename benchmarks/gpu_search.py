"""The search on a GPU beside the same on the processors of the same machine: time, and whether both choose alike.

    python benchmarks/gpu_search.py [--size 4096x11008] [--layers 32] [--repeats 5] [--device cuda] [--no-processor]

One MatMul K x N first, step by step, then the four kinds of input of a layer of Llama's shape (hidden size K, inner
size N): q, k, v; o; gate, up; down. A whole model is that layer as often as it has layers, which is an estimate: the
lm_head, files and onnxruntime's forward passes are not in it. Weights and activations are random, activations
correlated and with a few loud channels; weights lie in memory in half precision, and sending them is counted.

Times are what one waits for: the device is idle before and after, one run warms up, the median counts. The processors
compute each step once, with all cores as the command would. `--device cpu` puts them in the place of the GPU, to try
the script.

TF32 keeps 10 bits of a factor: it is tried here for the loss of the grid, awq-onnx does not use it.
"""

from __future__ import annotations

import argparse
import statistics as averages
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from awq_onnx import codec, compensate, rounding, search
from awq_onnx.arrays import at_once, beside, in_memory
from awq_onnx.codec import Float32, Format, Grid
from awq_onnx.compensate import Compensation
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import MissingPackageError
from awq_onnx.machine import CPU, CUDA, DEVICES
from awq_onnx.rounding import Rounded, Rounding
from awq_onnx.runtime import CUDA_PROVIDERS, first_line
from awq_onnx.search import ALPHAS, Base, Reader, ScaleChoice, ScaleLimits, plain_error
from awq_onnx.statistics import Accumulator, InputStatistics
from awq_onnx.threads import LARGE, Spread, Workers, one_by_one, usable_cores

TOKENS, BATCH, VALIDATION = 4096, 512, 256
CAUSES = 48  # of what channels have in common
FORMAT = Format(32, False, np.dtype(np.float16))
BUDGET_BYTES = 8 << 30  # of the workers on the processors: no piece waits for another

Made = TypeVar("Made")


def main() -> None:
    parser = argparse.ArgumentParser(description="The search on a GPU beside the same on the processors.")
    parser.add_argument("--size", type=_size, default=(4096, 11008), help="KxN of the one MatMul (4096x11008)")
    parser.add_argument("--layers", type=int, default=32, help="of the whole model (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of the device (%(default)s)")
    parser.add_argument("--device", choices=DEVICES, default=CUDA)
    parser.add_argument("--no-processor", action="store_true", help="time the device alone")
    arguments = parser.parse_args()
    try:
        device, name = _device(arguments.device)
    except MissingPackageError as error:
        print(f"gpu_search: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    K, N = arguments.size
    devices = [device] if arguments.no_processor else [device, PROCESSOR]
    print(f"{name}; {usable_cores()} cores; blocks of {FORMAT.block_size}; {TOKENS} tokens; ms, medians")
    print(f"{'':48}{'device':>10}{'cores':>11}{'ratio':>8}  choices")
    one_matmul(devices, K, N, arguments.repeats)
    whole_model(devices, K, N, arguments.layers, arguments.repeats)


def _size(text: str) -> tuple[int, int]:
    K, N = (int(part) for part in text.split("x"))
    return K, N


def _device(name: str) -> tuple[Device, str]:
    """With cupy alone: no model is run here. Raises MissingPackageError."""
    if name == CPU:
        return PROCESSOR, "the processors in the place of a GPU"
    try:
        import cupy
    except ImportError as error:
        raise MissingPackageError("cupy is missing: pip install 'awq-onnx[gpu]' on a machine with a GPU") from error
    try:
        like = cupy.empty(0)
        properties = cupy.cuda.runtime.getDeviceProperties(like.device.id)
    except Exception as error:  # cupy's own classes
        raise MissingPackageError(f"there is no GPU that cupy can use ({first_line(error)})") from error
    return Device(like, CUDA_PROVIDERS), f"{properties['name'].decode()}, cupy {cupy.__version__}"


# What goes in


def activations(K: int, seed: int) -> Float32:
    """Rows (TOKENS, K): noise, what channels have in common, and loud channels."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal((TOKENS, K), dtype=np.float32)
    x += rng.standard_normal((TOKENS, CAUSES), dtype=np.float32) @ rng.standard_normal((CAUSES, K), dtype=np.float32)
    x *= np.exp(0.5 * rng.standard_normal(K, dtype=np.float32))
    x[:, rng.choice(K, max(1, K // 512), replace=False)] *= 20
    return x


def weight(K: int, N: int, seed: int) -> NDArray[np.float16]:
    drawn = np.random.default_rng(seed).standard_normal((K, N), dtype=np.float32)
    drawn /= np.sqrt(np.float32(K))
    return drawn.astype(np.float16)


@dataclass(frozen=True)
class Place:
    """Where the weights of one input are searched, and what is known of that input there. spread: for pieces of work.

    known: of the weights, with their copies on the device and what the search keeps.
    """

    spread: Spread
    statistics: InputStatistics
    weights: Sequence[NDArray[Any]]
    known: Sequence[Reader]

    @classmethod
    def of(cls, device: Device, spread: Spread, x: Float32, weights: Sequence[NDArray[Any]]) -> Place:
        statistics = summed(device, spread, x)
        return cls(spread, statistics, weights, readers_of(weights, statistics))


def readers_of(weights: Sequence[NDArray[Any]], statistics: InputStatistics) -> list[Reader]:
    """Of which nothing is known yet: no eigenvectors, no copy of the weight on the device."""
    fresh = replace(statistics)
    return [Reader(one, fresh, fmt=FORMAT) for one in weights]


@contextmanager
def spreads(devices: Sequence[Device], K: int) -> Iterator[list[Spread]]:
    """The maps for pieces of work that the command would use, for inputs of K channels."""
    if K > LARGE:
        yield [one_by_one for _ in devices]
        return
    with Workers(usable_cores(), BUDGET_BYTES) as workers:
        yield [device.map_of(workers.spread) for device in devices]


# What is timed


def timed(
    name: str,
    places: Sequence[Made],
    work: Callable[[Made], Any],
    repeats: int,
    *,
    alike: Callable[[Any, Any], str] | None = None,
) -> tuple[list[float], list[Any]]:
    """A line of the table: seconds at each place, the device first, and what was made. alike: how far that agrees."""
    seconds, made = median_of(places[0], work, repeats)
    times, results = [seconds], [made]
    for place in places[1:]:
        start = time.perf_counter()
        results.append(work(place))
        times.append(time.perf_counter() - start)
    both = len(times) == 2
    said = alike(*results) if both and alike else ""
    print(line(name, times[0], times[1] if both else None, said), flush=True)
    return times, results


def median_of(place: Made, work: Callable[[Made], Any], repeats: int) -> tuple[float, Any]:
    """Seconds, and what was made last."""
    made, seconds = work(place), []
    for _ in range(repeats):
        finish()
        start = time.perf_counter()
        made = work(place)
        finish()
        seconds.append(time.perf_counter() - start)
    return averages.median(seconds), made


def finish() -> None:
    """Wait until a GPU has done all that it was told to, where one was told anything."""
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        cupy.cuda.get_current_stream().synchronize()


def line(name: str, seconds: float, reference: float | None, said: str) -> str:
    other = f"{'':>19}" if reference is None else f"{reference * 1e3:11.1f}{reference / seconds:8.1f}"
    return f"{name:48}{seconds * 1e3:10.2f}{other}  {said}".rstrip()


# One MatMul


def one_matmul(devices: Sequence[Device], K: int, N: int, repeats: int) -> None:
    print(f"one MatMul {K} x {N}")
    x, weights = activations(K, 0), [weight(K, N, 1)]
    with spreads(devices, K) as maps:
        where = list(zip(devices, maps, strict=True))
        timed("  sums of the activations", where, lambda one: summed(*one, x), repeats)
        places = [Place.of(*one, x, weights) for one in where]
        for place in places:
            searched_again(place)  # now all that is kept is there
        grid = f"  grid of {len(ALPHAS)} alphas"
        _, choices = timed(f"{grid}, weight in memory", places, searched, repeats, alike=same_choice)
        timed(f"{grid}, all known there", places, searched_again, repeats, alike=same_choice)
        timed(f"{grid}, each on all columns", places, estimated_losses, repeats, alike=same_alpha)
        timed(f"{grid}, each by the whole H", places, whole_losses, repeats, alike=same_alpha)
        if not isinstance(devices[0].like, np.ndarray):
            with tf32():
                timed(f"{grid}, each by the whole H, TF32", places, whole_losses, repeats, alike=same_alpha)
        one_rounding(places, choices[-1].scale, repeats)


def one_rounding(places: Sequence[Place], scale: Float32, repeats: int) -> None:
    """scale: the same for all, so that steps are compared, and not what led to them."""
    timed("  refit and losses", places, lambda place: refitted(place, scale), repeats, alike=same_codes)
    timed("  whether and how to compensate", places, lambda place: found(place, scale), repeats, alike=same_answer)
    tasks = [Task.of(place, scale) for place in places]
    timed("  compensated rounding alone", tasks, Task.codes, repeats, alike=same_arrays)
    timed("  all of it", places, search_and_round, repeats, alike=same_search)


def summed(device: Device, spread: Spread, x: Float32) -> InputStatistics:
    """As calibration does it, one batch after the other, the last one for validation."""
    sums = Accumulator(x.shape[1], device)
    for start in range(0, len(x), BATCH):
        last = start + BATCH >= len(x)
        sums.update(x[start : start + BATCH], validation_rows=VALIDATION if last else 0, spread=spread)
    return sums.finish()


def searched(place: Place) -> ScaleChoice:
    return search.search_scale(readers_of(place.weights, place.statistics), spread=place.spread)


def searched_again(place: Place) -> ScaleChoice:
    return search.search_scale(place.known, spread=place.spread)


def candidates(reader: Reader) -> list[Float32]:
    base = Base.of(search.MEAN, [reader])
    return [base.scale(alpha, ScaleLimits()) for alpha in ALPHAS]


def errors(reader: Reader, scales: Sequence[Float32], some: slice) -> Iterator[tuple[int, Float32]]:
    """What plain rounding does to some columns of s W, for each s: its number, (K, n)."""
    blocks = codec.to_blocks(reader.columns(some), reader.fmt.block_size)
    factors = beside(np.stack(scales)[:, :, None], blocks)  # (len(scales), K, 1)
    scaled, error = np.empty_like(blocks), np.empty_like(blocks)
    for at in range(len(scales)):
        np.multiply(blocks, codec.to_blocks(factors[at], reader.fmt.block_size), out=scaled)
        plain_error(scaled, reader.fmt, out=error)
        yield at, codec.from_blocks(error, reader.K)


def estimated_losses(place: Place) -> NDArray[np.float64]:
    """The loss of every alpha as the search estimates it, on all columns."""
    reader = place.known[0]
    scales = candidates(reader)

    def losses(some: slice) -> NDArray[np.float64]:
        found = [reader.statistics.column_energy(error, scales[at]).sum() for at, error in errors(reader, scales, some)]
        return in_memory(np.stack(found)).astype(np.float64)

    return summed_up(place.spread(losses, reader.slices()))


def summed_up(losses: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum(list(losses), axis=0)
    return total


def whole_losses(place: Place) -> NDArray[np.float64]:
    """The loss of every alpha by the whole H, on all columns."""
    reader = place.known[0]
    scales = candidates(reader)

    def losses(some: slice) -> NDArray[np.float64]:
        found = []
        for at, error in errors(reader, scales, some):
            error /= beside(scales[at][:, None], error)
            found.append(reader.statistics.loss(error))
        return np.array(found)

    return summed_up(place.spread(losses, reader.slices()))


@contextmanager
def tf32() -> Iterator[None]:
    """Products of matrices on tensor cores, in cupy's own way to ask for them at run time."""
    import cupy

    cupy._core.set_compute_type(np.float32, cupy._core.COMPUTE_TYPE_TF32)
    try:
        yield
    finally:
        cupy._core.set_compute_type(np.float32, cupy._core.COMPUTE_TYPE_DEFAULT)


def refitted(place: Place, scale: Float32) -> list[Rounded]:
    return rounding.round_group(place.known, scale, Rounding(compensate=False), place.spread)[1]


def found(place: Place, scale: Float32) -> Compensation | None:
    return compensate.find(place.statistics, scale)


@dataclass(frozen=True)
class Task:
    """s W and its grid, what to compensate with: all where the device is."""

    spread: Spread
    scaled: Float32
    grid: Grid
    compensation: Compensation

    @classmethod
    def of(cls, place: Place, scale: Float32) -> Task:
        reader = place.known[0]
        weight = reader.columns()
        scaled = weight * beside(scale[:, None], weight)
        compensation = compensate.find(reader.statistics, scale)
        assert compensation is not None, "these activations are correlated"
        blocks = codec.to_blocks(scaled, reader.fmt.block_size)
        return cls(place.spread, scaled, codec.minmax_grid(blocks, reader.fmt), compensation)

    def codes(self) -> Float32:
        n = self.scaled.shape[1]
        strips = search.slices(n, at_once(rounding.STRIP, n, self.scaled))
        return np.concatenate(list(self.spread(self._strip, strips)), axis=2)

    def _strip(self, some: slice) -> Float32:
        grid = replace(self.grid, scales=self.grid.scales[:, some], zero_points=self.grid.zero_points[:, some])
        return compensate.round_weight(self.scaled[:, some], grid, FORMAT.block_size, self.compensation)


def search_and_round(place: Place) -> tuple[ScaleChoice, list[Rounded]]:
    readers = readers_of(place.weights, place.statistics)
    choice = search.search_scale(readers, spread=place.spread)
    return choice, rounding.round_group(readers, choice.scale, spread=place.spread)[1]


# A whole model


def whole_model(devices: Sequence[Device], K: int, N: int, layers: int, repeats: int) -> None:
    inputs = {"q, k, v": (K, [K] * 3), "o": (K, [K]), "gate, up": (K, [N] * 2), "down": (N, [K])}
    print(f"a layer of hidden size {K} and inner size {N}, from what is known of its inputs to packed codes")
    total = np.zeros(len(devices))
    for number, (name, (rows, columns)) in enumerate(inputs.items()):
        x = activations(rows, number)
        weights = [weight(rows, width, 10 * number + at) for at, width in enumerate(columns)]
        with spreads(devices, rows) as maps:
            places = [Place.of(*one, x, weights) for one in zip(devices, maps, strict=True)]
            total += timed(f"  {name}", places, search_and_round, max(1, repeats // 2), alike=same_search)[0]
    total *= layers
    print(line(f"{layers} such layers (estimate)", total[0], total[1] if len(total) == 2 else None, ""))


# How alike


def same_choice(there: ScaleChoice, here: ScaleChoice) -> str:
    if (there.formula, there.alpha) == (here.formula, here.alpha):
        return f"alpha {here.alpha:g}"
    return f"DIFFER: alpha {there.alpha:g} of {there.formula}, not {here.alpha:g} of {here.formula}"


def same_alpha(there: NDArray[np.float64], here: NDArray[np.float64]) -> str:
    best, expected = ALPHAS[int(np.argmin(there))], ALPHAS[int(np.argmin(here))]
    apart = float(np.max(np.abs(there / here - 1)))
    return f"alpha {best:g}, losses within {apart:.0e}" if best == expected else f"DIFFER: {best:g}, not {expected:g}"


def same_answer(there: Compensation | None, here: Compensation | None) -> str:
    if there is None or here is None:
        return "none" if there is here else "DIFFER: only one compensates"
    apart = np.abs(np.tril(in_memory(there.feedback) - here.feedback, -1)).max()
    return "compensate" if apart < 1e-2 else f"DIFFER: by {apart:.1g}"  # the next shrink is further off


def same_arrays(there: Float32, here: Float32) -> str:
    return f"{np.mean(in_memory(there) == here):.3%} of codes"


def same_codes(there: list[Rounded], here: list[Rounded]) -> str:
    equal = sum(
        np.count_nonzero(codec.unpack(a.codes) == codec.unpack(b.codes)) for a, b in zip(there, here, strict=True)
    )
    loss = sum(one.loss for one in there) / sum(one.loss for one in here)
    return f"{equal / sum(2 * one.codes.size for one in here):.3%} of codes, {loss:.5f} of the loss"


def same_search(there: tuple[ScaleChoice, list[Rounded]], here: tuple[ScaleChoice, list[Rounded]]) -> str:
    return f"{same_choice(there[0], here[0])}, {same_codes(there[1], here[1])}"


if __name__ == "__main__":
    main()
