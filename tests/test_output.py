"""A model appears whole or not at all; what an interrupted run had finished is there for the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import (
    LARGE_K,
    LARGE_N,
    Array,
    GraphBuilder,
    assert_same_values,
    large_model,
    norm_and_readers,
    run,
    save,
    values_of,
)
from killing import Killed, killed_after
from onnx import TensorProto, external_data_helper, helper

from awq_onnx.errors import OutputError
from awq_onnx.output import OutputFiles, work_folder
from awq_onnx.store import INLINE_BYTES, OpenedModel, open_model

WORK = ".copy.onnx.unfinished"


def feed(seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((2, 3, LARGE_K)).astype(np.float32)}


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
    x = builder.input("x", [LARGE_K, LARGE_N])
    condition = builder.add("Greater", builder.add("ReduceMax", x, keepdims=0), builder.constant(0.0))
    branches = {}
    for offset, name in enumerate(("then_branch", "else_branch")):
        weight = TensorProto(name=f"{name}.weight", data_type=TensorProto.FLOAT, dims=[LARGE_K, LARGE_N])
        weight.raw_data = b"\0"  # set_external_data wants something to replace
        external_data_helper.set_external_data(
            weight, location, offset=offset * 4 * LARGE_K * LARGE_N, length=4 * LARGE_K * LARGE_N
        )
        weight.ClearField("raw_data")
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [LARGE_K, LARGE_N])
        node = helper.make_node("Add", [x, weight.name], [output.name])
        branches[name] = helper.make_graph([node], name, [], [output], [weight])
    builder.output(builder.add("If", condition, to="y", **branches), [LARGE_K, LARGE_N])
    graph = helper.make_graph(builder.nodes, "branches", builder.inputs, builder.outputs, builder.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_weights_of_subgraphs_are_copied_too(tmp_path: Path, folder: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((2, LARGE_K, LARGE_N)).astype(np.float32)
    (tmp_path / "weights.bin").write_bytes(weights.tobytes())
    path = save(model_with_branches("weights.bin"), tmp_path / "model.onnx")
    with open_model(path) as opened:
        write(opened, folder / "copy.onnx")
    for x, weight in (
        (np.ones((LARGE_K, LARGE_N), np.float32), weights[0]),
        (-np.ones((LARGE_K, LARGE_N), np.float32), weights[1]),
    ):
        np.testing.assert_array_equal(run(path, {"x": x})["y"], x + weight)
        np.testing.assert_array_equal(run(folder / "copy.onnx", {"x": x})["y"], x + weight)


def test_appended_arrays_are_read_back(source: OpenedModel, folder: Path) -> None:
    arrays: list[Array] = [
        np.arange(size, dtype=dtype) for size, dtype in ((5, np.uint8), (70000, np.uint8), (33, np.float16))
    ]
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
        assert WORK in names_in(output.parent)
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_nothing_is_left_where_the_work_stops_before_anything_is_finished(
    source: OpenedModel, folder: Path, error: BaseException
) -> None:
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
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
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
from awq_onnx.output import OutputFiles
from awq_onnx.store import open_model

model, output, limit, appended = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with open_model(model) as opened, OutputFiles(output, opened, overwrite=False, key="key") as files:
        if sys.argv[5] == "recorded":
            files.record("something", {})
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
@pytest.mark.parametrize("recorded", [False, True], ids=["nothing finished", "recorded"])
def test_a_full_disk_is_told_and_what_is_finished_stays(
    tmp_path: Path, folder: Path, limit_bytes: int, appended_bytes: int, recorded: bool
) -> None:
    model = large_model() if appended_bytes != 1001 else norm_and_readers(K=16, columns=(8,)).model()
    path = save(model, tmp_path / "model.onnx")
    arguments = [str(path), str(folder / "copy.onnx"), str(limit_bytes), str(appended_bytes)]
    arguments += ["recorded" if recorded else ""]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"cannot write {folder / 'copy.onnx'}: File too large; ")
    left = "the same command goes on from here" if recorded else "no half-written model was left"
    assert done.stdout.endswith(f"{left}\n")
    assert names_in(folder) == ({WORK} if recorded else set())


def test_a_disk_with_too_little_room_is_told_before_any_work(
    source: OpenedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with OutputFiles(folder / "copy.onnx", source, overwrite=False) as files:
        files.check_space(10**9)
        with pytest.raises(OutputError, match=r"about 1\.50 GB, 0\.50 GB more than its disk has free"):
            files.check_space(15 * 10**8)
        files.append("codes", np.zeros(10_000, np.uint8))
        files.check_space(10**9 + 10_000)  # of which so much is written already


# Going on


def begin(opened: OpenedModel, output: Path, *, key: str | None = "key", overwrite: bool = False) -> OutputFiles:
    """Files as a run has them that will be killed."""
    return OutputFiles(output, opened, overwrite=overwrite, key=key).__enter__()


def die(files: OutputFiles) -> None:
    """What the system does with the files of a process that is killed."""
    assert files._lock is not None
    os.close(files._lock)
    for file in (files._data, files._aside, files._journal):
        file.close()


def stop(opened: OpenedModel, output: Path, error: BaseException, **options: Any) -> None:
    """Finish one thing, begin another, and stop."""

    def run() -> None:
        with OutputFiles(output, opened, overwrite=False, **options) as files:
            files.append("one", np.arange(5, dtype=np.uint8))
            files.keep("aside", np.arange(3.0))
            files.record("one", {"is": "finished"})
            files.append("two", np.full(7, 7, np.uint8))
            raise error

    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OutputError("full")], ids=repr)
def test_an_interrupted_run_is_gone_on_with(source: OpenedModel, folder: Path, error: BaseException) -> None:
    stop(source, folder / "copy.onnx", error, key="key")
    assert names_in(folder) == {WORK}
    with OutputFiles(folder / "copy.onnx", source, overwrite=False, key="key") as files:
        assert files.done == {"one": {"is": "finished"}}
        assert files.append("two", np.full(3, 3, np.uint8)).offset == 64
        files.write(source.model)
        files.publish()
    assert names_in(folder) == {"copy.onnx", "copy.onnx.data"}
    data = (folder / "copy.onnx.data").read_bytes()
    assert data[:5] == bytes(range(5))
    assert data[64:67] == bytes([3, 3, 3])
    assert data[67:71] == bytes(4)  # nothing of what was not finished


@pytest.mark.parametrize("error", [ValueError(), MemoryError(), SystemExit()], ids=repr)
def test_nothing_is_left_of_a_run_that_failed_otherwise(
    source: OpenedModel, folder: Path, error: BaseException
) -> None:
    stop(source, folder / "copy.onnx", error, key="key")
    assert names_in(folder) == set()


def test_nothing_is_left_of_a_run_that_nobody_can_go_on_with(source: OpenedModel, folder: Path) -> None:
    stop(source, folder / "copy.onnx", KeyboardInterrupt())
    assert names_in(folder) == set()


@pytest.mark.parametrize("key", ["other", None])
def test_a_run_with_another_key_begins_anew(source: OpenedModel, folder: Path, key: str | None) -> None:
    stop(source, folder / "copy.onnx", KeyboardInterrupt(), key="key")
    (folder / WORK / "values-3.npz").write_text("of the other run")
    with OutputFiles(folder / "copy.onnx", source, overwrite=False, key=key) as files:
        assert files.done == {}
        assert names_in(folder / WORK) == {"aside", "copy.onnx.data", "journal", "lock"}
        assert files.append("one", np.zeros(3, np.uint8)).offset == 0
    assert names_in(folder) == set()


def test_what_parts_of_a_graph_left_there_is_removed(source: OpenedModel, folder: Path) -> None:
    stop(source, folder / "copy.onnx", KeyboardInterrupt(), key="key")
    for name in ("value-0.npy", "value-17.npy", "values-2.tmp", "values-1.npz"):
        (folder / WORK / name).write_text("")
    with OutputFiles(folder / "copy.onnx", source, overwrite=False, key="key"):
        assert names_in(folder / WORK) == {"aside", "copy.onnx.data", "journal", "lock", "values-1.npz"}


def test_a_killed_run_is_gone_on_with_from_what_it_recorded(source: OpenedModel, folder: Path) -> None:
    files = begin(source, folder / "copy.onnx")
    files.record("one", {"at": files.append("one", np.arange(5, dtype=np.uint8)).offset})
    files.append("two", np.arange(100, dtype=np.uint8))
    die(files)
    with OutputFiles(folder / "copy.onnx", source, overwrite=False, key="key") as files:
        assert files.done == {"one": {"at": 0}}
        assert (folder / WORK / "copy.onnx.data").read_bytes() == bytes(range(5))


def test_a_run_that_was_killed_while_it_wrote_the_graph_is_gone_on_with(source: OpenedModel, folder: Path) -> None:
    write(source, folder / "copy.onnx")
    expected = [(folder / name).read_bytes() for name in ("copy.onnx", "copy.onnx.data")]
    with open_model(folder.parent / "in" / "model.onnx") as opened:
        files = begin(opened, folder / "copy.onnx", overwrite=True)
        files.record("one", {})
        files.write(opened.model)
        die(files)
    with (
        open_model(folder.parent / "in" / "model.onnx") as opened,
        OutputFiles(folder / "copy.onnx", opened, overwrite=True, key="key") as files,
    ):
        files.write(opened.model)
        files.publish()
    assert [(folder / name).read_bytes() for name in ("copy.onnx", "copy.onnx.data")] == expected


def test_an_output_that_came_meanwhile_is_not_overwritten_unasked(source: OpenedModel, folder: Path) -> None:
    stop(source, folder / "copy.onnx", KeyboardInterrupt(), key="key")
    (folder / "copy.onnx").write_text("precious")
    with (
        pytest.raises(OutputError, match="--force"),
        OutputFiles(folder / "copy.onnx", source, overwrite=False, key="key"),
    ):
        pass
    assert names_in(folder) == {"copy.onnx", WORK}  # with --force it goes on
    with OutputFiles(folder / "copy.onnx", source, overwrite=True, key="key") as files:
        assert set(files.done) == {"one"}


@pytest.mark.parametrize("key", ["key", "other"])
def test_another_run_for_the_same_output_is_refused_and_disturbs_nothing(
    source: OpenedModel, folder: Path, key: str
) -> None:
    with OutputFiles(folder / "copy.onnx", source, overwrite=False, key="key") as files:
        files.record("one", {})
        with (
            pytest.raises(OutputError, match=r"another run is writing .*copy\.onnx"),
            OutputFiles(folder / "copy.onnx", source, overwrite=True, key=key),
        ):
            pass
        files.append("two", np.zeros(5, np.uint8))
        files.write(source.model)
        files.publish()
    assert names_in(folder) == {"copy.onnx", "copy.onnx.data"}


def test_two_outputs_in_one_folder_are_written_at_the_same_time(source: OpenedModel, folder: Path) -> None:
    with (
        open_model(folder.parent / "in" / "model.onnx") as other,
        OutputFiles(folder / "one.onnx", source, overwrite=False, key="key") as one,
        OutputFiles(folder / "two.onnx", other, overwrite=False, key="key") as two,
    ):
        for files, opened in ((one, source), (two, other)):
            files.write(opened.model)
            files.publish()
    assert len(names_in(folder)) == 4


# Publishing


def killed_at(rename: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> int:
    """Do something of which the renames from this one on never happen; how many did."""
    with killed_after(rename, monkeypatch) as renames, contextlib.suppress(Killed):
        act()
    return renames.done


def old_output(folder: Path, kind: str) -> None:
    if kind == "links":
        (folder / "elsewhere").mkdir()
        for name in ("copy.onnx", "copy.onnx.data"):
            (folder / "elsewhere" / name).write_text(f"old {name}")
            (folder / name).symlink_to(f"elsewhere/{name}")
    elif kind == "broken links":
        for name in ("copy.onnx", "copy.onnx.data"):
            (folder / name).symlink_to(f"nowhere/{name}")
    else:
        for name in kind.split():
            (folder / name).write_text(f"old {name}")


def state(folder: Path) -> dict[str, object]:
    """All that is there but the work folder: links as where they lead."""
    return {
        path.name: str(path.readlink()) if path.is_symlink() else path.read_text(errors="replace")
        for path in folder.iterdir()
        if not path.is_dir()
    }


KINDS = ["", "copy.onnx", "copy.onnx.data", "copy.onnx copy.onnx.data", "links", "broken links"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["key", "other"])
def test_a_run_that_was_killed_while_it_published_is_undone_by_the_next(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str
) -> None:
    """Before the last rename; after it the new model is there, and the run was done."""
    path = save(large_model(), tmp_path / "model.onnx")
    old_output(folder, kind)
    before, renames = state(folder), 2 + len(state(folder))
    for rename in range(renames + 1):
        with open_model(path) as opened:
            files = begin(opened, folder / "copy.onnx", overwrite=True)
            files.record("one", {})
            files.write(opened.model)
            assert killed_at(rename, monkeypatch, files.publish) == rename
            die(files)
        with open_model(path) as opened, OutputFiles(folder / "copy.onnx", opened, overwrite=True, key=key) as files:
            if rename < renames:
                assert state(folder) == before
                assert set(files.done) == ({"one"} if key == "key" else set())
            else:
                assert_same_values(values_of(onnx.load(folder / "copy.onnx")), values_of(large_model()))
                assert not files.done
        assert not work_folder(folder / "copy.onnx").exists()


@pytest.mark.parametrize("first", range(5))
def test_the_undoing_itself_may_be_killed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    path = save(large_model(), tmp_path / "model.onnx")
    old_output(folder, "copy.onnx copy.onnx.data")
    before = state(folder)
    for second in range(4):
        with open_model(path) as opened:
            files = begin(opened, folder / "copy.onnx", overwrite=True)
            files.record("one", {})
            files.write(opened.model)
            killed_at(first, monkeypatch, files.publish)
            die(files)
        with open_model(path) as opened:
            another = OutputFiles(folder / "copy.onnx", opened, overwrite=True, key="key")
            killed_at(second, monkeypatch, another.__enter__)
            if hasattr(another, "_data"):
                die(another)
        with open_model(path) as opened, OutputFiles(folder / "copy.onnx", opened, overwrite=True, key="key"):
            if first < 4:
                assert state(folder) == before
            else:
                assert_same_values(values_of(onnx.load(folder / "copy.onnx")), values_of(large_model()))
                for name, content in before.items():
                    (folder / name).write_text(str(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
def test_a_rename_that_fails_is_undone_at_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    path = save(large_model(), tmp_path / "model.onnx")
    old_output(folder, kind)
    before, original = state(folder), Path.rename
    done, fails_at = 0, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == fails_at:
            raise error
        return original(self, target)

    def overwrite() -> None:
        nonlocal done
        with (
            open_model(path) as opened,
            OutputFiles(folder / "copy.onnx", opened, overwrite=True) as files,
            monkeypatch.context() as patched,
        ):
            files.write(opened.model)
            done = 0
            patched.setattr(Path, "rename", failing)
            files.publish()

    for fails_at in range(1, 3 + len(before)):  # noqa: B007
        with pytest.raises((KeyboardInterrupt, OutputError)):
            overwrite()
        assert state(folder) == before
        assert not work_folder(folder / "copy.onnx").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
@pytest.mark.parametrize("key", ["key", None])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_an_undoing_that_fails_loses_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, first: int, key: str | None, error: BaseException
) -> None:
    """Not even of a model in memory: the next run for this output puts it back."""
    path = save(large_model(), tmp_path / "model.onnx")
    old_output(folder, "copy.onnx copy.onnx.data")
    before, original, done = state(folder), Path.rename, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done > first:
            raise error
        return original(self, target)

    def overwrite() -> None:
        with open_model(path) as opened, OutputFiles(folder / "copy.onnx", opened, overwrite=True, key=key) as files:
            files.record("one", {})
            files.write(opened.model)
            files.publish()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        for _ in range(2):  # while it publishes, and when the next run begins
            with pytest.raises((KeyboardInterrupt, OutputError)):
                overwrite()
    with open_model(path) as opened, OutputFiles(folder / "copy.onnx", opened, overwrite=True, key=key):
        assert state(folder) == before
    assert state(folder) == before
