"""Choose and load the calibration data: what the user gave, else the model's own text, else random inputs."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate import feeds as making
from awq_onnx.calibrate.feeds import MASK, TOKENS, Feed, Signature
from awq_onnx.calibrate.generate import LENGTH_WITHOUT_CACHE, generate, is_causal
from awq_onnx.errors import CalibrationError, MissingPackageError
from awq_onnx.progress import Progress
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel

Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"
Calibration: TypeAlias = "str | os.PathLike[str] | Sequence[str] | NDArray[Any] | Arrays | None"

SIDE_BY_SIDE = 4  # sequences in one feed: enough rows for fast products, few enough for memory
HELD_OUT_SHARE = 16  # one sequence in so many is kept to measure the result with


@dataclass(frozen=True)
class CalibrationData:
    """feeds: to calibrate with. held_out: to measure with, a sequence each; from `feeds` where nothing could be held
    out. source: what they are, for people.
    """

    feeds: tuple[Feed, ...]
    held_out: tuple[Feed, ...]
    source: str

    @property
    def all_feeds(self) -> tuple[Feed, ...]:
        """Every sample once."""
        return self.feeds + tuple(one for one in self.held_out if all(one is not other for other in self.feeds))


def load(
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
    progress: Progress,
) -> CalibrationData:
    """The data for one run. Raises CalibrationError where they do not fit the model."""
    if calibration is None:
        return _self_made(opened, wanted, recipe, progress)
    progress.stage("Reading the calibration data")
    arrays, what = _given(calibration, opened, wanted, recipe, tokenizer)
    check_arrays(arrays, wanted)
    held_out = _held_out(recipe.samples)
    arrays = {name: values[: recipe.samples + held_out] for name, values in arrays.items()}
    return _split(arrays, wanted, held_out, what, progress)


def _given(
    calibration: str | os.PathLike[str] | Sequence[str] | NDArray[Any] | Arrays,
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    tokenizer: str | os.PathLike[str] | None,
) -> tuple[Arrays, str]:
    """The user's data as arrays, and what to call a sample of them."""
    if isinstance(calibration, Mapping):
        return {name: np.asarray(values) for name, values in calibration.items()}, "given samples"
    if isinstance(calibration, np.ndarray):
        return {_only_name(wanted): calibration}, "given samples"
    if not isinstance(calibration, str | os.PathLike):
        if not all(isinstance(text, str) for text in calibration):
            raise CalibrationError("calibration is none of: a path, texts, token ids as an array, arrays by input name")
        windows = _windows_of_text(list(calibration), opened, wanted, recipe, tokenizer)
        return {TOKENS: windows}, "windows of the given texts"
    path = Path(calibration)
    try:
        if not path.is_file():
            raise CalibrationError(f"the calibration file {path} does not exist")
        if path.suffix in (".txt", ".jsonl"):
            windows = _windows_of_text(_texts(path), opened, wanted, recipe, tokenizer)
            return {TOKENS: windows}, f"windows of {path.name}"
        return _arrays(path, wanted), f"samples of {path.name}"
    except OSError as error:
        raise CalibrationError(f"the calibration file {path} cannot be read: {error.strerror}") from error


def _self_made(opened: OpenedModel, wanted: Signature, recipe: Recipe, progress: Progress) -> CalibrationData:
    samples = recipe.samples + _held_out(recipe.samples)
    session = runtime.session(opened.serialize(), opened.folder) if wanted.logits and wanted.takes_tokens else None
    if session is not None and is_causal(session, wanted):
        progress.stage("Writing calibration text with the model itself")
        length = wanted.sequence_length(recipe.sequence_length)
        if not wanted.caches and length > LENGTH_WITHOUT_CACHE:
            progress.note(
                f"The model has no key/value cache: its text is written {LENGTH_WITHOUT_CACHE} tokens at a time, "
                "slowly. Text of your own (--calibration file.txt) would be faster."
            )
        ids = generate(session, wanted, samples, length, recipe.seed, progress.advance)
        what = f"sequences of {ids.shape[1]} tokens that the model wrote itself"
        return _split({TOKENS: ids}, wanted, _held_out(recipe.samples), what, progress)
    progress.stage("Making random inputs")
    progress.note(
        "This is no language model that could write its own text: it is calibrated with random inputs. "
        "Inputs of your own (--calibration data.npz, or file.txt) give a better model."
    )
    rng = np.random.default_rng(recipe.seed)
    made = [making.random_feed(wanted, 1, recipe.sequence_length, rng) for _ in range(samples)]
    training, held_out = tuple(made[: recipe.samples]), tuple(made[recipe.samples :])
    return CalibrationData(training, held_out, _described(len(training), "random inputs", len(held_out)))


