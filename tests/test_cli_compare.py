"""`awq-onnx compare` as a user meets it: what it says, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import GraphBuilder, bigrams, norm_and_readers, save, tiny_decoder, tiny_encoder
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from awq_onnx import errors, speed
from awq_onnx.cli import main

Array = NDArray[Any]
WORDS = ("[UNK]", "the", "cat", "sat", "on", "mat")
TEXT = "the cat sat on the mat on the cat sat the mat"


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """main() sets a handler of its own, which belongs to the command and not to the test run."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are rough enough here."""
    monkeypatch.setattr(speed, "FORWARD_SECONDS", 0.01)


def tables() -> tuple[Array, Array]:
    """The logits (V, V) of two models that agree but for what comes after a cat."""
    one = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    other = one.copy()
    one[2], other[2] = np.log([0.01, 0.01, 0.01, 0.9, 0.05, 0.02]), np.log([0.01, 0.01, 0.01, 0.2, 0.75, 0.02])
    return one, other


KL = 0.9 * np.log(0.9 / 0.2) + 0.05 * np.log(0.05 / 0.75)  # after a cat; there are 2 in 12 words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models that read words, and a text."""
    for name, table in zip(("one.onnx", "other.onnx"), tables(), strict=True):
        save(bigrams(table), tmp_path / name)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command on the two models and the text; stdout and stderr."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        words = [folder / "one.onnx", folder / "other.onnx", "--data", folder / "text.txt", "--sequence-length", 12]
        assert exit_code(*words, "--quiet", *arguments) == code
        out, err = capsys.readouterr()
        return out, err

    return run


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    """The one sentence of a command that cannot go on."""
    assert exit_code(*arguments, "--quiet") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("awq-onnx: ")
    assert (err.count("\n"), err[-1]) == (1, "\n")
    return err


# What it says


def test_the_table_tells_both_models_and_where_they_disagree(compared: Any) -> None:
    out, err = compared()
    assert err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].strip()}
    assert f"{KL / 6:.3g} nats per token" in lines["KL"]
    assert "+-" not in lines["KL"]  # of one window
    assert "83.3% of 12 tokens" in lines["Agreement"]
    assert lines["Compared"].endswith("1 windows of text.txt")
    for label in ("Size", "Perplexity", "Speed"):
        assert " x" in lines[label]
    assert f"KL {KL:.3g} after 'the cat':" in out
    assert "original 'sat' 90%, quantised 'on' 75%" in out


def test_the_table_fits_into_80_columns(compared: Any, folder: Path) -> None:
    out, _ = compared()
    lines = [line for line in out.splitlines() if str(folder) not in line]
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)


