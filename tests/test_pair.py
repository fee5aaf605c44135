"""Two model files, run one after the other on the same inputs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    GraphBuilder,
    bigrams,
    norm_and_readers,
    save,
    tiny_cross_decoder,
    tiny_decoder,
    tiny_encoder,
)
from numpy.typing import NDArray

import awq_onnx
from awq_onnx import Machine, Recipe, runtime
from awq_onnx.calibrate.feeds import signature, token_feed
from awq_onnx.comparison import compare_sessions
from awq_onnx.errors import CalibrationError, DifferentModelsError, ModelFileError, OutputError, RuntimeFailedError
from awq_onnx.meter import STATUS, Meter
from awq_onnx.pair import compare, measure, open_pair
from awq_onnx.recipe import COMPARED
from awq_onnx.store import open_model

Array = NDArray[Any]
IDS = np.random.default_rng(0).integers(0, 160, (5, 12))


def decoders(folder: Path) -> tuple[Path, Path]:
    """Two that disagree."""
    models = {"one.onnx": tiny_decoder(layers=1), "other.onnx": tiny_decoder(layers=1, seed=1)}
    return tuple(save(model, folder / name) for name, model in models.items())  # type: ignore[return-value]


class Watcher:
    """Progress that remembers notes, and looks into a folder when the second model begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[str] = []
        self.notes: list[str] = []

    def stage(self, title: str) -> None:
        if title == "Running the quantised model":
            self.seen = [path.name for path in self.folder.rglob("*.npy")]

    def advance(self, fraction: float) -> None:
        pass

    def note(self, line: str) -> None:
        self.notes.append(line)


# What it finds


def test_it_is_the_public_compare() -> None:
    assert awq_onnx.compare is compare


def test_a_decoder_compared_with_itself_in_onnxruntime(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    result = compare(path, path, IDS)
    assert (result.kl_mean, result.top1, result.relative_error, result.worst) == (0, 1, 0, ())
    assert (result.windows, result.tokens) == (5, 60)


def test_one_sequence_is_one_window(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    result = compare(path, path, np.arange(12)[None])
    assert (result.windows, result.tokens, result.kl_se) == (1, 12, None)


def test_two_different_decoders_disagree(tmp_path: Path) -> None:
    result = compare(*decoders(tmp_path), IDS)
    assert result.kl_mean is not None
    assert result.kl_mean > 0.1
    assert result.top1 is not None
    assert result.top1 < 0.5


def test_the_numbers_of_a_small_model_are_those_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((6, 6)).astype(np.float32) for _ in range(2)]
    one, other = (save(bigrams(table), tmp_path / f"{at}.onnx") for at, table in enumerate(tables))
    ids = rng.integers(0, 6, (3, 7))
    result = compare(one, other, ids)
    p, q = (np.exp(table) / np.exp(table).sum(axis=1, keepdims=True) for table in tables)
    kl = (p * np.log(p / q)).sum(axis=1)[ids]  # (3, 7)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert result.kl_se == pytest.approx(kl.mean(axis=1).std(ddof=1) / 3**0.5, rel=1e-5)
    assert result.perplexity_original == pytest.approx(np.exp(-np.log(p[ids[:, :-1], ids[:, 1:]]).mean()), rel=1e-5)
    assert result.perplexity_quantized == pytest.approx(np.exp(-np.log(q[ids[:, :-1], ids[:, 1:]]).mean()), rel=1e-5)
    assert result.top1 == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1))[ids].mean())
    worst = result.worst[0]
    token = ids[worst.window, worst.position]
    assert worst.kl == pytest.approx(kl.max(), rel=1e-5)
    assert (worst.original, worst.quantized) == (p[token].argmax(), q[token].argmax())


def test_the_numbers_of_an_encoder_are_those_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, *weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 8), (8, 5), (8, 5)))
    paths = []
    for number, weight in enumerate(weights):
        builder = GraphBuilder()
        read = builder.input("x", ["batch", "sequence", 8])
        builder.output(builder.add("MatMul", read, builder.constant(weight, "w"), to="y"))
        paths.append(save(builder.model(), tmp_path / f"{number}.onnx"))
    result = compare(paths[0], paths[1], {"x": x})
    one, other = (x @ weight for weight in weights)
    assert result.relative_error == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(one), rel=1e-5)
    cosines = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    assert result.cosine_distance == pytest.approx(1 - cosines.mean(), rel=1e-5)
    assert (result.kl_mean, result.windows, result.tokens) == (None, 4, 12)


