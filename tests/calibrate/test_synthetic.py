"""Inputs made up where nobody gives any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import Array

from awq_onnx.calibrate import synthetic
from awq_onnx.calibrate.feeds import Input, Signature
from awq_onnx.calibrate.hints import Hints
from awq_onnx.errors import CalibrationError

INT, FLOAT, HALF = (np.dtype(kind) for kind in (np.int64, np.float32, np.float16))
TOKENS = Input("input_ids", INT, ("batch", "sequence"))
PIXELS = Input("pixel_values", FLOAT, ("batch", "channels", "height", "width"))


def filled(
    *inputs: Input, hints: Hints | None = None, vocabulary: int | None = 160, **given: Array
) -> dict[str, Array]:
    """3 samples, of 5 tokens where the length is free."""
    wanted = Signature(inputs, ("y",), (), vocabulary)
    return dict(synthetic.fill(wanted, given, 3, 5, hints or Hints(), np.random.default_rng(0)))


def made(one: Input, hints: Hints | None = None) -> Array:
    return filled(one, hints=hints)[one.name]


# Tokens


def test_random_tokens_are_in_the_vocabulary() -> None:
    ids = filled(TOKENS, vocabulary=7)["input_ids"]
    assert ids.shape == (3, 5)
    assert set(ids.ravel().tolist()) <= set(range(7))
    assert len(set(ids.ravel().tolist())) > 3


def test_a_fixed_length_wins() -> None:
    assert made(Input("input_ids", INT, ("batch", 9))).shape == (3, 9)


def test_the_vocabulary_of_the_config_is_taken_where_the_graph_tells_none() -> None:
    hints = Hints({"text_config": {"vocab_size": 1000}})
    assert filled(TOKENS, hints=hints, vocabulary=None)["input_ids"].max() > 100


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_no_token_is_padding(padding: int) -> None:
    hints = Hints({"pad_token_id": padding})
    ids = np.concatenate([filled(TOKENS, hints=hints, vocabulary=4)["input_ids"] for _ in range(5)])
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3} - {padding}


# Sizes


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (("batch", "sequence", 64), (3, 5, 64)),
        (("batch_size", "num_tokens", 64), (3, 5, 64)),
        (("n", "m", 64), (3, 5, 64)),
        (("batch", 3, 8, 8), (3, 3, 8, 8)),
        (("batch", "encoder_length"), (3, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_random_numbers_have_the_shape_of_their_input(
    dims: tuple[int | str, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    values = made(Input("x", dtype, dims))
    assert (values.shape, values.dtype) == (shape, dtype)
    assert np.std(values.astype(np.float32)) > 0.5


@pytest.mark.parametrize("dims", [None, ("batch", 3, "height", "width"), ("batch", "sequence", "features")])
def test_a_size_that_cannot_be_guessed_is_named(dims: tuple[int | str, ...] | None) -> None:
    with pytest.raises(CalibrationError, match=r"the model's input x .*: give inputs with --calibration data\.npz"):
        made(Input("x", FLOAT, dims))


def test_an_axis_that_a_given_input_has_too_is_as_long_as_there() -> None:
    states = Input("encoder_hidden_states", FLOAT, ("batch", "encoded", 8))
    mask = Input("encoder_attention_mask", INT, ("batch", "encoded"))
    assert filled(states, mask, encoder_attention_mask=np.ones((3, 11), int))[states.name].shape == (3, 11, 8)


def test_what_was_given_is_kept() -> None:
    ids = np.ones((3, 4), int)
    assert filled(TOKENS, PIXELS, hints=Hints({"image_size": 8}), input_ids=ids)["input_ids"] is ids


def test_caches_are_made_only_where_the_model_goes_on_after_another() -> None:
    own, read = (
        Input(f"past_key_values.0.{k}.key", FLOAT, ("batch", 2, f"past_{k}", 4)) for k in ("decoder", "encoder")
    )
    caches = ((own.name, "present.0.decoder.key"),)
    after = Signature((TOKENS, own, read), ("logits", caches[0][1]), caches, 160)
    values = synthetic.fill(after, {}, 3, 5, Hints(), np.random.default_rng(0))
    assert values[own.name].shape == values[read.name].shape == (3, 2, 5, 4)
    alone = Signature((TOKENS, own), after.outputs, caches, 160)
    assert [one.name for one in synthetic.missing(alone, {})] == ["input_ids"]


def test_the_same_seed_gives_the_same_numbers() -> None:
    one, other = (made(Input("x", FLOAT, ("batch", "sequence", 8))) for _ in range(2))
    np.testing.assert_array_equal(one, other)


# Pictures


@pytest.mark.parametrize(
    "hints",
    [
        Hints({"image_size": 24}),
        Hints({"image_size": [24, 24], "num_channels": 3}),
        Hints({"vision_config": {"image_size": 24}}),
        Hints({}, {"size": {"height": 24, "width": 24}}),
        Hints({}, {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}),
        Hints({}, {"size": 24}),
    ],
)
def test_the_files_beside_the_model_tell_the_size_of_a_picture(hints: Hints) -> None:
    assert made(PIXELS, hints).shape == (3, 3, 24, 24)


def test_the_graph_knows_better_than_the_config() -> None:
    assert made(Input("pixel_values", FLOAT, ("batch", 1, 16, 8)), Hints({"image_size": 24})).shape == (3, 1, 16, 8)


def test_colours_may_come_last() -> None:
    one = Input("pixel_values", FLOAT, ("batch", "height", "width", 3))
    assert made(one, Hints({"image_size": 24})).shape == (3, 24, 24, 3)


def test_a_picture_of_unknown_size_is_named() -> None:
    message = (
        r"pixel_values \(float32, shape batch x channels x height x width\) does not say how large height is: give"
    )
    with pytest.raises(CalibrationError, match=message):
        made(PIXELS, Hints({"image_size": "large"}))


def test_pictures_are_normalised() -> None:
    picture = made(PIXELS, Hints({"image_size": 64}))
    assert abs(picture.mean()) < 0.01
    assert picture.std() == pytest.approx(1, rel=0.05)


def test_neighbours_in_a_picture_are_alike_and_so_are_its_colours() -> None:
    picture = made(PIXELS, Hints({"image_size": 64}))[0]
    beside = np.corrcoef(picture[0, :, 1:].ravel(), picture[0, :, :-1].ravel())[0, 1]
    colours = np.corrcoef(picture[0].ravel(), picture[1].ravel())[0, 1]
    assert beside > 0.6
    assert 0.7 < colours < 0.99


def test_the_amplitude_of_a_picture_falls_with_the_frequency() -> None:
    """At four times the frequency it is a quarter; that of white noise would be the same."""
    picture = made(PIXELS, Hints({"image_size": 128}))[0, 0]
    spectrum = np.abs(np.fft.fft2(picture))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128, 1 / 128), np.fft.fftfreq(128, 1 / 128)))
    low, high = (spectrum[(frequency > at - 2) & (frequency < at + 2)].mean() for at in (12, 48))
    assert low / high == pytest.approx(4, rel=0.15)


# Sound


def test_a_spectrogram_is_as_the_graph_says() -> None:
    assert made(Input("input_features", FLOAT, ("batch", 16, 60))).shape == (3, 16, 60)


def test_a_spectrogram_is_as_the_config_says() -> None:
    one = Input("input_features", FLOAT, ("batch", "bins", "frames"))
    assert made(one, Hints({"num_mel_bins": 20, "max_source_positions": 15})).shape == (3, 20, 30)
    with pytest.raises(CalibrationError, match=r"input_features .* does not say how large bins is"):
        made(one)


def test_sound_is_as_long_as_the_tokens_that_are_made_of_it() -> None:
    one = Input("input_values", FLOAT, ("batch", "samples"))
    assert made(one, Hints({"conv_stride": [5, 4, 2]})).shape == (3, 5 * 40)
    assert made(one, Hints({}, {"sampling_rate": 8000})).shape == (3, 8000)
    assert made(Input("input_values", FLOAT, ("batch", 400))).shape == (3, 400)
