"""Turn the weights inside a .onnx file into references to that same file, without reading them; and references back
into weights.

A model that was exported as one file keeps its weights in the protobuf, and parsing it copies them all. This
module walks the wire format (https://protobuf.dev/programming-guides/encoding) as far as the raw data of the
graph's initializers and rewrites each as ONNX external data: location = the file itself, with offset and length
(https://onnx.ai/onnx/repo-docs/ExternalData.html). onnxruntime maps such references like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

# Field numbers of onnx.proto.
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
# The fields that lead to a tensor, by message.
HOLDS: Mapping[str, Mapping[int, str]] = {
    "model": {MODEL_GRAPH: "graph"},
    "graph": {1: "node", GRAPH_INITIALIZER: "tensor"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}
# Wire types of protobuf.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are no protobuf, or end in the middle of a field."""


def externalize(data: memoryview, location: str, min_bytes: int) -> bytes:
    """The ModelProto in `data` with every initializer of at least `min_bytes` referring to file `location`.

    Raises WireError where `data` does not hold whole fields.
    """
    model = bytearray()
    for number, start, body, end in _fields(data, 0, len(data)):
        if number != MODEL_GRAPH:
            model += data[start:end]
            continue
        graph = b"".join(_graph(data, body, end, location, min_bytes))
        model += _tag(MODEL_GRAPH, BYTES) + _varint(len(graph)) + graph
    return bytes(model)


def _graph(data: memoryview, start: int, end: int, location: str, min_bytes: int) -> Iterator[bytes | memoryview]:
    for number, field, body, stop in _fields(data, start, end):
        if number != GRAPH_INITIALIZER or stop - body < min_bytes:
            yield data[field:stop]
            continue
        tensor = _tensor(data, body, stop, location)
        yield _tag(GRAPH_INITIALIZER, BYTES) + _varint(len(tensor)) + tensor


@dataclass(frozen=True)
class Span:
    """Bytes of the data file."""

    offset: int
    length: int


Piece = bytes | memoryview | Span


def internalize(data: memoryview) -> list[Piece]:
    """The ModelProto in `data` with the bytes in place of every reference, in pieces: those that the data file has
    are to be read from it. Graphs inside nodes have theirs too.
    """
    return _whole(data, 0, len(data), "model")


def size_of(pieces: Sequence[Piece]) -> int:
    """In bytes."""
    return sum(piece.length if isinstance(piece, Span) else len(piece) for piece in pieces)


def _whole(data: memoryview, start: int, end: int, message: str) -> list[Piece]:
    pieces: list[Piece] = []
    for number, field, body, stop in _fields(data, start, end):
        inner = HOLDS[message].get(number)
        if inner is None:
            pieces.append(data[field:stop])
            continue
        held = _whole_tensor(data[body:stop]) if inner == "tensor" else _whole(data, body, stop, inner)
        pieces += [_tag(number, BYTES) + _varint(size_of(held)), *held]
    return pieces


def _whole_tensor(data: memoryview) -> list[Piece]:
    tensor = onnx.TensorProto.FromString(bytes(data))
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return [data]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    span = Span(int(entries["offset"]), int(entries["length"]))
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    return [tensor.SerializeToString() + _tag(TENSOR_RAW_DATA, BYTES) + _varint(span.length), span]


def _tensor(data: memoryview, start: int, end: int, location: str) -> bytes | memoryview:
    raw: tuple[int, int] | None = None
    header = bytearray()
    for number, field, body, stop in _fields(data, start, end):
        if number == TENSOR_RAW_DATA:
            raw = body, stop - body
        else:
            header += data[field:stop]
    if raw is None:
        return data[start:end]
    tensor = onnx.TensorProto.FromString(bytes(header))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(raw[0])), ("length", str(raw[1]))):
        tensor.external_data.add(key=key, value=value)
    return bytes(tensor.SerializeToString())


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start of the field, start of its body, end) of each field in data[position:end]."""
    while position < end:
        start = position
        key, position = _read_varint(data, position, end)
        number, wire_type = key >> 3, key & 7
        if wire_type == BYTES:
            length, position = _read_varint(data, position, end)
            stop = position + length
        elif wire_type == VARINT:
            _, stop = _read_varint(data, position, end)
        elif wire_type in (FIXED64, FIXED32):
            stop = position + (8 if wire_type == FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {wire_type} at byte {start}")
        if stop > end or number == 0:
            raise WireError(f"the field at byte {start} does not end within the file")
        yield number, start, position, stop
        position = stop


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise WireError(f"a number at byte {position} does not end")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)
