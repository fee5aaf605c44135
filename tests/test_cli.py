"""The command `awq-onnx` as a user meets it: what it writes, says and returns, and how it ends when it cannot go on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import GraphBuilder, norm_and_readers, save, tiny_decoder
from onnx import numpy_helper

import awq_onnx
from awq_onnx import Recipe, errors, pipeline
from awq_onnx.cli import main
from awq_onnx.machine import Machine

QUICK = ["--samples", "2", "--sequence-length", "8"]
STAGES = ["Writing text", "Tracing", "Calibrating", "Writing the model", "Measuring"]

WORK = ".model_int4.onnx.unfinished"
ROOT = Path(__file__).parent.parent
# A command that says when it has begun: what comes before is not ours to answer for.
STARTED = "from awq_onnx.cli import main; print('started', flush=True); main()"
GOES_ON = "the same command goes on from here"

Files = dict[str, bytes | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_decoder(), tmp_path / "model.onnx")
    return tmp_path


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """main() sets a handler of its own, which belongs to the command and not to the test run."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def files(folder: Path) -> Files:
    """Everything below a folder, hidden work folders included."""
    return {str(one.relative_to(folder)): one.read_bytes() if one.is_file() else None for one in folder.rglob("*")}


def published(folder: Path) -> Files:
    """`files` without those of an unfinished run."""
    return {name: content for name, content in files(folder).items() if not name.startswith(WORK)}


