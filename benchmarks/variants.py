"""The 4-bit models of benchmarks/methods.py: what is made, of what, with which text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from awq_onnx.targets import WHOLE_COLUMN

Found: TypeAlias = dict[str, dict[str, Any]]  # what was measured, by the key of a variant or the name of a section

METHODS, SALIENT, TOKENS, TEXT, FP16 = SECTIONS = ("methods", "salient", "tokens", "text", "fp16")
OWN, OTHER, RANDOM, ITSELF = "own text", "numpy's documentation", "random tokens", "nothing given"
PROSE = "the prose in awq-onnx"
LICENCES = "licences"
FP32_MODEL, FP16_MODEL = "smollm2", "smollm2-fp16"
LENGTH = 256  # tokens in a sequence
SAMPLES = 32
PROSE_SAMPLES = 13  # as many as there is prose for
BLOCK_SIZES = (32, 128)
SAMPLE_COUNTS = (1, 2, 4, 8, 32, 64)


@dataclass(frozen=True)
class Variant:
    """A 4-bit model to make and measure. settings: of the recipe. text: what calibrates, so many `samples` of it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = OWN
    samples: int = SAMPLES
    model: str = FP32_MODEL

    @property
    def key(self) -> str:
        settings = (f"{name}={value}" for name, value in sorted(self.settings.items()))
        return ", ".join([self.model, *settings, f"{self.samples} x {self.text}"])

    def with_block(self, block_size: int) -> Variant:
        return replace(self, settings={**self.settings, "block_size": block_size})


# What reads no activation takes the fewest samples that the command runs with.
ROUND_TO_NEAREST = Variant({"method": "rtn"}, samples=1)
BOTH = Variant({"method": "awq+gptq"})
AWQ = Variant({"method": "awq"})
FOUR_METHODS = (ROUND_TO_NEAREST, Variant({"method": "gptq"}), AWQ, BOTH)
FORMULAS = (
    Variant({"method": "awq", "scale_from": "max"}),
    Variant({"method": "awq", "scale_from": "weights"}),
    Variant({"method": "awq", "scale_from": "all"}),
    Variant({"method": "awq", "alpha": 0.5}),
)
PRESETS = (
    Variant({"quality": "fast", "block_size": 32}, ITSELF, samples=8),
    Variant({"quality": "default", "block_size": 32}, ITSELF),
)
PRESET_BEST = Variant({"quality": "best", "block_size": 32}, ITSELF, samples=64)
OVER_TOKENS = tuple(
    Variant({"method": method, "block_size": 32}, samples=samples)
    for samples in SAMPLE_COUNTS
    for method in ("awq", "gptq", "awq+gptq")
)
TEXTS = tuple(Variant({"method": "awq+gptq"}, text) for text in (OWN, LICENCES, OTHER, RANDOM))
FEWER_TEXTS = tuple(Variant({"method": "awq+gptq"}, text, PROSE_SAMPLES) for text in (OWN, OTHER, PROSE))
HALVES = tuple(replace(one, model=FP16_MODEL) for one in (ROUND_TO_NEAREST, BOTH))


def wanted_variants(section: str, *, best: bool) -> list[Variant]:
    """What a section needs, the most telling first."""
    if section == METHODS:
        blocks = [one.with_block(size) for some in (FOUR_METHODS, FORMULAS) for size in BLOCK_SIZES for one in some]
        columns = [one.with_block(WHOLE_COLUMN) for one in FOUR_METHODS]
        return [*blocks, *PRESETS, *columns, *([PRESET_BEST] if best else [])]
    if section == TEXT:
        return [
            *(one.with_block(size) for size in BLOCK_SIZES for one in TEXTS),
            *(one.with_block(32) for one in FEWER_TEXTS),
        ]
    if section == FP16:
        return [one.with_block(size) for size in BLOCK_SIZES for one in HALVES]
    return list(OVER_TOKENS) if section == TOKENS else []
