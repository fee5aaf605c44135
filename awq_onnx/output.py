"""Write a model that appears whole or not at all, and that the same command goes on with after an interruption.

Tensors go to the new data file one after the other as they are finished, the graph last; both are made in a work
folder beside the output and renamed into place at the end. A journal in that folder tells what is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import wire
from awq_onnx.companions import Companion
from awq_onnx.errors import ModelFileError, OutputError
from awq_onnx.folder import Destination
from awq_onnx.journal import Entry, Journal
from awq_onnx.store import INLINE_BYTES, OpenedModel, reference

Array = NDArray[Any]

FILE_INLINE_BYTES = 1 << 10  # tensors below stay in the written graph file; the rest goes to the data file
PAGE_BYTES = 4096  # large tensors start on a page of the data file, so that they can be mapped
LINE_BYTES = 64  # small ones on a cache line
COPY_BYTES = 1 << 24
PROTOBUF_BYTES = (1 << 31) - 1  # the largest file that can hold a whole model
ASIDE, JOURNAL, LOCK = "aside", "journal", "lock"
SPILLED = "value-*.npy"  # what the parts of a graph leave there, see `calibrate.shelf`
REPLACED = "replaced"  # the folder with the output that was there before
PARTS = "parts"  # what is being published: names there, and places
WHOLE, COMPANION = "whole.tmp", "companion-"


def alignment(size_bytes: int) -> int:
    """Of a tensor in the data file, in bytes."""
    return PAGE_BYTES if size_bytes >= INLINE_BYTES else LINE_BYTES


def work_folder(output: Path) -> Path:
    """Where an output is made."""
    return output.with_name(f".{output.name}.unfinished")


class DataFile:
    """A file that tensors are appended to; what it held beyond `end` is cut off."""

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(end)
        self._file.seek(end)

    @property
    def end(self) -> int:
        return self._file.tell()

    def append(self, name: str, values: Array) -> ir.ExternalTensor:
        """The tensor to put into a graph."""
        offset = self._aligned(values.nbytes)
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._file.flush()  # so that it can be read again
        return reference(name, self._path.name, offset, ir.Tensor(values, name=name), self._path.parent)

    def append_tensor(self, name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """A copy of a tensor that lies in memory or in another file, of which little is read at once."""
        offset = self._aligned(tensor.nbytes)
        for block in _blocks(tensor):
            self._file.write(block)
        self._file.flush()  # so that it can be read again
        return reference(name, self._path.name, offset, tensor, self._path.parent)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _aligned(self, size_bytes: int) -> int:
        self._file.write(bytes(-self.end % alignment(size_bytes)))
        return self.end


def _blocks(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    if not isinstance(tensor, ir.ExternalTensor):
        yield tensor.tobytes()
        return
    with Path(tensor.path).open("rb") as source:
        yield from _blocks_of(source, tensor.offset or 0, tensor.nbytes)


def _blocks_of(source: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    source.seek(offset)
    while length:
        block = source.read(min(COPY_BYTES, length))
        if not block:
            raise ModelFileError(f"{source.name} became shorter while it was being read")
        yield block
        length -= len(block)


class OutputFiles:
    """The model being written: NAME, NAME.data and what goes with them, all in the folder `work` until `publish`.

    Use as a context manager. Leaving it removes that folder, unless the run was interrupted or could not write, and has
    finished something that the same command goes on from; `done` holds that, by name.
    """

    def __init__(
        self, output: Path | Destination, source: OpenedModel, *, overwrite: bool, key: str | None = None
    ) -> None:
        """output: the file to write, or more about it. key: a run is gone on with by one with the same key; None: by
        none.
        """
        self.destination = output if isinstance(output, Destination) else Destination(output)
        self.output = self.destination.graph
        self.work = work_folder(self.output)
        self._made_folders: list[Path] = []
        self._source = source
        self._overwrite = overwrite
        self._key = key
        self._published = False
        self.done: Mapping[str, Entry] = {}
        with self.failures():
            self._check_places()
            if not self.work.exists():  # else it may hold what was there
                self._check_existing()

    def __enter__(self) -> OutputFiles:
        with self.failures():
            try:
                self._make_folder(self.output.parent)
                self.work.mkdir(exist_ok=True)
            except OSError:
                self._remove_empty_folders()
                raise
            self._lock = _locked(self.work / LOCK, self.output)
            try:
                self._begin()
            except BaseException:
                if not self.resumable:
                    self._remove_work()
                self._unlock()
                raise
        return self

    def _begin(self) -> None:
        self._put_back()
        paths = (self.work / self.destination.data.name, self.work / ASIDE)
        self._journal = Journal(self.work / JOURNAL, self._key, paths)
        self.done = self._journal.entries
        try:
            self._check_existing()
        except OutputError:
            self._journal.close()
            raise
        if not self.done:
            self._remove_all_but(JOURNAL, LOCK)
        for stray in (*self.work.glob(SPILLED), *self.work.glob("*.tmp")):
            stray.unlink()
        self._data, self._aside = (DataFile(path, end) for path, end in zip(paths, self._journal.ends, strict=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._data, self._aside, self._journal):
            with contextlib.suppress(OSError):  # a full disk; that it is full has been said where it was met
                file.close()
        if not (self.resumable and isinstance(error, KeyboardInterrupt | OutputError)):
            self._remove_work()
        self._unlock()

    @property
    def resumable(self) -> bool:
        """Whether something is finished that the same command would go on from."""
        return bool(self.done) and self._key is not None and not self._published

    def append(self, name: str, values: Array) -> ir.ExternalTensor:
        """Write an array to the data file now; the tensor to put into the graph."""
        with self.failures():
            return self._data.append(name, values)

    def append_tensor(self, name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write a tensor that is no plain array, of 4-bit numbers, to the data file now."""
        with self.failures():
            return self._data.append_tensor(name, tensor)

    def keep(self, name: str, values: Array) -> ir.ExternalTensor:
        """Write an array to the work folder, out of memory."""
        with self.failures():
            return self._aside.append(name, values)

    def record(self, name: str, entry: Entry) -> None:
        """`name` is finished, and with it all that was written so far: `done` holds the entry from now on."""
        with self.failures():
            self._data.sync()
            self._aside.sync()
            self._journal.record(name, entry, (self._data.end, self._aside.end))

    def write(self, model: ir.Model) -> Path:
        """Copy what `model` still refers to in the source, write the graph; the finished file in the work folder."""
        path = self.work / self.output.name
        with self.failures():
            for graph in model.graphs():
                for value in graph.initializers.values():
                    value.const_value = self._moved(value)
            self._data.sync()
            ir.save(model, path)
            with path.open("rb") as written:
                os.fsync(written.fileno())
        return path

    def publish(self) -> int:
        """Rename all files into place; the size of the model in bytes. Whatever interrupts that, what was there before
        comes back.
        """
        with self.failures():
            self._data.close()
            whole = self.destination.whole and self._made_whole()
            parts = self._write_companions(whole)
            parts |= {path.name: path for path in (self.destination.data, self.output)}  # last the graph, which tells
            for place in parts.values():
                self._make_folder(place.parent)
            relative = {name: os.path.relpath(place, self.output.parent) for name, place in parts.items()}
            _write(self.work / PARTS, [json.dumps(relative).encode()])
            (self.work / REPLACED).mkdir()
            try:
                for name, place in reversed(parts.items()):
                    if os.path.lexists(place):
                        place.rename(self.work / REPLACED / name)
                for name, place in parts.items():
                    if not (whole and place == self.destination.data):
                        (self.work / name).rename(place)
                self._published = True
            except BaseException:
                self._put_back()
                raise
            return self.output.stat().st_size + (0 if whole else self.destination.data.stat().st_size)

    @property
    def written_bytes(self) -> int:
        """Of the model in the work folder."""
        return sum((self.work / path.name).stat().st_size for path in (self.destination.data, self.output))

    def _write_companions(self, whole: bool) -> dict[str, Path]:
        """Where the companions go, by the names that they have in the work folder now."""
        folder = self.destination.folder
        if folder is None:
            return {}
        too_large = self.destination.whole and not whole
        as_written = self.destination.with_external_data() if too_large else self.destination
        places = {}
        for number, companion in enumerate(as_written.companions):
            name = f"{COMPANION}{number}"
            _write(self.work / name, [companion.read()])
            places[name] = folder / companion.target
        return places

    def _made_whole(self) -> bool:
        """Put the weights into the graph file, little by little, if one file can hold them."""
        graph = self.work / self.output.name
        pieces = wire.internalize(memoryview(graph.read_bytes()))
        if wire.size_of(pieces) > PROTOBUF_BYTES:
            return False
        with (self.work / self.destination.data.name).open("rb") as data:
            _write(self.work / WHOLE, _read(pieces, data))
        (self.work / WHOLE).replace(graph)
        return True

    def check_space(self, needed_bytes: int) -> None:
        """Raise OutputError where the disk has no room for so much, beside what is written already."""
        needed_bytes *= 2 if self.destination.whole else 1  # the weights are in both files for a moment
        with self.failures():
            free = shutil.disk_usage(self.work).free
        missing = needed_bytes - self._data.end - free
        if missing > 0:
            raise OutputError(
                f"{self.output} needs about {needed_bytes / 1e9:.2f} GB, {missing / 1e9:.2f} GB more than its disk has "
                "free; make room, or name an output elsewhere"
            )

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn what goes wrong on the disk into an OutputError."""
        try:
            yield
        except OSError as error:
            left = "the same command goes on from here" if self.resumable else "no half-written model was left"
            raise OutputError(f"cannot write {self.output}: {error.strerror}; {left}") from error

    def _moved(self, value: ir.Value) -> ir.TensorProtocol | None:
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return tensor
        written = isinstance(tensor, ir.ExternalTensor) and tensor.base_dir == str(self.work)
        if written or (tensor.nbytes < FILE_INLINE_BYTES and not isinstance(tensor, ir.ExternalTensor)):
            return tensor
        return self._data.append_tensor(value.name or "", tensor)

    def _check_places(self) -> None:
        folder = self.destination.folder
        if folder is None and not self.output.parent.is_dir():
            raise OutputError(f"the folder {self.output.parent} for the output does not exist")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, where the output has to make a folder; choose another name")
        for path in self._places():
            if path.is_dir():
                raise OutputError(f"{path} is a folder, where the output has to write a file; choose another name")
            if path.exists() and path.resolve() in self._source.files:
                raise OutputError(f"the output {path} belongs to the model that is read; choose another name")

    def _check_existing(self) -> None:
        for path, companion in self._places().items():
            if self._overwrite or not path.exists():
                continue
            if companion is None:
                raise OutputError(f"{path} exists already; choose another name, or overwrite it with --force")
            if not companion.replaces(path.read_bytes()):
                raise OutputError(
                    f"{path} exists already and is another than the model's; choose another folder, or overwrite it "
                    "with --force"
                )

    def _places(self) -> dict[Path, Companion | None]:
        """Every file that may be written; what it is if not the model."""
        model: dict[Path, Companion | None] = {self.output: None, self.destination.data: None}
        folder = self.destination.folder or self.output.parent
        return model | {folder / one.target: one for one in self.destination.companions}

    def _put_back(self) -> None:
        """Undo a `publish` that came no further than this; one that put the graph in place was done."""
        replaced = self.work / REPLACED
        if not replaced.is_dir():
            return
        if not (self.work / self.output.name).exists():
            self._published = True
            self._remove_all_but(LOCK)
            return
        for name, relative in json.loads((self.work / PARTS).read_bytes()).items():
            place = self.output.parent / relative
            if not (self.work / name).exists():
                place.rename(self.work / name)
            if os.path.lexists(replaced / name):  # it may be a link, which leads nowhere from there
                (replaced / name).rename(place)
        replaced.rmdir()

    def _make_folder(self, path: Path) -> None:
        """Where the output is a folder; it goes again if nothing comes of the output."""
        missing = [one for one in (path, *path.parents) if not one.exists()] if self.destination.folder else []
        for folder in reversed(missing):
            folder.mkdir()
            self._made_folders.append(folder)

    def _remove_empty_folders(self) -> None:
        for folder in reversed(self._made_folders):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def _remove_all_but(self, *names: str) -> None:
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in names:
                path.unlink()

    def _remove_work(self) -> None:
        """The journal first: without it whatever else is left counts for nothing. Never an output that could not be put
        back where it was.
        """
        if (self.work / REPLACED).exists() and not self._published:
            return
        with contextlib.suppress(OSError):
            (self.work / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        self._remove_empty_folders()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """A file, on the disk."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _read(pieces: Iterable[wire.Piece], data: BinaryIO) -> Iterator[bytes | memoryview]:
    """The pieces of a file, those that lie in the data file block by block."""
    for piece in pieces:
        if isinstance(piece, wire.Span):
            yield from _blocks_of(data, piece.offset, piece.length)
        else:
            yield piece


def _locked(path: Path, output: Path) -> int | None:
    """A lock that is held as long as the process lives; raises OutputError where another one holds it."""
    if fcntl is None:  # two runs for one output are the user's to avoid
        return None
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"another run is writing {output}; wait for it, or choose another name") from None
    except OSError:  # a file system that has no locks
        os.close(lock)
        return None
    if not path.exists() or os.fstat(lock).st_ino != path.stat().st_ino:  # another run ended just now
        os.close(lock)
        raise OutputError(f"another run was writing {output} until now; look at what it wrote")
    return lock