def command(*arguments: object, cwd: Path | None = None, code: int = 0, **options: object) -> tuple[str, str]:
    """stdout and stderr of the command in a process of its own, from another folder than the model's."""
    words = [sys.executable, "-m", "awq_onnx", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd or Path("/"), check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def main_exits(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(one) for one in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run the command, which must say one sentence, return the code, and touch nothing; the sentence."""

    def run(*arguments: object, code: int) -> str:
        before = files(tmp_path)
        assert main_exits(*QUICK, *arguments, "--quiet") == code
        out, err = capfd.readouterr()
        assert out == ""
        assert_one_sentence(err)
        assert files(tmp_path) == before
        return err

    return run


def assert_one_sentence(err: str) -> None:
    assert err.startswith("awq-onnx: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")


def with_weight(value: float, name: str = "/layers.0/q_proj.weight") -> onnx.ModelProto:
    """A decoder with one broken number."""
    model = tiny_decoder()
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[5] = value
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


# What it writes and says


def test_the_output_lies_beside_the_model_under_a_name_of_its_own(folder: Path) -> None:
    command(folder / "model.onnx", *QUICK)
    assert sorted(files(folder)) == ["model.onnx", "model_int4.onnx", "model_int4.onnx.data"]


def test_o_names_the_output(folder: Path) -> None:
    (folder / "small").mkdir()
    assert main_exits(folder / "model.onnx", "-o", folder / "small" / "m.onnx", *QUICK) == 0
    assert sorted(files(folder)) == ["model.onnx", "small", "small/m.onnx", "small/m.onnx.data"]


def test_o_may_name_a_folder_which_gets_what_belongs_to_the_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    summary, _ = command("model.onnx", "-o", "small/", *QUICK, cwd=folder)
    assert "Carried over  config.json\n" in summary
    assert set(files(folder / "small")) == {"model.onnx", "model.onnx.data", "config.json"}


def test_paths_are_relative_to_the_current_folder(folder: Path) -> None:
    command("model.onnx", "-o", "out.onnx", *QUICK, cwd=folder)
    assert sorted(files(folder)) == ["model.onnx", "out.onnx", "out.onnx.data"]


def test_the_model_is_not_changed(folder: Path) -> None:
    before = (folder / "model.onnx").read_bytes()
    assert main_exits(folder / "model.onnx", *QUICK) == 0
    assert (folder / "model.onnx").read_bytes() == before


def test_the_summary_is_on_stdout_and_the_progress_on_stderr(folder: Path) -> None:
    out, err = command(folder / "model.onnx", *QUICK)
    for label in ("Output", "Quantised", "Scales", "Left alone", "Calibration", "Output error", "Cost"):
        assert f"\n{label}" in f"\n{out}"
    assert "14 MatMuls" in out
    assert "lm_head" in out
    lines = err.splitlines()
    assert len(lines) == len(STAGES)
    assert all(line.startswith(stage) for line, stage in zip(lines, STAGES, strict=True))


def test_a_note_is_one_line_on_stderr_so_that_logs_can_be_searched(tmp_path: Path) -> None:
    model = save(norm_and_readers().model(), tmp_path / "model.onnx")
    _, err = command(model, *QUICK)
    assert len([line for line in err.splitlines() if not line.startswith((*STAGES, "Making random inputs"))]) == 1


def test_json_is_one_object_and_nothing_else_on_stdout(folder: Path) -> None:
    out, _ = command(folder / "model.onnx", "--json", *QUICK)
    report = json.loads(out)
    assert report["output"] == str(folder / "model_int4.onnx")
    assert len(report["matmuls"]) == 14
    assert report["recipe"]["samples"] == 2
    assert report["comparison"]["kl_mean"] >= 0


def test_the_layers_left_alone_are_told_with_the_option_that_did_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--include", "*layers*", "--exclude", "*/mlp/*", "--exclude", "*o_proj*"]
    assert main_exits(folder / "model.onnx", "--quiet", *QUICK, *options) == 0
    out = capsys.readouterr().out
    assert "6 MatMuls to 4 bits," in out
    assert "6 layers, /layers.0/mlp/gate_proj/MatMul first: --exclude */mlp/* names it" in out
    assert "2 layers, /layers.0/o_proj/MatMul first: --exclude *o_proj* names it" in out
    assert "/lm_head/MatMul: it is the lm_head, which stays as it is" in out


def test_a_head_of_eight_bits_is_counted_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exits(folder / "model.onnx", "--quiet", *QUICK, "--lm-head", "8") == 0
    out = capsys.readouterr().out
    assert "14 MatMuls to 4 bits, 1 more to 8 bits, block size 32" in out
    assert "Left alone" not in out


def test_quiet_leaves_stderr_empty(folder: Path) -> None:
    out, err = command(folder / "model.onnx", "--quiet", *QUICK)
    assert err == ""
    assert out.startswith("Output")


def test_the_summary_does_not_need_a_terminal_that_knows_unicode(folder: Path) -> None:
    arguments = [folder / "model.onnx", "--quiet", "--samples", "32", "--sequence-length", "8"]
    out, _ = command(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "KL" in out


def test_force_replaces_both_files_of_the_output(folder: Path) -> None:
    assert main_exits(folder / "model.onnx", *QUICK) == 0
    first = files(folder)
    assert main_exits(folder / "model.onnx", "--force", "--block-size", "16", *QUICK) == 0
    second = files(folder)
    assert sorted(first) == sorted(second)
    assert second["model_int4.onnx"] != first["model_int4.onnx"]
    assert second["model_int4.onnx.data"] != first["model_int4.onnx.data"]


def test_a_second_run_with_force_leaves_the_same_bytes_and_does_not_append(folder: Path) -> None:
    assert main_exits(folder / "model.onnx", *QUICK) == 0
    first = files(folder)
    assert main_exits(folder / "model.onnx", "--force", *QUICK) == 0
    assert files(folder) == first


def test_every_option_reaches_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--block-size", 16, "--symmetric", "--explicit-zero-points", "--accuracy-level", 0, "--samples", 3]
    options += ["--target", "cpu", "--format", "matmulnbits"]
    options += ["--sequence-length", 9, "--seed", 5, "--lm-head", 8, "--allow-mul"]
    options += ["--include", "*proj*", "--include", "*lm_head*", "--exclude", "*/mlp/*"]
    options += ["--quality", "fast", "--method", "awq", "--bits", 8, "--embedding", 4]
    options += ["--override", "*q_proj*:bits=2", "--scale-from", "all", "--alpha", 0.5]
    assert main_exits(folder / "model.onnx", "--json", "--quiet", *options) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    numbers = {"block_size": 16, "accuracy_level": 0, "samples": 3, "sequence_length": 9, "seed": 5, "bits": 8}
    flags = {"symmetric": True, "explicit_zero_points": True, "allow_mul": True, "lm_head": "8", "embedding": "4"}
    patterns = {"include": ["*proj*", "*lm_head*"], "exclude": ["*/mlp/*"], "override": ["*q_proj*:bits=2"]}
    method = {"quality": "fast", "method": "awq", "scale_from": "all", "alpha": 0.5}
    formats = {"target": "cpu", "format": "matmulnbits", "target_bits": None, "target_size": None}
    assert recipe == {**numbers, **flags, **patterns, **method, **formats}


@pytest.mark.parametrize(("option", "symmetric"), [("--no-symmetric", False), ("--symmetric", True), (None, False)])
def test_a_switch_can_be_on_off_or_left_to_the_target(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str | None, symmetric: bool
) -> None:
    options = [*QUICK, "--target", "cuda", *([] if option is None else [option])]
    assert main_exits(folder / "model.onnx", "--json", "--quiet", *options) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["symmetric"], recipe["target"], recipe["format"]) == (symmetric, "cuda", "matmulnbits")


def test_a_format_that_the_target_cannot_run_is_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_exits(folder / "model.onnx", "--target", "dml", "--symmetric", "--no-explicit-zero-points") == 2
    assert capsys.readouterr().err.startswith("awq-onnx: --explicit-zero-points is False, but target dml")
    assert main_exits(folder / "model.onnx", "--target", "tensorrt", "--format", "matmulnbits") == 2
    told = "awq-onnx: --format matmulnbits does not run on target tensorrt; qdq does\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("options", "machine"),
    [
        ([], Machine()),
        (["--threads", "3"], Machine(threads=3)),
        (["--memory-budget", "1.5GiB"], Machine(memory_budget=3 << 29)),
        (["--memory-budget", "500MB", "--threads", "1"], Machine(threads=1, memory_budget=500_000_000)),
    ],
)
def test_what_may_be_taken_of_the_machine_reaches_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], machine: Machine
) -> None:
    seen = []

    def quantize(*_: object, machine: Machine, **__: object) -> None:
        seen.append(machine)
        raise errors.ModelError("enough")

    monkeypatch.setattr(pipeline, "quantize", quantize)
    assert main_exits(folder / "model.onnx", *options) == errors.ModelError.exit_code
    assert seen == [machine]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_neither_threads_nor_memory_change_a_byte(tmp_path: Path, dtype: type) -> None:
    save(tiny_decoder(dtype=dtype), tmp_path / "model.onnx")
    written = []
    for budget, threads in [("1MB", 1), ("1MB", 2), ("30MB", 1), ("500MB", 2), ("4GB", 1), ("4GB", 2)]:
        options = ["--memory-budget", budget, "--threads", threads, "--force", "--quiet"]
        assert main_exits(tmp_path / "model.onnx", *options, "--samples", "6", "--sequence-length", "12") == 0
        written.append(files(tmp_path))
    assert sorted(written[0]) == ["model.onnx", "model_int4.onnx", "model_int4.onnx.data"]
    assert all(one == written[0] for one in written)


# Help


def test_help_lists_every_setting_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exits("--help") == 0
    text = capsys.readouterr().out
    for setting in fields(Recipe):
        assert f"--{setting.name.replace('_', '-')}" in text
    for option in ("--output", "--force", "--json", "--quiet", "--version", "--calibration", "--tokenizer"):
        assert option in text
    for option in ("--threads", "--memory-budget"):
        assert option in text
    codes = {getattr(errors, name).exit_code for name in errors.__all__} - {1}
    for code in (0, *codes, 130):
        assert f" {code} " in text.partition("exit codes:")[2]


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'tokenizers', 'ml_dtypes', 'json'}"
    program = f"""
import sys
from awq_onnx.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exits("--version") == 0
    assert capsys.readouterr().out == f"awq-onnx {awq_onnx.__version__}\n"


# Options that cannot be used


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--block-size", "48"),
        ("--block-size", "many"),
        ("--accuracy-level", "2"),
        ("--samples", "0"),
        ("--samples", "-3"),
        ("--samples", "1.5"),
        ("--sequence-length", "1"),
        ("--seed", "-1"),
        ("--lm-head", "16"),
        ("--include", ""),
        ("--exclude", ""),
        ("--threads", "0"),
        ("--threads", "-1"),
        ("--threads", "two"),
        ("--memory-budget", "0"),
        ("--memory-budget", "-1GB"),
        ("--memory-budget", "1e9"),
        ("--memory-budget", "much"),
    ],
)
def test_an_impossible_option_value_is_named(folder: Path, refused: Refused, option: str, value: str) -> None:
    assert option in refused(folder / "model.onnx", f"{option}={value}", code=2)


