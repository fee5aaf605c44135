"""One run of a tiny decoder, that every test of its page reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import save, tiny_decoder

import awq_onnx
from awq_onnx import Recipe, Report

RECIPE = Recipe(samples=3, sequence_length=8, exclude=("/layers.1/mlp/*",))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(tiny_decoder(), folder / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def report(run_folder: Path) -> Report:
    return awq_onnx.quantize(run_folder / "model.onnx", run_folder / "model_int4.onnx", RECIPE)
