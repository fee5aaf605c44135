"""Open a model without reading its weights, write one that appears whole or not at all.

Reading: weights stay memory-mapped in the files they came in, wherever ONNX allows them to be (inside the .onnx
file, in one external file, in many). Writing: tensors go to the new data file one after the other as they are
finished, the graph last; both are made in a work folder beside the output and renamed into place at the end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import wire
from awq_onnx.errors import ModelError, ModelFileError, OutputError

if TYPE_CHECKING:
    import onnx_graphsurgeon

Array = NDArray[Any]
ModelSource: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | onnx_graphsurgeon.Graph"

INLINE_BYTES = 1 << 16  # tensors below stay in the graph in memory: norm gains, biases, shapes
FILE_INLINE_BYTES = 1 << 10  # tensors below stay in the written graph file; the rest goes to the data file
PAGE_BYTES = 4096  # large tensors start on a page of the data file, so that they can be mapped
LINE_BYTES = 64  # small ones on a cache line
COPY_BYTES = 1 << 24
WORK_PREFIX = ".awq-onnx-"


@dataclass(frozen=True)
class OpenedModel:
    """A model whose large weights are references (`ir.ExternalTensor`) into files below `folder`.

    folder: an absolute path without links: onnxruntime refuses references that leave it. path: the file the user
    named, None for a model in memory. files: that and its data files, without links. size_bytes: of all of them.
    """

    model: ir.Model
    folder: Path
    path: Path | None
    files: frozenset[Path]
    size_bytes: int
    _maps: dict[Path, Array] = field(default_factory=dict)

    def read(self, tensor: ir.TensorProtocol) -> Array:
        """The values of a tensor: a read-only view of the mapped file where it is a reference."""
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        raw = self._mapped(Path(tensor.path))[tensor.offset or 0 :][: tensor.nbytes]
        return raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())

    def let_go(self) -> None:
        """Give the pages of mapped weights back to the system; reading them again is only slower."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED") and isinstance(mapped.base, mmap.mmap):
                mapped.base.madvise(mmap.MADV_DONTNEED)

    def serialize(self) -> bytes:
        """The ModelProto with its references: small, to be loaded with `folder`."""
        return bytes(ir.to_proto(self.model).SerializeToString())

    def _mapped(self, path: Path) -> Array:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[path]


