"""Where an output goes: a file, or a folder that clients open as it is, with what belongs to the model beside it.

Clients find a model by the names of files: optimum and onnxruntime-genai want config and tokenizer beside it,
transformers.js one folder up (https://huggingface.co/docs/transformers.js/custom_usage).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from awq_onnx.errors import OutputError
from awq_onnx.store import OpenedModel

PLAIN, WEB = "plain", "web"  # layouts
ONNX = "onnx"  # the folder of the models in a repository of the hub, configurations one folder up
IN_MEMORY = "model.onnx"  # what a model that was no file is called
WEB_DTYPE, WEB_HALF_DTYPE = "q4", "q4f16"  # transformers.js' names, and the ends of its file names
WEB_CONFIG, EXTERNAL_DATA = "transformers.js_config", "use_external_data_format"  # in config.json, and in that
CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"

COMPANIONS = (
    CONFIG,
    "generation_config.json",
    GENAI_CONFIG,
    # the tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "spiece.*",
    "normalizer.json",
    "chat_template.*",
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
        return self.target == CONFIG and _same_but_for_web(_json(there), _json(content))


@dataclass(frozen=True)
class Destination:
    """graph: the file to write, NAME; its weights go to NAME`data_suffix`, or inside it where it is to be `whole`.

    folder: where the `companions` go; None where the output is a file. left: other models beside the source that stay
    there.
    """

    graph: Path
    data_suffix: str = ".data"
    whole: bool = False
    folder: Path | None = None
    companions: tuple[Companion, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        return self.graph.with_name(self.graph.name + self.data_suffix)

    def with_external_data(self) -> Destination:
        """The same where the model turned out too large for one file: transformers.js wants to be told."""
        told = (
            replace(one, content=_with_external_data(one.read(), self.graph.name)) if one.target == CONFIG else one
            for one in self.companions
        )
        return replace(self, whole=False, companions=tuple(told))


def is_folder(output: str | os.PathLike[str]) -> bool:
    """Whether that names a folder to write into: by a separator at its end, or because it is one."""
    ends = tuple(filter(None, (os.sep, os.altsep)))
    return os.fspath(output).endswith(ends) or Path(output).is_dir()


def graph_paths(model: Path, output: str | os.PathLike[str]) -> list[Path]:
    """Every file that may be the output of `destination`, for the file of a model that nobody has opened."""
    if not is_folder(output):
        return [Path(output)]
    return [Path(output) / name for name in (_plain_name(model), *(_web_name(model, d) for d in _web_dtypes()))]


def destination(opened: OpenedModel, output: str | os.PathLike[str], layout: str = PLAIN) -> Destination:
    """Where a model goes that is written to `output`. Raises OutputError where that is the folder of the model."""
    web = layout == WEB
    how = Destination(Path(output), data_suffix="_data", whole=True) if web else Destination(Path(output))
    if not is_folder(output):
        return how
    folder, source = Path(output), opened.path or Path(IN_MEMORY)
    dtype = WEB_HALF_DTYPE if _is_half(opened.model) else WEB_DTYPE
    how = replace(how, graph=folder / (_web_name(source, dtype) if web else _plain_name(source)), folder=folder)
    if opened.path is None:
        return how
    if folder.resolve() in {source.parent.resolve(), _home(source).resolve()}:
        raise OutputError(f"{folder} is the folder of the model that is read; name another one, or a file")
    companions = tuple(_web_companions(how, source, dtype, opened.model) if web else _plain_companions(how, source))
    return replace(how, companions=companions, left=tuple(_left(how, source)))


def _plain_name(source: Path) -> str:
    return f"{ONNX}/{source.name}" if _home(source) != source.parent else source.name


def _web_name(source: Path, dtype: str) -> str:
    return f"{ONNX}/{source.stem}_{dtype}.onnx"


def _web_dtypes() -> tuple[str, ...]:
    return WEB_DTYPE, WEB_HALF_DTYPE


def _home(source: Path) -> Path:
    """The folder of a model's configuration: its own, or one up in a repository of the hub."""
    above = source.absolute().parent.parent
    in_hub = source.absolute().parent.name == ONNX and not (source.parent / CONFIG).exists()
    return above if in_hub and (above / CONFIG).is_file() else source.parent


