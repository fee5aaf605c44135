"""Choose and load the calibration data: what the user gave, else what can be made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from awq_onnx.calibrate import companion, given, synthetic
from awq_onnx.calibrate.feeds import ENCODER_STATES, Arrays, Feed, Signature, complete
from awq_onnx.calibrate.given import Calibration, Texts
from awq_onnx.calibrate.maker import NOISY, PROSE, Maker
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import CalibrationError
from awq_onnx.journal import Entry
from awq_onnx.output import OutputFiles
from awq_onnx.progress import Progress, Silent
from awq_onnx.recipe import Recipe
from awq_onnx.store import OpenedModel, describe, described, open_model

__all__ = ["Calibration", "CalibrationData", "load"]

NO_WRITER = "This is no language model that could write its own text"
SIDE_BY_SIDE = 4  # sequences in one feed: enough rows for fast products, few enough for memory
HELD_OUT_SHARE = 16  # one sequence in so many is kept to measure the result with


@dataclass(frozen=True)
class CalibrationData:
    """feeds: to calibrate with. held_out: to measure with, a sequence each; from `feeds` where nothing could be held
    out. source: what they are, for people. random: whether some of them are noise.
    """

    feeds: tuple[Feed, ...]
    held_out: tuple[Feed, ...]
    source: str
    random: bool = False

    @property
    def all_feeds(self) -> tuple[Feed, ...]:
        """Every sample once."""
        return self.feeds + tuple(one for one in self.held_out if all(one is not other for other in self.feeds))

    def keep(self, files: OutputFiles) -> Entry:
        """Write the data aside; what `kept` reads them again with."""
        count = iter(range(1 << 30))

        def written(feed: Feed) -> Entry:
            return {name: describe(files.keep(f"feed.{next(count)}", values)) for name, values in feed.items()}

        return {
            "feeds": [written(feed) for feed in self.feeds],
            "held_out": [written(feed) for feed in self.held_out],
            "source": self.source,
            "random": self.random,
        }

    @classmethod
    def kept(cls, entry: Entry, folder: Path) -> CalibrationData:
        """The data that `keep` wrote to a folder."""

        def read(feeds: list[Entry]) -> tuple[Feed, ...]:
            return tuple({name: described(one, folder).numpy() for name, one in feed.items()} for feed in feeds)

        return cls(read(entry["feeds"]), read(entry["held_out"]), entry["source"], entry["random"])


def load(
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
    progress: Progress,
    device: Device = PROCESSOR,
) -> CalibrationData:
    """The data for one run. device: what runs models for them. Raises CalibrationError where they do not fit."""
    maker = Maker.of(opened, recipe, progress, tokenizer, wanted, device)
    held_out = _held_out(recipe.samples)
    parts, what, source = _parts(maker, calibration, recipe.samples + held_out)
    if calibration is None:
        _tell_of_better_data(maker, what)
    return replace(_split(parts, wanted, held_out, source, progress), random=what in NOISY)


def windows(
    opened: OpenedModel,
    wanted: Signature,
    recipe: Recipe,
    calibration: Calibration,
    tokenizer: str | os.PathLike[str] | None,
    progress: Progress,
    device: Device = PROCESSOR,
) -> tuple[tuple[Feed, ...], str]:
    """Feeds of one sample each (of a batch, where the graph fixes that), at most `recipe.samples` samples; and what
    they are, for people. Raises CalibrationError where the data do not fit.
    """
    maker = Maker.of(opened, recipe, progress, tokenizer, wanted, device)
    parts, _, source = _parts(maker, calibration, recipe.samples)
    total, batch = len(next(iter(parts[0].values()))), wanted.fixed_batch or 1
    _check_batch(total, wanted)
    return _batches(parts, wanted, range(0, total - batch + 1, batch), total), f"{total} {source}"


def _parts(maker: Maker, calibration: Calibration, most: int) -> tuple[Sequence[Arrays], str, str]:
    """At most so many samples along axis 0 of every part; what to call a sample of them, and how they were made."""
    values, what = None, ""
    if calibration is not None:
        maker.progress.stage("Reading the data")
        values, what = given.read(calibration, maker.wanted)
    opened = maker.opened
    before = companion.decoder_before(opened) if maker.wanted.needs_past and not _holds_caches(values) else None
    if before is None:
        arrays, what = _whole(maker, values, what, most)
        return [arrays], what, what
    with open_model(before) as other:
        first = Maker.of(other, maker.recipe, maker.progress, maker.tokenizer, device=maker.device)
        arrays, what = _whole(first, values, what, most)
        maker.progress.stage(f"Running {before.name} for the caches that the model goes on from")
        parts = companion.continued(first.session, first.wanted, opened, arrays)
    return parts, what, f"{what}, gone on from at {len(parts)} places"


def _holds_caches(values: Texts | Arrays | None) -> bool:
    return isinstance(values, dict) and any(name.startswith("past") for name in values)


def _whole(maker: Maker, values: Texts | Arrays | None, what: str, most: int) -> tuple[Arrays, str]:
    """Arrays for every input that does not follow from others, and what to call a sample of them."""
    if values is None:
        batch = maker.wanted.fixed_batch
        return maker.fill({}, most if batch is None else max(-(-most // batch), 2) * batch)
    if isinstance(values, list):
        values = _windows(maker, values, most)
    values = {name: one[:most] for name, one in values.items()}
    left = [one.name for one in synthetic.missing(maker.wanted, values) if one.name != ENCODER_STATES]
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        maker.progress.note(f"Not in the data, and made up: {', '.join(left[:4])}{more}.")
    arrays, _ = maker.fill(values, len(next(iter(values.values()))))
    return arrays, what


def _tell_of_better_data(maker: Maker, what: str) -> None:
    """Where the model could not write its own text."""
    if what not in (PROSE, *NOISY):
        return
    or_text = ", or file.txt" if maker.wanted.takes_tokens else ""
    large = maker.is_large and what == PROSE
    why = "The model would take long to write its own text" if large else NO_WRITER
    maker.progress.note(
        f"{why}: it is calibrated with {what}. "
        f"Inputs of your own (--calibration data.npz{or_text}) give a better model."
    )


def _windows(maker: Maker, texts: Texts, most: int) -> Arrays:
    """Windows of the texts that are no longer than the model takes."""
    wanted = maker.wanted
    ids = given.token_ids(texts, maker.opened.path, wanted, maker.tokenizer)
    unheard = replace(maker, progress=Silent())  # the states for all of the windows are made, and told of, later
    length = maker.longest(unheard.with_states({}, wanted.batch_size(1)))
    return given.windows(ids, wanted, length, most)


def _held_out(samples: int) -> int:
    return max(1, samples // HELD_OUT_SHARE)


def _split(parts: Sequence[Arrays], wanted: Signature, held_out: int, what: str, progress: Progress) -> CalibrationData:
    """Samples along axis 0 of every part: the last ones are held out, the others go into feeds of a few."""
    total = len(next(iter(parts[0].values())))
    kept = max(total - held_out, total // 2, 1)
    if total == 1:
        progress.note("There is one calibration sample, so the result is measured on the sample it was made with.")
    fixed = wanted.fixed_batch
    if fixed is not None:
        _check_batch(total, wanted)
        kept = max(kept // fixed, 1) * fixed
    training = _batches(parts, wanted, range(0, kept, fixed or SIDE_BY_SIDE), kept)
    measuring = _batches(parts, wanted, range(kept, total - (fixed or 1) + 1, fixed or 1), total)
    return CalibrationData(training, measuring or training[-1:], _described(kept, what, total - kept))


def _check_batch(total: int, wanted: Signature) -> None:
    batch = wanted.fixed_batch or 1
    if total < batch:
        raise CalibrationError(f"the model takes batches of {batch}, the data hold {total} samples")


def _batches(parts: Sequence[Arrays], wanted: Signature, starts: range, stop: int) -> tuple[Feed, ...]:
    return tuple(
        complete(wanted, {name: values[at : min(at + starts.step, stop)] for name, values in arrays.items()})
        for arrays in parts
        for at in starts
    )


def _described(samples: int, what: str, held_out: int) -> str:
    return f"{samples} {what}" + (f", {held_out} more held out to measure with" if held_out else "")
