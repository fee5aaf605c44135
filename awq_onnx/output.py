"""Write a model that appears whole or not at all, and that the same command goes on with after an interruption.

Tensors go to the new data file one after the other as they are finished, the graph last; both are made in a work
folder beside the output and renamed into place at the end. A journal in that folder tells what is finished.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.errors import ModelFileError, OutputError
from awq_onnx.journal import Entry, Journal
from awq_onnx.store import INLINE_BYTES, OpenedModel, reference

Array = NDArray[Any]

FILE_INLINE_BYTES = 1 << 10  # tensors below stay in the written graph file; the rest goes to the data file
PAGE_BYTES = 4096  # large tensors start on a page of the data file, so that they can be mapped
LINE_BYTES = 64  # small ones on a cache line
COPY_BYTES = 1 << 24
ASIDE, JOURNAL, LOCK = "aside", "journal", "lock"
SPILLED = "value-*.npy"  # what the parts of a graph leave there, see `calibrate.shelf`
REPLACED = "replaced"  # the folder with the output that was there before


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
        source.seek(tensor.offset or 0)
        remaining = tensor.nbytes
        while remaining:
            block = source.read(min(COPY_BYTES, remaining))
            if not block:
                raise ModelFileError(f"{tensor.path} became shorter while it was being read")
            yield block
            remaining -= len(block)


class OutputFiles:
    """The model being written: NAME and NAME.data, both in the folder `work` until `publish`.

    Use as a context manager. Leaving it removes that folder, unless the run was interrupted or could not write, and has
    finished something that the same command goes on from; `done` holds that, by name.
    """

    def __init__(self, output: Path, source: OpenedModel, *, overwrite: bool, key: str | None = None) -> None:
        """key: a run is gone on with by one with the same key; None: by none."""
        self.output = output
        self.work = work_folder(output)
        self._names = (f"{output.name}.data", output.name)  # the graph last: with it the output is there
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
            self.work.mkdir(exist_ok=True)
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
        paths = (self.work / self._names[0], self.work / ASIDE)
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
        """Rename both files into place; their size in bytes. Whatever interrupts that, the old output comes back."""
        with self.failures():
            self._data.close()
            (self.work / REPLACED).mkdir()
            try:
                for name in reversed(self._names):
                    if os.path.lexists(self.output.parent / name):
                        (self.output.parent / name).rename(self.work / REPLACED / name)
                for name in self._names:
                    (self.work / name).rename(self.output.parent / name)
                self._published = True
            except BaseException:
                self._put_back()
                raise
            return sum((self.output.parent / name).stat().st_size for name in self._names)

    def check_space(self, needed_bytes: int) -> None:
        """Raise OutputError where the disk has no room for so much, beside what is written already."""
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
        if not self.output.parent.is_dir():
            raise OutputError(f"the folder {self.output.parent} for the output does not exist")
        for path in (self.output.with_name(name) for name in reversed(self._names)):
            if path.is_dir():
                raise OutputError(f"{path} is a folder, where the output has to write a file; choose another name")
            if path.exists() and path.resolve() in self._source.files:
                raise OutputError(f"the output {path} belongs to the model that is read; choose another name")

    def _check_existing(self) -> None:
        for path in (self.output.with_name(name) for name in reversed(self._names)):
            if path.exists() and not self._overwrite:
                raise OutputError(f"{path} exists already; choose another name, or overwrite it with --force")

    def _put_back(self) -> None:
        """Undo a `publish` that came no further than this; one that put the graph in place was done."""
        replaced = self.work / REPLACED
        if not replaced.is_dir():
            return
        if not (self.work / self.output.name).exists():
            self._published = True
            self._remove_all_but(LOCK)
            return
        for name in self._names:
            place = self.output.parent / name
            if not (self.work / name).exists():
                place.rename(self.work / name)
            if os.path.lexists(replaced / name):  # it may be a link, which leads nowhere from there
                (replaced / name).rename(place)
        replaced.rmdir()

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

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)


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
