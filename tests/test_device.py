"""`--device cuda`: one arithmetic for arrays in memory and on a GPU, and a sentence where there is none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import PLAIN, activations, norm_and_readers, read_by, save, tiny_decoder, weight
from foreign import Foreign
from gpus import skipped_without_a_gpu
from on_cpu import with_kernels

from awq_onnx import (
    Machine,
    Recipe,
    codec,
    compensate,
    device,
    edit,
    grids,
    groups,
    pipeline,
    rounding,
    runtime,
    search,
)
from awq_onnx.arrays import beside, in_memory
from awq_onnx.cli import main
from awq_onnx.codec import Format
from awq_onnx.device import CPU_PROVIDERS, Device, device_of
from awq_onnx.errors import MissingPackageError, RecipeError, RuntimeFailedError
from awq_onnx.search import Reader
from awq_onnx.statistics import Accumulator, InputStatistics

ELSEWHERE = Device(Foreign(np.empty(0)), CPU_PROVIDERS)
QUICK = Recipe(block_size=16, samples=16, sequence_length=24)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What "cuda" stands for computes with arrays that numpy cannot read."""
    monkeypatch.setattr(pipeline, "device_of", lambda name: ELSEWHERE if name == "cuda" else device_of(name))


def bytes_made(model: Path, folder: Path, recipe: Recipe, name: str) -> list[bytes]:
    folder.mkdir()
    output = folder / "int4.onnx"
    pipeline.quantize(model, output, recipe, machine=Machine(device=name))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


