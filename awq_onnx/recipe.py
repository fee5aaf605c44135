"""All settings of a quantisation, in one frozen value that is checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from awq_onnx.errors import RecipeError
from awq_onnx.targets import (
    BITS,
    BLOCK_SIZES,
    CPU,
    FORMATS,
    QDQ,
    QDQ_BITS,
    TARGETS,
    Target,
)

FAST, DEFAULT, BEST = QUALITIES = ("fast", "default", "best")
AWQ_GPTQ, AWQ, GPTQ, RTN = METHODS = ("awq+gptq", "awq", "gptq", "rtn")
UNSCALED = (GPTQ, RTN)
EVERY_FORMULA = "all"
SCALES_FROM = ("mean", "max", "weights", EVERY_FORMULA)
ACCURACY_LEVELS = (0, 4)
DEFAULT_ACCURACY_LEVEL = 4  # what onnxruntime makes of format qdq too
LM_HEADS = ("none", "8", "4")
SAMPLES = {FAST: 8, DEFAULT: 32, BEST: 64}
COMPARED = (
    16  # samples to compare models on: a standard error of a few percent, in less than a minute where they are small
)


def _by_quality(values: dict[str, int]) -> str:
    return ", ".join(map(str, values.values()))


def _setting(default: int | float | bool | str | tuple[str, ...] | None, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantise. Unknown settings are a TypeError, impossible values a `RecipeError`.

    The descriptions of the fields are their help texts on the command line too.
    """

    quality: str = _setting(
        DEFAULT,
        "fast: few samples, and no error made up for; best: more samples, each layer the bits and blocks that the "
        "output wants, at the size of one format for all, and weights that make up for the layers before them; takes "
        "several times as long",
    )
    method: str = _setting(
        AWQ_GPTQ,
        "awq: as in the paper, scales and clipping alone; gptq: compensating rounding alone; rtn: round-to-nearest",
    )
    target: str = _setting(
        CPU,
        "what is to run the model: sets format, block size and zero points to what that wants, where you do not say; "
        "see docs/targets.md",
    )
    format: str = _setting(
        None,
        "matmulnbits: nodes of onnxruntime's own; qdq: standard ONNX of opset 21, DequantizeLinear and MatMul (default "
        "by target; cpu: matmulnbits)",
    )
    bits: int = _setting(4, "bits that a weight is stored in")
    block_size: int = _setting(
        None,
        "weights that share one scale, along K; -1: a whole column. Smaller blocks are closer to the original, in a "
        "larger file (default by target; cpu: 32)",
    )
    symmetric: bool = _setting(
        None, "no zero points: a little smaller, and further from the original (default by target; cpu: with them)"
    )
    explicit_zero_points: bool = _setting(
        None, "write zero points that are all in the middle too, for what does not know that (default by target)"
    )
    target_bits: float | None = _setting(
        None, "bits of a weight on average, scales, zero points, lm_head and embedding counted: chooses bits and blocks"
    )
    target_size: int | None = _setting(
        None, "bytes that the model may have (120MB, on the command line): chooses bits and blocks of every layer"
    )
    accuracy_level: int = _setting(
        None,
        "4: int8 arithmetic in onnxruntime's CPU kernel, fast; 0: float arithmetic, more exact (CUDA ignores this; "
        "default 4)",
    )
    lm_head: str = _setting(
        "none", "bits of the layer that makes the logits, and of an embedding that shares its weight"
    )
    embedding: str = _setting("none", "bits of an embedding whose table is not the lm_head's weight")
    include: tuple[str, ...] = _setting((), "quantise only nodes whose name fits this pattern (*, ?), may be repeated")
    exclude: tuple[str, ...] = _setting((), "leave nodes whose name fits this pattern as they are, may be repeated")
    override: tuple[str, ...] = _setting(
        (), "other settings for nodes whose name fits a pattern: '*/layers.0/*:bits=8,block_size=64', may be repeated"
    )
    scale_from: str = _setting(
        "mean",
        "what makes the scale of an input channel. mean: mean|x|^alpha; max: max|x|^alpha / max|w|^(1-alpha); "
        "weights: mean|x|^alpha / mean(|w|/max|w|)^(1-alpha); all: whichever loses least",
    )
    alpha: float | None = _setting(None, "exponent of the scale, 0 to 1, for all layers (default: searched for each)")
    allow_mul: bool = _setting(
        False, "where a scale cannot be folded, divide the input by it with a Mul at run time, if that helps"
    )
    samples: int = _setting(None, f"calibration sequences (default by quality: {_by_quality(SAMPLES)})")
    sequence_length: int = _setting(256, "tokens in each calibration sequence")
    seed: int = _setting(0, "of everything that is sampled: the same seed gives the same file")

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "override"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _one_of("quality", self.quality, QUALITIES)
        _one_of("method", self.method, METHODS)
        _one_of("target", self.target, tuple(TARGETS))
        _one_of("bits", self.bits, BITS)
        _one_of("lm_head", self.lm_head, LM_HEADS)
        _one_of("embedding", self.embedding, LM_HEADS)
        _one_of("allow_mul", self.allow_mul, (False, True))
        _patterns("include", self.include)
        _patterns("exclude", self.exclude)
        _patterns("override", self.override)
        for text in self.override:
            parse_override(text)
        _one_of("scale_from", self.scale_from, SCALES_FROM)
        if self.target_bits is not None and not (type(self.target_bits) in (int, float) and 2 <= self.target_bits <= 9):
            raise RecipeError(f"target_bits is {self.target_bits!r}; it must be a number from 2 to 9")
        if self.target_size is not None:
            _in_range("target_size", self.target_size, 1, 2**63)
        if self.alpha is not None and not (type(self.alpha) in (int, float) and 0 <= self.alpha <= 1):
            raise RecipeError(f"alpha is {self.alpha!r}; it must be a number from 0 to 1")
        self._fill()
        _one_of("format", self.format, FORMATS)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("symmetric", self.symmetric, (False, True))
        _one_of("explicit_zero_points", self.explicit_zero_points, (False, True))
        _one_of("accuracy_level", self.accuracy_level, ACCURACY_LEVELS)
        self._check_together()
        self._check_target()
        _in_range("samples", self.samples, 1, 65536)
        _in_range("sequence_length", self.sequence_length, 2, 65536)
        _in_range("seed", self.seed, 0, 2**32 - 1)

    def _fill(self) -> None:
        """What the user does not say is by quality and by target."""
        wants = self.runs_on
        defaults = {
            "samples": SAMPLES[self.quality],
            "format": wants.format,
            "block_size": wants.block_size,
            "symmetric": wants.symmetric,
            "explicit_zero_points": wants.tells_zero_points,
            "accuracy_level": DEFAULT_ACCURACY_LEVEL,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _check_together(self) -> None:
        """Settings that leave each other nothing to do."""
        if self.target_size is not None and self.target_bits is not None:
            raise RecipeError("target_size and target_bits exclude each other; give one of them")
        if self.has_size and (self.bits, self.block_size) != (BITS[0], self.runs_on.block_size):
            raise RecipeError("target_size and target_bits choose bits and block_size; leave these out")
        if self.method in UNSCALED and (self.alpha is not None or self.scale_from != "mean"):
            raise RecipeError(f"alpha and scale_from are of the scales, which method {self.method} does not have")
        if self.method == GPTQ and self.quality == FAST:
            raise RecipeError("quality fast makes up for no errors, which is all that method gptq does; use rtn")

        if self.format == QDQ and self.embedding_bits is not None:
            raise RecipeError(
                "embedding is not for format qdq: looking up packed rows takes a node of onnxruntime's own"
            )
        if self.format == QDQ and self.accuracy_level != DEFAULT_ACCURACY_LEVEL:
            raise RecipeError(
                f"accuracy_level {self.accuracy_level} is not for format qdq, whose nodes do not have it; "
                "applications set session.qdq_matmulnbits_accuracy_level instead"
            )

    def _check_target(self) -> None:
        """What the target, or the format, cannot run."""
        wants, where = self.runs_on, f"target {self.target} with format {self.format}"
        if self.format not in wants.formats:
            raise RecipeError(
                f"format {self.format} does not run on target {self.target}; {_listed(wants.formats)} does"
            )
        given = {"bits": self.bits, "lm_head": self.lm_head_bits, "embedding": self.embedding_bits}
        given["block_size"] = self.block_size
        for text in self.override:
            given |= {f"override {text!r}: {name}": value for name, value in parse_override(text)[1].items()}
        for name, value in given.items():
            offered = wants.block_sizes if name.endswith("block_size") else self.all_bits
            if value is not None and value not in offered:
                raise RecipeError(f"{name} {value} does not run on {where}; it takes {_listed(offered)}")
        if wants.only_symmetric and not self.symmetric:
            raise RecipeError(f"symmetric is False, but {where} takes no zero points")
        if wants.tells_zero_points and self.symmetric and not self.explicit_zero_points:
            raise RecipeError(f"explicit_zero_points is False, but {where} knows no zero point that is not written")

    @property
    def runs_on(self) -> Target:
        return TARGETS[self.target]

    @property
    def all_bits(self) -> tuple[int, ...]:
        """Those that the target runs in this format."""
        return tuple(bits for bits in self.runs_on.bits if self.format != QDQ or bits in QDQ_BITS)

    @property
    def lm_head_bits(self) -> int | None:
        return None if self.lm_head == "none" else int(self.lm_head)

    @property
    def embedding_bits(self) -> int | None:
        return None if self.embedding == "none" else int(self.embedding)

    @property
    def chooses_formats(self) -> bool:
        """Whether each layer gets bits and blocks of its own."""
        return self.has_size or self.quality == BEST

    @property
    def has_size(self) -> bool:
        return self.target_bits is not None or self.target_size is not None

    def overrides(self, name: str) -> dict[str, int]:
        """The settings of a node; of several that name it the last counts."""
        settings: dict[str, int] = {}
        for pattern, changed in map(parse_override, self.override):
            settings |= changed if fnmatchcase(name, pattern) else {}
        return settings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def arguments(self) -> list[str]:
        """The options of the command line that make this recipe: those that are not what they are without."""
        usual = Recipe(quality=self.quality, target=self.target).to_dict() | {"quality": DEFAULT, "target": CPU}
        changed = [(name, value) for name, value in self.to_dict().items() if value != usual[name]]
        every = [(name, one) for name, value in changed for one in (value if isinstance(value, tuple) else (value,))]
        return [word for name, one in every for word in option(name, one)]


def option(name: str, value: object) -> list[str]:
    """A setting as words of the command line."""
    words, text = name.replace("_", "-"), str(value)
    flag = f"--{words}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{words}"]
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def help_of(name: str) -> str:
    """The help text of a setting, with its default."""
    setting = next(f for f in fields(Recipe) if f.name == name)
    default = setting.default
    told = isinstance(default, int | str) and not isinstance(default, bool)
    return f"{setting.metadata['help']}" + (f" (default {default})" if told else "")


def parse_override(text: str) -> tuple[str, dict[str, int]]:
    """'PATTERN:bits=8,block_size=64' as the pattern and the settings."""
    pattern, colon, given = text.rpartition(":")
    settings: dict[str, int] = {}
    for one in given.split(",") if colon else ():
        name, _, value = (part.strip() for part in one.partition("="))
        choices = {"bits": BITS, "block_size": BLOCK_SIZES}.get(name)
        if choices is None or value not in map(str, choices):
            settings = {}
            break
        settings[name] = int(value)
    if not (pattern and settings):
        raise RecipeError(
            f"override {text!r} is not PATTERN:SETTING=VALUE,...; settings are bits ({_listed(BITS)}) and "
            f"block_size ({_listed(BLOCK_SIZES)})"
        )
    return pattern, settings


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _one_of(name: str, value: object, choices: tuple[int | str, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise RecipeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _patterns(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise RecipeError(f"{name} is {value!r}; it must be a tuple of patterns")


def _in_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