@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("more", [[], ["--include", "*q_proj*"], ["--exclude", "*q_proj*"]])
def test_a_pattern_that_fits_no_layer_is_named(folder: Path, refused: Refused, option: str, more: list[str]) -> None:
    err = refused(folder / "model.onnx", *more, option, "*/layer[9]/*", code=2)
    assert f"{option.strip('-')} '*/layer[9]/*' fits no layer" in err
    assert "/layers.0/" in err  # what names are like here


def test_patterns_that_leave_nothing_are_told_with_what_they_left(folder: Path, refused: Refused) -> None:
    err = refused(folder / "model.onnx", "--exclude", "*", code=3)
    assert "--exclude * names it" in err


def test_an_unknown_option_is_named(folder: Path, refused: Refused) -> None:
    assert "--group-size" in refused(folder / "model.onnx", "--group-size", "32", code=2)


def test_the_model_must_be_named(refused: Refused) -> None:
    assert "model" in refused(code=2)


# Models that cannot be read


def test_a_missing_file(tmp_path: Path, refused: Refused) -> None:
    assert "does not exist" in refused(tmp_path / "no.onnx", code=3)


def test_a_missing_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    out, err = command(tmp_path / "no.onnx", code=3)
    assert out == ""
    assert_one_sentence(err)


