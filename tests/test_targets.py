"""What runs the model: what a recipe has where the user says nothing, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import GraphBuilder, save

import awq_onnx
from awq_onnx import Recipe
from awq_onnx.errors import RecipeError
from awq_onnx.targets import BITS, BLOCK_SIZES, FORMATS, MATMULNBITS, QDQ, TARGETS, WHOLE_COLUMN

every_target = pytest.mark.parametrize("name", TARGETS)


@every_target
def test_a_target_sets_what_is_not_said(name: str) -> None:
    recipe, wants = Recipe(target=name), TARGETS[name]
    assert (recipe.format, recipe.block_size, recipe.symmetric) == (wants.format, wants.block_size, wants.symmetric)
    assert recipe.explicit_zero_points == wants.tells_zero_points
    assert recipe.accuracy_level == 4


@every_target
def test_what_a_target_wants_is_what_it_runs(name: str) -> None:
    wants = TARGETS[name]
    assert wants.format in wants.formats
    assert wants.block_size in wants.block_sizes
    assert set(wants.formats) <= set(FORMATS)
    assert set(wants.block_sizes) <= set(BLOCK_SIZES)
    assert 4 in wants.bits
    assert set(wants.bits) <= set(BITS)
    assert wants.symmetric or not wants.only_symmetric


@every_target
def test_to_dict_makes_the_same_recipe_again(name: str) -> None:
    recipe = Recipe(target=name)
    assert Recipe(**recipe.to_dict()) == recipe


def test_what_is_said_wins() -> None:
    recipe = Recipe(target="tensorrt", block_size=128)
    assert (recipe.block_size, recipe.format, recipe.symmetric) == (128, QDQ, True)
    recipe = Recipe(target="dml", symmetric=True, block_size=16, format=QDQ)
    assert (recipe.format, recipe.block_size, recipe.symmetric, recipe.explicit_zero_points) == (QDQ, 16, True, True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target": "tensorrt", "format": MATMULNBITS}, "format matmulnbits does not run on target tensorrt; qdq does"),
        ({"target": "qnn", "format": MATMULNBITS}, "format matmulnbits does not run on target qnn; qdq does"),
        ({"target": "tensorrt", "block_size": 32}, "block_size 32 does not run on target tensorrt .* 64, 128"),
        (
            {"target": "tensorrt", "lm_head": "8"},
            "lm_head 8 does not run on target tensorrt .*; it takes 4",
        ),
        ({"target": "tensorrt", "symmetric": False}, "symmetric is False, but target tensorrt .* no zero points"),
        ({"target": "dml", "symmetric": True, "explicit_zero_points": False}, "explicit_zero_points is False"),
        ({"target": "dml", "bits": 2}, "bits 2 does not run on target dml"),
        ({"target": "cuda", "override": ("*:bits=2",)}, "override '.*:bits=2': bits 2 does not run on target cuda"),
        ({"target": "cuda", "override": ("*:block_size=256",)}, "block_size 256 does not run on target cuda"),
        ({"target": "qnn", "block_size": 32}, "block_size 32 does not run on target qnn"),
        ({"target": "web", "bits": 8}, "bits 8 does not run on target web"),
        ({"format": QDQ, "bits": 2}, "bits 2 does not run on target cpu with format qdq; it takes 4, 8"),
        ({"format": QDQ, "embedding": "8"}, "embedding is not for format qdq"),
        ({"format": QDQ, "accuracy_level": 0}, "session.qdq_matmulnbits_accuracy_level"),
    ],
)
def test_what_cannot_run_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe(**settings)


def test_what_cannot_run_is_refused_in_a_changed_copy_too() -> None:
    with pytest.raises(RecipeError, match="does not run on target tensorrt"):
        replace(Recipe(), target="tensorrt")


def test_a_size_for_the_model_goes_with_every_target() -> None:
    for name in TARGETS:
        assert Recipe(target=name, target_bits=6.0).has_size


def test_a_size_for_the_model_leaves_no_block_size_to_choose() -> None:
    with pytest.raises(RecipeError, match="leave these out"):
        Recipe(target="qnn", target_bits=4.5, bits=8)
    assert Recipe(target="qnn", target_bits=4.5, block_size=WHOLE_COLUMN).has_size


def test_tables_get_what_the_target_reads_too() -> None:
    with pytest.raises(RecipeError, match="embedding 8 does not run on target web"):
        Recipe(target="web", embedding="8")
    assert Recipe(target="web", embedding="4").embedding_bits == 4


@pytest.mark.parametrize("name", ["cuda", "web", "dml"])
def test_kernels_that_knew_no_bias_get_an_add(tmp_path: Path, name: str) -> None:
    builder = GraphBuilder()
    builder.input("x", ["batch", 64])
    bias = builder.constant(np.ones(32), "bias")
    builder.output(builder.add("Gemm", "x", builder.weight(64, 32), bias, name="layer"), ["batch", 32])
    recipe = Recipe(target=name, samples=2)
    awq_onnx.quantize(save(builder.model(), tmp_path / "model.onnx"), tmp_path / "out.onnx", recipe)
    ops = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert ops == ["MatMulNBits", "Add"]
