"""Calibration data of every kind, and a clear sentence for everything that is none."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import (
    Array,
    GraphBuilder,
    norm_and_readers,
    run,
    save,
    tiny_cross_decoder,
    tiny_decoder,
    tiny_encoder,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

from awq_onnx.calibrate import companion, data, prose, segments
from awq_onnx.calibrate.data import Calibration, CalibrationData
from awq_onnx.calibrate.feeds import Feed, signature
from awq_onnx.errors import CalibrationError, MissingPackageError
from awq_onnx.passes.absorb import find_groups
from awq_onnx.passes.sites import survey
from awq_onnx.recipe import Recipe
from awq_onnx.statistics import InputStatistics
from awq_onnx.store import open_model

VOCABULARY = 160
RECIPE = Recipe(samples=8, sequence_length=4)  # and one more sequence is held out
WORDS = [f"word{number}" for number in range(VOCABULARY)]
TEXT = " ".join(WORDS)  # token ids 0, 1, 2 … 159


class Listener:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, title: str) -> None:
        pass

    def advance(self, fraction: float) -> None:
        pass

    def note(self, line: str) -> None:
        self.notes.append(line)


def write_tokenizer(path: Path, words: Sequence[str] = WORDS) -> Path:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return tiny_decoder(layers=1)


@pytest.fixture
def model(tmp_path: Path, decoder: onnx.ModelProto) -> Path:
    """A decoder with its tokenizer beside it."""
    write_tokenizer(tmp_path / "tokenizer.json")
    return save(decoder, tmp_path / "model.onnx")


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    """A model without tokens: x (batch, sequence, 64)."""
    return save(norm_and_readers().model(), tmp_path / "floats.onnx")


def load(
    model: Path | onnx.ModelProto,
    calibration: Calibration,
    recipe: Recipe = RECIPE,
    tokenizer: Path | None = None,
    progress: Listener | None = None,
) -> CalibrationData:
    with open_model(model) as opened:
        wanted = signature(opened.model.graph)
        return data.load(opened, wanted, recipe, calibration, tokenizer, progress or Listener())


def sequences(feeds: Sequence[Feed], name: str = "input_ids") -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for feed in feeds for row in feed[name]]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Text


def test_a_text_file_becomes_windows_of_its_tokens(model: Path, tmp_path: Path) -> None:
    loaded = load(model, written(tmp_path / "text.txt", TEXT))
    windows = sequences([*loaded.feeds, *loaded.held_out])
    assert len(windows) == 9
    assert all(window == tuple(range(window[0], window[0] + 4)) for window in windows)
    assert loaded.source == "8 windows of text.txt, 1 more held out to measure with"


def test_the_windows_are_spread_over_the_whole_text(model: Path, tmp_path: Path) -> None:
    loaded = load(model, written(tmp_path / "text.txt", TEXT))
    starts = [window[0] for window in sequences([*loaded.feeds, *loaded.held_out])]
    assert (starts[0], starts[-1]) == (0, 156)


def test_held_out_windows_are_not_calibrated_with(model: Path, tmp_path: Path) -> None:
    loaded = load(model, written(tmp_path / "text.txt", TEXT))
    calibrated, held_out = set(sequences(loaded.feeds)), set(sequences(loaded.held_out))
    assert (len(calibrated), len(held_out)) == (8, 1)
    assert not calibrated & held_out


def test_a_feed_holds_every_input_of_the_model(model: Path, tmp_path: Path) -> None:
    loaded = load(model, written(tmp_path / "text.txt", TEXT))
    for feed in (*loaded.feeds, *loaded.held_out):
        assert set(feed) == {"input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"}
        assert feed["past_key_values.0.key"].shape == (len(feed["input_ids"]), 2, 0, 16)
    assert [len(feed["input_ids"]) for feed in loaded.held_out] == [1]


def test_lines_of_json_are_joined_and_blank_ones_skipped(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join(WORDS[start : start + 3]), "id": start}) for start in range(0, 36, 3)]
    path = written(tmp_path / "text.jsonl", "\n\n".join(lines))
    loaded = load(model, path)
    assert sequences([*loaded.feeds, *loaded.held_out]) == [tuple(range(at, at + 4)) for at in range(0, 36, 4)]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_a_line_of_json_ends_at_its_newline_only(model: Path, tmp_path: Path, separator: str) -> None:
    """JSON strings may hold the other characters that Python's splitlines takes for line ends."""
    line = json.dumps({"text": f"word1{separator}word2 word3"}, ensure_ascii=False)
    assert sequences(load(model, written(tmp_path / "text.jsonl", f"{line}\r\n")).feeds) == [(1, 2, 3)]


def test_a_list_of_texts_is_taken(model: Path) -> None:
    loaded = load(model, [TEXT, TEXT])
    assert len(sequences(loaded.feeds)) == 8
    assert loaded.source == "8 windows of the given texts, 1 more held out to measure with"


def test_a_short_text_is_one_window_and_the_user_is_told(model: Path) -> None:
    listener = Listener()
    loaded = load(model, ["word3 word1 word4"], progress=listener)
    assert sequences(loaded.feeds) == sequences(loaded.held_out) == [(3, 1, 4)]
    assert any("measured on the sample it was made with" in note for note in listener.notes)


