"""Open a model without reading its weights.

They stay memory-mapped in the files they came in, wherever ONNX allows them to be: inside the .onnx file, in one
external file, in many.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import wire
from awq_onnx.errors import ModelError, ModelFileError

if TYPE_CHECKING:
    import onnx_graphsurgeon

Array = NDArray[Any]
ModelSource: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | onnx_graphsurgeon.Graph"

INLINE_BYTES = 1 << 16  # tensors below stay in the graph in memory: norm gains, biases, shapes


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

    @property
    def fingerprint(self) -> str | None:
        """What changes whenever its files do; None for a model in memory."""
        if self.path is None:
            return None
        return json.dumps([fingerprint(path) for path in sorted(self.files)])

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


def fingerprint(path: Path) -> list[str | int]:
    """What changes whenever a file does, whatever its times are set to."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


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
        value.const_value = reference(value.name or "", relative, offset, tensor, folder)
        if length < INLINE_BYTES:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=tensor.dtype, name=value.name)
    return folder, sizes


def _check_length(tensor: ir.TensorProtocol) -> None:
    """Raise ValueError where a tensor inside the graph has fewer bytes than its shape needs."""
    if tensor.dtype != ir.DataType.STRING and len(tensor.tobytes()) != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name} does not have the bytes that its shape needs")


def reference(name: str, location: str, offset: int, like: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
    """A tensor whose bytes lie in a file of `folder`."""
    return ir.ExternalTensor(
        location, offset, like.nbytes, like.dtype, shape=ir.Shape(like.shape.numpy()), name=name, base_dir=str(folder)
    )


def describe(tensor: ir.ExternalTensor) -> dict[str, Any]:
    """A reference as JSON can hold it."""
    return {
        "name": tensor.name,
        "location": str(tensor.location),
        "offset": tensor.offset or 0,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape.numpy()),
    }


def described(description: Mapping[str, Any], folder: Path) -> ir.ExternalTensor:
    """The reference, to a file in `folder`, that `describe` described."""
    dtype, shape = ir.DataType[description["dtype"]], ir.Shape(description["shape"])
    like = ir.LazyTensor(lambda: ir.Tensor(np.zeros(0)), dtype, shape)
    return reference(description["name"], description["location"], description["offset"], like, folder)
