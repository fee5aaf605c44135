"""Which channels of an input carry most, before and after the scale: small enough to be told of every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from awq_onnx.codec import Float32

BINS = 256  # of neighbouring channels, at most
LOUDEST = 8
DIGITS = 4


@dataclass(frozen=True)
class Channel:
    """One channel of an input. activation: mean|x|. scale: what it is divided by."""

    index: int
    activation: float
    scale: float


@dataclass(frozen=True)
class Salience:
    """mean|x| of the K channels of an input, as they come and divided by their scale.

    before, after: the largest in each bin of `width` neighbouring channels; median_before, median_after: of all
    channels. loudest: those with the largest mean|x|, the largest first.
    """

    K: int
    width: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    median_before: float
    median_after: float
    loudest: tuple[Channel, ...]

    @classmethod
    def of(cls, act_mean: Float32, scale: Float32) -> Salience:
        """act_mean: mean|x|, scale: what x is divided by; both float32 (K,)."""
        scaled, width = act_mean / scale, -(-act_mean.size // BINS)
        loudest = np.argsort(-act_mean, kind="stable")[:LOUDEST].tolist()
        return cls(
            K=act_mean.size,
            width=width,
            before=_peaks(act_mean, width),
            after=_peaks(scaled, width),
            median_before=_short(np.median(act_mean)),
            median_after=_short(np.median(scaled)),
            loudest=tuple(Channel(at, _short(act_mean[at]), _short(scale[at])) for at in loudest),
        )

    def coarser(self, bins: int) -> Salience:
        """The same in at most so many bins."""
        together = -(-len(self.before) // bins)
        before, after = (_peaks(np.array(one, np.float32), together) for one in (self.before, self.after))
        return replace(self, width=self.width * together, before=before, after=after)


def _peaks(values: Float32, width: int) -> tuple[float, ...]:
    """The largest of each `width` neighbours."""
    padded = np.pad(values, (0, -values.size % width))  # magnitudes: 0 is never larger
    return tuple(_short(peak) for peak in padded.reshape(-1, width).max(axis=1))


def _short(value: np.floating) -> float:
    """With as many digits as a chart shows."""
    return float(f"{value:.{DIGITS}g}")