def _found(source: Path) -> Iterator[Path]:
    """The companions of a model, those named first in `COMPANIONS` first."""
    found = (path for pattern in COMPANIONS for path in sorted(_home(source).glob(pattern)) if path.is_file())
    yield from dict.fromkeys(found)


def _plain_companions(how: Destination, source: Path) -> Iterator[Companion]:
    for path in _found(source):
        target = path.relative_to(_home(source)).as_posix()
        corrected = _corrected_genai(path, source.name, how.graph.name) if target == GENAI_CONFIG else None
        yield Companion(target, path if corrected is None else corrected)


def _web_companions(how: Destination, source: Path, dtype: str, model: ir.Model) -> Iterator[Companion]:
    for path in _found(source):
        target = path.relative_to(_home(source)).as_posix()
        if target == CONFIG:
            yield Companion(target, _web_config(path, (how.folder or source) / CONFIG, how.graph.name, dtype, model))
        elif target != GENAI_CONFIG:
            yield Companion(target, path)


def _corrected_genai(path: Path, source: str, name: str) -> bytes | None:
    """genai_config.json where the model `source` is called `name`; None where nothing changes.

    Of a model of one part that it calls otherwise (a copy, a conversion) it is that part.
    """
    config = _json(path.read_bytes()) or {}
    parts = [part for part in _object(config.get("model")).values() if "filename" in _object(part)]
    ours = [part for part in parts if part["filename"] == source] or (parts if len(parts) == 1 else [])
    if all(part["filename"] == name for part in ours):
        return None
    for part in ours:
        part["filename"] = name
    return _dumped(config)


def _web_config(path: Path, there: Path, name: str, dtype: str, model: ir.Model) -> bytes:
    """config.json with what transformers.js has to know; `there` is that of other parts in the folder."""
    config = _json(path.read_bytes())
    if config is None:
        return path.read_bytes()
    before = _json(there.read_bytes()) if there.is_file() else None
    told = _object(config.get(WEB_CONFIG)) | {EXTERNAL_DATA: {}}  # that of the source's files says nothing of ours
    if before is not None and _same_but_for_web(before, config):
        told |= _object(before.get(WEB_CONFIG))
    told["dtype"] = dtype
    told[EXTERNAL_DATA] = {other: large for other, large in _external_data(told).items() if other != name}
    if any(
        (value.name or "").startswith("past") and value.dtype == ir.DataType.FLOAT16 for value in model.graph.inputs
    ):
        told["kv_cache_dtype"] = {dtype: "float16"}
    return _dumped(config | {WEB_CONFIG: told})


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


def _same_but_for_web(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    if first is None or second is None:
        return False
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


def _is_half(model: ir.Model) -> bool:
    """Whether most of the weights have 16 bits: so have the activations then."""
    sizes = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 0}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in sizes:
            sizes[value.const_value.dtype] += value.const_value.size
    return sizes[ir.DataType.FLOAT16] > sizes[ir.DataType.FLOAT]


def _left(how: Destination, source: Path) -> Iterator[str]:
    """Other parts of the model (encoder_model.onnx beside decoder_model.onnx) that are not in the folder either.

    Other forms of one part, like model_fp16.onnx beside model.onnx, are not meant.
    """
    stems = sorted(path.stem for path in source.parent.glob("*.onnx"))
    for stem in stems:
        form = any(stem.startswith(f"{other}_") for other in stems)
        own = stem == source.stem or source.stem.startswith(f"{stem}_")
        if not (form or own or any(how.graph.parent.glob(f"{stem}*.onnx"))):
            yield f"{stem}.onnx"
