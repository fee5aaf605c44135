"""Windows of the text that comes with awq-onnx."""

from __future__ import annotations

import sys
import tomllib
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Array
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing

from awq_onnx.calibrate import prose
from awq_onnx.errors import CalibrationError, MissingPackageError

TEXT = (resources.files("awq_onnx.calibrate") / "prose.txt").read_text(encoding="utf-8")
SPECIAL = ["[UNK]", "[CLS]", "[SEP]"]
UNKNOWN, FIRST, LAST = range(3)


def bert_like() -> Tokenizer:
    """Knows every word of the prose, puts [CLS] before a text and [SEP] after it."""
    words = dict.fromkeys(word for word, _ in Whitespace().pre_tokenize_str(TEXT))
    return word_level([*SPECIAL, *words])


def word_level(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", FIRST), ("[SEP]", LAST)]
    )
    return tokenizer


def of_bytes() -> Tokenizer:
    """As a GPT-2's with no merges: a token a byte, nothing around a text."""
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def ids_of(tokenizer: Tokenizer) -> Array:
    """The tokens (T,) of the prose."""
    return np.array(tokenizer.encode(TEXT, add_special_tokens=False).ids)


def model_beside(folder: Path, tokenizer: Tokenizer) -> Path:
    """The path of a model in a folder with this tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "model.onnx"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return model_beside(tmp_path, bert_like())


@pytest.fixture
def bytewise(tmp_path: Path) -> Path:
    return model_beside(tmp_path, of_bytes())


def windows(
    model: Path | None, *, samples: int = 6, length: int = 20, vocabulary: int | None = None, **options: Any
) -> Array:
    found = prose.windows(model, options.pop("tokenizer", None), vocabulary, samples, length, **options)
    assert found is not None
    return found


def none_made(model: Path | None, *, samples: int = 6, length: int = 20, vocabulary: int | None = None) -> bool:
    return prose.windows(model, None, vocabulary, samples, length) is None


def places(pieces: Array, whole: Array) -> list[int]:
    """Where the pieces (N, L) stand in the whole (T,)."""
    stretches = np.lib.stride_tricks.sliding_window_view(whole, pieces.shape[1])
    found = [np.flatnonzero((stretches == piece).all(axis=1)).tolist() for piece in pieces]
    assert [len(one) for one in found] == [1] * len(pieces), "a piece is none of the text, or too short to tell"
    return [one[0] for one in found]


# Windows


def test_every_window_is_a_piece_of_the_prose_between_the_tokens_that_bound_a_text(bert: Path) -> None:
    found = windows(bert)
    assert (found.shape, found.dtype) == ((6, 20), np.dtype(np.int64))
    assert set(found[:, 0].tolist()) == {FIRST}
    assert set(found[:, -1].tolist()) == {LAST}
    assert not np.isin(found[:, 1:-1], (UNKNOWN, FIRST, LAST)).any()
    assert len(places(found[:, 1:-1], ids_of(bert_like()))) == 6


def test_a_tokenizer_that_bounds_no_text_gives_pieces_alone(bytewise: Path) -> None:
    found = windows(bytewise, length=50)
    assert (found.shape, found.dtype) == ((6, 50), np.dtype(np.int64))
    assert len(places(found, ids_of(of_bytes()))) == 6


def test_a_token_before_a_text_alone_is_put_there(tmp_path: Path) -> None:
    tokenizer = bert_like()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", FIRST)])
    found = windows(model_beside(tmp_path, tokenizer))
    assert found.shape == (6, 20)
    assert len(places(found[:, 1:], ids_of(tokenizer))) == 6
    assert set(found[:, 0].tolist()) == {FIRST}


def test_two_tokens_after_a_text_are_put_there(tmp_path: Path) -> None:
    tokenizer = bert_like()
    tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP] [CLS]", special_tokens=[("[CLS]", FIRST), ("[SEP]", LAST)]
    )
    found = windows(model_beside(tmp_path, tokenizer))
    assert found.shape == (6, 20)
    assert found[:, -2:].tolist() == [[LAST, FIRST]] * 6
    assert len(places(found[:, :-2], ids_of(tokenizer))) == 6


@pytest.mark.parametrize("samples", [2, 7, 34])
def test_the_pieces_are_spread_from_the_first_token_to_the_last(bytewise: Path, samples: int) -> None:
    whole = ids_of(of_bytes())
    found = places(windows(bytewise, samples=samples, length=60), whole)
    assert (found[0], found[-1]) == (0, len(whole) - 60)
    gaps = np.diff(found)
    assert gaps.min() >= gaps.max() - 1


def test_one_sample_is_the_beginning(bytewise: Path) -> None:
    assert windows(bytewise, samples=1, length=30).tolist() == [ids_of(of_bytes())[:30].tolist()]


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 34, 64])
def test_windows_are_shorter_where_that_keeps_pieces_from_overlapping(bytewise: Path, samples: int) -> None:
    whole = ids_of(of_bytes())
    found = windows(bytewise, samples=samples, length=100_000)
    assert found.shape == (samples, len(whole) // samples)
    assert np.diff(places(found, whole)).min(initial=len(whole)) >= found.shape[1]


def test_what_bounds_a_text_does_not_overlap_and_does_not_count(bert: Path) -> None:
    whole = ids_of(bert_like())
    found = windows(bert, samples=20, length=10_000)
    assert found.shape == (20, len(whole) // 20 + 2)
    assert np.diff(places(found[:, 1:-1], whole)).min() >= found.shape[1] - 2


def test_so_many_samples_that_pieces_overlap_are_not_shorter_than_they_need_be(bert: Path) -> None:
    assert len(ids_of(bert_like())) // 1000 < prose.SHORTEST
    assert windows(bert, samples=1000, length=64).shape == (1000, prose.SHORTEST + 2)


def test_windows_are_never_longer_than_wanted(bert: Path) -> None:
    assert windows(bert, samples=1000, length=7).shape == (1000, 7)
    assert windows(bert, samples=2, length=3).shape == (2, 3)


def test_an_exact_length_is_kept_where_pieces_overlap(bert: Path) -> None:
    whole = ids_of(bert_like())
    found = windows(bert, samples=40, length=500, exact=True)
    assert found.shape == (40, 500)
    starts = places(found[:, 1:-1], whole)
    assert (starts[0], starts[-1]) == (0, len(whole) - 498)
    assert len(set(starts)) == 40


def test_an_exact_length_of_all_of_the_prose_is_had_and_no_longer_one(bytewise: Path) -> None:
    whole = ids_of(of_bytes())
    found = windows(bytewise, samples=2, length=len(whole), exact=True)
    assert found.tolist() == [whole.tolist()] * 2
    assert prose.windows(bytewise, None, None, 2, len(whole) + 1, exact=True) is None


@pytest.mark.parametrize("length", [1, 2])
def test_a_window_with_no_room_for_a_word_is_none(bert: Path, length: int) -> None:
    assert none_made(bert, length=length)


def test_the_same_windows_come_every_time(bert: Path) -> None:
    np.testing.assert_array_equal(windows(bert), windows(bert))


# Tokenizers


def test_a_vocabulary_that_holds_every_token_is_large_enough(bytewise: Path) -> None:
    largest = int(ids_of(of_bytes()).max())
    assert windows(bytewise, vocabulary=largest + 1).max() <= largest
    assert none_made(bytewise, vocabulary=largest)


def test_what_bounds_a_text_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    """[SEP] after all words."""
    words = bert_like().get_vocab()
    tokenizer = word_level(sorted(words, key=lambda word: (word == "[SEP]", words[word])))
    last = tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", last)])
    model = model_beside(tmp_path, tokenizer)
    assert windows(model, vocabulary=last + 1).max() == last
    assert none_made(model, vocabulary=last)


def test_a_tokenizer_that_knows_none_of_our_words_is_no_use(tmp_path: Path) -> None:
    assert none_made(model_beside(tmp_path, word_level([*SPECIAL, "wordless", "proteins"])))


def test_a_tokenizer_that_knows_few_of_our_words_is_no_use(tmp_path: Path) -> None:
    words = bert_like().get_vocab()
    assert none_made(model_beside(tmp_path, word_level(sorted(words, key=lambda word: words[word])[:30])))


def test_a_tokenizer_that_leaves_our_words_out_is_no_use(tmp_path: Path) -> None:
    tokenizer = Tokenizer(BPE({"☃": 0, "☂": 1}, []))
    assert not tokenizer.encode(TEXT).ids
    assert none_made(model_beside(tmp_path, tokenizer))


def test_fewer_tokens_than_samples_are_no_use(bert: Path) -> None:
    assert none_made(bert, samples=len(ids_of(bert_like())) + 1)


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    assert none_made(tmp_path / "model.onnx")
    assert none_made(None)


def test_a_broken_tokenizer_beside_the_model_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert none_made(tmp_path / "model.onnx")


def test_without_the_package_there_is_no_text(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert none_made(bert)
    with pytest.raises(MissingPackageError, match="pip install"):
        prose.windows(bert, bert.parent, None, 6, 20)


def test_a_named_tokenizer_is_used_for_a_model_in_memory(bert: Path) -> None:
    np.testing.assert_array_equal(windows(None, tokenizer=bert.parent), windows(bert))


def test_a_named_tokenizer_wins(bytewise: Path, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    model_beside(tmp_path / "named", bert_like())
    assert set(windows(bytewise, tokenizer=str(tmp_path / "named"))[:, 0].tolist()) == {FIRST}


@pytest.mark.parametrize("named", ["missing", "missing.json", "."])
def test_a_named_tokenizer_that_is_not_there_is_told(tmp_path: Path, named: str) -> None:
    (tmp_path / "model").mkdir()
    model = model_beside(tmp_path / "model", bert_like())
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json in"):
        prose.windows(model, tmp_path / named, None, 6, 20)


def test_a_named_tokenizer_that_is_broken_is_told(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"broken\.json is no tokenizer"):
        prose.windows(bert, tmp_path / "broken.json", None, 6, 20)


def test_truncation_and_padding_of_the_tokenizer_do_not_touch_the_text(tmp_path: Path) -> None:
    tokenizer = bert_like()
    expected = windows(model_beside(tmp_path, tokenizer), length=100)
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=10_000)
    np.testing.assert_array_equal(windows(model_beside(tmp_path, tokenizer), length=100), expected)


# The prose


def test_the_prose_is_package_data() -> None:
    raw = (resources.files("awq_onnx.calibrate") / "prose.txt").read_bytes()
    assert raw.decode("utf-8") == TEXT
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["awq_onnx"]
    assert any(fnmatch("calibrate/prose.txt", pattern) for pattern in patterns)


def test_the_prose_is_enough_for_a_run_with_no_settings() -> None:
    """32 samples and 2 to measure with: 64 words each, at least, that do not overlap."""
    assert len(TEXT.split()) >= 34 * 64


def test_a_tokenizer_that_refuses_unknown_words_is_of_no_use(tmp_path: Path) -> None:
    Tokenizer(WordLevel({"a": 0, "b": 1})).save(str(tmp_path / "tokenizer.json"))
    assert prose.windows(tmp_path / "model.onnx", None, None, 4, 16) is None
