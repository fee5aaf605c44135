"""A run that was interrupted is gone on with to the same bytes, and only by a run that would make the same."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Array, norm_and_readers, save, tiny_cross_decoder, tiny_decoder

from awq_onnx import Recipe, groups, partwise, quantize, resume
from awq_onnx.calibrate import segments
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import signature
from awq_onnx.errors import OutputError
from awq_onnx.journal import Entry
from awq_onnx.machine import Machine
from awq_onnx.output import OutputFiles, work_folder
from awq_onnx.store import open_model

RECIPE = Recipe(samples=3, sequence_length=8)
BEST = Recipe(quality="best", samples=6, sequence_length=8)
IDS = np.random.default_rng(0).integers(0, 160, (6, 8))

Files = dict[str, bytes]


# What two runs must have in common


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return save(tiny_decoder(layers=1), tmp_path / "model" / "model.onnx", external=True)


def key(
    path: Path, recipe: Recipe = RECIPE, calibration: Calibration = None, tokenizer: Path | None = None
) -> str | None:
    with open_model(path) as opened:
        return resume.key(opened, signature(opened.model.graph), recipe, calibration, tokenizer)


def test_the_same_has_the_same_key(path: Path) -> None:
    assert key(path) == key(path)
    assert key(path) is not None


def test_a_model_in_memory_has_none() -> None:
    model = tiny_decoder(layers=1)
    with open_model(model) as opened:
        assert resume.key(opened, signature(opened.model.graph), RECIPE, None, None) is None


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_model_that_was_written_again_has_another(path: Path, name: str) -> None:
    before = key(path)
    content = (path.parent / name).read_bytes()
    (path.parent / name).unlink()
    (path.parent / name).write_bytes(content)
    assert key(path) != before


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 16},
        {"symmetric": True},
        {"samples": 4},
        {"sequence_length": 9},
        {"seed": 1},
        {"lm_head": "8"},
        {"exclude": ("*q_proj*",)},
        {"allow_mul": True},
        {"accuracy_level": 0},
    ],
    ids=str,
)
def test_every_setting_counts(path: Path, change: dict[str, Any]) -> None:
    assert key(path, replace(RECIPE, **change)) != key(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("up", [False, True], ids=["beside", "one folder up"])
def test_what_is_read_beside_the_model_counts(path: Path, name: str, up: bool) -> None:
    folder = path.parent.parent if up else path.parent
    keys = [key(path)]
    (folder / name).write_text("{}")
    keys.append(key(path))
    (folder / name).write_text('{"a": 1}')
    keys.append(key(path))
    assert len(set(keys)) == 3
    (folder / name).unlink()
    assert key(path) == keys[0]


NOT_READ = ["report.json", "notes.txt", "model_int4.onnx", ".model_int4.onnx.unfinished", "other.onnx"]


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_does_not_count(path: Path, name: str) -> None:
    before = key(path)
    for folder in (path.parent, path.parent.parent):
        (folder / name).write_text("new")
    assert key(path) == before


def test_the_other_half_of_a_model_beside_it_counts(tmp_path: Path) -> None:
    path = save(tiny_cross_decoder(past=True), tmp_path / "decoder_with_past_model.onnx")
    before = key(path)
    save(tiny_cross_decoder(past=False), tmp_path / "decoder_model.onnx")
    assert key(path) != before


def test_the_version_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(path)
    monkeypatch.setattr(resume, "__version__", "0.0.0")
    assert key(path) != before


def test_the_tokenizer_that_is_named_counts(path: Path, tmp_path: Path) -> None:
    keys = [key(path)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        keys.append(key(path, tokenizer=tmp_path / name))
    (tmp_path / "two" / "tokenizer.json").write_text('{"a": 1}')
    keys.append(key(path, tokenizer=tmp_path / "two"))
    assert len(set(keys)) == 4
    assert key(path, tokenizer=tmp_path / "two") == keys[-1]


def test_a_calibration_file_counts_with_its_content(path: Path, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("words")
    keys = [key(path), *(key(path, calibration=tmp_path / name) for name in ("one.txt", "two.txt", "no.txt"))]
    (tmp_path / "two.txt").write_text("other words")
    keys.append(key(path, calibration=tmp_path / "two.txt"))
    assert len(set(keys)) == 5
    assert key(path, calibration=str(tmp_path / "two.txt")) == keys[-1]


def given(seed: int = 0) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(0, 160, (4, 8))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


DIFFERENT: list[Any] = [
    None,
    given()["input_ids"],
    given()["input_ids"].astype(np.int32),
    given()["input_ids"].reshape(8, 4),
    given(1)["input_ids"],
    given(),
    {"input_ids": given()["input_ids"]},
    {"attention_mask": given()["input_ids"], "input_ids": given()["attention_mask"]},
    ["ab", "c"],
    ["a", "bc"],
    ["abc"],
    ["abc", ""],
    ["", "abc"],
    ["c", "ab"],
    ['a", "b'],
    [[1, 2], [3]],
    [[1], [2, 3]],
    [1, 2, 3],
    [],
]


def test_what_is_given_in_memory_counts(path: Path) -> None:
    keys = [key(path, calibration=one) for one in DIFFERENT]
    assert len(set(keys)) == len(DIFFERENT)
    assert [key(path, calibration=one) for one in DIFFERENT] == keys


NONSENSE = [7, 1.5, object(), {1, 2}, b"words", iter(["a"]), [object()], [[1], [[2], 3]], {"input_ids": object()}]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=[type(one).__name__ for one in NONSENSE])
def test_what_nobody_can_calibrate_with_never_matches_and_never_fails(path: Path, nonsense: Any) -> None:
    assert key(path, calibration=nonsense) != key(path, calibration=nonsense)


# Going on


class Stopped(KeyboardInterrupt):
    """An interruption that the test asked for."""


def written(folder: Path, name: str = "out.onnx") -> Files:
    """Both files of an output, and nothing else of it."""
    assert not work_folder(folder / name).exists()
    return {one: (folder / one).read_bytes() for one in (name, f"{name}.data")}


def stop_at(
    monkeypatch: pytest.MonkeyPatch, number: int, *, before: bool, failure: BaseException, act: Callable[[], object]
) -> bool:
    """Stop a run before or after it records its nth thing; whether it came so far."""
    original, done = OutputFiles.record, 0

    def record(self: OutputFiles, name: str, entry: Entry) -> None:
        nonlocal done
        done += 1
        if done == number and before:
            raise failure
        original(self, name, entry)
        if done == number:
            raise failure

    with monkeypatch.context() as patched, contextlib.suppress(type(failure)):
        patched.setattr(OutputFiles, "record", record)
        act()
        return False
    return True


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_decoder(), tmp_path_factory.mktemp("decoder") / "model.onnx")


@pytest.fixture(scope="module")
def expected(decoder: Path) -> Files:
    """What an uninterrupted run writes."""
    quantize(decoder, decoder.with_name("out.onnx"), RECIPE)
    return written(decoder.parent)


@pytest.fixture(scope="module")
def best(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The same with the best quality."""
    folder = tmp_path_factory.mktemp("best")
    quantize(decoder, folder / "out.onnx", BEST)
    return written(folder)


