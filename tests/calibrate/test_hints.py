"""What the files beside a model tell."""

from __future__ import annotations

import json
from pathlib import Path

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
