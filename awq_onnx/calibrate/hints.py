"""What config.json and preprocessor_config.json beside a model tell about the sizes that its graph leaves open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
SAMPLING_RATE = 16_000  # of the sound that most speech models take


@dataclass(frozen=True)
class Hints:
    """Sizes, each None where nobody tells. Keys are looked up in the file first, then in the parts that it nests:
    text_config, vision_config, encoder, decoder and whatever else there is.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int | None:
        """The longest text."""
        return _size(self.config, *POSITIONS)

    @property
    def vocabulary(self) -> int | None:
        return _size(self.config, "vocab_size")

    @property
    def padding(self) -> int | None:
        """The token that stands for none."""
        found = next(_found(self.config, "pad_token_id"), None)
        return found if _is_token(found) else None

    @property
    def start(self) -> int | None:
        """The token that texts start with."""
        return next(
            (one for one in _found(self.config, "decoder_start_token_id", "bos_token_id") if _is_token(one)), None
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that texts end with."""
        found = next(_found(self.config, "eos_token_id"), None)
        return tuple(one for one in (found if isinstance(found, list) else [found]) if _is_token(one))

    @property
    def channels(self) -> int:
        """Of an image; three colours where nobody tells."""
        return _size(self.config, "num_channels") or 3

    @property
    def image(self) -> tuple[int, int] | None:
        """Height and width."""
        found = [*_found(self.config, "image_size"), *_found(self.preprocessor, "crop_size", "size")]
        return next((size for size in map(_height_and_width, found) if size), None)

    @property
    def mel_bins(self) -> int | None:
        return _size(self.config, "num_mel_bins")

    @property
    def frames(self) -> int | None:
        """Of a spectrogram: a speech encoder halves them before it counts positions."""
        positions = _size(self.config, "max_source_positions")
        return 2 * positions if positions else None

    @property
    def samples_a_token(self) -> int | None:
        """How many samples of sound become one token."""
        strides = next(_found(self.config, "conv_stride"), None)
        return prod(strides) if isinstance(strides, list) and all(map(_is_size, strides)) else None

    @property
    def sampling_rate(self) -> int:
        return _size(self.preprocessor, "sampling_rate") or SAMPLING_RATE


def read_hints(model: Path | None) -> Hints:
    """From the folder of the model, or the one above it; files that are missing or broken tell nothing."""
    folders = [model.parent, model.parent.parent] if model is not None else []
    return Hints(_read(folders, "config.json"), _read(folders, "preprocessor_config.json"))


def _read(folders: list[Path], name: str) -> Mapping[str, Any]:
    for folder in folders:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _size(content: Mapping[str, Any], *names: str) -> int | None:
    return next((value for value in _found(content, *names) if _is_size(value)), None)


def _found(content: Mapping[str, Any], *names: str) -> Iterator[Any]:
    """The values of these keys, in this order, then those in nested parts."""
    yield from (content[name] for name in names if name in content)
    for part in content.values():
        if isinstance(part, dict):
            yield from _found(part, *names)


def _is_token(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _height_and_width(value: Any) -> tuple[int, int] | None:
    """From 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(value, dict):
        edge = value.get("shortest_edge")
        value = [value.get("height", edge), value.get("width", edge)]
    height, width = value if isinstance(value, list) and len(value) == 2 else (value, value)
    return (height, width) if _is_size(height) and _is_size(width) else None