def outputs_of(decoder: Path, folder: Path, **options: Any) -> Callable[[], object]:
    return lambda: quantize(decoder, folder / "out.onnx", RECIPE, **options)


@pytest.mark.parametrize("seconds", [0, 1e9], ids=["values saved", "no values saved"])
def test_a_run_may_be_interrupted_whenever_it_has_finished_something(
    decoder: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """And may have another budget when it goes on."""
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", seconds)
    for number in range(1, 40, 2 if seconds else 5):
        before = bool(number // 2 % 2)
        budgets = [Machine(memory_budget=budget) for budget in ((1, 1 << 30) if number % 4 == 1 else (1 << 16, 1))]
        first, second = (outputs_of(decoder, tmp_path, machine=machine, overwrite=True) for machine in budgets)
        if not stop_at(monkeypatch, number, before=before, failure=Stopped(), act=first):
            break
        assert work_folder(tmp_path / "out.onnx").exists() == (number > 1 or not before)
        second()
        assert written(tmp_path) == expected
    else:
        pytest.fail("it never came to an end")
    assert number > 8


@pytest.mark.parametrize("seconds", [0, 1e9], ids=["values saved", "no values saved"])
def test_a_run_that_is_interrupted_after_every_step_comes_to_its_end(
    decoder: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", seconds)
    run = outputs_of(decoder, tmp_path, machine=Machine(memory_budget=1))
    for _ in range(20):
        if not stop_at(monkeypatch, 2 if seconds == 0 else 1, before=False, failure=Stopped(), act=run):
            break
    assert written(tmp_path) == expected


@pytest.mark.parametrize("seconds", [0, 1e9], ids=["values saved", "no values saved"])
def test_a_run_whose_layers_make_up_for_those_before_may_be_interrupted(
    decoder: Path, best: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", seconds)
    for number in (3, 5, 7, 10):
        budgets = [Machine(memory_budget=budget) for budget in ((1, 1 << 30) if number % 2 else (1 << 30, 1))]
        first, second = (
            partial(quantize, decoder, tmp_path / "out.onnx", BEST, machine=machine, overwrite=True)
            for machine in budgets
        )
        assert stop_at(monkeypatch, number, before=False, failure=Stopped(), act=first)
        second()
        assert written(tmp_path) == best


@pytest.mark.parametrize("recipe", [RECIPE, BEST], ids=lambda recipe: recipe.quality)
def test_a_run_that_was_interrupted_reports_the_same(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """But for what it cost."""
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", 0)
    run = partial(quantize, decoder, tmp_path / "out.onnx", recipe, overwrite=True)
    uninterrupted = run()
    for number in (1, 3, 8):
        assert stop_at(monkeypatch, number, before=False, failure=Stopped(), act=run)
    cost = ("seconds", "total_seconds", "peak_memory_bytes", "resident_memory_bytes")
    assert replace(run(), **{name: getattr(uninterrupted, name) for name in cost}) == uninterrupted


def test_values_are_saved_once_all_groups_before_them_are_written(
    decoder: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches that take longer than the next part: their statistics are in no saved value."""
    original = groups.search_group

    def slow(*arguments: Any, **options: Any) -> groups.Found:
        time.sleep(0.05)
        return original(*arguments, **options)

    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", 0)
    monkeypatch.setattr(segments, "PART_BYTES", 1)
    monkeypatch.setattr(groups, "search_group", slow)
    run = outputs_of(decoder, tmp_path, machine=Machine(memory_budget=1 << 30, threads=2), overwrite=True)
    for number in (4, 6, 9):
        assert stop_at(monkeypatch, number, before=False, failure=Stopped(), act=run)
        run()
        assert written(tmp_path) == expected


def test_a_run_goes_on_after_a_full_disk(
    decoder: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = outputs_of(decoder, tmp_path)
    for number in (2, 5):
        assert stop_at(monkeypatch, number, before=True, failure=OutputError("full"), act=run)
        assert work_folder(tmp_path / "out.onnx").exists()
    run()
    assert written(tmp_path) == expected


def test_nothing_is_left_of_a_run_that_failed_otherwise(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = outputs_of(decoder, tmp_path)
    assert stop_at(monkeypatch, 3, before=False, failure=MemoryError(), act=run)
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_model_is_gone_on_with_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", 0)
    path = save(tiny_decoder(dtype=np.float16), tmp_path / "model.onnx")
    run = outputs_of(path, tmp_path, overwrite=True)
    run()
    expected = written(tmp_path)
    for number in (1, 4, 9):
        assert stop_at(monkeypatch, number, before=False, failure=Stopped(), act=run)
        run()
        assert written(tmp_path) == expected


class Listener:
    """Progress that remembers, and does something when a stage begins."""

    def __init__(self, title: str = "", act: Callable[[], object] = lambda: None) -> None:
        self.title, self.act = title, act
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.fractions: list[float] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)
        self.fractions.append(0.0)
        if self.title and title.startswith(self.title):
            self.act()

    def advance(self, fraction: float) -> None:
        self.fractions[-1] += fraction

    def note(self, line: str) -> None:
        self.notes.append(line)


def test_going_on_is_told_and_makes_no_calibration_data_again(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_at(monkeypatch, 4, before=False, failure=Stopped(), act=outputs_of(decoder, tmp_path))
    listener = Listener()
    quantize(decoder, tmp_path / "out.onnx", RECIPE, progress=listener)
    assert listener.notes == ["Going on from an interrupted run, which had finished 3 groups of layers."]
    assert not any(stage.startswith("Writing text") for stage in listener.stages)
    at = listener.stages.index("Calibrating and searching")
    assert listener.fractions[at] == pytest.approx(1)


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("stage", ["Tracing", "Calibrating", "Writing the model", "Measuring"])
def test_a_run_is_gone_on_with_from_every_stage(decoder: Path, expected: Files, tmp_path: Path, stage: str) -> None:
    with pytest.raises(Stopped):
        quantize(decoder, tmp_path / "out.onnx", RECIPE, progress=Listener(stage, raising(Stopped())))
    assert work_folder(tmp_path / "out.onnx").exists()
    listener = Listener()
    quantize(decoder, tmp_path / "out.onnx", RECIPE, progress=listener)
    assert len(listener.notes) == 1
    assert written(tmp_path) == expected


def test_a_run_of_another_recipe_begins_anew(decoder: Path, expected: Files, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quantize(
            decoder,
            tmp_path / "out.onnx",
            replace(RECIPE, block_size=16),
            progress=Listener("Measuring", raising(Stopped())),
        )
    listener = Listener()
    quantize(decoder, tmp_path / "out.onnx", RECIPE, progress=listener)
    assert listener.notes == []
    assert written(tmp_path) == expected


def test_a_model_in_memory_is_never_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quantize(tiny_decoder(), tmp_path / "out.onnx", RECIPE, progress=Listener("Measuring", raising(Stopped())))
    assert list(tmp_path.iterdir()) == []


def test_calibration_data_that_are_given_are_gone_on_with(decoder: Path, tmp_path: Path) -> None:
    whole = quantize(decoder, tmp_path / "whole.onnx", RECIPE, calibration=IDS)
    with pytest.raises(Stopped):
        quantize(
            decoder,
            tmp_path / "out.onnx",
            RECIPE,
            calibration=IDS,
            progress=Listener("Writing the model", raising(Stopped())),
        )
    report = quantize(decoder, tmp_path / "out.onnx", RECIPE, calibration=IDS)
    assert report.calibration == whole.calibration
    assert report.comparison == whole.comparison
    assert written(tmp_path)["out.onnx.data"] == written(tmp_path, "whole.onnx")["whole.onnx.data"]


@pytest.mark.parametrize("content", [None, b"", b"garbage"], ids=repr)
def test_saved_values_that_are_lost_are_made_again(
    decoder: Path, expected: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(partwise, "SAVE_EVERY_SECONDS", 0)
    run = outputs_of(decoder, tmp_path, machine=Machine(memory_budget=1))
    assert stop_at(monkeypatch, 12, before=False, failure=Stopped(), act=run)
    for values in work_folder(tmp_path / "out.onnx").glob("values-*.npz"):
        values.unlink()
        if content is not None:
            values.write_bytes(content)
    run()
    assert written(tmp_path) == expected


def test_two_runs_at_once_are_refused_and_the_first_goes_on(decoder: Path, expected: Files, tmp_path: Path) -> None:
    refused = []

    def again() -> None:
        with pytest.raises(OutputError, match="another run is writing") as caught:
            quantize(decoder, tmp_path / "out.onnx", RECIPE, overwrite=True)
        refused.append(caught.value)

    quantize(decoder, tmp_path / "out.onnx", RECIPE, progress=Listener("Measuring", again))
    assert len(refused) == 1
    assert written(tmp_path) == expected


def test_a_model_of_plain_layers_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(norm_and_readers().model(), tmp_path / "model.onnx")
    run = outputs_of(path, tmp_path, overwrite=True)
    run()
    expected = written(tmp_path)
    for number in (1, 2):
        assert stop_at(monkeypatch, number, before=False, failure=Stopped(), act=run)
        run()
        assert written(tmp_path) == expected


# Killed


KILLED = """
import sys
from awq_onnx import Recipe, partwise, pipeline
partwise.SAVE_EVERY_SECONDS = float(sys.argv[3])
print("ready", flush=True)
pipeline.quantize(sys.argv[1], sys.argv[2], Recipe(samples=3, sequence_length=8), overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("seconds", [0, 60])
def test_a_run_that_is_killed_again_and_again_writes_the_same(
    decoder: Path, expected: Files, tmp_path: Path, seconds: int
) -> None:
    moments = random.Random(seconds)
    (tmp_path / "out.onnx").write_text("old")
    for _ in range(4):
        words = [sys.executable, "-c", KILLED, str(decoder), str(tmp_path / "out.onnx"), str(seconds)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.8))
            process.send_signal(signal.SIGKILL)
    quantize(decoder, tmp_path / "out.onnx", RECIPE, overwrite=True)
    assert written(tmp_path) == expected
    assert {one.name for one in tmp_path.iterdir()} == {"out.onnx", "out.onnx.data"}
