"""What lies beside a model and belongs to it: found, and written for the clients that read it.

onnxruntime-genai finds the model through genai_config.json; transformers.js wants to be told of the type of the weights
and of files that keep them elsewhere (its src/utils/dtypes.js, src/utils/model-loader.js), and reads the template
of chats in tokenizer_config.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

ONNX = "onnx"  # the folder of the models in a repository of the hub, configurations one folder up
WEB_CONFIG, EXTERNAL_DATA = "transformers.js_config", "use_external_data_format"  # in config.json, and in that
CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template"  # in that, or in a file TEMPLATE.jinja

COMPANIONS = (
    CONFIG,
    "generation_config.json",
    GENAI_CONFIG,
    # the tokenizer
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "spiece.*",
    "normalizer.json",
    f"{TEMPLATE}.*",
    # what prepares pictures and sounds
    "*processor*.json",
    # sentence-transformers
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Companion:
    """A file of the output folder beside the model. target: its path there. content: its bytes, or what to copy."""

    target: str
    content: bytes | Path

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content

    def replaces(self, there: bytes) -> bool:
        """Whether nothing is lost where it takes the place of a file: that is the same, but for what we write."""
        content = self.read()
        if there == content:
            return True
        before, after = _json(there), _json(content)
        if before is None or after is None:
            return False
        if self.target == TOKENIZER_CONFIG:
            return {TEMPLATE: after.get(TEMPLATE), **before} == after
        return self.target == CONFIG and _same_but_for_web(before, after)


def home(source: Path) -> Path:
    """The folder of a model's configuration: its own, or one up in a repository of the hub."""
    above = source.absolute().parent.parent
    in_hub = source.absolute().parent.name == ONNX and not (source.parent / CONFIG).exists()
    return above if in_hub and (above / CONFIG).is_file() else source.parent


def plain(source: Path, name: str) -> Iterator[Companion]:
    """Those of the model `source`; its output has the path `name` in the folder."""
    for one in _found(source):
        corrected = _corrected_genai(one.read(), name) if one.target == GENAI_CONFIG else None
        yield one if corrected is None else replace(one, content=corrected)


def for_web(source: Path, model: ir.Model, folder: Path, name: str, dtype: str) -> Iterator[Companion]:
    """Those of the model `source`, as transformers.js wants them; its output in `folder` is called `name`."""
    for one in _found(source):
        if one.target == CONFIG:
            before = folder / CONFIG
            others = _json(before.read_bytes()) if before.is_file() else None
            yield replace(one, content=_web_config(one.read(), others, name, dtype, model))
        elif one.target == TOKENIZER_CONFIG:
            yield replace(one, content=_with_template(one.read(), home(source) / f"{TEMPLATE}.jinja"))
        elif one.target != GENAI_CONFIG:
            yield one


def with_external_data(companions: tuple[Companion, ...], name: str) -> tuple[Companion, ...]:
    """Those for the web where the model `name` keeps its weights in another file."""
    return tuple(
        replace(one, content=_with_external_data(one.read(), name)) if one.target == CONFIG else one
        for one in companions
    )


def _found(source: Path) -> Iterator[Companion]:
    """In the order of `COMPANIONS`. Raises OSError where one cannot be read, while nothing is done yet."""
    folder = home(source)
    found = (path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)) if path.is_file())
    for path in dict.fromkeys(found):
        path.open("rb").close()
        yield Companion(path.relative_to(folder).as_posix(), path)


def _corrected_genai(content: bytes, name: str) -> bytes | None:
    """genai_config.json where a model of one part has another name (a copy, a conversion); None where it is right."""
    config = _json(content) or {}
    parts = [part for part in _object(config.get("model")).values() if "filename" in _object(part)]
    if len(parts) != 1 or parts[0]["filename"] == name:
        return None
    parts[0]["filename"] = name
    return _dumped(config)


def _web_config(content: bytes, before: Mapping[str, Any] | None, name: str, dtype: str, model: ir.Model) -> bytes:
    """config.json with what transformers.js has to know; `before` is that of other parts in the folder."""
    config = _json(content)
    if config is None:
        return content
    told = _object(config.get(WEB_CONFIG)) | {EXTERNAL_DATA: {}}  # that of the source's files says nothing of ours
    if before is not None and _same_but_for_web(before, config):
        told |= _object(before.get(WEB_CONFIG))
    told["dtype"] = dtype
    told[EXTERNAL_DATA] = {other: large for other, large in _external_data(told).items() if other != name}
    if any(value.dtype == ir.DataType.FLOAT16 for value in model.graph.inputs if (value.name or "").startswith("past")):
        told["kv_cache_dtype"] = {dtype: "float16"}  # before 4.0 it does not ask the model
    return _dumped(config | {WEB_CONFIG: told})


def _with_template(content: bytes, template: Path) -> bytes:
    """tokenizer_config.json with the template of chats that lies in a file beside it, where it has none itself."""
    config = _json(content)
    if config is None or config.get(TEMPLATE) is not None or not template.is_file():
        return content
    return _dumped(config | {TEMPLATE: template.read_text(encoding="utf-8", errors="replace")})


def _with_external_data(content: bytes, name: str) -> bytes:
    config = _json(content)
    if config is None:
        return content
    told = config[WEB_CONFIG]
    told[EXTERNAL_DATA] = _external_data(told) | {name: True}
    return _dumped(config)


def _external_data(told: Mapping[str, Any]) -> dict[str, Any]:
    """The files of the folder that keep their weights elsewhere."""
    return _object(told.get(EXTERNAL_DATA))


def _same_but_for_web(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return {**first, WEB_CONFIG: None} == {**second, WEB_CONFIG: None}


def _json(content: bytes) -> dict[str, Any] | None:
    """The object in a JSON file; None where it holds something else, which is carried over as it is."""
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dumped(config: Any) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