def test_a_folder_in_the_place_of_the_model(tmp_path: Path, refused: Refused) -> None:
    assert "folder" in refused(tmp_path, code=3)


def test_a_name_that_no_file_can_have(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / f"{'x' * 300}.onnx", code=3)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is a text\n" * 20, b'{"a": 1}\n', b"PK\x03\x04" + bytes(100), bytes(1000), bytes(range(256))],
    ids=["empty", "text", "json", "zip", "zeros", "bytes"],
)
def test_a_file_that_is_not_onnx(tmp_path: Path, refused: Refused, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert str(path) in refused(path, code=3)


@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.99999])
def test_a_truncated_protobuf(folder: Path, refused: Refused, kept: float) -> None:
    path = folder / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in refused(path, code=3)


def test_a_weight_with_fewer_bytes_than_its_shape_needs(tmp_path: Path, refused: Refused) -> None:
    model = tiny_decoder()
    tensor = next(one for one in model.graph.initializer if one.name == "/layers.0/q_proj.weight")
    tensor.raw_data = tensor.raw_data[:-8]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, code=3)


def test_a_node_that_reads_what_nobody_makes(tmp_path: Path) -> None:
    model = tiny_decoder()
    next(node for node in model.graph.node if node.op_type == "Sigmoid").input[0] = "nowhere"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    _, err = command(path, "--quiet", code=7)  # in a process of its own: pytest would swallow what a library logs
    assert_one_sentence(err)
    assert "nowhere" in err


def test_external_data_that_are_missing(tmp_path: Path, refused: Refused) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx", external=True)
    (tmp_path / "model.onnx.data").unlink()
    assert "model.onnx.data" in refused(path, code=3)


@pytest.mark.parametrize("missing_bytes", [1, 5000, None], ids=["one byte", "some", "all"])
def test_external_data_that_are_too_short(tmp_path: Path, refused: Refused, missing_bytes: int | None) -> None:
    path = save(tiny_decoder(), tmp_path / "model.onnx", external=True)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(b"" if missing_bytes is None else data.read_bytes()[:-missing_bytes])
    assert "model.onnx.data is too short" in refused(path, code=3)


# Models that cannot be quantised


def test_an_already_quantised_model(folder: Path, refused: Refused) -> None:
    awq_onnx.quantize(folder / "model.onnx", folder / "once.onnx", Recipe(samples=2, sequence_length=8))
    assert "quantised already" in refused(folder / "once.onnx", code=3)


def test_a_model_without_a_matmul(tmp_path: Path, refused: Refused) -> None:
    builder = GraphBuilder()
    builder.output(builder.add("Relu", builder.input("x", ["batch", 8]), to="y"), ["batch", 8])
    assert "no linear layer" in refused(save(builder.model(), tmp_path / "model.onnx"), code=3)


