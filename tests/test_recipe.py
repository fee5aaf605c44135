"""Recipe: the settings of a run, checked once."""

from __future__ import annotations

import shlex
from dataclasses import Field, FrozenInstanceError, fields, replace
from typing import Any

import pytest

from awq_onnx import Recipe
from awq_onnx.cli.options import recipe_of
from awq_onnx.cli.quantize import parser
from awq_onnx.errors import AwqOnnxError, RecipeError
from awq_onnx.recipe import ACCURACY_LEVELS, BLOCK_SIZES, QUALITIES, SAMPLES, help_of


def test_the_defaults_need_no_decision_from_the_user() -> None:
    assert Recipe().to_dict() == {
        "quality": "default",
        "method": "awq+gptq",
        "target": "cpu",
        "format": "matmulnbits",
        "bits": 4,
        "block_size": 32,
        "symmetric": False,
        "explicit_zero_points": False,
        "target_bits": None,
        "target_size": None,
        "accuracy_level": 4,
        "lm_head": "none",
        "embedding": "none",
        "include": (),
        "exclude": (),
        "override": (),
        "scale_from": "mean",
        "alpha": None,
        "allow_mul": False,
        "samples": 32,
        "sequence_length": 256,
        "seed": 0,
    }


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("accuracy_level", ACCURACY_LEVELS)
def test_every_offered_format_is_accepted(block_size: int, accuracy_level: int) -> None:
    recipe = Recipe(block_size=block_size, accuracy_level=accuracy_level, symmetric=True)
    assert (recipe.block_size, recipe.accuracy_level, recipe.symmetric) == (block_size, accuracy_level, True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("samples", value) for value in (1, 65536)),
        *(("sequence_length", value) for value in (2, 65536)),
        *(("seed", value) for value in (0, 2**32 - 1)),
    ],
)
def test_the_ends_of_a_range_are_in_it(setting: str, value: int) -> None:
    assert getattr(Recipe(**{setting: value}), setting) == value


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("block_size", bad) for bad in (0, 8, 33, 512, -32, "32", 32.5)),
        *((name, bad) for name in ("symmetric", "explicit_zero_points") for bad in ("yes", 2, [])),
        *((name, bad) for name in ("target", "format") for bad in ("onnx", "", 8)),
        ("target", None),
        *(("accuracy_level", bad) for bad in (1, 2, 3, 5, -1, "4")),
        *(("lm_head", bad) for bad in ("16", "", None, 8, [])),
        *((name, bad) for name in ("include", "exclude") for bad in ("*", ("",), (3,), None)),
        *(("allow_mul", bad) for bad in ("yes", None, 2)),
        *(("samples", bad) for bad in (0, -1, 65537, 1.5, "8", True)),
        *(("sequence_length", bad) for bad in (1, 0, -5, 65537, 2.5, "64", None, True)),
        *(("seed", bad) for bad in (-1, 2**32, 0.5, "0", None, False)),
    ],
)
def test_an_impossible_value_is_refused_with_the_name_of_its_setting_and_the_value(setting: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{setting} is ") as caught:
        Recipe(**{setting: value})
    assert repr(value) in str(caught.value)
    assert "must be" in str(caught.value)


def test_a_recipe_error_is_a_value_error_and_an_error_of_this_package() -> None:
    assert issubclass(RecipeError, ValueError)
    assert issubclass(RecipeError, AwqOnnxError)
    assert RecipeError.exit_code == 2


def test_an_unknown_setting_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="group_size"):
        Recipe(group_size=32)  # type: ignore[call-arg]


def test_settings_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        Recipe(32)  # type: ignore[call-arg]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError):
        recipe.block_size = 64  # type: ignore[misc]


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="samples"):
        replace(Recipe(), samples=0)


def test_equal_recipes_are_equal_and_can_be_keys() -> None:
    assert len({Recipe(), Recipe(block_size=32), Recipe(seed=1)}) == 2


def test_to_dict_makes_the_same_recipe_again() -> None:
    choice = {"lm_head": "8", "include": ("*",), "exclude": ("*/layers.0/*", "lm_head"), "allow_mul": True}
    recipe = Recipe(block_size=128, symmetric=True, accuracy_level=0, samples=3, sequence_length=5, seed=7, **choice)
    assert Recipe(**recipe.to_dict()) == recipe


@pytest.mark.parametrize("setting", fields(Recipe), ids=lambda setting: setting.name)
def test_every_setting_has_a_help_text_with_its_default(setting: Field[object]) -> None:
    assert help_of(setting.name)
    told = isinstance(setting.default, int | str) and not isinstance(setting.default, bool)
    assert not told or f"(default {setting.default})" in help_of(setting.name)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_bits": 4.0, "target_size": 10**6}, "exclude each other"),
        ({"target_bits": 4.0, "bits": 8}, "choose bits and block_size"),
        ({"target_size": 10**6, "block_size": 128}, "choose bits and block_size"),
        ({"method": "rtn", "alpha": 0.5}, "method rtn does not have"),
        ({"method": "gptq", "scale_from": "max"}, "method gptq does not have"),
        ({"method": "gptq", "quality": "fast"}, "use rtn"),
    ],
)
def test_settings_that_leave_each_other_nothing_to_do_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe(**settings)


def test_what_a_quality_sets_by_itself_can_be_set() -> None:
    assert [Recipe(quality=quality).samples for quality in QUALITIES] == list(SAMPLES.values())
    assert Recipe(quality="best", samples=5).samples == 5


def test_a_list_of_patterns_is_as_good_as_a_tuple() -> None:
    """As JSON gives it back."""
    recipe = Recipe(include=["*"], exclude=["a", "b"])  # type: ignore[arg-type]
    assert (recipe.include, recipe.exclude) == (("*",), ("a", "b"))
    assert recipe == Recipe(include=("*",), exclude=("a", "b"))


@pytest.mark.parametrize(("lm_head", "bits"), [("none", None), ("8", 8), ("4", 4)])
def test_the_bits_of_the_lm_head_are_a_number_or_none(lm_head: str, bits: int | None) -> None:
    assert Recipe(lm_head=lm_head).lm_head_bits == bits


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(quality="best"),
        Recipe(quality="fast", samples=32),
        Recipe(method="rtn", bits=8, block_size=-1, symmetric=True, accuracy_level=0),
        Recipe(target_bits=4.25, lm_head="8"),
        Recipe(target_size=120_000_000, embedding="4"),
        Recipe(include=("*a b*", "-x"), exclude=("--y", "'\"$(z)"), override=("*/mlp/*:bits=8,block_size=64",)),
        Recipe(alpha=0, scale_from="max", allow_mul=True, sequence_length=5, seed=2**32 - 1),
    ],
    ids=lambda recipe: " ".join(recipe.arguments()) or "defaults",
)
def test_the_arguments_of_a_recipe_make_it_again(recipe: Recipe) -> None:
    """Through a shell."""
    words = shlex.split(shlex.join(["model.onnx", *recipe.arguments()]))
    assert recipe_of(parser().parse_args(words)) == recipe


def test_what_is_as_usual_is_no_argument() -> None:
    assert Recipe(quality="best", samples=64, bits=4).arguments() == ["--quality", "best"]
