"""Moving nodes to our domain: which, why not the others, and that the output is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbits
import numpy as np
import onnx
import onnxruntime
import pytest
from builders import save, values_of
from gpus import Emulated
from nbits import MICROSOFT, OURS, Node, node
from onnx import TensorProto, helper

from awq_onnx import adoption, kernels
from awq_onnx.errors import ModelError, ModelFileError, OutputError
from awq_onnx.kernels import library
from awq_onnx.kernels.__main__ import main
from awq_onnx.output import OutputFiles

HALF = np.float16
SERVED, EIGHT_BITS = node(dtype=HALF, name="served", zero_points=True), node(dtype=HALF, name="eight", bits=8)


def floats_as_zero_points() -> Node:
    one = node(dtype=HALF, name="odd")
    one.zero_points = np.full(one.scales.shape, 8, HALF)
    return one


LEFT = [
    pytest.param(EIGHT_BITS, "its weight has 8 bits, the kernels know 4", id="8 bits"),
    pytest.param(
        node(dtype=HALF, name="odd", group_index=np.zeros(40, np.int32)), "it has the input g_idx", id="g_idx"
    ),
    pytest.param(floats_as_zero_points(), "its zero points are not uint8", id="float zero points"),
    pytest.param(node(1024, 3, 512, HALF, name="odd"), "its block_size is 512", id="block size"),
]


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A model with a node that is served and one that is not."""
    return save(nbits.model(SERVED, EIGHT_BITS), tmp_path / "model.onnx")


def nodes_of(path: Path) -> dict[str, onnx.NodeProto]:
    return {one.name: one for one in onnx.load(path).graph.node}


def test_a_node_that_is_served_moves_and_another_stays_with_its_reason(both: Path, tmp_path: Path) -> None:
    done = kernels.adopt(both, tmp_path / "out.onnx")
    assert done == kernels.Adoption(("served",), (kernels.Left("eight", "its weight has 8 bits, the kernels know 4"),))
    before, after = nodes_of(both), nodes_of(tmp_path / "out.onnx")
    assert (after["served"].domain, after["eight"].domain) == (OURS, MICROSOFT)
    after["served"].domain = MICROSOFT
    assert after == before


@pytest.mark.parametrize(("left", "reason"), LEFT)
def test_what_the_kernels_do_not_serve_is_left(left: Node, reason: str, tmp_path: Path) -> None:
    served = node(left.K, 3, 32, HALF, name="served")
    model = nbits.model(served)
    left.append(model.graph, "x" if left.dtype == HALF else "x32", "y1")
    if left.dtype != HALF:
        model.graph.input.append(helper.make_tensor_value_info("x32", TensorProto.FLOAT, ["n", left.K]))
    done = kernels.adopt(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx")
    assert done.moved == ("served",)
    assert [one.name for one in done.left] == [left.name]
    assert done.left[0].reason.startswith(reason)


def test_a_tensor_behind_a_reshape_is_known_too(tmp_path: Path) -> None:
    """As where the head shares its scales with the embedding."""
    model = nbits.model(SERVED)
    (inner,) = model.graph.node
    model.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [2], SERVED.scales.shape))
    model.graph.node.insert(0, helper.make_node("Reshape", [inner.input[2], "shape"], ["scales"], name="view"))
    model.graph.node[1].input[2] = "scales"
    assert kernels.adopt(save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx").moved == ("served",)


def test_weights_and_metadata_are_what_they_were(tmp_path: Path) -> None:
    model = nbits.model(SERVED, EIGHT_BITS)
    model.metadata_props.add(key="made by", value="a test")
    source = save(model, tmp_path / "model.onnx", external=True)
    kernels.adopt(source, tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert {one.domain: one.version for one in written.opset_import} == {"": 17, MICROSOFT: 1, OURS: 1}
    assert list(written.metadata_props) == list(model.metadata_props)
    for name, values in values_of(model).items():
        np.testing.assert_array_equal(values_of(written)[name], values)


def test_the_adopted_model_runs_each_node_where_it_belongs(both: Path, tmp_path: Path, emulated_gpu: Emulated) -> None:
    kernels.adopt(both, tmp_path / "out.onnx")
    options: Any = onnxruntime.SessionOptions()
    library.configure_and_register(
        options,
        library.path(),
        "CPUExecutionProvider",
        driver=emulated_gpu.driver,
        folder=emulated_gpu.folder,
        replace=False,
    )
    running = onnxruntime.InferenceSession(tmp_path / "out.onnx", options, providers=["CPUExecutionProvider"])
    plain = onnxruntime.InferenceSession(both, providers=["CPUExecutionProvider"])
    a = SERVED.activations(3)
    emulated_gpu.launched()
    ours, theirs = running.run(None, {"x": a})
    assert emulated_gpu.launched() == ["awq_plain_f16"]
    np.testing.assert_allclose(ours, SERVED.expected(a), atol=2e-2)
    np.testing.assert_array_equal(theirs, plain.run(["y1"], {"x": a})[0])


def test_a_model_with_nothing_for_the_kernels_is_an_error(tmp_path: Path) -> None:
    source = save(nbits.model(EIGHT_BITS), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="none of its 1 MatMulNBits can be moved; of eight, its weight has 8 bits"):
        kernels.adopt(source, tmp_path / "out.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx"}


def test_a_model_that_was_not_quantised_is_told_so(tmp_path: Path) -> None:
    model = nbits.model(SERVED)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Other", "elsewhere"
    source = save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"has no com.microsoft::MatMulNBits; quantise it with awq-onnx first"):
        kernels.adopt(source, tmp_path / "out.onnx")


def test_the_output_is_there_whole_or_not_at_all(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: OutputFiles) -> int:
        raise OutputError("the disk is full")

    output = tmp_path / "out.onnx"
    output.write_bytes(b"something else")
    monkeypatch.setattr(OutputFiles, "publish", fail)
    with pytest.raises(OutputError, match="full"):
        kernels.adopt(both, output, overwrite=True)
    assert output.read_bytes() == b"something else"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "out.onnx"}


def test_an_output_that_exists_is_not_overwritten_unasked(both: Path, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"something else")
    with pytest.raises(OutputError, match="exists already"):
        kernels.adopt(both, tmp_path / "out.onnx")


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        adoption.adopt(tmp_path / "none.onnx", tmp_path / "out.onnx")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    return int(ended.value.code or 0)


def test_the_command_says_what_was_moved_and_left(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("adopt", both, "-o", tmp_path / "out.onnx") == 0
    assert capsys.readouterr().out == (
        "1 MatMulNBits moved to the domain awq_onnx, 1 left to onnxruntime\n"
        "eight: its weight has 8 bits, the kernels know 4\n"
    )
    assert command("adopt", both, "-o", tmp_path / "out.onnx") == 4
    assert "python -m awq_onnx.kernels: " in capsys.readouterr().err
    assert command("adopt", both, "-o", tmp_path / "out.onnx", "--force") == 0


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("adopt", tmp_path / "none.onnx", "-o", tmp_path / "out.onnx") == 3
    said = capsys.readouterr().err
    assert said == f"python -m awq_onnx.kernels: {tmp_path / 'none.onnx'} does not exist\n"
    assert command("adopt") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
