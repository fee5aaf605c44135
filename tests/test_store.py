"""Reading: weights stay where they are, wherever ONNX allows. Writing: whole files or none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import GraphBuilder, norm_and_readers, run, save, tiny_decoder
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from awq_onnx.errors import ModelError, ModelFileError, OutputError
from awq_onnx.store import INLINE_BYTES, WORK_PREFIX, OpenedModel, OutputFiles, open_model

Array = NDArray[Any]

K, N = 160, 128  # a weight of 80 kB: large enough to stay in its file


def large_model(seed: int = 0) -> onnx.ModelProto:
    """x -> RMSNorm -> two MatMuls, each with a weight that stays in its file."""
    return norm_and_readers(K=K, columns=(N, N), seed=seed).model()


def values_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def opened_values(opened: OpenedModel) -> dict[str, Array]:
    """All initializers of an opened model, copied."""
    tensors = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    return {name: opened.read(tensor).copy() for name, tensor in tensors.items() if tensor is not None}


def assert_same_values(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def references(opened: OpenedModel) -> dict[str, ir.ExternalTensor]:
    tensors = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def feed(seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((2, 3, K)).astype(np.float32)}


def save_with_data(model: onnx.ModelProto, path: Path, location: str, *, one_file: bool = True) -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (path.parent / location).parent.mkdir(exist_ok=True, parents=True)
    onnx.save(
        copy, path, save_as_external_data=True, all_tensors_to_one_file=one_file, location=location, size_threshold=0
    )
    return path


def move_to(model: onnx.ModelProto, name: str, location: str, **entries: int) -> None:
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
    model = norm_and_readers(K=320, columns=(N,), dtype=dtype).model()
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
        np.testing.assert_array_equal(run(blobs / "check.onnx", feed())["y0"], run(model, feed())["y0"])


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


# Writing


@pytest.fixture
def source(tmp_path: Path) -> Iterator[OpenedModel]:
    (tmp_path / "in").mkdir()
    with open_model(save(large_model(), tmp_path / "in" / "model.onnx", external=True)) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def write(opened: OpenedModel, output: Path, *, overwrite: bool = False) -> int:
    """Copy a model as it is; the size in bytes."""
    with OutputFiles(output, opened, overwrite=overwrite) as files:
        files.write(opened.model)
        return files.publish()


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("external", [False, True])
def test_a_copied_model_computes_the_same(tmp_path: Path, folder: Path, external: bool) -> None:
    model = large_model()
    with open_model(save(model, tmp_path / "model.onnx", external=external)) as opened:
        size_bytes = write(opened, folder / "copy.onnx")
    assert names_in(folder) == {"copy.onnx", "copy.onnx.data"}
    assert size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert_same_values(values_of(onnx.load(folder / "copy.onnx")), values_of(model))
    expected, actual = run(model, feed()), run(folder / "copy.onnx", feed())
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def test_a_copy_does_not_need_its_source(tmp_path: Path, source: OpenedModel, folder: Path) -> None:
    write(source, folder / "copy.onnx")
    (tmp_path / "in" / "model.onnx.data").unlink()
    (tmp_path / "in" / "model.onnx").unlink()
    assert set(run(folder / "copy.onnx", feed())) == {"y0", "y1"}


def model_with_branches(location: str) -> onnx.ModelProto:
    """If x is positive add one weight, else another: both belong to the subgraphs, and lie in `location`."""
    builder = GraphBuilder()
    x = builder.input("x", [K, N])
    condition = builder.add("Greater", builder.add("ReduceMax", x, keepdims=0), builder.constant(0.0))
    branches = {}
    for offset, name in enumerate(("then_branch", "else_branch")):
        weight = TensorProto(name=f"{name}.weight", data_type=TensorProto.FLOAT, dims=[K, N])
        weight.raw_data = b"\0"  # set_external_data wants something to replace
        external_data_helper.set_external_data(weight, location, offset=offset * 4 * K * N, length=4 * K * N)
        weight.ClearField("raw_data")
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [K, N])
        node = helper.make_node("Add", [x, weight.name], [output.name])
        branches[name] = helper.make_graph([node], name, [], [output], [weight])
    builder.output(builder.add("If", condition, to="y", **branches), [K, N])
    graph = helper.make_graph(builder.nodes, "branches", builder.inputs, builder.outputs, builder.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_weights_of_subgraphs_are_copied_too(tmp_path: Path, folder: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((2, K, N)).astype(np.float32)
    (tmp_path / "weights.bin").write_bytes(weights.tobytes())
    path = save(model_with_branches("weights.bin"), tmp_path / "model.onnx")
    with open_model(path) as opened:
        write(opened, folder / "copy.onnx")
    for x, weight in ((np.ones((K, N), np.float32), weights[0]), (-np.ones((K, N), np.float32), weights[1])):
        np.testing.assert_array_equal(run(path, {"x": x})["y"], x + weight)
        np.testing.assert_array_equal(run(folder / "copy.onnx", {"x": x})["y"], x + weight)


def test_appended_arrays_are_read_back(source: OpenedModel, folder: Path) -> None:
    arrays = [np.arange(size, dtype=dtype) for size, dtype in ((5, np.uint8), (70000, np.uint8), (33, np.float16))]
    arrays.append(np.arange(12, dtype=np.float32).reshape(3, 4).T)  # not contiguous
    with OutputFiles(folder / "copy.onnx", source, overwrite=False) as files:
        tensors = [files.append(f"array_{index}", values) for index, values in enumerate(arrays)]
        for tensor in tensors:
            value = ir.val(tensor.name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
            source.model.graph.register_initializer(value)
        files.write(source.model)
        files.publish()
    written = values_of(onnx.load(folder / "copy.onnx"))
    for index, values in enumerate(arrays):
        np.testing.assert_array_equal(written[f"array_{index}"], values)


def test_the_written_model_can_be_run_before_it_is_published(source: OpenedModel, folder: Path) -> None:
    with OutputFiles(folder / "copy.onnx", source, overwrite=False) as files:
        finished = files.write(source.model)
        assert not (folder / "copy.onnx").exists()
        assert set(run(finished, feed())) == {"y0", "y1"}
    assert names_in(folder) == set()


def test_tensors_are_aligned_in_the_data_file(source: OpenedModel, folder: Path) -> None:
    with OutputFiles(folder / "copy.onnx", source, overwrite=False) as files:
        offsets = [files.append(f"a{size}", np.zeros(size, np.uint8)).offset for size in (1, 65, INLINE_BYTES, 3)]
        files.write(source.model)
        files.publish()
    assert offsets == [0, 64, 4096, 4096 + INLINE_BYTES]
    for tensor in onnx.load(folder / "copy.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "copy.onnx.data"
            assert int(entries["offset"]) % (4096 if int(entries["length"]) >= INLINE_BYTES else 64) == 0


def write_and_stop(opened: OpenedModel, output: Path, error: BaseException) -> None:
    with OutputFiles(output, opened, overwrite=True) as files:
        files.append("codes", np.zeros(100_000, np.uint8))
        files.write(opened.model)
        assert any(name.startswith(WORK_PREFIX) for name in names_in(output.parent))
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_nothing_is_left_where_the_work_stops(source: OpenedModel, folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_and_stop(source, folder / "copy.onnx", error)
    assert names_in(folder) == set()


def test_a_failed_overwrite_leaves_the_old_model(source: OpenedModel, folder: Path) -> None:
    old = large_model(seed=1)
    save(old, folder / "copy.onnx", external=True)
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(source, folder / "copy.onnx", KeyboardInterrupt())
    assert names_in(folder) == {"copy.onnx", "copy.onnx.data"}
    assert_same_values(values_of(onnx.load(folder / "copy.onnx")), values_of(old))


@pytest.mark.parametrize("name", ["copy.onnx", "copy.onnx.data"])
def test_what_exists_is_not_overwritten_unasked(source: OpenedModel, folder: Path, name: str) -> None:
    (folder / name).write_text("precious")
    with pytest.raises(OutputError, match=rf"{name} exists already; .* --force"):
        OutputFiles(folder / "copy.onnx", source, overwrite=False)
    assert (folder / name).read_text() == "precious"


def test_overwriting_replaces_and_never_appends(tmp_path: Path, folder: Path) -> None:
    sizes = []
    for _ in range(3):
        with open_model(save(large_model(), tmp_path / "model.onnx", external=True)) as opened:
            sizes.append((write(opened, folder / "copy.onnx", overwrite=True), names_in(folder)))
    assert sizes[0] == sizes[1] == sizes[2]


def test_no_old_graph_ever_meets_new_data(source: OpenedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(large_model(seed=1), folder / "copy.onnx", external=True)
    rename, seen = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        if target.parent == folder:
            seen.append((target.name, (folder / "copy.onnx").exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    write(source, folder / "copy.onnx", overwrite=True)
    assert seen == [("copy.onnx.data", False), ("copy.onnx", False)]


def test_overwriting_a_link_leaves_what_it_links_to(source: OpenedModel, folder: Path) -> None:
    (folder / "precious").write_text("precious")
    (folder / "copy.onnx").symlink_to("precious")
    (folder / "copy.onnx.data").symlink_to("precious")
    write(source, folder / "copy.onnx", overwrite=True)
    assert (folder / "precious").read_text() == "precious"
    assert not (folder / "copy.onnx").is_symlink()
    assert set(run(folder / "copy.onnx", feed())) == {"y0", "y1"}


def test_overwriting_a_hard_link_of_the_model_leaves_the_model(tmp_path: Path, source: OpenedModel) -> None:
    original = tmp_path / "in" / "model.onnx"
    before = original.read_bytes()
    (tmp_path / "copy.onnx").hardlink_to(original)
    write(source, tmp_path / "copy.onnx", overwrite=True)
    assert original.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
def test_the_model_is_never_its_own_output(tmp_path: Path, source: OpenedModel, overwrite: bool, linked: bool) -> None:
    output = tmp_path / "in" / "model.onnx"
    if linked:
        (tmp_path / "link.onnx").symlink_to(output)
        output = tmp_path / "link.onnx"
    with pytest.raises(OutputError, match="belongs to the model that is read"):
        OutputFiles(output, source, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["weights", "weights.data"], ids=["its data would be", "is"])
@pytest.mark.parametrize("large", [True, False], ids=["large weights", "small weights"])
def test_the_data_of_the_model_are_never_the_output(tmp_path: Path, output: str, overwrite: bool, large: bool) -> None:
    model = large_model() if large else norm_and_readers(K=32).model()
    path = save_with_data(model, tmp_path / "model.onnx", "weights.data")
    before = (tmp_path / "weights.data").read_bytes()
    with open_model(path) as opened, pytest.raises(OutputError, match="belongs to the model that is read"):
        write(opened, tmp_path / output, overwrite=overwrite)
    assert (tmp_path / "weights.data").read_bytes() == before


def test_a_missing_folder_is_not_made(source: OpenedModel, folder: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        OutputFiles(folder / "missing" / "copy.onnx", source, overwrite=False)
    assert names_in(folder) == set()


def test_a_folder_that_is_a_file_is_refused(source: OpenedModel, folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(OutputError, match="does not exist"):
        OutputFiles(folder / "file" / "copy.onnx", source, overwrite=False)


def test_an_output_that_is_a_folder_is_refused(source: OpenedModel, folder: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        OutputFiles(folder, source, overwrite=True)


def test_an_output_whose_data_file_is_a_folder_is_refused_before_any_work(source: OpenedModel, folder: Path) -> None:
    (folder / "copy.onnx.data").mkdir()
    with pytest.raises(OutputError, match=r"copy\.onnx\.data is a folder"):
        OutputFiles(folder / "copy.onnx", source, overwrite=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(source: OpenedModel, folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write(source, folder / "copy.onnx")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that takes no files, from root either")
def test_a_folder_that_takes_no_files_is_refused(source: OpenedModel) -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/copy\.onnx: "):
        write(source, Path("/proc/copy.onnx"))


def test_two_models_in_one_folder_leave_each_other_alone(tmp_path: Path, folder: Path) -> None:
    models = {f"{name}.onnx": large_model(seed) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        with open_model(save(model, tmp_path / name)) as opened:
            write(opened, folder / name)
    for name, model in models.items():
        assert_same_values(values_of(onnx.load(folder / name)), values_of(model))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from awq_onnx.errors import OutputError
from awq_onnx.store import OutputFiles, open_model

model, output, limit, appended = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with open_model(model) as opened, OutputFiles(output, opened, overwrite=False) as files:
        files.append("codes", np.zeros(appended, np.uint8))
        files.write(opened.model)
        files.publish()
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize(
    ("limit_bytes", "appended_bytes"),
    [
        pytest.param(100_000, 300_000, id="in the middle of a tensor"),
        pytest.param(100_000, 10, id="while weights are copied"),
        pytest.param(1000, 1001, id="when the buffer is written out"),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, folder: Path, limit_bytes: int, appended_bytes: int
) -> None:
    model = large_model() if appended_bytes != 1001 else norm_and_readers(K=16, columns=(8,)).model()
    path = save(model, tmp_path / "model.onnx")
    arguments = [str(path), str(folder / "copy.onnx"), str(limit_bytes), str(appended_bytes)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"cannot write {folder / 'copy.onnx'}: File too large")
    assert names_in(folder) == set()
