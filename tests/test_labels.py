"""What a node says of itself: that it is read as it was written, and reads well."""

from __future__ import annotations

import pytest

from awq_onnx.labels import Label

FOLDED = Label(0.45, "mean", "/norm/Mul", None, None, 0.0412, 0.0721)
REFUSED = Label(0.0, "mean", None, "Add reads the same input", "Add of x (y)", 0.05, 0.06)


@pytest.mark.parametrize("label", [FOLDED, REFUSED])
def test_a_label_is_read_as_it_was_written(label: Label) -> None:
    assert Label.read(label.metadata()) == label


def test_what_is_no_label_is_none() -> None:
    assert Label.read({}) is None
    assert Label.read({"awq_onnx.alpha": "0.5"}) is None
    assert Label.read(FOLDED.metadata() | {"awq_onnx.error": "large"}) is None


def test_the_sentences_tell_format_scale_and_error() -> None:
    assert FOLDED.sentences(4, 32, zero_points=True) == (
        "4-bit weight, in blocks of 32 along K with zero points.\n"
        "Input divided by s, weight times s; s is folded into\n"
        "/norm/Mul,\n"
        "s = mean|x|^0.45.\n"
        "||X E|| / ||X W|| = 0.0412; plain rounding 0.0721."
    )


def test_a_layer_without_a_scale_says_so() -> None:
    assert "\nIts input is not scaled.\n" in REFUSED.sentences(8, 128, zero_points=False)
    assert REFUSED.sentences(8, 128, zero_points=False).startswith("8-bit weight, in blocks of 128 along K without")


@pytest.mark.parametrize(
    ("formula", "scale"),
    [("max", "max|x|^0.25 / max|w|^0.75"), ("weights", "mean|x|^0.25 / mean(|w| / max|w|)^0.75")],
)
def test_the_formula_of_the_scale_is_written_out(formula: str, scale: str) -> None:
    label = Label(0.25, formula, "/v", None, None, 0.1, 0.2)
    assert f"s = {scale}." in label.sentences(4, 32, zero_points=True)
