"""Where an output goes: a file, or a folder that clients open as it is, with what belongs to the model beside it.

Clients find a model by the names of files: optimum and onnxruntime-genai want config and tokenizer beside it,
transformers.js one folder up (https://huggingface.co/docs/transformers.js/custom_usage).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from awq_onnx import companions
from awq_onnx.companions import ONNX, Companion
from awq_onnx.errors import OutputError
from awq_onnx.store import OpenedModel

WEB_HALF = "_fp16"  # the end of its names for what is half as wide already
# Of models in several files, as optimum and transformers.js name them.
PARTS = frozenset({"encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged"})
PARTS |= {"text_model", "vision_model", "vision_encoder", "audio_encoder", "embed_tokens"}
IN_MEMORY = "model.onnx"  # what a model that was no file is called
WEB_DTYPES = WEB_DTYPE, WEB_HALF_DTYPE = "q4", "q4f16"  # transformers.js' names, and the ends of its file names


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
        told = companions.with_external_data(self.companions, self.graph.name)
        return replace(self, whole=False, companions=told)


def is_folder(output: str | os.PathLike[str]) -> bool:
    """Whether that names a folder to write into: by a separator at its end, or because it is one."""
    ends = tuple(filter(None, (os.sep, os.altsep)))
    return os.fspath(output).endswith(ends) or os.path.isdir(output)  # noqa: PTH112 (raises for no name)


def graph_paths(model: Path, output: str | os.PathLike[str]) -> list[Path]:
    """Every file that may be the output of `destination`, for the file of a model that nobody has opened."""
    if not is_folder(output):
        return [Path(output)]
    return [Path(output) / name for name in (_plain_name(model), *(_web_name(model, dtype) for dtype in WEB_DTYPES))]


def destination(opened: OpenedModel, output: str | os.PathLike[str], *, web: bool = False) -> Destination:
    """Where a model goes that is written to `output`. web: in one file, and in a folder under the names of
    transformers.js. Raises OutputError where that is the folder of the model.
    """
    if not (Path(output).name or is_folder(output)):
        raise OutputError("the output has no name; give it one")
    how = Destination(Path(output), data_suffix="_data", whole=True) if web else Destination(Path(output))
    if not is_folder(output):
        return how
    folder, source = Path(output), opened.path or Path(IN_MEMORY)
    dtype = WEB_HALF_DTYPE if _is_half(opened.model) else WEB_DTYPE
    how = replace(how, graph=folder / (_web_name(source, dtype) if web else _plain_name(source)), folder=folder)
    if opened.path is None:
        return how
    if folder.resolve() in {source.parent.resolve(), companions.home(source).resolve()}:
        raise OutputError(f"{folder} is the folder of the model that is read; name another one, or a file")
    try:
        found = _companions(how, source, opened.model, dtype if web else None)
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return replace(how, companions=found, left=tuple(_left(how, source)))


def _companions(how: Destination, source: Path, model: ir.Model, web_dtype: str | None) -> tuple[Companion, ...]:
    if web_dtype is None or how.folder is None:
        return tuple(companions.plain(source, _plain_name(source)))
    return tuple(companions.for_web(source, model, how.folder, how.graph.name, web_dtype))


def _plain_name(source: Path) -> str:
    return f"{ONNX}/{source.name}" if companions.home(source) != source.parent else source.name


def _web_name(source: Path, dtype: str) -> str:
    return f"{ONNX}/{source.stem.removesuffix(WEB_HALF)}_{dtype}.onnx"


def _is_half(model: ir.Model) -> bool:
    """Whether most of the weights have 16 bits: so have the activations then."""
    sizes = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 0}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in sizes:
            sizes[value.const_value.dtype] += value.const_value.size
    return sizes[ir.DataType.FLOAT16] > sizes[ir.DataType.FLOAT]


def _left(how: Destination, source: Path) -> Iterator[str]:
    """The other parts of a model of several that are not in the folder either."""
    parts = sorted(path for path in source.parent.glob("*.onnx") if path.stem in PARTS)
    if source.stem in PARTS:
        yield from (one.name for one in parts if one != source and not any(how.graph.parent.glob(f"{one.stem}*.onnx")))
