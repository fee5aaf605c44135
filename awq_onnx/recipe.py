"""All settings of a quantisation, in one frozen value that is checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from awq_onnx.errors import RecipeError

BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 4)
LM_HEADS = ("none", "8", "4")


def _setting(default: int | bool | str | tuple[str, ...], description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantise. Unknown settings are a TypeError, impossible values a `RecipeError`.

    The descriptions of the fields are their help texts on the command line too.
    """

    block_size: int = _setting(
        32, "weights that share one scale, along K; smaller is closer to the original, and larger"
    )
    symmetric: bool = _setting(False, "no zero points: a little smaller, and further from the original")
    accuracy_level: int = _setting(
        4, "4: int8 arithmetic in onnxruntime's CPU kernel, fast; 0: float arithmetic, more exact (CUDA ignores this)"
    )
    lm_head: str = _setting(
        "none", "bits of the layer that makes the logits, and of an embedding that shares its weight"
    )
    include: tuple[str, ...] = _setting((), "quantise only nodes whose name fits this pattern (*, ?), may be repeated")
    exclude: tuple[str, ...] = _setting((), "leave nodes whose name fits this pattern as they are, may be repeated")
    allow_mul: bool = _setting(
        False, "where a scale cannot be folded, divide the input by it with a Mul at run time, if that helps"
    )
    samples: int = _setting(32, "calibration sequences")
    sequence_length: int = _setting(256, "tokens in each calibration sequence")
    seed: int = _setting(0, "of everything that is sampled: the same seed gives the same file")

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("symmetric", self.symmetric, (False, True))
        _one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)
        _one_of("lm_head", self.lm_head, LM_HEADS)
        _one_of("allow_mul", self.allow_mul, (False, True))
        _patterns("include", self.include)
        _patterns("exclude", self.exclude)
        _in_range("samples", self.samples, 1, 65536)
        _in_range("sequence_length", self.sequence_length, 2, 65536)
        _in_range("seed", self.seed, 0, 2**32 - 1)

    @property
    def lm_head_bits(self) -> int | None:
        return None if self.lm_head == "none" else int(self.lm_head)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def help_of(name: str) -> str:
    """The help text of a setting, with its default."""
    setting = next(f for f in fields(Recipe) if f.name == name)
    default = setting.default
    return f"{setting.metadata['help']}" + ("" if isinstance(default, bool | tuple) else f" (default {default})")


def _one_of(name: str, value: object, choices: tuple[int | str, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise RecipeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _patterns(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise RecipeError(f"{name} is {value!r}; it must be a tuple of patterns")


def _in_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