def test_without_a_tokenizer_tokens_are_numbers(compared: Any, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    np.save(folder / "ids.npy", np.array([[1, 2, 3]]))
    out, _ = compared("--data", folder / "ids.npy")
    assert f"KL {KL:.3g} after the tokens ... 1 2:" in out
    assert "original token 3 90%, quantised token 4 75%" in out


def test_json_holds_everything(compared: Any, folder: Path) -> None:
    out, _ = compared("--json")
    values = json.loads(out)
    assert values["comparison"]["kl_mean"] == pytest.approx(KL / 6, rel=1e-5)
    assert values["original"]["path"] == str(folder / "one.onnx")
    assert values["quantized"]["size_bytes"] == (folder / "other.onnx").stat().st_size
    assert values["original"]["speed"]["per_second"] > 0
    worst = values["comparison"]["worst"][0]
    assert worst["text"] == {"context": "the cat", "original": "sat", "quantized": "on"}
    assert (worst["context"], worst["original"], worst["quantized"]) == ([1, 2], 3, 4)


def test_json_of_numbers_that_are_none_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(bigrams(np.full((6, 6), np.nan)), folder / "broken.onnx")
    code = exit_code(folder / "one.onnx", folder / "broken.onnx", "--samples", 1, "--json", "--quiet", "--max-kl", 9)
    assert code == 1
    out, err = capsys.readouterr()
    values = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["comparison"]["kl_mean"] is None
    assert "the mean KL is nan" in err


def test_an_encoder_has_errors_and_no_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save(norm_and_readers().model(), tmp_path / "one.onnx")
    other = save(norm_and_readers(dtype=np.float16).model(), tmp_path / "other.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32))
    assert exit_code(one, other, "--data", tmp_path / "data.npz", "--quiet") == 0
    out, _ = capsys.readouterr()
    assert "Compared on   4 samples of data.npz\n" in out
    assert "cosine distance" in out
    assert "samples/s" in out
    assert "KL" not in out
    assert "Perplexity" not in out


def test_a_classifier_has_classes_and_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes are no words, whatever tokenizer lies beside it."""
    paths = []
    for name, weight in zip(("c.onnx", "d.onnx"), ([[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]), strict=True):
        builder = GraphBuilder()
        x = builder.input("x", ["batch", 1])
        builder.output(builder.add("MatMul", x, builder.constant(weight, "w"), to="logits"), ["batch", 3])
        paths.append(save(builder.model(), folder / name))
    np.save(folder / "x.npy", np.array([[0], [3], [0]], np.float32))
    assert exit_code(*paths, "--data", folder / "x.npy", "--quiet") == 0
    out, _ = capsys.readouterr()
    assert "nats per sample" in out
    assert "the same likeliest class for 66.7% of 3 samples" in out
    assert "in sample 1:\n              original class 1 91%, quantised class 2 91%" in out
    assert exit_code(*paths, "--data", folder / "x.npy", "--quiet", "--json") == 0
    (worst,) = json.loads(capsys.readouterr().out)["comparison"]["worst"]
    assert "text" not in worst


def test_progress_is_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And without data the original writes its own text."""
    assert exit_code(folder / "one.onnx", folder / "other.onnx", "--samples", 2, "--sequence-length", 8) == 0
    out, err = capsys.readouterr()
    assert "2 sequences of 8 tokens that the model wrote itself" in out
    stages = [line for line in err.splitlines() if line.endswith(" ...")]
    assert stages == [
        "Writing text with the model itself ...",
        "Running the original ...",
        "Running the quantised model ...",
    ]


# Its verdict


def test_a_model_beside_itself_is_within_any_limit(folder: Path) -> None:
    limits = ["--max-kl", 0, "--max-error", 0]
    assert exit_code(folder / "one.onnx", folder / "one.onnx", "--data", folder / "text.txt", "--quiet", *limits) == 0


@pytest.mark.parametrize(("factor", "code"), [(1.01, 0), (0.99, 1)])
def test_a_limit_of_the_kl_decides_the_exit_code(factor: float, code: int, compared: Any) -> None:
    out, err = compared("--max-kl", factor * KL / 6, code=code)
    assert "nats per token" in out, "the table is shown either way"
    if code:
        assert err == f"awq-onnx: the mean KL is {KL / 6:.6g}, more than --max-kl {factor * KL / 6:g}\n"
    else:
        assert err == ""


def test_a_limit_of_the_error_holds_for_any_model(compared: Any) -> None:
    one, other = (table[[1, 2, 3, 4, 1, 5, 4, 1, 2, 3, 1, 5]] for table in tables())
    error = float(np.linalg.norm(one - other) / np.linalg.norm(one))
    compared("--max-error", 1.01 * error)
    _, err = compared("--max-error", 0.99 * error, code=1)
    assert "the relative error of the outputs is" in err


def test_an_encoder_has_no_kl_to_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tiny_encoder(), tmp_path / "model.onnx")
    assert "no logits; use --max-error" in refusal(capsys, model, model, "--max-kl", 1, code=2)


# Mistakes


def test_models_that_want_other_things(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save(tiny_decoder(layers=1), folder / "decoder.onnx")
    assert "6 tokens, the other 160" in refusal(capsys, folder / "one.onnx", other, code=3)
    encoder = save(norm_and_readers().model(), folder / "encoder.onnx")
    assert "different inputs" in refusal(capsys, folder / "one.onnx", encoder, code=3)


def test_files_that_are_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = folder / "one.onnx", folder / "other.onnx"
    assert "no.onnx does not exist" in refusal(capsys, folder / "no.onnx", other, code=3)
    assert "no.onnx does not exist" in refusal(capsys, one, folder / "no.onnx", code=3)
    assert "no.txt does not exist" in refusal(capsys, one, other, "--data", folder / "no.txt", code=5)
    (folder / "other.onnx").write_bytes(b"no model")
    assert "other.onnx is not an ONNX model" in refusal(capsys, one, other, code=3)


def test_text_without_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    words = [folder / "one.onnx", folder / "other.onnx", "--data", folder / "text.txt"]
    assert "name its folder with --tokenizer" in refusal(capsys, *words, code=5)
    assert f"no tokenizer.json in {folder}" in refusal(capsys, *words, "--tokenizer", folder, code=5)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--samples", "0", "--samples is 0"),
        ("--sequence-length", "1", "--sequence-length is 1"),
        ("--threads", "0", "--threads is 0"),
        ("--max-kl", "-1", "'-1' is no number of at least 0"),
        ("--max-error", "nan", "'nan' is no number"),
        ("--max-kl", "much", "'much' is no number"),
        ("--loud", "1", "see awq-onnx compare --help"),
    ],
)
def test_options_that_cannot_be_used(
    option: str, value: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refusal(capsys, folder / "one.onnx", folder / "other.onnx", f"{option}={value}", code=2)


# Help


def test_help_tells_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    told = capsys.readouterr().out.partition("exit codes:")[2]
    for code in (0, *(getattr(errors, name).exit_code for name in errors.__all__), 130):
        assert f" {code} " in told


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'tokenizers', 'ml_dtypes', 'json'}"
    program = f"""
import sys
from awq_onnx.cli import main
try:
    main(["compare", "--help"])
except SystemExit:
    print(sorted({heavy} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