def test_a_model_whose_only_matmul_is_the_lm_head(tmp_path: Path, refused: Refused) -> None:
    assert "lm_head" in refused(save(tiny_decoder(layers=0), tmp_path / "model.onnx"), code=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", ["/layers.0/q_proj", "/layers.1/mlp/down_proj"])
def test_nan_or_inf_in_a_weight(tmp_path: Path, refused: Refused, value: float, weight: str) -> None:
    path = save(with_weight(value, f"{weight}.weight"), tmp_path / "model.onnx")
    message = refused(path, code=3)
    assert weight in message
    assert "NaN or Inf" in message


@pytest.mark.parametrize("weight", ["embed_tokens.weight", "/layers.0/input_layernorm.weight", "lm_head.weight"])
def test_nan_in_a_weight_that_is_not_quantised_itself(tmp_path: Path, refused: Refused, weight: str) -> None:
    refused(save(with_weight(np.nan, weight), tmp_path / "model.onnx"), code=3)


# Outputs that cannot be written


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_output_is_the_model(folder: Path, refused: Refused, force: list[str]) -> None:
    refused(folder / "model.onnx", "-o", folder / "model.onnx", *force, code=4)


def test_the_output_is_a_link_to_the_model(folder: Path, refused: Refused) -> None:
    (folder / "link.onnx").symlink_to(folder / "model.onnx")
    refused(folder / "model.onnx", "-o", folder / "link.onnx", "--force", code=4)


@pytest.mark.parametrize("hidden", [16, 256], ids=["small weights", "large weights"])
def test_the_data_file_of_the_output_is_that_of_the_model(tmp_path: Path, refused: Refused, hidden: int) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(tiny_decoder(layers=1, hidden=hidden), path, save_as_external_data=True, location="out.onnx.data")
    refused(path, "-o", tmp_path / "out.onnx", "--force", code=4)


@pytest.mark.parametrize("existing", ["out.onnx", "out.onnx.data"])
def test_an_existing_output_without_force(folder: Path, refused: Refused, existing: str) -> None:
    (folder / existing).write_text("precious")
    assert "--force" in refused(folder / "model.onnx", "-o", folder / "out.onnx", code=4)


def test_the_folder_of_the_output_is_missing(folder: Path, refused: Refused) -> None:
    assert "does not exist" in refused(folder / "model.onnx", "-o", folder / "no" / "out.onnx", code=4)


def test_the_output_is_the_folder_of_the_model(folder: Path, refused: Refused) -> None:
    assert "is the folder of the model" in refused(folder / "model.onnx", "-o", f"{folder}/", "--force", code=4)


def test_another_configuration_in_the_folder_of_the_output(folder: Path, refused: Refused) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("precious")
    assert "--force" in refused(folder / "model.onnx", "-o", f"{folder}/out/", code=4)


def test_the_data_file_of_the_output_is_a_folder(folder: Path, refused: Refused) -> None:
    (folder / "out.onnx").write_text("precious")
    (folder / "out.onnx.data").mkdir()
    refused(folder / "model.onnx", "-o", folder / "out.onnx", "--force", code=4)


def test_the_folder_of_the_output_is_a_file(folder: Path, refused: Refused) -> None:
    (folder / "file").write_text("")
    refused(folder / "model.onnx", "-o", folder / "file" / "out.onnx", code=4)


@pytest.mark.parametrize("length", [300, 252])
def test_an_output_name_that_is_too_long(folder: Path, refused: Refused, length: int) -> None:
    refused(folder / "model.onnx", "-o", folder / ("x" * length), code=4)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root can write")
def test_a_folder_where_nobody_can_write(folder: Path, refused: Refused) -> None:
    assert "cannot write" in refused(folder / "model.onnx", "-o", "/proc/out.onnx", code=4)


def uninterrupted(model: onnx.ModelProto, folder: Path) -> Files:
    """What a folder holds once the command has done its work there."""
    save(model, folder / "model.onnx")
    assert main_exits(folder / "model.onnx", "--quiet", *QUICK) == 0
    return files(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """`folder` once the command has done its work there."""
    return uninterrupted(tiny_decoder(), tmp_path_factory.mktemp("done"))


@pytest.mark.parametrize("limit_bytes", [0, 20_000, 60_000, 100_000], ids=["at once", "early", "later", "late"])
def test_a_full_disk(folder: Path, done: Files, limit_bytes: int) -> None:
    before = files(folder)
    arguments = [folder / "model.onnx", "--quiet", *QUICK]
    out, err = command(*arguments, code=4, preexec_fn=lambda: fill_the_disk_after(limit_bytes))
    assert out == ""
    assert_one_sentence(err)
    assert "cannot write" in err
    assert published(folder) == before
    assert (folder / WORK).exists() == (limit_bytes > 0)
    assert err.endswith(f"{GOES_ON if limit_bytes else 'no half-written model was left'}\n")
    assert main_exits(*arguments) == 0
    assert files(folder) == done


def test_a_disk_that_is_full_when_the_graph_is_written(tmp_path: Path) -> None:
    model = tiny_decoder(hidden=16, mlp=16, vocabulary=32)
    (tmp_path / "done").mkdir()
    done = uninterrupted(model, tmp_path / "done")
    folder = tmp_path / "full"
    folder.mkdir()
    path = save(model, folder / "model.onnx")
    before = files(folder)
    _, err = command(path, "--quiet", *QUICK, code=4, preexec_fn=lambda: fill_the_disk_after(20_000))
    assert_one_sentence(err)
    assert published(folder) == before
    assert main_exits(path, "--quiet", *QUICK) == 0
    assert files(folder) == done


def test_a_full_disk_leaves_the_old_output_whole(folder: Path) -> None:
    (folder / "model_int4.onnx").write_text("old")
    before = files(folder)
    arguments = [folder / "model.onnx", "--force", "--quiet", *QUICK]
    command(*arguments, code=4, preexec_fn=lambda: fill_the_disk_after(20_000))
    assert published(folder) == before


def fill_the_disk_after(limit_bytes: int) -> None:
    """No file may grow beyond the limit: writing then fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


# Calibration data that cannot be used

IDS = np.arange(32).reshape(4, 8)


def calibration(folder: Path, name: str, content: object) -> Path:
    """A calibration file: bytes, a text, an array (.npy) or arrays (.npz)."""
    path = folder / name
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, str):
            file.write(content.encode())
        elif isinstance(content, np.ndarray):
            np.save(file, content)
        elif isinstance(content, dict):
            np.savez(file, **content)
    return path


MISFITS = [
    ("data.csv", "1,2,3", ".txt, .jsonl, .npz, .npy"),
    ("data", "1 2 3", ".txt, .jsonl, .npz, .npy"),
    ("data.npz", "no archive", "cannot be read"),
    ("data.npz", b"", "cannot be read"),
    ("data.npz", b"PK\x03\x04 cut", "cannot be read"),
    ("data.npz", {}, "no array"),
    ("data.npz", {"tokens": IDS}, "tokens"),
    ("data.npz", {"attention_mask": np.ones((4, 8), np.int64)}, "input_ids"),
    ("data.npz", {"input_ids": IDS, "attention_mask": np.ones((4, 7), np.int64)}, "attention_mask"),
    ("data.npz", {"input_ids": IDS, "attention_mask": np.ones((3, 8), np.int64)}, "samples"),
    ("data.npz", {"input_ids": IDS, "attention_mask": np.zeros((4, 8), np.int64)}, "attention_mask"),
    ("data.npy", IDS * 0.5, "float64"),
    ("data.npy", IDS + 150, "0 to 159"),
    ("data.npy", IDS - 1, "-1"),
    ("data.npy", IDS[0], "batch_size x sequence_length"),
    ("data.npy", IDS[:0], "no sample"),
    ("data.npy", IDS[:, :0], "token"),
    ("data.npy", np.array(3), "sample"),
    ("data.txt", "words", "tokenizer.json"),
    ("data.txt", b"\xff\xfe\xe4", "UTF-8"),
    ("data.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2"),
    ("data.jsonl", "[1, 2]\n", "line 1"),
]


@pytest.mark.parametrize(("name", "content", "says"), MISFITS, ids=range(len(MISFITS)))
def test_a_calibration_file_that_does_not_fit(
    folder: Path, refused: Refused, name: str, content: object, says: str
) -> None:
    path = calibration(folder, name, content)
    assert says in refused(folder / "model.onnx", "--calibration", path, code=5)


def test_a_calibration_file_that_is_missing(folder: Path, refused: Refused) -> None:
    assert "no.npz" in refused(folder / "model.onnx", "--calibration", folder / "no.npz", code=5)


def test_a_calibration_file_whose_name_is_too_long(folder: Path, refused: Refused) -> None:
    refused(folder / "model.onnx", "--calibration", folder / f"{'x' * 300}.npz", code=5)


def test_a_calibration_file_that_is_a_folder(folder: Path, refused: Refused) -> None:
    (folder / "data.npz").mkdir()
    refused(folder / "model.onnx", "--calibration", folder / "data.npz", code=5)


def test_text_for_a_model_that_takes_none(tmp_path: Path, refused: Refused) -> None:
    model = save(norm_and_readers().model(), tmp_path / "model.onnx")
    assert "input_ids" in refused(model, "--calibration", calibration(tmp_path, "data.txt", "words"), code=5)


def test_a_tokenizer_that_is_none(folder: Path, refused: Refused) -> None:
    (folder / "tokenizer.json").write_text("{}")
    text = calibration(folder, "data.txt", "words")
    assert "tokenizer.json" in refused(folder / "model.onnx", "--calibration", text, code=5)


def test_inputs_that_the_model_chokes_on_are_told_in_one_line(folder: Path, refused: Refused) -> None:
    """A past without a mask that covers it: only running the model shows that it does not fit."""
    past = {"past_key_values.0.key": np.zeros((4, 2, 3, 16), np.float32)}
    path = calibration(folder, "data.npz", {"input_ids": IDS, **past})
    refused(folder / "model.onnx", "--calibration", path, code=7)


# Packages that are missing


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("onnxruntime", [], "pip install 'awq-onnx[cpu]'"),
        ("tokenizers", ["--calibration", "data.txt"], "pip install 'awq-onnx[hf]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    folder: Path, module: str, arguments: list[str], says: str
) -> None:
    calibration(folder, "data.txt", "words")
    (folder / "tokenizer.json").write_text("{}")
    before = files(folder)
    words = ["model.onnx", "--quiet", *arguments]
    program = f"import sys; sys.modules[{module!r}] = None; from awq_onnx.cli import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 6
    assert_one_sentence(done.stderr)
    assert says in done.stderr
    assert files(folder) == before


# Interruptions


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Every stage of it takes long enough for a signal to arrive while it lasts."""
    path = tmp_path_factory.mktemp("slow") / "model.onnx"
    return save(tiny_decoder(layers=2, hidden=256, mlp=512, vocabulary=8000), path).read_bytes()


def signalled(folder: Path, stage: str, *signals: signal.Signals, options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run the command and signal it once it has told that a stage begins; its exit code, the rest of stderr."""
    words = [sys.executable, "-m", "awq_onnx", str(folder / "model.onnx"), "--samples", "24", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                break
        for one in signals:
            process.send_signal(one)
        _, err = process.communicate(timeout=60)
        return process.returncode, err


@pytest.fixture(scope="module")
def slow_done(tmp_path_factory: pytest.TempPathFactory, slow_model: bytes) -> Files:
    """What is there when it is done."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "model.onnx").write_bytes(slow_model)
    command(folder / "model.onnx", "--quiet", "--samples", "24")
    return files(folder)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("Writing text", signal.SIGINT),
        ("Calibrating", signal.SIGINT),
        ("Measuring", signal.SIGINT),
        ("Calibrating", signal.SIGTERM),
    ],
)
def test_an_interrupted_run_leaves_the_old_output_whole_and_is_gone_on_with(
    tmp_path: Path, slow_model: bytes, slow_done: Files, stage: str, number: signal.Signals
) -> None:
    (tmp_path / "model.onnx").write_bytes(slow_model)
    (tmp_path / "model_int4.onnx").write_text("old graph")
    (tmp_path / "model_int4.onnx.data").write_text("old data")
    before = files(tmp_path)
    code, err = signalled(tmp_path, stage, number, options=("--force",))
    assert code == 130
    finished = stage != "Writing text"  # the calibration data at least
    assert err.splitlines()[-1] == f"awq-onnx: interrupted; {GOES_ON if finished else 'nothing was written'}"
    assert "Traceback" not in err
    assert published(tmp_path) == before
    assert (tmp_path / WORK).exists() == finished
    _, err = command(tmp_path / "model.onnx", "--samples", "24", "--force")
    assert ("Going on from an interrupted run" in err) == finished
    assert files(tmp_path) == slow_done


def test_an_impatient_user_who_interrupts_twice_loses_nothing(
    tmp_path: Path, slow_model: bytes, slow_done: Files
) -> None:
    (tmp_path / "model.onnx").write_bytes(slow_model)
    before = files(tmp_path)
    code, err = signalled(tmp_path, "Calibrating", signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert published(tmp_path) == before
    command(tmp_path / "model.onnx", "--samples", "24")
    assert files(tmp_path) == slow_done


@pytest.mark.parametrize("options", [["--samples", "24"], QUICK], ids=["the same command", "another"])
def test_a_killed_run_leaves_only_its_hidden_folder_and_the_next_one_nothing(
    tmp_path: Path, slow_model: bytes, slow_done: Files, options: list[str]
) -> None:
    (tmp_path / "model.onnx").write_bytes(slow_model)
    before = files(tmp_path)
    code, _ = signalled(tmp_path, "Measuring", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert published(tmp_path) == before
    _, err = command(tmp_path / "model.onnx", *options)
    assert ("Going on from an interrupted run" in err) == (options != QUICK)
    assert set(files(tmp_path)) == set(slow_done)
    if options != QUICK:
        assert files(tmp_path) == slow_done


def test_a_second_run_for_the_same_output_is_refused(tmp_path: Path, slow_model: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(slow_model)
    words = [sys.executable, "-m", "awq_onnx", str(tmp_path / "model.onnx"), "--samples", "24"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline()  # the first stage: its folder is there
        _, err = command(tmp_path / "model.onnx", "--quiet", "--force", code=4)
        assert_one_sentence(err)
        assert "another run is writing" in err
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130  # it was still at work


@pytest.mark.parametrize("stage", range(len(STAGES)))
@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_a_stage_leaves_the_old_output_whole(
    folder: Path, stage: int, failure: type[BaseException]
) -> None:
    """And where it was the user, what is finished: the calibration data first."""

    class Ending:
        def __init__(self) -> None:
            self.stages = 0

        def stage(self, title: str) -> None:
            assert title.startswith(STAGES[self.stages])
            if self.stages == stage:
                raise failure
            self.stages += 1

        def advance(self, fraction: float) -> None: ...

        def note(self, line: str) -> None: ...

    (folder / "model_int4.onnx").write_text("old")
    before = files(folder)
    recipe = Recipe(samples=2, sequence_length=8)
    with pytest.raises(failure):
        awq_onnx.quantize(folder / "model.onnx", folder / "model_int4.onnx", recipe, overwrite=True, progress=Ending())
    assert published(folder) == before
    assert (folder / WORK).exists() == (failure is KeyboardInterrupt and stage > 0)


@pytest.mark.parametrize("renames_before", range(4))
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(5, "Input/output error")], ids=["Ctrl-C", "I/O error"])
def test_a_failure_between_the_renames_loses_nothing(
    folder: Path,
    done: Files,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    renames_before: int,
    failure: BaseException,
) -> None:
    """The last moment: the old output is there, and the new one with the same command."""
    assert main_exits(folder / "model.onnx", "--quiet", "--block-size", "16", *QUICK) == 0
    before = files(folder)
    renamed = 0

    def breaking(method: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Path, target: Path) -> None:
            nonlocal renamed
            renamed += Path(target).name.startswith("model_int4.onnx")
            if renamed == renames_before + 1:
                renamed += 1  # once: what mends the failure works
                raise failure
            method(source, target)

        return rename

    with monkeypatch.context() as patched:
        for name in ("rename", "replace"):
            patched.setattr(os, name, breaking(getattr(os, name)))
        assert main_exits(folder / "model.onnx", "--quiet", "--force", *QUICK) in (4, 130)
    assert renamed > renames_before + 1
    assert published(folder) == before
    assert capsys.readouterr().err.endswith(f"{GOES_ON}\n")
    assert main_exits(folder / "model.onnx", "--quiet", "--force", *QUICK) == 0
    assert files(folder) == done


def test_the_installed_command_is_this_one() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="awq-onnx")
    assert entry.load() is main


@pytest.mark.parametrize("delay_seconds", [0.05, 0.1, 0.2, 0.3, 0.4])
def test_an_interruption_at_any_moment_of_the_start_is_one_line(folder: Path, delay_seconds: float) -> None:
    """Also in the middle of an import. Before Python has read our first line it is Python that answers."""
    words = [sys.executable, "-c", STARTED, str(folder / "model.onnx"), *QUICK]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(delay_seconds)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("awq-onnx: interrupted; ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", [["--json"], []])
def test_a_result_that_cannot_be_printed_is_told(folder: Path, options: list[str]) -> None:
    words = [sys.executable, "-m", "awq_onnx", "inspect", str(folder / "model.onnx"), *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (4, "awq-onnx: cannot print the result: No space left on device\n")


@pytest.mark.parametrize("words", [["."], [""], ["model.onnx", "-o", ""], ["report", "."]])
def test_names_that_name_nothing_are_mistakes_of_a_user(folder: Path, words: list[str]) -> None:
    _, told = command(*words, cwd=folder, code=4 if "-o" in words else 3)
    assert told.startswith("awq-onnx: ")
    assert told.count("\n") == 1


def test_a_name_that_looks_like_a_folder_is_pointed_at(folder: Path) -> None:
    _, told = command(folder / "model.onnx", "-o", folder / "small", *QUICK)
    assert told.startswith(f"{folder / 'small'} will be a file; {folder / 'small'}/ would be a folder.\n")
    assert (folder / "small").is_file()