def test_no_special_tokens_are_added(model: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="word99 $A", special_tokens=[("word99", 99)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert sequences(load(model, ["word3 word1 word4"]).feeds) == [(3, 1, 4)]


# Tokenizers


def test_a_tokenizer_in_the_folder_above_is_found(decoder: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    write_tokenizer(tmp_path / "tokenizer.json")
    path = save(decoder, tmp_path / "onnx" / "model.onnx")
    assert len(sequences(load(path, [TEXT]).feeds)) == 8


@pytest.mark.parametrize("named", ["folder", "folder/tokenizer.json"])
def test_a_tokenizer_that_is_named_wins(model: Path, tmp_path: Path, named: str) -> None:
    (tmp_path / "folder").mkdir()
    write_tokenizer(tmp_path / "folder" / "tokenizer.json", WORDS[::-1])
    loaded = load(model, ["word159 word158 word157"], tokenizer=tmp_path / named)
    assert sequences(loaded.feeds) == [(0, 1, 2)]


def test_a_missing_tokenizer_is_told(decoder: onnx.ModelProto, tmp_path: Path) -> None:
    path = save(decoder, tmp_path / "model.onnx")
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json beside the model; name its folder with --tok"):
        load(path, [TEXT])


def test_a_model_in_memory_has_no_tokenizer_beside_it(decoder: onnx.ModelProto) -> None:
    with pytest.raises(CalibrationError, match="no tokenizer"):
        load(decoder, [TEXT])


def test_a_named_folder_without_a_tokenizer_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json in .*empty"):
        load(model, [TEXT], tokenizer=tmp_path / "empty")


def test_a_broken_tokenizer_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"broken\.json is no tokenizer"):
        load(model, [TEXT], tokenizer=written(tmp_path / "broken.json", "{}"))


def test_without_the_package_the_user_is_told_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'awq-onnx\[hf\]'"):
        load(model, [TEXT])


# Arrays

IDS = np.arange(10 * 4).reshape(10, 4)


def saved_npy(folder: Path, values: Array) -> Path:
    np.save(folder / "data.npy", values)
    return folder / "data.npy"


def saved_npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda _: IDS, id="array"),
        pytest.param(lambda _: {"input_ids": IDS}, id="mapping"),
        pytest.param(lambda folder: saved_npy(folder, IDS.astype(np.int32)), id="npy"),
        pytest.param(lambda folder: str(saved_npz(folder, input_ids=IDS)), id="npz"),
        pytest.param(lambda folder: saved_npy(folder, IDS).rename(folder / "ids.npz"), id="npy called npz"),
        pytest.param(lambda folder: saved_npz(folder, input_ids=IDS).rename(folder / "ids.npy"), id="npz called npy"),
    ],
)
def test_token_ids_are_taken_as(model: Path, tmp_path: Path, given: Callable[[Path], Calibration]) -> None:
    loaded = load(model, given(tmp_path))
    assert sequences(loaded.feeds) == [tuple(row) for row in IDS[:8].tolist()]
    assert sequences(loaded.held_out) == [tuple(IDS[8].tolist())]
    assert loaded.source.startswith("8 ")


def test_a_mask_that_comes_along_is_used(model: Path) -> None:
    mask = np.ones_like(IDS)
    mask[:, 3] = 0
    loaded = load(model, {"input_ids": IDS, "attention_mask": mask})
    assert set(sequences(loaded.feeds, "attention_mask")) == {(1, 1, 1, 0)}