def _held_out(samples: int) -> int:
    return max(1, samples // HELD_OUT_SHARE)


def _split(arrays: Arrays, wanted: Signature, held_out: int, what: str, progress: Progress) -> CalibrationData:
    """Samples along axis 0: the last ones are held out, the others go into feeds of a few."""
    total = len(next(iter(arrays.values())))
    kept = max(total - held_out, total // 2, 1)
    if total == 1:
        progress.note("There is one calibration sample, so the result is measured on the sample it was made with.")
    fixed = wanted.inputs[0].fixed(0)
    step = fixed or SIDE_BY_SIDE

    def batches(start: int, stop: int, step: int) -> tuple[Feed, ...]:
        starts = range(start, stop - (fixed or 1) + 1, step)
        return tuple(
            making.complete(wanted, {name: values[at : min(at + step, stop)] for name, values in arrays.items()})
            for at in starts
        )

    training = batches(0, kept, step)
    if not training:
        raise CalibrationError(f"the model takes batches of {fixed}, the calibration data hold {total} samples")
    measuring = batches(kept, total, fixed or 1)
    return CalibrationData(training, measuring or training[-1:], _described(kept, what, total - kept))


def _described(samples: int, what: str, held_out: int) -> str:
    return f"{samples} {what}" + (f", {held_out} more held out to measure with" if held_out else "")


def _texts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the calibration file {path} is not UTF-8 text (byte {error.start})") from error
    if path.suffix == ".txt":
        return [text]
    return [_text_field(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # JSON can hold halves of characters, tokenizers cannot read them
    except (ValueError, KeyError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(f'line {number} of {path} is not a JSON object with a string "text"')
    return text


def _windows_of_text(
    texts: Sequence[str],
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    tokenizer: str | os.PathLike[str] | None,
) -> NDArray[np.int64]:
    """Token ids (windows, T) from all of the texts, evenly spread over them."""
    if not wanted.takes_tokens:
        raise CalibrationError(f"the model has no input {TOKENS}, so text cannot calibrate it: {making.ADVICE}")
    encoder = _tokenizer(opened.path, tokenizer)
    ids = np.array([token for text in texts for token in encoder(text)], np.int64)
    length = wanted.sequence_length(recipe.sequence_length)
    if len(ids) < length and (wanted.names[TOKENS].fixed(1) or len(ids) < 2):
        raise CalibrationError(f"the calibration text has {len(ids)} tokens; the model needs at least {length}")
    length = min(length, len(ids))
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    count = min(len(windows), recipe.samples + _held_out(recipe.samples))
    chosen: NDArray[np.int64] = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    _check_ids(chosen, wanted)
    return chosen


def _tokenizer(model: Path | None, named: str | os.PathLike[str] | None) -> Callable[[str], list[int]]:
    folders = [Path(named)] if named is not None else [model.parent, model.parent.parent] if model else []
    files = [folder if folder.is_file() else folder / "tokenizer.json" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        where = f"in {named}" if named is not None else "beside the model"
        raise CalibrationError(f"there is no tokenizer.json {where}; name its folder with --tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError("calibration text needs a tokenizer: pip install 'awq-onnx[hf]'") from error
    try:
        loaded = Tokenizer.from_file(str(found))
    except Exception as error:  # tokenizers raises plain Exception
        raise CalibrationError(f"{found} is no tokenizer: {error}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _arrays(path: Path, wanted: Signature) -> Arrays:
    if path.suffix not in (".npz", ".npy"):
        raise CalibrationError(f"the calibration file {path} is none of .txt, .jsonl, .npz, .npy")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {_only_name(wanted): loaded}
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"the calibration file {path} cannot be read: {error}") from error


def _only_name(wanted: Signature) -> str:
    """The input that a single array is meant for."""
    if wanted.takes_tokens:
        return TOKENS
    if len(wanted.inputs) == 1:
        return wanted.inputs[0].name
    names = ", ".join(one.name for one in wanted.inputs)
    raise CalibrationError(f"one array does not tell which input it is for; give an .npz with {names}")


def check_arrays(arrays: Arrays, wanted: Signature) -> None:
    """Raise CalibrationError where an array does not fit its input."""
    if not arrays:
        raise CalibrationError("the calibration data hold no array")
    if any(not values.ndim or not values.size for values in arrays.values()):
        raise CalibrationError("the calibration arrays hold no sample, or samples of no token")
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise CalibrationError(f"the calibration arrays differ in their number of samples: {lengths}")
    for name, values in arrays.items():
        _check_array(name, values, wanted)
    if TOKENS in arrays:
        _check_ids(arrays[TOKENS], wanted)
    if MASK in arrays and TOKENS in arrays and arrays[MASK].shape != arrays[TOKENS].shape:
        raise CalibrationError(f"{MASK} is {arrays[MASK].shape}, {TOKENS} {arrays[TOKENS].shape}; they must agree")
    if MASK in arrays and not arrays[MASK].any(axis=-1).all():
        raise CalibrationError(f"a sample has an {MASK} of zeros alone: it holds no token")


def _check_array(name: str, values: NDArray[Any], wanted: Signature) -> None:
    one = wanted.names.get(name)
    if one is None:
        names = ", ".join(wanted.names)
        raise CalibrationError(f"the calibration data hold {name}, which is no input of the model; its inputs: {names}")
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(one.dtype.kind, one.dtype.kind)
    if values.dtype.kind not in kinds:
        raise CalibrationError(f"calibration array {name} is {values.dtype}, the model wants {one.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise CalibrationError(f"calibration array {name} holds NaN or Inf")
    if one.dims is None:
        return
    fits = len(one.dims) == values.ndim and all(
        axis == 0 or not isinstance(dim, int) or dim == size
        for axis, (dim, size) in enumerate(zip(one.dims, values.shape, strict=False))
    )
    if not fits:
        dims = " x ".join(map(str, one.dims))
        raise CalibrationError(
            f"calibration array {name} is {' x '.join(map(str, values.shape))}, the model wants {dims}"
        )


def _check_ids(ids: NDArray[Any], wanted: Signature) -> None:
    if wanted.vocabulary and ids.size and not (ids.min() >= 0 and ids.max() < wanted.vocabulary):
        raise CalibrationError(
            f"the calibration tokens run from {ids.min()} to {ids.max()}, "
            f"the model knows 0 to {wanted.vocabulary - 1}; is it the right tokenizer?"
        )