def test_one_after_the_other_finds_what_both_together_do(tmp_path: Path) -> None:
    paths = decoders(tmp_path)
    with open_model(paths[0]) as one, open_model(paths[1]) as other:
        sessions = [runtime.session(each.serialize(), each.folder, prepack=True, reuse=False) for each in (one, other)]
        wanted = signature(one.model.graph)
    windows = [token_feed(wanted, row[None]) for row in IDS]
    assert compare(*paths, IDS) == compare_sessions(*sessions, windows, wanted)


# Of different types, with different inputs


def test_a_float16_model_beside_its_float32_original(tmp_path: Path) -> None:
    """Its caches and its logits are float16."""
    one, other = (
        save(tiny_decoder(layers=1, dtype=d), tmp_path / f"{d.__name__}.onnx") for d in (np.float32, np.float16)
    )
    for pair in ((one, other), (other, one)):
        result = compare(*pair, IDS)
        assert result.kl_mean is not None
        assert 0 < result.kl_mean < 1e-3
        assert 0 < result.relative_error < 0.02


def test_a_model_in_int8_of_onnxruntime(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    quantize_dynamic(path, tmp_path / "int8.onnx")
    result = compare(path, tmp_path / "int8.onnx", IDS)
    assert result.kl_mean is not None
    assert 0 < result.kl_mean < 0.1


def test_what_follows_from_other_inputs_may_be_wanted_by_one_alone(tmp_path: Path) -> None:
    """A decoder without a cache, and the same with one."""
    one, other = (save(tiny_decoder(layers=1, cache=cache), tmp_path / f"{cache}.onnx") for cache in (True, False))
    for pair in ((one, other), (other, one)):
        assert compare(*pair, IDS).kl_mean == pytest.approx(0, abs=1e-9)


def test_models_in_memory(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    assert compare(tiny_decoder(layers=1), onnx.load(path), IDS) == compare(path, path, IDS)


def with_another_input() -> onnx.ModelProto:
    builder = norm_and_readers()
    builder.input("z", ["batch", 4])
    return builder.model()


REFUSALS: list[Any] = [
    pytest.param(norm_and_readers().model(), with_another_input(), "only the other has z", id="an input more"),
    pytest.param(with_another_input(), norm_and_readers().model(), "only the original has z", id="an input less"),
    pytest.param(tiny_encoder(), tiny_encoder(vocabulary=41), "the original knows 40 tokens, the other 41", id="words"),
    pytest.param(
        norm_and_readers(columns=(8,)).model(), norm_and_readers(K=32, columns=(8,)).model(), "x 64.*x 32", id="width"
    ),
    pytest.param(
        norm_and_readers(columns=(8, 8)).model(),
        norm_and_readers(columns=(8,)).model(),
        "the original has y1",
        id="out",
    ),
    pytest.param(
        tiny_decoder(layers=1, cache=False), tiny_encoder(vocabulary=160), "the original has logits", id="task"
    ),
    pytest.param(
        bigrams(np.ones((6, 6))), bigrams(np.ones((6, 7))), r"different shapes, \(1, 12, 6\)", id="more logits"
    ),
]


@pytest.mark.parametrize(("one", "other", "says"), REFUSALS)
def test_models_that_cannot_be_compared(
    one: onnx.ModelProto, other: onnx.ModelProto, says: str, tmp_path: Path
) -> None:
    inputs = IDS % 6 if any(each.name == "input_ids" for each in one.graph.input) else None
    paths = save(one, tmp_path / "one.onnx"), save(other, tmp_path / "other.onnx")
    with pytest.raises(DifferentModelsError, match=says):
        compare(*paths, inputs, recipe=Recipe(samples=1))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_file_that_is_missing(missing: int, tmp_path: Path) -> None:
    paths = list(decoders(tmp_path))
    paths[missing].unlink()
    with pytest.raises(ModelFileError, match=f"{paths[missing].name} does not exist"):
        compare(*paths, IDS)


# Data


def test_as_many_windows_as_wanted(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    recipe = Recipe(samples=3, sequence_length=8)
    with open_pair(path, path) as pair:
        written = measure(pair, None, None, recipe, timed=False)
        given = measure(pair, {"input_ids": IDS}, None, recipe, timed=False)
    assert (written.comparison.windows, written.comparison.tokens) == (3, 24)
    assert written.data == "3 sequences of 8 tokens that the model wrote itself"
    assert (given.comparison.windows, given.data) == (3, "3 given samples")


def test_arrays_are_taken_whole_where_nothing_is_said(tmp_path: Path) -> None:
    path = save(tiny_decoder(layers=1), tmp_path / "model.onnx")
    many = np.tile(IDS, (5, 1))
    assert len(many) > COMPARED
    assert compare(path, path, many).windows == compare(path, path, {"input_ids": many}).windows == len(many)
    np.savez(tmp_path / "data.npz", input_ids=many)
    assert compare(path, path, tmp_path / "data.npz").windows == COMPARED


def test_a_graph_of_a_fixed_batch_runs_with_whole_batches(tmp_path: Path) -> None:
    model = bigrams(np.random.default_rng(0).standard_normal((160, 160)))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path = save(model, tmp_path / "model.onnx")
    result = compare(path, path, IDS)  # 5 sequences
    assert (result.kl_mean, result.windows, result.tokens) == (0, 4, 48)
    with pytest.raises(CalibrationError, match="batches of 2, the data hold 1 samples"):
        compare(path, path, IDS[:1])


def test_the_second_half_of_an_encoder_decoder_goes_on_from_the_first(tmp_path: Path) -> None:
    save(tiny_cross_decoder(past=False), tmp_path / "decoder_model.onnx")
    path = save(tiny_cross_decoder(past=True), tmp_path / "decoder_with_past_model.onnx")
    result = compare(path, path, recipe=Recipe(samples=2, sequence_length=8))
    assert result.kl_mean == 0
    assert result.windows % 2 == 0


# Memory, disk, cost


def test_what_does_not_fit_into_memory_lies_on_the_disk_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths, watcher = decoders(tmp_path), Watcher(tmp_path)
    result = compare(*paths, IDS, machine=Machine(memory_budget=1), progress=watcher)
    assert len(watcher.seen) == len(IDS)
    assert len(watcher.notes) == 2
    assert all("too large for this memory" in note for note in watcher.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "other.onnx"]
    in_memory = compare(*paths, IDS, progress=(watcher := Watcher(tmp_path)))
    assert (watcher.seen, watcher.notes) == ([], [])
    assert result.kl_windows == pytest.approx(in_memory.kl_windows, rel=1e-4)


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"\(No space left on device\); compare on fewer samples"):
        compare(*decoders(tmp_path), IDS, machine=Machine(memory_budget=1))


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_the_two_models_are_never_in_memory_together(tmp_path: Path) -> None:
    """Each session copies its weights, so that both would take twice their size."""
    K, readers = 2048, 6
    weights_bytes = readers * 4 * K * K
    model = norm_and_readers(K=K, columns=(K,) * readers).model()
    paths = [save(model, tmp_path / name, external=True) for name in ("one.onnx", "other.onnx")]
    del model
    x = {"x": np.ones((2, 4, K), np.float32)}
    runtime.give_back_memory()
    with Meter() as before:
        before._done.wait(0.1)
    with Meter() as meter:
        compare(*paths, x)
    assert meter.peak_private_bytes is not None
    assert before.peak_private_bytes is not None
    taken = meter.peak_private_bytes - before.peak_private_bytes
    assert 0.9 * weights_bytes < taken < 1.5 * weights_bytes


def test_the_cost_is_bytes_with_the_data_files_and_a_speed(tmp_path: Path) -> None:
    one = save(tiny_decoder(layers=1), tmp_path / "one.onnx", external=True)
    other = save(tiny_decoder(layers=1), tmp_path / "other.onnx")
    with open_pair(one, other) as pair:
        report = measure(pair, IDS)
    assert report.original.size_bytes == sum((tmp_path / name).stat().st_size for name in ("one.onnx", "one.onnx.data"))
    assert report.quantized.size_bytes == other.stat().st_size
    for cost in (report.original, report.quantized):
        assert cost.speed is not None
        assert (cost.speed.unit, cost.speed.decoding) == ("tokens", True)
        assert cost.speed.per_second > 0
    assert report.to_dict()["original"]["speed"]["unit"] == "tokens"


def test_a_model_that_is_too_large_for_memory_has_no_speed(tmp_path: Path) -> None:
    with open_pair(*decoders(tmp_path)) as pair:
        report = measure(pair, IDS, machine=Machine(memory_budget=1))
    assert (report.original.speed, report.quantized.speed) == (None, None)


def test_a_model_that_takes_fewer_tokens_cannot_be_run(tmp_path: Path) -> None:
    one, other = bigrams(np.ones((160, 160))), bigrams(np.ones((160, 160)))
    other.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    paths = save(one, tmp_path / "one.onnx"), save(other, tmp_path / "other.onnx")
    with pytest.raises(RuntimeFailedError, match="onnxruntime failed while running the model"):
        compare(*paths, IDS)