@contextmanager
def open_model(source: ModelSource) -> Iterator[OpenedModel]:
    """Open a file, or take a model that is in memory already (its weights go to a temporary file meanwhile).

    Raises ModelFileError where the file is missing, no ONNX, truncated, or its external data missing or short.
    """
    if isinstance(source, str | os.PathLike):
        yield _open_file(Path(source))
        return
    with tempfile.TemporaryDirectory(prefix="awq-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        _spill(source, path)
        yield replace(_open_file(path), path=None)


def _spill(source: Any, path: Path) -> None:
    if not isinstance(source, ir.Model | onnx.ModelProto):
        source = _from_graphsurgeon(source)
    model = source if isinstance(source, ir.Model) else ir.from_proto(source)
    try:
        ir.save(model, path, external_data="weights")
    except FileNotFoundError as error:
        raise ModelFileError(
            f"the model in memory refers to weights in {error.filename}, which is missing; "
            "give the path of the .onnx file instead, or load the model with its external data"
        ) from error


def _from_graphsurgeon(source: Any) -> onnx.ModelProto:
    if not type(source).__module__.startswith("onnx_graphsurgeon"):
        raise ModelError(
            f"cannot quantise a {type(source).__name__}; give a path, an onnx.ModelProto, an onnx_ir.Model "
            "or an onnx_graphsurgeon.Graph"
        )
    import onnx_graphsurgeon

    exported: onnx.ModelProto = onnx_graphsurgeon.export_onnx(source)
    return exported


def _open_file(path: Path) -> OpenedModel:
    try:
        if not path.exists():
            raise ModelFileError(f"{path} does not exist")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no file"
            raise ModelFileError(f"{path} is {kind}; name the .onnx file that holds the graph")
        proto = _parse(path)
        if not proto.HasField("graph"):
            raise ModelFileError(f"{path} is not an ONNX model: it holds no graph")
        model = ir.from_proto(proto)
        folder, sizes = _locate_weights(model, path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    except ModelFileError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise a dozen classes for broken files
        raise ModelFileError(f"{path} is not an ONNX model, or truncated: {' '.join(str(error).split())}") from error
    return OpenedModel(model, folder, path, frozenset(sizes), sum(sizes.values()))


def _parse(path: Path) -> onnx.ModelProto:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ModelFileError(f"{path} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            stripped = wire.externalize(data, path.name, INLINE_BYTES)
    proto: onnx.ModelProto = onnx.ModelProto.FromString(stripped)
    return proto


def _locate_weights(model: ir.Model, path: Path) -> tuple[Path, dict[Path, int]]:
    """Make every reference relative to one folder without links, small ones plain values; the folder, the files."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    for value in values:
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
            _check_length(value.const_value)
    references = [(v, v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    files = {str(tensor.location): (path.parent / tensor.location).resolve() for _, tensor in references}
    for location, file in files.items():
        if not file.is_file():
            raise ModelFileError(f"{path} keeps weights in {location}, which is missing from {path.parent}")
    folder = Path(os.path.commonpath([file.parent for file in files.values()] or [path.parent.resolve()]))
    sizes = {file: file.stat().st_size for file in [*files.values(), path.resolve()]}
    for value, tensor in references:
        file = files[str(tensor.location)]
        offset, length = tensor.offset or 0, tensor.nbytes
        if offset + length > sizes[file] or tensor.length not in (None, length):
            raise ModelFileError(
                f"{file.name} is too short: weight {value.name} of {path} needs bytes {offset} to {offset + length}, "
                f"the file has {sizes[file]}"
            )
        relative = file.relative_to(folder).as_posix()
        value.const_value = _reference(value.name or "", relative, offset, tensor, folder)
        if length < INLINE_BYTES:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=tensor.dtype, name=value.name)
    return folder, sizes


def _check_length(tensor: ir.TensorProtocol) -> None:
    """Raise ValueError where a tensor inside the graph has fewer bytes than its shape needs."""
    if tensor.dtype != ir.DataType.STRING and len(tensor.tobytes()) != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name} does not have the bytes that its shape needs")


def _reference(name: str, location: str, offset: int, like: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location, offset, like.nbytes, like.dtype, shape=ir.Shape(like.shape.numpy()), name=name, base_dir=str(folder)
    )


class OutputFiles:
    """The model being written: NAME and NAME.data, both in a work folder until `publish`.

    Use as a context manager; leaving it removes the work folder, whatever happened.
    """

    def __init__(self, output: Path, source: OpenedModel, *, overwrite: bool) -> None:
        self.output = output
        self._data_name = f"{output.name}.data"
        self._source = source
        with self._failures():
            self._check(overwrite)

    def __enter__(self) -> OutputFiles:
        with self._failures():
            self._work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=self.output.parent))
            self._data = (self._work / self._data_name).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk; that it is full has been said where it was met
            self._data.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def append(self, name: str, values: Array) -> ir.ExternalTensor:
        """Write an array to the data file now; the tensor to put into the graph."""
        with self._failures():
            offset = self._align(values.nbytes)
            self._data.write(np.ascontiguousarray(values).view(np.uint8).data)
        like = ir.Tensor(values, name=name)
        return _reference(name, self._data_name, offset, like, self._work)

    def write(self, model: ir.Model) -> Path:
        """Copy what `model` still refers to in the source, write the graph; the finished file in the work folder."""
        path = self._work / self.output.name
        with self._failures():
            for graph in model.graphs():
                for value in graph.initializers.values():
                    value.const_value = self._moved(value)
            self._data.flush()
            os.fsync(self._data.fileno())
            ir.save(model, path)
        return path

    def publish(self) -> int:
        """Rename both files into place; their size in bytes. Whatever interrupts that, the old output comes back."""
        names = (self._data_name, self.output.name)  # the graph last: with it the output is there
        replaced = self._work / "replaced"
        with self._failures():
            self._data.close()
            replaced.mkdir()
            try:
                for name in reversed(names):
                    if (self.output.parent / name).exists():
                        (self.output.parent / name).rename(replaced / name)
                for name in names:
                    (self._work / name).rename(self.output.parent / name)
            except BaseException:
                self._take_back(names, replaced)
                raise
            return sum((self.output.parent / name).stat().st_size for name in names)

    def _take_back(self, names: Sequence[str], replaced: Path) -> None:
        for name in names:
            place = self.output.parent / name
            if (replaced / name).exists():
                (replaced / name).replace(place)
            elif not (self._work / name).exists():  # the new one was put in place already, over nothing
                place.unlink(missing_ok=True)

    def _moved(self, value: ir.Value) -> ir.TensorProtocol | None:
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return tensor
        if isinstance(tensor, ir.ExternalTensor):
            return tensor if tensor.base_dir == str(self._work) else self._copied(tensor)
        if tensor.nbytes < FILE_INLINE_BYTES:
            return tensor
        offset = self._align(tensor.nbytes)
        self._data.write(tensor.tobytes())
        return _reference(value.name or "", self._data_name, offset, tensor, self._work)

    def _copied(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        offset = self._align(tensor.nbytes)
        with Path(tensor.path).open("rb") as source:
            source.seek(tensor.offset or 0)
            remaining = tensor.nbytes
            while remaining:
                block = source.read(min(COPY_BYTES, remaining))
                if not block:
                    raise ModelFileError(f"{tensor.path} became shorter while it was being read")
                self._data.write(block)
                remaining -= len(block)
        return _reference(tensor.name or "", self._data_name, offset, tensor, self._work)

    def _align(self, size_bytes: int) -> int:
        position = self._data.tell()
        self._data.write(bytes(-position % (PAGE_BYTES if size_bytes >= INLINE_BYTES else LINE_BYTES)))
        return self._data.tell()

    def _check(self, overwrite: bool) -> None:
        if not self.output.parent.is_dir():
            raise OutputError(f"the folder {self.output.parent} for the output does not exist")
        for path in (self.output, self.output.with_name(self._data_name)):
            if path.is_dir():
                raise OutputError(f"{path} is a folder, where the output has to write a file; choose another name")
            if path.exists() and path.resolve() in self._source.files:
                raise OutputError(f"the output {path} belongs to the model that is read; choose another name")
            if path.exists() and not overwrite:
                raise OutputError(f"{path} exists already; choose another name, or overwrite it with --force")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {self.output}: {error.strerror}; no half-written model was left"
            ) from error