def test_floats_are_taken_for_the_only_input(floats: Path) -> None:
    x = np.random.default_rng(0).standard_normal((10, 3, 64))
    loaded = load(floats, x)
    assert sum(len(feed["x"]) for feed in loaded.feeds) == 8
    assert loaded.feeds[0]["x"].dtype == np.float32
    np.testing.assert_array_equal(loaded.held_out[0]["x"], x[8:9].astype(np.float32))


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_of_few_samples_at_most_half_are_held_out(model: Path, samples: int) -> None:
    loaded = load(model, IDS[:samples], Recipe(samples=64, sequence_length=4))
    assert len(sequences(loaded.held_out)) in range(1, samples // 2 + 2)
    assert sequences(loaded.feeds) + sequences(loaded.held_out) == [tuple(row) for row in IDS[:samples].tolist()]


def test_feeds_are_as_large_as_a_fixed_batch(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 3
    loaded = load(save(model, tmp_path / "model.onnx"), IDS)
    assert {len(feed["input_ids"]) for feed in (*loaded.feeds, *loaded.held_out)} == {3}


def test_fewer_samples_than_a_fixed_batch_are_told(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 8
    with pytest.raises(CalibrationError, match="batches of 8, the data hold 4 samples"):
        load(save(model, tmp_path / "model.onnx"), IDS[:4])


# What the model makes itself


def test_without_data_a_language_model_writes(decoder: onnx.ModelProto) -> None:
    loaded = load(decoder, None)
    assert len(sequences(loaded.feeds)) == 8
    assert len(sequences(loaded.held_out)) == 1
    assert loaded.source == "8 sequences of 4 tokens that the model wrote itself, 1 more held out to measure with"


def test_without_data_other_models_get_random_inputs_and_the_user_is_told(floats: Path) -> None:
    listener = Listener()
    loaded = load(floats, None, progress=listener)
    assert [feed["x"].shape for feed in loaded.feeds] == [(4, 4, 64)] * 2
    assert [feed["x"].shape for feed in loaded.held_out] == [(1, 4, 64)]
    assert any("random inputs" in note for note in listener.notes)


def test_an_encoder_gets_random_tokens() -> None:
    loaded = load(tiny_decoder(layers=1, causal=False), None)
    assert loaded.source == "8 random inputs, 1 more held out to measure with"


def test_an_encoder_of_a_fixed_batch_gets_whole_batches_and_one_is_held_out() -> None:
    model = tiny_encoder()
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 6
    loaded = load(model, None, Recipe(samples=2, sequence_length=4))
    assert [len(feed["input_ids"]) for feed in (*loaded.feeds, *loaded.held_out)] == [6, 6]
    assert (loaded.feeds[0]["input_ids"] != loaded.held_out[0]["input_ids"]).any()


# Where its texts start and end

ENDLESS, START, END = 0, 1, 39  # ENDLESS: the padding
CONFIG = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": ENDLESS}
LONG = Recipe(samples=8, sequence_length=48)


def counting_model(after_start: int, *, mask: bool = True, text: str = "input_ids") -> onnx.ModelProto:
    """A language model of 40 tokens that surely writes t + 1 after t, and END after 38, `after_start` after START.

    So what it writes after a first text is junk where `after_start` is END: no text but its start and its end.
    """
    builder = GraphBuilder()
    surely = 1000.0 * np.roll(np.eye(40), 1, axis=1)
    surely[START] = 1000.0 * np.eye(40)[after_start]
    ids = builder.input(text, ["batch", "sequence"], np.int64)
    x = builder.add("Gather", builder.weight(40, 32, "words"), ids)
    if mask:
        real = builder.input("attention_mask".join(text.split("input_ids")), ["batch", "sequence"], np.int64)
        x = builder.add("Mul", x, builder.add("Unsqueeze", builder.cast(real, np.float32, "real"), builder.integers(2)))
    if text != "input_ids":  # those of an encoder, which it adds up
        other, its_mask = (
            builder.input(name, ["batch", "encoded"], np.int64) for name in ("input_ids", "attention_mask")
        )
        read = builder.add("Gather", "words", builder.add("Mul", other, its_mask))
        x = builder.add("Add", x, builder.add("ReduceSum", read, builder.integers(1), keepdims=1))
    weak = builder.linear(builder.rms_norm(x, 32, "norm"), 32, 40, "reader")
    logits = builder.add("Add", weak, builder.add("Gather", builder.constant(surely), ids), to="logits")
    builder.output(logits, ["batch", "sequence", 40])
    return builder.model()


def beside(folder: Path, model: onnx.ModelProto, **config: Any) -> Path:
    """The path of the model, saved beside such a config.json."""
    written(folder / "config.json", json.dumps(config))
    return save(model, folder / "model.onnx")


def rows(loaded: CalibrationData, name: str) -> Array:
    """Of all samples: (samples, length)."""
    return np.concatenate([feed[name] for feed in loaded.all_feeds])


def until_the_first_end(ids: Array, ends: Sequence[int] = (END,)) -> Array:
    """Which tokens are of the first text of each sample; the first two do not end one."""
    real = np.ones(ids.shape, bool)
    for row, tokens in enumerate(ids.tolist()):
        end = next((at for at, token in enumerate(tokens) if at > 1 and token in ends), len(tokens))
        real[row, end + 1 :] = False
    return real


def test_the_texts_that_a_model_writes_start_as_its_config_says(tmp_path: Path) -> None:
    ids = rows(load(beside(tmp_path, tiny_decoder(layers=1), bos_token_id=7), None), "input_ids")
    assert ids.shape == (9, 4)
    assert set(ids[:, 0].tolist()) == {7}
    assert len(set(ids[:, 1].tolist())) > 4


def test_junk_after_the_end_of_a_text_is_masked(tmp_path: Path) -> None:
    loaded = load(beside(tmp_path, counting_model(END), **CONFIG), None, LONG)
    ids, mask = rows(loaded, "input_ids"), rows(loaded, "attention_mask")
    assert ids.shape == (9, 48)
    real = until_the_first_end(ids)
    assert 0 < real.sum() < real.size
    np.testing.assert_array_equal(mask, real)
    assert set(ids[~real].tolist()) == {ENDLESS}
    assert set(ids[:, 0].tolist()) == {START}
    assert loaded.source == "8 sequences of 48 tokens that the model wrote itself, 1 more held out to measure with"


def test_what_is_masked_does_not_count_in_the_statistics(tmp_path: Path) -> None:
    path = beside(tmp_path, counting_model(END), **CONFIG)
    feeds = load(path, None, LONG).feeds
    real = np.concatenate([feed["attention_mask"].astype(bool).reshape(-1) for feed in feeds])
    assert 0 < real.sum() < real.size
    x = np.concatenate([normed(path, feed).reshape(-1, 32) for feed in feeds])[real].astype(np.float64)
    found = statistics_of(path, feeds)
    assert found.tokens == len(x)
    np.testing.assert_allclose(found.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def normed(path: Path, feed: Feed) -> Array:
    """What the only MatMul of `counting_model` reads."""
    model = onnx.load(path)
    (reader,) = (node for node in model.graph.node if node.op_type == "MatMul")
    model.graph.output.append(onnx.ValueInfoProto(name=reader.input[0]))
    return run(model, feed)[reader.input[0]]


def statistics_of(path: Path, feeds: Sequence[Feed]) -> InputStatistics:
    with open_model(path) as opened:
        groups = find_groups(survey(opened.model))
        parts = segments.Segments(opened, groups, segments.Data(feeds), folder=path.parent, budget_bytes=1 << 30)
        ((_, statistics),) = (one for part in parts.run() for one in part)
    (found,) = statistics.values()
    return found


@pytest.mark.parametrize(
    ("config", "padding"),
    [
        pytest.param({"bos_token_id": START, "eos_token_id": END}, END, id="none"),
        pytest.param({**CONFIG, "pad_token_id": None}, END, id="null"),
        pytest.param({**CONFIG, "pad_token_id": 40}, END, id="beyond the vocabulary"),
        pytest.param({**CONFIG, "pad_token_id": 17}, 17, id="a word"),
        pytest.param({**CONFIG, "eos_token_id": [END, 20], "pad_token_id": None}, END, id="the first of two ends"),
        pytest.param({**CONFIG, "eos_token_id": [400, END], "pad_token_id": None}, END, id="the first end there is"),
    ],
)
def test_in_the_place_of_junk_is_padding_or_the_end(tmp_path: Path, config: dict[str, Any], padding: int) -> None:
    loaded = load(beside(tmp_path, counting_model(END), **config), None, LONG)
    masked = rows(loaded, "attention_mask") == 0
    assert masked.any()
    assert set(rows(loaded, "input_ids")[masked].tolist()) == {padding}


def test_a_text_may_end_with_any_of_several_tokens(tmp_path: Path) -> None:
    path = beside(tmp_path, counting_model(END), **{**CONFIG, "eos_token_id": [END, 20]})
    loaded = load(path, None, LONG)
    ids, mask = rows(loaded, "input_ids"), rows(loaded, "attention_mask")
    np.testing.assert_array_equal(mask, until_the_first_end(ids, (END, 20)))
    assert {END, 20} <= set(ids[:, 2:][mask[:, 2:] == 1].tolist())


@pytest.mark.parametrize("text", ["input_ids", "decoder_input_ids"])
def test_a_model_without_a_mask_keeps_all_that_it_wrote(tmp_path: Path, text: str) -> None:
    """Nor is the mask of an encoder in the same graph one for it."""
    path = beside(tmp_path, counting_model(END, mask=False, text=text), **CONFIG)
    loaded = load(path, None, LONG)
    ids = rows(loaded, text)
    assert set(loaded.feeds[0]) <= {"input_ids", "attention_mask", "decoder_input_ids"}
    junk = ids[~until_the_first_end(ids)]
    assert len(junk) > 20
    assert set(junk.tolist()) == {START, END}
    run(path, loaded.feeds[0])


def test_a_model_that_goes_on_after_the_end_keeps_all_that_it_wrote(tmp_path: Path) -> None:
    loaded = load(beside(tmp_path, counting_model(20), **CONFIG), None, LONG)
    ids = rows(loaded, "input_ids")
    assert rows(loaded, "attention_mask").all()
    after_end = ids[:, 1:-1] == END
    assert after_end.sum() > 9
    assert set(ids[:, 2:][after_end].tolist()) == {START}


@pytest.mark.parametrize("ends", [40, [40, 1000], None, []])
def test_an_end_that_is_none_of_the_vocabulary_ends_nothing(tmp_path: Path, ends: Any) -> None:
    loaded = load(beside(tmp_path, counting_model(END), **{**CONFIG, "eos_token_id": ends}), None, LONG)
    ids = rows(loaded, "input_ids")
    assert rows(loaded, "attention_mask").all()
    assert set(ids[:, 2:][ids[:, 1:-1] == END].tolist()) == {0}  # as the model writes it


@pytest.mark.parametrize("start", [40, None, -1])
def test_a_start_that_is_none_of_the_vocabulary_is_none(tmp_path: Path, start: int | None) -> None:
    loaded = load(beside(tmp_path, counting_model(20), **{**CONFIG, "bos_token_id": start}), None, LONG)
    ids = rows(loaded, "input_ids")
    assert len(set(ids[:, 0].tolist())) > 4
    assert set(ids[:, 2:][ids[:, 1:-1] == END].tolist()) == {0}


def test_the_junk_of_a_decoder_is_masked_in_its_own_mask(tmp_path: Path) -> None:
    """An encoder-decoder in one graph has two masks."""
    path = beside(tmp_path, counting_model(END, text="decoder_input_ids"), **CONFIG)
    loaded = load(path, None, LONG)
    ids = rows(loaded, "decoder_input_ids")
    real = until_the_first_end(ids)
    assert not real.all()
    np.testing.assert_array_equal(rows(loaded, "decoder_attention_mask"), real)
    assert rows(loaded, "attention_mask").all()
    run(path, loaded.feeds[0])


# Text for models that cannot write it

BYTES = 256
SHORT_TEXTS = "short texts that come with awq-onnx"


def write_byte_tokenizer(folder: Path) -> Path:
    """One that knows any text: a token a byte, nothing around it."""
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def pieces(folder: Path, samples: int = 9, length: int = 4, *, exact: bool = False) -> list[tuple[int, ...]]:
    """The windows of the prose with the tokenizer in this folder."""
    found = prose.windows(None, folder, BYTES, samples, length, exact=exact)
    assert found is not None
    return [tuple(row) for row in found.tolist()]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder with its tokenizer beside it."""
    write_byte_tokenizer(tmp_path)
    return save(tiny_encoder(vocabulary=BYTES), tmp_path / "model.onnx")


def test_an_encoder_beside_a_tokenizer_reads_the_prose_and_the_user_is_told(encoder: Path) -> None:
    listener = Listener()
    loaded = load(encoder, None, progress=listener)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(encoder.parent)
    assert loaded.feeds[0]["attention_mask"].all()
    assert loaded.source == f"8 {SHORT_TEXTS}, 1 more held out to measure with"
    assert not loaded.random
    assert listener.notes == [
        "This is no language model that could write its own text: it is calibrated with short texts that come with "
        "awq-onnx. Inputs of your own (--calibration data.npz, or file.txt) give a better model."
    ]
    run(encoder, loaded.feeds[0])


def test_an_encoder_with_logits_reads_the_prose_too(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    path = save(tiny_decoder(layers=1, causal=False, vocabulary=BYTES), tmp_path / "model.onnx")
    assert load(path, None).source.startswith(f"8 {SHORT_TEXTS}")


def test_an_encoder_without_a_tokenizer_gets_random_tokens_and_the_user_is_told(encoder: Path) -> None:
    (encoder.parent / "tokenizer.json").unlink()
    listener = Listener()
    loaded = load(encoder, None, progress=listener)
    assert loaded.random
    assert loaded.source == "8 random inputs, 1 more held out to measure with"
    assert any("it is calibrated with random inputs" in note for note in listener.notes)


def test_an_encoder_whose_tokenizer_knows_none_of_our_words_gets_random_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    assert load(save(tiny_encoder(vocabulary=VOCABULARY), tmp_path / "model.onnx"), None).random


def test_an_encoder_of_fewer_tokens_than_its_tokenizer_gets_random_ones(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    loaded = load(save(tiny_encoder(vocabulary=40), tmp_path / "model.onnx"), None)
    assert loaded.random
    assert max(map(max, sequences(loaded.feeds))) < 40


def test_a_tokenizer_that_is_named_makes_the_prose_readable(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    folder = write_byte_tokenizer(tmp_path / "named")
    path = save(tiny_encoder(vocabulary=BYTES), tmp_path / "model.onnx")
    loaded = load(path, None, tokenizer=folder)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(folder)
    assert load(path, None).random


def test_a_named_tokenizer_that_is_not_there_is_told_where_it_is_wanted(encoder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json in .*missing"):
        load(encoder, None, tokenizer=encoder.parent / "missing")


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(np.arange(40).reshape(10, 4), id="ids"),
        pytest.param({"input_ids": np.arange(40).reshape(10, 4)}, id="arrays"),
        pytest.param(["a text of the user's own, long enough for a few windows"], id="text"),
    ],
)
def test_what_is_given_is_not_random(encoder: Path, given: Calibration) -> None:
    loaded = load(encoder, given)
    assert not loaded.random
    assert "given" in loaded.source
    assert not set(sequences(loaded.feeds)) & set(pieces(encoder.parent))


def test_what_a_model_wrote_itself_is_not_random(decoder: onnx.ModelProto) -> None:
    listener = Listener()
    assert not load(decoder, None, progress=listener).random
    assert not listener.notes


def test_random_numbers_are_random(floats: Path) -> None:
    assert load(floats, None).random
    assert not load(floats, np.random.default_rng(0).standard_normal((10, 3, 64))).random


def test_an_encoder_of_a_fixed_length_reads_as_many_tokens(encoder: Path) -> None:
    fixed_length(encoder, 12)
    loaded = load(encoder, None)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(encoder.parent, length=12)
    run(encoder, loaded.feeds[0])


def test_a_fixed_length_is_kept_where_the_prose_is_too_short_for_every_sample(encoder: Path) -> None:
    fixed_length(encoder, 4000)
    loaded = load(encoder, None)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(encoder.parent, length=4000, exact=True)
    assert not loaded.random


def test_a_free_length_is_shorter_where_the_prose_is_too_short_for_every_sample(encoder: Path) -> None:
    loaded = load(encoder, None, Recipe(samples=8, sequence_length=4000))
    expected = pieces(encoder.parent, length=4000)
    assert len(expected[0]) < 4000
    assert sequences([*loaded.feeds, *loaded.held_out]) == expected
    run(encoder, loaded.feeds[0])


def test_a_fixed_length_beyond_all_of_the_prose_is_filled_with_random_tokens(encoder: Path) -> None:
    fixed_length(encoder, 20_000)
    loaded = load(encoder, None, Recipe(samples=1, sequence_length=4))
    assert loaded.feeds[0]["input_ids"].shape == (1, 20_000)
    assert loaded.random


def fixed_length(path: Path, length: int) -> None:
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = length
    save(model, path)


def test_an_encoder_of_a_fixed_batch_reads_whole_batches_of_the_prose(encoder: Path) -> None:
    model = onnx.load(encoder)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 6
    loaded = load(save(model, encoder), None, Recipe(samples=2, sequence_length=4))
    assert [len(feed["input_ids"]) for feed in (*loaded.feeds, *loaded.held_out)] == [6, 6]
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(encoder.parent, 12)


def test_the_prose_is_no_longer_than_the_positions_that_the_model_knows(encoder: Path) -> None:
    save(tiny_encoder(vocabulary=BYTES, positions=11), encoder)
    loaded = load(encoder, None, Recipe(samples=8, sequence_length=100))
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(encoder.parent, length=6)
    run(encoder, loaded.feeds[0])


# Lengths


def test_a_text_is_no_longer_than_the_positions_that_the_model_knows(tmp_path: Path) -> None:
    listener = Listener()
    path = save(tiny_encoder(positions=11), tmp_path / "model.onnx")
    loaded = load(path, None, Recipe(samples=4, sequence_length=100), progress=listener)
    assert loaded.feeds[0]["input_ids"].shape == (4, 6)  # after 100, 50, 25 and 12
    assert "Sequences of 6 tokens for model.onnx: 100 are more than it takes." in listener.notes
    run(path, loaded.feeds[0])


def test_the_config_tells_how_many_positions_there_are(tmp_path: Path) -> None:
    written(tmp_path / "config.json", '{"max_position_embeddings": 11}')
    path = save(tiny_encoder(positions=11), tmp_path / "model.onnx")
    assert load(path, None, Recipe(samples=4, sequence_length=100)).feeds[0]["input_ids"].shape == (4, 11)


def test_windows_of_text_are_no_longer_either(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    path = save(tiny_encoder(positions=12, vocabulary=VOCABULARY), tmp_path / "model.onnx")
    loaded = load(path, [TEXT], Recipe(samples=4, sequence_length=20))
    assert loaded.feeds[0]["input_ids"].shape == (4, 10)


def test_a_model_that_runs_on_no_length_is_told_with_what_was_tried(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", 8])
    builder.output(builder.add("Reshape", x, builder.integers(77, 3)), [77, 3])
    message = r"does not run on inputs made for it, x 1 x 1 x 8: give inputs with --calibration data\.npz \(onnxruntime"
    with pytest.raises(CalibrationError, match=message):
        load(save(builder.model(), tmp_path / "model.onnx"), None)


# Pictures


def picture_model(words: int = 50, **axes: int) -> onnx.ModelProto:
    """Ids and a picture in, as CLIP has them; a vector of each out."""
    builder = GraphBuilder()
    ids = builder.input("input_ids", ["text_batch", "sequence"], np.int64)
    dims: list[int | str] = [axes.get(name, name) for name in ("image_batch", "channels", "height", "width")]
    pixels = builder.input("pixel_values", dims)
    vectors = builder.add("Gather", builder.weight(words, 8, "words"), ids)
    texts = builder.add("ReduceMean", vectors, builder.integers(1), keepdims=0)
    builder.output(builder.add("Identity", texts, to="text_embeds"), ["text_batch", 8])
    flat = builder.add("Reshape", pixels, builder.integers(0, 3 * 6 * 6))
    builder.output(builder.linear(flat, 3 * 6 * 6, 8, "patch"), ["image_batch", 8])
    return builder.model()


def test_a_pair_of_text_and_picture_gets_as_many_of_both(tmp_path: Path) -> None:
    written(tmp_path / "config.json", '{"vision_config": {"image_size": 6}}')
    path = save(picture_model(), tmp_path / "model.onnx")
    loaded = load(path, None)
    assert {name: one.shape for name, one in loaded.feeds[0].items()} == {
        "input_ids": (4, 4),
        "pixel_values": (4, 3, 6, 6),
    }
    run(path, loaded.feeds[0])


def test_of_a_pair_one_may_be_given_and_the_user_is_told_what_was_made_up(tmp_path: Path) -> None:
    listener = Listener()
    pixels = np.random.default_rng(0).standard_normal((5, 3, 6, 6))
    loaded = load(save(picture_model(), tmp_path / "model.onnx"), {"pixel_values": pixels}, progress=listener)
    assert loaded.feeds[0]["input_ids"].shape == (4, 4)
    np.testing.assert_array_equal(loaded.feeds[0]["pixel_values"], pixels[:4].astype(np.float32))
    assert "Not in the data, and made up: input_ids." in listener.notes


def test_of_a_pair_the_text_is_the_prose_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    written(tmp_path / "config.json", '{"vision_config": {"image_size": 6}}')
    write_byte_tokenizer(tmp_path)
    path = save(picture_model(words=BYTES), tmp_path / "model.onnx")
    loaded = load(path, None)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(tmp_path)
    assert loaded.feeds[0]["pixel_values"].shape == (4, 3, 6, 6)
    assert loaded.source == f"8 {SHORT_TEXTS}, the rest of the inputs random, 1 more held out to measure with"
    assert loaded.random
    pixels = np.random.default_rng(0).standard_normal((9, 3, 6, 6)).astype(np.float32)
    loaded = load(path, {"pixel_values": pixels})
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(tmp_path)
    np.testing.assert_array_equal(rows(loaded, "pixel_values"), pixels)


def test_pictures_of_unknown_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"pixel_values .* does not say how large height is: give inputs with"):
        load(save(picture_model(), tmp_path / "model.onnx"), None)


# Encoder-decoders


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """The folder of an encoder and the two halves of its decoder."""
    save(tiny_encoder(), tmp_path / "encoder_model.onnx")
    save(tiny_cross_decoder(past=False), tmp_path / "decoder_model.onnx")
    save(tiny_cross_decoder(past=True), tmp_path / "decoder_with_past_model.onnx")
    return tmp_path


def test_a_decoder_reads_what_the_encoder_beside_it_makes_and_writes_after_it(pair: Path) -> None:
    listener = Listener()
    loaded = load(pair / "decoder_model.onnx", None, progress=listener)
    feed = loaded.feeds[0]
    assert {name: one.shape for name, one in feed.items()} == {
        "input_ids": (4, 4),
        "encoder_hidden_states": (4, 4, 32),
    }
    assert not any("random" in note for note in listener.notes)
    assert "that the model wrote itself" in loaded.source
    run(pair / "decoder_model.onnx", feed)


def test_the_encoder_reads_the_text_that_was_given(pair: Path) -> None:
    ids = np.arange(20).reshape(5, 4)
    feed = load(pair / "decoder_model.onnx", ids).feeds[0]
    encoded = run(pair / "encoder_model.onnx", {"input_ids": ids[:4], "attention_mask": np.ones_like(ids[:4])})
    np.testing.assert_allclose(feed["encoder_hidden_states"], encoded["last_hidden_state"], rtol=1e-3, atol=1e-5)


def test_the_encoder_reads_the_prose_where_there_is_a_tokenizer(pair: Path) -> None:
    write_byte_tokenizer(pair)
    encoder = save(tiny_encoder(vocabulary=BYTES), pair / "encoder_model.onnx")
    ids = np.array(pieces(pair))
    states = run(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    loaded = load(pair / "decoder_model.onnx", None)
    np.testing.assert_allclose(rows(loaded, "encoder_hidden_states"), states, rtol=1e-3, atol=1e-5)
    assert "that the model wrote itself" in loaded.source
    assert not loaded.random


def test_the_encoder_reads_the_prose_before_a_decoder_that_goes_on(pair: Path) -> None:
    write_byte_tokenizer(pair)
    encoder = save(tiny_encoder(vocabulary=BYTES), pair / "encoder_model.onnx")
    ids = np.array(pieces(pair))[:4]
    states = run(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    feed = load(pair / "decoder_with_past_model.onnx", None).feeds[0]
    np.testing.assert_allclose(feed["past_key_values.0.encoder.key"], states[:, None], rtol=1e-3, atol=1e-5)


def test_the_encoder_beside_a_decoder_reads_as_much_of_the_prose_as_it_takes(pair: Path) -> None:
    write_byte_tokenizer(pair)
    encoder = save(tiny_encoder(vocabulary=BYTES), pair / "encoder_model.onnx")
    fixed_length(encoder, 7)
    ids = np.array(pieces(pair, length=7))
    states = run(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    loaded = load(pair / "decoder_model.onnx", None)
    np.testing.assert_allclose(rows(loaded, "encoder_hidden_states"), states, rtol=1e-3, atol=1e-5)


def test_the_encoder_reads_the_prose_with_the_tokenizer_that_is_named(pair: Path) -> None:
    (pair / "named").mkdir()
    folder = write_byte_tokenizer(pair / "named")
    encoder = save(tiny_encoder(vocabulary=BYTES), pair / "encoder_model.onnx")
    ids = np.array(pieces(folder))
    states = run(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    loaded = load(pair / "decoder_model.onnx", None, tokenizer=folder)
    np.testing.assert_allclose(rows(loaded, "encoder_hidden_states"), states, rtol=1e-3, atol=1e-5)


def test_states_that_were_given_are_kept(pair: Path) -> None:
    states = np.random.default_rng(0).standard_normal((5, 3, 32)).astype(np.float32)
    feed = load(pair / "decoder_model.onnx", {"encoder_hidden_states": states}).feeds[0]
    np.testing.assert_array_equal(feed["encoder_hidden_states"], states[:4])
    assert feed["input_ids"].shape == (4, 4)


def test_without_an_encoder_the_states_are_random_and_the_user_is_told(pair: Path) -> None:
    (pair / "encoder_model.onnx").unlink()
    listener = Listener()
    feed = load(pair / "decoder_model.onnx", None, progress=listener).feeds[0]
    assert feed["encoder_hidden_states"].shape == (4, 4, 32)
    assert any("no encoder beside the model: its encoder_hidden_states are random" in note for note in listener.notes)


def test_an_encoder_of_another_width_is_not_taken(pair: Path) -> None:
    save(tiny_encoder(hidden=48), pair / "encoder_model.onnx")
    listener = Listener()
    load(pair / "decoder_model.onnx", None, progress=listener)
    assert any("no encoder beside the model" in note for note in listener.notes)


def test_a_broken_file_beside_the_model_is_passed_by(pair: Path) -> None:
    (pair / "a.onnx").write_bytes(b"no model")
    assert "wrote itself" in load(pair / "decoder_model.onnx", None).source


def test_a_decoder_that_goes_on_gets_the_caches_of_the_one_before_it(pair: Path) -> None:
    """What it says after them is what the first says at that place of the whole text."""
    whole = load(pair / "decoder_model.onnx", None)
    loaded = load(pair / "decoder_with_past_model.onnx", None)
    text = run(pair / "decoder_model.onnx", whole.feeds[0])["logits"]
    for position, feed in enumerate(loaded.feeds[::2], start=1):  # two feeds of four samples for every place
        assert feed["past_key_values.0.decoder.key"].shape == (4, 1, position, 32)
        assert feed["encoder_attention_mask"].shape == (4, 4)
        logits = run(pair / "decoder_with_past_model.onnx", feed)["logits"]
        np.testing.assert_allclose(logits[:, 0], text[:, position], rtol=1e-3, atol=1e-4)
    assert loaded.source == (
        "8 sequences of 4 tokens that the model wrote itself, gone on from at 3 places, 1 more held out to measure with"
    )


def test_large_caches_make_fewer_samples(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "PAST_BUDGET_BYTES", 1)
    loaded = load(pair / "decoder_with_past_model.onnx", None)
    assert [len(feed["input_ids"]) for feed in (*loaded.feeds, *loaded.held_out)] == [1] * 6


def test_without_the_decoder_before_it_the_caches_are_random_and_the_user_is_told(pair: Path) -> None:
    (pair / "decoder_model.onnx").unlink()
    listener = Listener()
    loaded = load(pair / "decoder_with_past_model.onnx", None, progress=listener)
    assert loaded.feeds[0]["past_key_values.0.encoder.key"].std() > 0.5
    assert any("no decoder beside the model that makes its caches" in note for note in listener.notes)
    run(pair / "decoder_with_past_model.onnx", loaded.feeds[0])


def test_random_caches_are_random_whatever_text_goes_on_after_them(pair: Path) -> None:
    write_byte_tokenizer(pair)
    path = save(tiny_cross_decoder(past=True, vocabulary=BYTES), pair / "decoder_with_past_model.onnx")
    (pair / "decoder_model.onnx").unlink()
    listener = Listener()
    loaded = load(path, None, progress=listener)
    assert sequences([*loaded.feeds, *loaded.held_out]) == pieces(pair)
    assert loaded.random
    assert any(f"with {SHORT_TEXTS}, the rest of the inputs random" in note for note in listener.notes)
    run(path, loaded.feeds[0])


def test_caches_that_were_given_are_kept(pair: Path) -> None:
    cache = np.random.default_rng(0).standard_normal((5, 1, 3, 32)).astype(np.float32)
    given = {"input_ids": np.ones((5, 1), int), "past_key_values.0.decoder.key": cache}
    feed = load(pair / "decoder_with_past_model.onnx", given).feeds[0]
    np.testing.assert_array_equal(feed["past_key_values.0.decoder.key"], cache[:4])
    run(pair / "decoder_with_past_model.onnx", feed)


# What is refused

GivenBy = Callable[[Path], Calibration]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(lambda folder: folder / "no.txt", "no.txt does not exist", id="missing file"),
        pytest.param(lambda folder: folder, "does not exist", id="folder"),
        pytest.param(lambda folder: written(folder / "data.csv", "1,2"), "none of .txt, .jsonl, .npz, .npy", id="csv"),
        pytest.param(lambda folder: written(folder / "a.txt", ""), "has 0 tokens", id="empty text"),
        pytest.param(lambda _: [], "has 0 tokens", id="no texts"),
        pytest.param(lambda folder: not_utf8(folder / "a.txt"), "is not UTF-8 text (byte 2)", id="not UTF-8"),
        pytest.param(
            lambda folder: written(folder / "a.jsonl", '{"text": "word1"}\n\n{"text": '),
            "line 3 of",
            id="broken json",
        ),
        pytest.param(lambda folder: written(folder / "a.jsonl", '{"body": "word1"}'), "line 1 of", id="no text field"),
        pytest.param(lambda folder: written(folder / "a.jsonl", '{"text": 5}'), 'a string "text"', id="text a number"),
        pytest.param(lambda folder: written(folder / "a.jsonl", '["word1"]'), "line 1 of", id="no object"),
        pytest.param(lambda _: {"ids": IDS}, "hold ids, which is no input of the model; its inputs: input_ids", id="?"),
        pytest.param(lambda _: IDS[0], "array input_ids is 4, the model wants batch_size x", id="rank 1"),
        pytest.param(lambda _: IDS[None], "is 1 x 10 x 4, the model wants", id="rank 3"),
        pytest.param(lambda _: np.array(3), "hold no sample", id="a number"),
        pytest.param(lambda _: IDS[:0], "hold no sample", id="no sample"),
        pytest.param(lambda _: IDS * 1.0, "is float64, the model wants int64", id="float ids"),
        pytest.param(lambda _: IDS > 3, "is bool, the model wants int64", id="bool ids"),
        pytest.param(lambda _: IDS.astype(str), "the model wants int64", id="strings"),
        pytest.param(lambda _: IDS + 121, "run from 121 to 160, the model knows 0 to 159", id="above the vocabulary"),
        pytest.param(lambda _: IDS - 1, "run from -1 to", id="below the vocabulary"),
        pytest.param(
            lambda _: {"input_ids": IDS, "attention_mask": IDS[:9]}, "differ in their number of samples", id="counts"
        ),
        pytest.param(
            lambda _: {"input_ids": IDS, "attention_mask": IDS[:, :3]}, "they must agree", id="lengths of mask and ids"
        ),
        pytest.param(lambda _: {"attention_mask": IDS + 1}, "input input_ids", id="mask alone"),
        pytest.param(
            lambda _: {"input_ids": IDS, "attention_mask": IDS // 4 % 10},
            "an attention_mask of zeros alone",
            id="masked",
        ),
        pytest.param(lambda _: IDS[:, :0], "samples of no token", id="no token"),
        pytest.param(lambda _: {}, "hold no array", id="no array"),
        pytest.param(lambda folder: saved_npz(folder), "hold no array", id="empty archive"),
        pytest.param(lambda folder: pickled(folder / "a.npy"), "cannot be read", id="pickled npy"),
        pytest.param(lambda folder: pickled_inside(folder / "a.npz"), "cannot be read", id="pickled in npz"),
        pytest.param(lambda folder: written(folder / "a.npy", "no array"), "cannot be read", id="no npy"),
        pytest.param(lambda folder: written(folder / "a.npz", "no archive"), "cannot be read", id="no npz"),
        pytest.param(lambda folder: written(folder / "a.npy", ""), "cannot be read", id="empty npy"),
        pytest.param(lambda folder: truncated(saved_npz(folder, input_ids=IDS)), "cannot be read", id="truncated npz"),
        pytest.param(lambda folder: damaged(folder / "a.npz"), "cannot be read", id="damaged npz"),
        pytest.param(
            lambda folder: written(folder / "a.jsonl", r'{"text": "word1 \ud800 word2"}'),
            "line 1",
            id="half a character",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model: Path, tmp_path: Path, given: GivenBy, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(model, given(tmp_path))
    assert message in str(caught.value)


def not_utf8(path: Path) -> Path:
    path.write_bytes(b"a \xff b")
    return path


def pickled(path: Path) -> Path:
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    return path


def pickled_inside(path: Path) -> Path:
    np.savez(path, input_ids=np.array([{"a": 1}], object))
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


def damaged(path: Path) -> Path:
    """A compressed array that begins with a block of a kind that does not exist."""
    np.savez_compressed(path, input_ids=IDS)
    content = bytearray(path.read_bytes())
    name_length, extra_length = struct.unpack_from("<HH", content, 26)
    content[30 + name_length + extra_length] = 0b111
    path.write_bytes(content)
    return path


def test_text_for_a_model_without_tokens_is_refused(floats: Path) -> None:
    with pytest.raises(CalibrationError, match="has no input input_ids, so text is of no use to it"):
        load(floats, [TEXT])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused(floats: Path, bad: float) -> None:
    x = np.zeros((4, 3, 64), np.float32)
    x[2, 1, 7] = bad
    with pytest.raises(CalibrationError, match="x holds NaN or Inf"):
        load(floats, {"x": x})


def test_another_width_is_refused(floats: Path) -> None:
    with pytest.raises(CalibrationError, match="x is 4 x 3 x 32, the model wants batch x sequence x 64"):
        load(floats, np.zeros((4, 3, 32), np.float32))


def test_one_array_for_a_model_with_two_inputs_is_refused(tmp_path: Path) -> None:
    builder = norm_and_readers()
    builder.output(builder.add("Relu", builder.input("z", ["batch", 4])))
    path = save(builder.model(), tmp_path / "two.onnx")
    with pytest.raises(CalibrationError, match=r"give an \.npz with x, z"):
        load(path, np.zeros((4, 3, 64), np.float32))


def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    larger = write_tokenizer(tmp_path / "larger.json", [*WORDS, *(f"more{number}" for number in range(50))])
    with pytest.raises(CalibrationError, match="is it the right tokenizer"):
        load(model, ["more1 more2 more3 more4"], tokenizer=larger)


def test_a_text_that_is_shorter_than_a_fixed_length_is_refused(tmp_path: Path) -> None:
    model = tiny_decoder(layers=1, cache=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_value = 12
    write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(CalibrationError, match="has 3 tokens; the model needs at least 12"):
        load(save(model, tmp_path / "model.onnx"), ["word3 word1 word4"])