MODELS = {
    "decoder": (tiny_decoder, {}),
    "an odd number of channels": (lambda: norm_and_readers(K=70, columns=(300, 40)).model(), {}),
    "half precision": (lambda: tiny_decoder(dtype=np.float16), {}),
    "symmetric": (tiny_decoder, {"symmetric": True}),
    "the lm_head in 8 bits": (tiny_decoder, {"lm_head": "8"}),
    "a Mul where nothing absorbs": (tiny_decoder, {"allow_mul": True}),
    "the best quality": (tiny_decoder, {"quality": "best"}),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", MODELS)
def test_the_device_changes_no_byte_where_it_computes_the_same(name: str, tmp_path: Path) -> None:
    build, options = MODELS[name]
    model = save(build(), tmp_path / "model.onnx")
    Foreign.used.clear()
    there = bytes_made(model, tmp_path / "there", replace(QUICK, **options), "cuda")
    assert {"linalg.qr", "linalg.cholesky"} <= Foreign.used
    assert there == bytes_made(model, tmp_path / "here", replace(QUICK, **options), "cpu")


def summed(x: np.ndarray[Any, Any], where: Device) -> InputStatistics:
    sums = Accumulator(x.shape[1], where)
    for position in range(0, len(x), 64):
        sums.update(x[position : position + 64], validation_rows=8 if position == 64 else 0)
    return sums.finish()


def spoiled() -> np.ndarray[Any, Any]:
    x = activations(np.random.default_rng(3), 64, outliers=2)
    x[5, 7], x[200, 3] = np.nan, np.inf
    return x


def test_sums_are_the_same_and_matrices_stay_there() -> None:
    here, there = summed(spoiled(), device.PROCESSOR), summed(spoiled(), ELSEWHERE)
    assert isinstance(there.second_moment, Foreign)
    assert isinstance(there.validation, Foreign)
    assert isinstance(there.principal, Foreign)
    for one in ("second_moment", "validation", "principal", "rest", "act_mean", "act_max", "diagonal"):
        np.testing.assert_array_equal(in_memory(getattr(there, one)), getattr(here, one))
    merged = InputStatistics.merged([there, there])
    np.testing.assert_array_equal(in_memory(merged.second_moment), InputStatistics.merged([here, here]).second_moment)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head_size", [None, 16])
def test_choices_and_codes_are_the_same(dtype: Any, head_size: int | None) -> None:
    w, fmt = weight(np.random.default_rng(4), 64, 288), Format(32, False, np.dtype(dtype))
    results = []
    for where in (device.PROCESSOR, ELSEWHERE):
        readers = [Reader(w, summed(spoiled(), where), head_size, factor=2.0, fmt=fmt)]
        choice = search.search_scale(readers)
        scale, (rounded,) = rounding.round_group(readers, choice.scale)
        assert isinstance(rounded.codes, np.ndarray)
        assert isinstance(rounded.grid.scales, np.ndarray)
        results.append((choice.losses, scale.tolist(), rounded.codes.tolist(), rounded.loss, rounded.plain_loss))
    assert results[0] == results[1]


@pytest.mark.parametrize("head_size", [None, 16])
def test_codes_are_the_same_with_kernels_for_what_goes_channel_by_channel(
    head_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share a few causes: what is compensated for."""
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((512, 8)) @ rng.standard_normal((8, 150)) + rng.standard_normal((512, 150))).astype(
        np.float32
    )
    w, fmt = weight(rng, 150, 288), Format(32, False, np.dtype(np.float16))
    (here,) = rounded_on(device.PROCESSOR, x, w, fmt, head_size)
    plainly = rounding.round_group(
        [Reader(w, summed(x, device.PROCESSOR), head_size, fmt=fmt)],
        np.ones(150, np.float32),
        rounding.Rounding(compensate=False),
    )[1][0]
    assert (codec.unpack(here.codes) != codec.unpack(plainly.codes)).mean() > 0.02
    with_kernels(monkeypatch)
    (there,) = rounded_on(ELSEWHERE, x, w, fmt, head_size)
    assert (codec.unpack(there.codes) == codec.unpack(here.codes)).mean() > 0.999
    assert there.loss == pytest.approx(here.loss, rel=1e-3)


def rounded_on(
    where: Device, x: np.ndarray[Any, Any], w: np.ndarray[Any, Any], fmt: Format, head_size: int | None
) -> list[rounding.Rounded]:
    return rounding.round_group([Reader(w, summed(x, where), head_size, fmt=fmt)], np.ones(x.shape[1], np.float32))[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("room", ["for all of it", "for some of it", "for little"])
def test_a_weight_is_sent_piece_by_piece_and_stays_where_there_is_room_for_it(
    dtype: Any, transposed: bool, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SENT_BYTES", {"for all of it": 1 << 20, "for some of it": 1000}.get(room, 1))
    monkeypatch.setattr(search, "THERE_BYTES", 1 << 20 if room != "for little" else 1)
    x = activations(np.random.default_rng(3), 64)
    w = weight(np.random.default_rng(4), *((50, 64) if transposed else (64, 50))).astype(dtype)
    w = w.T if transposed else w
    here, there = (Reader(w, summed(x, where), factor=0.5, fmt=PLAIN) for where in (device.PROCESSOR, ELSEWHERE))
    for some in (slice(None), slice(3, 20), np.array([4, 40, 7])):
        columns = there.columns(some)
        assert isinstance(columns, Foreign)
        np.testing.assert_array_equal(in_memory(columns), here.columns(some))
    assert isinstance(there._stored, Foreign) == (room != "for little")


@pytest.mark.parametrize("compensated", [False, True])
def test_a_device_with_little_room_makes_the_same_codes_strip_by_strip(
    compensated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x, fmt = weight(np.random.default_rng(4), 64, 288), spoiled(), Format(32, False, np.dtype(np.float32))
    made, strips = [], []
    round_strip = rounding._round_strip
    monkeypatch.setattr(rounding, "_round_strip", lambda *args: strips.append(args[1]) or round_strip(*args))
    for room_bytes in (1 << 30, 4 * 64 * rounding.STRIPS * 100):
        monkeypatch.setattr(rounding, "THERE_BYTES", room_bytes)
        monkeypatch.setattr(search, "THERE_BYTES", room_bytes)
        readers = [Reader(w, summed(x, ELSEWHERE), fmt=fmt)]
        choice = search.search_scale(readers)
        _, (rounded,) = rounding.round_group(readers, choice.scale, rounding.Rounding(compensate=compensated))
        made.append((choice.alpha, rounded.codes.tolist(), rounded.grid.scales.tolist()))
    assert made[0] == made[1]
    assert [strip.stop - strip.start for strip in strips] == [288, 96, 96, 96]


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often something came back from the device since this was asked last."""
    count = [0]

    def counting(name: str) -> None:
        original = getattr(Foreign, name)

        def counted(self: Foreign) -> Any:
            count[0] += 1
            return original(self)

        monkeypatch.setattr(Foreign, name, counted)

    for name in ("get", "__float__", "__bool__"):
        counting(name)

    def since() -> int:
        made, count[0] = count[0], 0
        return made

    return since


@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head_size", [None, 16])
@pytest.mark.parametrize("N", [96, 288])
def test_more_alphas_make_no_more_round_trips(
    N: int, head_size: int | None, scale_dtype: Any, monkeypatch: pytest.MonkeyPatch, trips: Callable[[], int]
) -> None:
    w, statistics = weight(np.random.default_rng(4), 64, N), summed(spoiled(), ELSEWHERE)
    made = []
    for count in (6, 21, 101):
        monkeypatch.setattr(search, "ALPHAS", tuple(np.linspace(0, 1, count).tolist()))
        trips()
        fmt = Format(PLAIN.block_size, PLAIN.symmetric, np.dtype(scale_dtype))
        choice = search.search_scale([Reader(w, statistics, head_size, fmt=fmt)])
        made.append(trips())
        assert len(choice.losses) == count
    if N <= search.SAMPLED:
        assert made[0] == made[1] == made[2] <= 2
    else:
        assert max(made) <= 8  # all columns without a scale, some of them, the finalists, and downhill from these


def test_rounding_a_strip_brings_back_its_losses_and_what_ships(trips: Callable[[], int]) -> None:
    (reader,) = [Reader(weight(np.random.default_rng(4), 320, 200), summed(wide(), ELSEWHERE), fmt=PLAIN)]
    trips()
    rounding.round_group([reader], np.ones(320, np.float32), rounding.Rounding(compensate=False))
    assert trips() <= 1 + 3 + 3  # diag H; energy and two losses; codes, scales, zero points


def wide() -> np.ndarray[Any, Any]:
    return activations(np.random.default_rng(3), 320)


@pytest.mark.parametrize("quality", ["default", "best"])
def test_one_search_at_a_time_holds_the_device(quality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn, taken = Lock(), []
    monkeypatch.setattr(pipeline, "device_of", lambda _: replace(ELSEWHERE, turn=turn))
    for name in ("search_group", "try_group"):
        work = getattr(groups, name)
        monkeypatch.setattr(groups, name, lambda *a, work=work, **kw: taken.append(turn.locked()) or work(*a, **kw))
    model = save(tiny_decoder(), tmp_path / "model.onnx")
    bytes_made(model, tmp_path / "there", replace(QUICK, quality=quality), "cuda")
    assert len(taken) > 1
    assert all(taken)
    assert not turn.locked()


def test_an_input_that_calibration_never_saw_is_there_as_well() -> None:
    flat = InputStatistics.flat(32, ELSEWHERE)
    assert isinstance(flat.second_moment, Foreign)
    assert compensate.find(flat, np.ones(32, np.float32)) is None
    symmetric = Format(32, True, np.dtype(np.float32))
    (reader,) = read_by(flat, weight(np.random.default_rng(5), 32, 48), fmt=symmetric)
    _, (rounded,) = rounding.round_group([reader], np.ones(32, np.float32))
    assert np.isfinite(rounded.loss)


def test_a_weight_that_is_worse_refitted_keeps_its_plain_grid_there_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(np.random.default_rng(6), 64, outliers=4)
    w, fmt = weight(np.random.default_rng(7), 64, 40), Format(32, False, np.dtype(np.float32))
    monkeypatch.setattr(rounding, "total_loss", lambda *_, plain=False: 0.0 if plain else 1.0)
    fit = grids.fit
    monkeypatch.setattr(grids, "fit", lambda blocks, h, fmt: fit(blocks * np.float32(30), h, fmt))
    found = [
        rounding.round_group(read_by(summed(x, where), w, fmt=fmt), np.full(64, 2, np.float32))
        for where in (device.PROCESSOR, ELSEWHERE)
    ]
    (_, (here,)), (_, (there,)) = found
    np.testing.assert_array_equal(here.codes, there.codes)
    assert isinstance(there.grid.scales, np.ndarray)
    np.testing.assert_array_equal(here.codes, codec.pack(*plain_codes(w, fmt)))


def plain_codes(w: np.ndarray[Any, Any], fmt: Format) -> tuple[Any, Any]:
    blocks = codec.to_blocks(w, fmt.block_size)
    grid = codec.minmax_grid(blocks, fmt)
    return codec.centred_codes(blocks, grid), grid


def test_nothing_moves_unless_it_is_asked_to() -> None:
    there, here = Foreign(np.arange(3.0)), np.arange(3.0)
    with pytest.raises(TypeError):
        np.array(there)
    with pytest.raises(TypeError):
        there + here
    with pytest.raises(TypeError):
        np.concatenate([there, here])
    with pytest.raises(TypeError):
        there[np.array([0, 1])]
    np.testing.assert_array_equal(in_memory(beside(here, there) + there), here * 2)


def test_cupy_has_all_that_is_used_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed (pip install 'awq-onnx[gpu]')")
    monkeypatch.setattr(pipeline, "device_of", lambda _: ELSEWHERE)
    Foreign.used.clear()
    bytes_made(save(tiny_decoder(), tmp_path / "model.onnx"), tmp_path / "there", QUICK, "cuda")
    for name in Foreign.used:
        functools.reduce(getattr, name.split("."), cupy)


@pytest.fixture
def gpu() -> Device:
    with skipped_without_a_gpu():
        import cupy

        return Device(cupy.empty(0), CPU_PROVIDERS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head_size", [None, 16])
@pytest.mark.parametrize("compensated", [False, True])
def test_a_gpu_makes_the_same_choices(gpu: Device, dtype: Any, head_size: int | None, compensated: bool) -> None:
    rng = np.random.default_rng(9)
    K, N = 400, 1200
    x = (rng.standard_normal((2048, 12)) @ rng.standard_normal((12, K)) + rng.standard_normal((2048, K))).astype(
        np.float32
    )
    x[:, 7] *= 30
    w, fmt = weight(rng, K, N).astype(dtype), Format(32, False, np.dtype(dtype))
    made = []
    for where in (device.PROCESSOR, gpu):
        readers = [Reader(w, summed(x, where), head_size, fmt=fmt)]
        choice = search.search_scale(readers)
        made.append((choice, rounding.round_group(readers, choice.scale, rounding.Rounding(compensate=compensated))))
    (here, (_, (expected,))), (there, (_, (rounded,))) = made
    assert (there.formula, there.alpha) == (here.formula, here.alpha)
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-3)
    assert (codec.unpack(rounded.codes) == codec.unpack(expected.codes)).mean() > (0.97 if compensated else 0.999)
    assert rounded.loss == pytest.approx(expected.loss, rel=0.01)
    assert rounded.plain_loss == pytest.approx(expected.plain_loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("formulas", [search.FORMULAS])
@pytest.mark.parametrize("ranges", [grids.CLIPPED, grids.WHOLE])
def test_a_gpu_knows_all_formulas_and_ranges(gpu: Device, formulas: tuple[str, ...], ranges: str) -> None:
    rng = np.random.default_rng(10)
    x, w = activations(rng, 96, outliers=2), weight(rng, 96, 300)
    made = []
    for where in (device.PROCESSOR, gpu):
        readers = [Reader(w, summed(x, where), fmt=PLAIN)]
        choice = search.search_scale(readers, candidates=search.Candidates(formulas))
        _, (rounded,) = rounding.round_group(readers, choice.scale, rounding.Rounding(ranges, compensate=False))
        made.append((choice.formula, choice.alpha, codec.unpack(rounded.codes)))
    assert made[0][:2] == made[1][:2]
    assert (made[0][2] == made[1][2]).mean() > 0.999


def pretend(monkeypatch: pytest.MonkeyPatch, *, providers: list[str], cupy: object) -> None:
    monkeypatch.setattr(runtime.onnxruntime(), "get_available_providers", lambda: providers)
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]


def failing(*_: object) -> None:
    raise RuntimeError("cudaErrorNoDevice:\nno CUDA-capable device")


WITH_CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
UNUSABLE = {
    "no provider": ({"providers": ["CPUExecutionProvider"], "cupy": ModuleType("cupy")}, "onnxruntime cannot use it"),
    "no cupy": ({"providers": WITH_CUDA, "cupy": None}, "cupy is missing"),
    "no GPU": (
        {"providers": WITH_CUDA, "cupy": SimpleNamespace(empty=failing)},
        "cupy finds no GPU that it can use (cudaErrorNoDevice: no CUDA-capable device)",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_machine_without_cuda_is_told_what_is_missing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, said = UNUSABLE[what]
    pretend(monkeypatch, **packages)
    with pytest.raises(MissingPackageError) as told:
        device_of("cuda")
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_cuda_is_what_onnxruntime_and_cupy_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, providers=WITH_CUDA, cupy=SimpleNamespace(empty=lambda n: Foreign(np.empty(n))))
    found = device_of("cuda")
    assert [name for name, _ in found.providers] == WITH_CUDA
    assert isinstance(found.put(np.ones(3)), Foreign)


def test_a_provider_that_does_not_start_is_an_error_and_no_slow_run(tmp_path: Path) -> None:
    model = norm_and_readers().model().SerializeToString()
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(RuntimeFailedError, match="CUDA"):
        runtime.session(model, tmp_path, providers=runtime.CUDA_PROVIDERS)


def test_the_command_tells_it_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "CUDAExecutionProvider" in runtime.onnxruntime().get_available_providers():
        pytest.skip("this machine has CUDA")
    model = save(norm_and_readers().model(), tmp_path / "model.onnx")
    with pytest.raises(SystemExit) as ended:
        main([str(model), "--device", "cuda"])
    assert ended.value.code == MissingPackageError.exit_code
    told = capsys.readouterr().err
    assert told.startswith("awq-onnx: device is cuda, but")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_device_that_nobody_knows_is_told() -> None:
    with pytest.raises(RecipeError, match="device is 'tpu'; it must be one of cpu, cuda"):
        Machine(device="tpu")


@pytest.mark.usefixtures("elsewhere")
def test_what_one_device_left_unfinished_is_not_gone_on_with_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tiny_decoder(), tmp_path / "model.onnx")
    output = tmp_path / "int4.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(edit, "apply", failing)
        with pytest.raises(RuntimeError):
            pipeline.quantize(model, output, QUICK)
    loaded: list[object] = []
    load = pipeline.data.load
    monkeypatch.setattr(pipeline.data, "load", lambda *args: loaded.append(args) or load(*args))
    pipeline.quantize(model, output, QUICK, machine=Machine(device="cuda"))
    assert len(loaded) == 1
    assert onnx.load(output, load_external_data=False).graph.node
