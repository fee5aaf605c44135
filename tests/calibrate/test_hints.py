"""What the files beside a model tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from awq_onnx.calibrate.hints import Hints, read_hints


def written(folder: Path, content: str, name: str = "config.json") -> Path:
    """The path of a model in a folder with this file."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    return folder / "model.onnx"


def test_the_config_beside_the_model_is_read(tmp_path: Path) -> None:
    hints = read_hints(written(tmp_path, json.dumps({"n_positions": 77, "vocab_size": 300, "pad_token_id": 0})))
    assert (hints.positions, hints.vocabulary, hints.padding) == (77, 300, 0)


def test_the_config_in_the_folder_above_is_read(tmp_path: Path) -> None:
    written(tmp_path, json.dumps({"max_position_embeddings": 77}))
    assert read_hints(tmp_path / "onnx" / "model.onnx").positions == 77


def test_the_nearer_config_wins(tmp_path: Path) -> None:
    written(tmp_path, json.dumps({"n_positions": 77}))
    assert read_hints(written(tmp_path / "onnx", json.dumps({"n_positions": 55}))).positions == 55


def test_the_preprocessor_is_read(tmp_path: Path) -> None:
    hints = read_hints(written(tmp_path, json.dumps({"size": {"height": 6, "width": 8}}), "preprocessor_config.json"))
    assert hints.image == (6, 8)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"n_positions": "many"}', '{"n_positions": true}', "{}"])
def test_a_file_that_tells_nothing_is_no_error(tmp_path: Path, content: str) -> None:
    assert read_hints(written(tmp_path, content)).positions is None


def test_a_model_in_memory_has_no_files() -> None:
    assert read_hints(None) == Hints()


def test_nested_parts_are_searched_after_the_whole() -> None:
    text, whole = {"text_config": {"max_position_embeddings": 77}}, {"max_position_embeddings": 55}
    assert Hints(text).positions == 77
    assert Hints({**text, **whole}).positions == 55
    assert Hints({"decoder": {"n_positions": 33}, "encoder": {"image_size": 32}}).image == (32, 32)


# Where texts start and end


@pytest.mark.parametrize(
    ("config", "start"),
    [
        pytest.param({"bos_token_id": 5}, 5, id="bos"),
        pytest.param({"bos_token_id": 0}, 0, id="zero"),
        pytest.param({"bos_token_id": 5, "decoder_start_token_id": 7}, 7, id="a decoder's own"),
        pytest.param({"bos_token_id": 5, "decoder_start_token_id": 0}, 0, id="a decoder's own is zero"),
        pytest.param({"bos_token_id": 5, "decoder_start_token_id": None}, 5, id="no decoder's own"),
        pytest.param({"bos_token_id": None}, None, id="none"),
        pytest.param({"bos_token_id": True}, None, id="bool"),
        pytest.param({"bos_token_id": -1}, None, id="negative"),
        pytest.param({"bos_token_id": "5"}, None, id="text"),
        pytest.param({"bos_token_id": [5]}, None, id="list"),
        pytest.param({"eos_token_id": 5, "pad_token_id": 6}, None, id="other tokens"),
        pytest.param({}, None, id="nothing"),
        pytest.param({"text_config": {"bos_token_id": 5}}, 5, id="nested"),
        pytest.param({"text_config": {"bos_token_id": 5}, "bos_token_id": 7}, 7, id="the whole before its parts"),
        pytest.param(
            {"text_config": {"bos_token_id": 5}, "bos_token_id": None}, 5, id="a part where the whole is none"
        ),
        pytest.param({"decoder": {"bos_token_id": 5, "decoder_start_token_id": 7}}, 7, id="nested decoder's own"),
    ],
)
def test_a_text_starts_with(config: dict[str, Any], start: int | None) -> None:
    assert (Hints(config).start, type(Hints(config).start)) == (start, type(start))


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        pytest.param({"eos_token_id": 5}, (5,), id="one"),
        pytest.param({"eos_token_id": 0}, (0,), id="zero"),
        pytest.param({"eos_token_id": [5, 9, 2]}, (5, 9, 2), id="several"),
        pytest.param({"eos_token_id": [5, None, True, -1, "9", 2]}, (5, 2), id="among what is no token"),
        pytest.param({"eos_token_id": []}, (), id="empty list"),
        pytest.param({"eos_token_id": None}, (), id="none"),
        pytest.param({"eos_token_id": True}, (), id="bool"),
        pytest.param({"eos_token_id": {"a": 5}}, (), id="object"),
        pytest.param({"bos_token_id": 5, "pad_token_id": 6}, (), id="other tokens"),
        pytest.param({}, (), id="nothing"),
        pytest.param({"text_config": {"eos_token_id": [5, 9]}}, (5, 9), id="nested"),
        pytest.param({"text_config": {"eos_token_id": 5}, "eos_token_id": 7}, (7,), id="the whole before its parts"),
    ],
)
def test_a_text_ends_with(config: dict[str, Any], ends: tuple[int, ...]) -> None:
    assert Hints(config).ends == ends


def test_where_texts_start_and_end_is_read_from_the_config(tmp_path: Path) -> None:
    hints = read_hints(written(tmp_path, json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]})))
    assert (hints.start, hints.ends) == (1, (2, 3))
