"""Weights stay where they are, wherever ONNX allows them to be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import LARGE_K, assert_same_values, large_model, norm_and_readers, run, save, tiny_decoder, values_of
from numpy.typing import NDArray
from onnx import external_data_helper

from awq_onnx.errors import ModelError, ModelFileError
from awq_onnx.store import INLINE_BYTES, OpenedModel, describe, described, open_model, reference

Array = NDArray[Any]


def opened_values(opened: OpenedModel) -> dict[str, Array]:
    """All initializers of an opened model, copied."""
    tensors = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    return {name: opened.read(tensor).copy() for name, tensor in tensors.items() if tensor is not None}


def references(opened: OpenedModel) -> dict[str, ir.ExternalTensor]:
    tensors = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def save_with_data(model: onnx.ModelProto, path: Path, location: str, *, one_file: bool = True) -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (path.parent / location).parent.mkdir(exist_ok=True, parents=True)
    onnx.save(
        copy, path, save_as_external_data=True, all_tensors_to_one_file=one_file, location=location, size_threshold=0
    )
    return path


def move_to(model: onnx.ModelProto, name: str, location: str, **entries: Any) -> None:
    """Make the initializer `name` of `model` a reference to `location`."""
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    external_data_helper.set_external_data(tensor, location=location, **entries)
    tensor.ClearField("raw_data")


# Reading


def test_the_weights_of_a_model_in_one_file_stay_in_it(tmp_path: Path) -> None:
    model = large_model()
    path = save(model, tmp_path / "model.onnx")
    with open_model(path) as opened:
        assert set(references(opened)) == {"w0", "w1"}
        assert all(Path(tensor.path) == path.resolve() for tensor in references(opened).values())
        assert opened.folder == tmp_path.resolve()
        assert opened.path == path
        assert opened.size_bytes == path.stat().st_size
        assert_same_values(opened_values(opened), values_of(model))


def test_what_is_read_is_mapped_and_read_only(tmp_path: Path) -> None:
    path = save(large_model(), tmp_path / "model.onnx")
    with open_model(path) as opened:
        weight = opened.read(references(opened)["w0"])
        assert not weight.flags.writeable
        assert isinstance(weight, np.memmap)
        before = weight.copy()
        opened.let_go()
        np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("external", [False, True])
def test_small_tensors_are_in_memory_and_large_ones_in_their_file(tmp_path: Path, external: bool) -> None:
    path = save(large_model(), tmp_path / "model.onnx", external=external)
    with open_model(path) as opened:
        for name, values in opened_values(opened).items():
            assert (name in references(opened)) == (values.nbytes >= INLINE_BYTES)


@pytest.mark.parametrize("one_file", [True, False], ids=["one file", "many files"])
@pytest.mark.parametrize("location", ["weights.bin", "sub/folder/weights.bin"])
def test_external_data_are_read_from_wherever_they_lie(tmp_path: Path, location: str, one_file: bool) -> None:
    model = large_model()
    if not one_file:
        folder = Path(location).parent
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        referring = large_model()
        for name, values in values_of(model).items():
            (tmp_path / folder / f"{name}.bin").write_bytes(values.tobytes())
            move_to(referring, name, f"{folder.as_posix()}/{name}.bin")
        path = save(referring, tmp_path / "model.onnx")
    else:
        path = save_with_data(model, tmp_path / "model.onnx", location)
    with open_model(path) as opened:
        assert set(references(opened)) == {"w0", "w1"}
        assert_same_values(opened_values(opened), values_of(model))
        assert opened.size_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 4096, 70001])
def test_a_weight_may_start_anywhere_in_its_file(tmp_path: Path, offset: int) -> None:
    model = large_model()
    weight = values_of(model)["w0"]
    (tmp_path / "weights.bin").write_bytes(b"\xff" * offset + weight.tobytes() + b"\xff" * 9)
    move_to(model, "w0", "weights.bin", offset=offset, length=weight.nbytes)
    path = save(model, tmp_path / "model.onnx")
    with open_model(path) as opened:
        np.testing.assert_array_equal(opened.read(references(opened)["w0"]), weight)


def test_a_reference_without_offset_and_length_means_the_whole_file(tmp_path: Path) -> None:
    model = large_model()
    weight = values_of(model)["w0"]
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    move_to(model, "w0", "weights.bin")
    with open_model(save(model, tmp_path / "model.onnx")) as opened:
        np.testing.assert_array_equal(opened.read(references(opened)["w0"]), weight)


@pytest.mark.parametrize("external", [False, True])
def test_tensors_of_no_elements_and_of_no_dimensions_can_be_opened(tmp_path: Path, external: bool) -> None:
    model = tiny_decoder(layers=1)
    path = save(model, tmp_path / "model.onnx", external=external)
    with open_model(path) as opened:
        assert_same_values(opened_values(opened), values_of(model))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_float_type_keeps_its_values(tmp_path: Path, dtype: type) -> None:
    model = norm_and_readers(K=320, columns=(128,), dtype=dtype).model()
    with open_model(save(model, tmp_path / "model.onnx")) as opened:
        assert set(references(opened)) == {"w0"}
        assert_same_values(opened_values(opened), values_of(model))


@pytest.mark.parametrize("external", [False, True])
def test_a_hugging_face_cache_of_links_is_read(tmp_path: Path, external: bool) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = large_model()
    saved = tmp_path / "elsewhere" / "model.onnx"
    saved.parent.mkdir()
    if external:
        save_with_data(model, saved, "model.onnx_data")
        saved.with_name("model.onnx_data").rename(blobs / "0b1c")
        (snapshot / "model.onnx_data").symlink_to("../../blobs/0b1c")
    else:
        save(model, saved)
    saved.rename(blobs / "a2f3")
    path = snapshot / "model.onnx"
    path.symlink_to("../../blobs/a2f3")
    with open_model(path) as opened:
        assert opened.path == path
        assert opened.folder == blobs.resolve()
        assert_same_values(opened_values(opened), values_of(model))
        referring = onnx.ModelProto.FromString(opened.serialize())
        onnx.save(referring, blobs / "check.onnx")  # onnxruntime follows the references, links and all
        feed = {"x": np.random.default_rng(0).standard_normal((2, 3, LARGE_K)).astype(np.float32)}
        np.testing.assert_array_equal(run(blobs / "check.onnx", feed)["y0"], run(model, feed)["y0"])


def test_hard_links_are_read_like_files(tmp_path: Path) -> None:
    model = large_model()
    saved = save(model, tmp_path / "model.onnx", external=True)
    other = tmp_path / "other"
    other.mkdir()
    for file in (saved, tmp_path / "model.onnx.data"):
        (other / file.name).hardlink_to(file)
        file.unlink()
    with open_model(other / "model.onnx") as opened:
        assert_same_values(opened_values(opened), values_of(model))


def test_a_path_relative_to_the_current_folder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large_model()
    save(model, tmp_path / "model.onnx", external=True)
    monkeypatch.chdir(tmp_path)
    with open_model("model.onnx") as opened:
        assert opened.folder == tmp_path.resolve()
        assert_same_values(opened_values(opened), values_of(model))


def test_opening_changes_no_file(tmp_path: Path) -> None:
    path = save(large_model(), tmp_path / "model.onnx", external=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with open_model(path) as opened:
        opened_values(opened)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Files that are no model


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelFileError) as caught, open_model(path):
        pass
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "model.onnx", "does not exist")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").symlink_to("gone")
    assert_refused(tmp_path / "model.onnx", "does not exist")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is a folder")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert_refused(tmp_path / "model.onnx", "is empty")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n", id="a git-lfs pointer"
        ),
        pytest.param(b"<!DOCTYPE html><html><body>404</body></html>", id="a web page"),
        pytest.param(b'{"model_type": "llama"}', id="JSON"),
        pytest.param(b"\x00" * 100, id="zeros"),
        pytest.param(b"\xff" * 100, id="ones"),
        pytest.param(b"PK\x03\x04" + bytes(range(60)), id="a zip file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert_refused(tmp_path / "model.onnx", "not an ONNX model")


def test_a_protobuf_without_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx.ModelProto(producer_name="nobody").SerializeToString())
    assert_refused(tmp_path / "model.onnx", "holds no graph")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    data = large_model().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(data[: int(share * len(data))])
    assert_refused(tmp_path / "model.onnx", "truncated")


def test_missing_external_data_are_named(tmp_path: Path) -> None:
    path = save_with_data(large_model(), tmp_path / "model.onnx", "weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert_refused(path, "weights.bin", "missing")


@pytest.mark.parametrize("kept", [0, 1, 100_000])
def test_external_data_that_are_too_short_are_named(tmp_path: Path, kept: int) -> None:
    path = save_with_data(large_model(), tmp_path / "model.onnx", "weights.bin")
    os.truncate(tmp_path / "weights.bin", kept)
    assert_refused(path, "weights.bin", "too short")


def test_a_reference_whose_length_does_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    model = large_model()
    weight = values_of(model)["w0"]
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    move_to(model, "w0", "weights.bin", offset=0, length=weight.nbytes - 4)
    assert_refused(save(model, tmp_path / "model.onnx"), "weights.bin", "w0")


# Models in memory


def assert_taken_and_left_as_it_was(source: Any, to_proto: Callable[[Any], onnx.ModelProto]) -> None:
    before = to_proto(source).SerializeToString(deterministic=True)
    expected = values_of(large_model())
    with open_model(source) as opened:
        assert opened.path is None
        assert {"w0", "w1"} <= set(references(opened))
        actual = opened_values(opened)
        for name in ("w0", "w1", "norm.weight"):
            np.testing.assert_array_equal(actual[name], expected[name])
        folder = opened.folder
    assert not folder.exists()
    assert to_proto(source).SerializeToString(deterministic=True) == before


def test_a_model_proto_is_taken_and_left_as_it_was() -> None:
    assert_taken_and_left_as_it_was(large_model(), lambda proto: proto)


def test_a_model_of_onnx_ir_is_taken_and_left_as_it_was() -> None:
    assert_taken_and_left_as_it_was(ir.from_proto(large_model()), ir.to_proto)


def test_a_model_of_onnx_ir_with_weights_in_a_file_is_taken_and_left_as_it_was(tmp_path: Path) -> None:
    model = ir.load(save(large_model(), tmp_path / "model.onnx", external=True))
    assert_taken_and_left_as_it_was(model, ir.to_proto)


def test_a_graph_of_graphsurgeon_is_taken_and_left_as_it_was() -> None:
    graphsurgeon = pytest.importorskip("onnx_graphsurgeon")
    assert_taken_and_left_as_it_was(graphsurgeon.import_onnx(large_model()), graphsurgeon.export_onnx)


@pytest.mark.parametrize("source", [None, 7, b"model.onnx", ["model.onnx"], {}], ids=repr)
def test_something_that_is_no_model_is_refused(source: Any) -> None:
    with pytest.raises(ModelError, match=f"cannot quantise a {type(source).__name__}"), open_model(source):
        pass


def test_a_model_in_memory_whose_weights_were_not_loaded_is_refused(tmp_path: Path) -> None:
    path = save(large_model(), tmp_path / "model.onnx", external=True)
    source = onnx.load(path, load_external_data=False)
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data, which is missing"), open_model(source):
        pass


# What is known of a model without reading it


def test_a_fingerprint_stays_while_the_files_do(tmp_path: Path) -> None:
    path = save(large_model(), tmp_path / "model.onnx", external=True)
    with open_model(path) as one, open_model(path) as other:
        assert one.fingerprint == other.fingerprint
        assert one.fingerprint is not None


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_fingerprint_changes_with_every_file_whatever_its_time_is_set_to(tmp_path: Path, name: str) -> None:
    path = save(large_model(), tmp_path / "model.onnx", external=True)
    with open_model(path) as opened:
        before = opened.fingerprint
        content, status = bytearray((tmp_path / name).read_bytes()), (tmp_path / name).stat()
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert opened.fingerprint != before


def test_a_model_in_memory_has_no_fingerprint() -> None:
    with open_model(large_model()) as opened:
        assert opened.fingerprint is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_a_reference_survives_json(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    values: Array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    (tmp_path / "data").write_bytes(bytes(64) + values.tobytes())
    tensor = reference("a", "data", 64, ir.Tensor(values, name="a"), tmp_path)
    found = described(json.loads(json.dumps(describe(tensor))), tmp_path)
    assert (found.name, found.offset, found.nbytes, found.path) == ("a", 64, values.nbytes, tensor.path)
    assert found.numpy().dtype == values.dtype
    np.testing.assert_array_equal(found.numpy(), values)
