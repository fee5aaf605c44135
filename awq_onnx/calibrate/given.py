"""Read the calibration data that the user gave, and say clearly where they do not fit the model."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from awq_onnx.calibrate.feeds import ADVICE, DECODER_TOKENS, MASK, POSITIONS, SEGMENTS, TOKENS, Arrays, Signature
from awq_onnx.errors import CalibrationError, MissingPackageError

Calibration: TypeAlias = "str | os.PathLike[str] | Sequence[str] | NDArray[Any] | Arrays | None"
Texts: TypeAlias = "list[str]"


def read(
    calibration: str | os.PathLike[str] | Sequence[str] | NDArray[Any] | Arrays, wanted: Signature
) -> tuple[Texts | Arrays, str]:
    """Texts, or arrays by input name with samples along axis 0; and what to call a sample of them.

    Raises CalibrationError where they cannot be read, or do not fit the model.
    """
    if isinstance(calibration, Mapping):
        return _checked({name: np.asarray(values) for name, values in calibration.items()}, wanted), "given samples"
    if isinstance(calibration, np.ndarray):
        return _checked({_only_name(wanted): calibration}, wanted), "given samples"
    if not isinstance(calibration, str | os.PathLike):
        if not all(isinstance(text, str) for text in calibration):
            raise CalibrationError("the data are none of: a path, texts, token ids as an array, arrays by input name")
        return list(calibration), "windows of the given texts"
    path = Path(calibration)
    try:
        if not path.is_file():
            raise CalibrationError(f"the file {path} does not exist")
        if path.suffix in (".txt", ".jsonl"):
            return _texts(path), f"windows of {path.name}"
        return _checked(_arrays(path, wanted), wanted), f"samples of {path.name}"
    except OSError as error:
        raise CalibrationError(f"the file {path} cannot be read: {error.strerror}") from error


def _texts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the file {path} is not UTF-8 text (byte {error.start})") from error
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


def token_ids(
    texts: Texts, model: Path | None, wanted: Signature, tokenizer: str | os.PathLike[str] | None
) -> NDArray[np.int64]:
    """The tokens (T,) of all texts. Raises CalibrationError where the model takes none, or none can be made."""
    if not wanted.takes_tokens:
        raise CalibrationError(f"the model has no input {TOKENS}, so text is of no use to it: {ADVICE}")
    loaded = load_tokenizer(model, tokenizer)
    try:
        encoded = [loaded.encode(text, add_special_tokens=False).ids for text in texts]
    except Exception as error:  # tokenizers raises plain Exception
        raise CalibrationError(f"the tokenizer cannot read the text: {error}") from error
    return np.array([token for ids in encoded for token in ids], np.int64)


def windows(ids: NDArray[np.int64], wanted: Signature, length: int, most: int) -> Arrays:
    """Of tokens (T,) at most so many windows of that length, evenly spread; for every input that takes tokens."""
    if len(ids) < length and (wanted.names[wanted.text].fixed(1) or len(ids) < 2):
        raise CalibrationError(f"the text has {len(ids)} tokens; the model needs at least {length}")
    length = min(length, len(ids))
    cut = ids[: len(ids) // length * length].reshape(-1, length)
    chosen: NDArray[np.int64] = cut[np.linspace(0, len(cut) - 1, min(len(cut), most)).astype(int)]
    _check_ids(chosen, wanted)
    return {name: chosen for name in (TOKENS, DECODER_TOKENS) if name in wanted.names}


def load_tokenizer(model: Path | None, named: str | os.PathLike[str] | None) -> Any:
    """The tokenizer in the folder or file `named`, else beside the model or one folder up, as tokenizers.Tokenizer.

    Raises CalibrationError where there is none, MissingPackageError where it cannot be read.
    """
    folders = [Path(named)] if named is not None else [model.parent, model.parent.parent] if model else []
    files = [folder if folder.is_file() else folder / "tokenizer.json" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        where = f"in {named}" if named is not None else "beside the model"
        raise CalibrationError(f"there is no tokenizer.json {where}; name its folder with --tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError("text needs a tokenizer: pip install 'awq-onnx[hf]'") from error
    try:
        loaded = Tokenizer.from_file(str(found))
    except Exception as error:  # tokenizers raises plain Exception
        raise CalibrationError(f"{found} is no tokenizer: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _arrays(path: Path, wanted: Signature) -> Arrays:
    if path.suffix not in (".npz", ".npy"):
        raise CalibrationError(f"the file {path} is none of .txt, .jsonl, .npz, .npy")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {_only_name(wanted): loaded}
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"the file {path} cannot be read: {error}") from error


def _only_name(wanted: Signature) -> str:
    """The input that a single array is meant for."""
    if wanted.takes_tokens:
        return TOKENS if TOKENS in wanted.names else wanted.text
    if len(wanted.inputs) == 1:
        return wanted.inputs[0].name
    names = ", ".join(one.name for one in wanted.inputs)
    raise CalibrationError(f"one array does not tell which input it is for; give an .npz with {names}")


def _checked(arrays: Arrays, wanted: Signature) -> Arrays:
    """The arrays. Raises CalibrationError where one does not fit its input, or the others."""
    if not arrays:
        raise CalibrationError("the data hold no array")
    if any(not values.ndim or not values.size for values in arrays.values()):
        raise CalibrationError("the arrays hold no sample, or samples of no token")
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise CalibrationError(f"the arrays differ in their number of samples: {lengths}")
    for name, values in arrays.items():
        _check_array(name, values, wanted)
    for name in (TOKENS, DECODER_TOKENS):
        if name in arrays:
            _check_ids(arrays[name], wanted)
    _check_mask(arrays, wanted)
    return arrays


def _check_mask(arrays: Arrays, wanted: Signature) -> None:
    """What follows from the tokens is of no use without them; a mask must be as long as they are."""
    if TOKENS in wanted.names and TOKENS not in arrays:
        for name in (MASK, SEGMENTS, POSITIONS):
            if name in arrays:
                raise CalibrationError(f"the data hold {name} without the input {TOKENS} it belongs to")
    if MASK not in arrays:
        return
    after_past = any(name.startswith("past") for name in arrays)
    if TOKENS in arrays and not after_past and arrays[MASK].shape != arrays[TOKENS].shape:
        raise CalibrationError(f"{MASK} is {arrays[MASK].shape}, {TOKENS} {arrays[TOKENS].shape}; they must agree")
    if not arrays[MASK].any(axis=-1).all():
        raise CalibrationError(f"a sample has an {MASK} of zeros alone: it holds no token")


def _check_array(name: str, values: NDArray[Any], wanted: Signature) -> None:
    one = wanted.names.get(name)
    if one is None:
        names = ", ".join(wanted.names)
        raise CalibrationError(f"the data hold {name}, which is no input of the model; its inputs: {names}")
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(one.dtype.kind, one.dtype.kind)
    if values.dtype.kind not in kinds:
        raise CalibrationError(f"array {name} is {values.dtype}, the model wants {one.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise CalibrationError(f"array {name} holds NaN or Inf")
    if one.dims is None:
        return
    fits = len(one.dims) == values.ndim and all(
        axis == 0 or not isinstance(dim, int) or dim == size
        for axis, (dim, size) in enumerate(zip(one.dims, values.shape, strict=False))
    )
    if not fits:
        dims = " x ".join(map(str, one.dims))
        raise CalibrationError(f"array {name} is {' x '.join(map(str, values.shape))}, the model wants {dims}")


def _check_ids(ids: NDArray[Any], wanted: Signature) -> None:
    if wanted.vocabulary and ids.size and not (ids.min() >= 0 and ids.max() < wanted.vocabulary):
        raise CalibrationError(
            f"the tokens run from {ids.min()} to {ids.max()}, "
            f"the model knows 0 to {wanted.vocabulary - 1}; is it the right tokenizer?"
        )
