"""Which input channels carry the error of rounding, before and after AWQ's scales; what keeping a few unrounded brings.

`measured_channels` is the part of benchmarks/methods.py that looks inside the layers. The squared error of a layer's
output, ||X E||^2 = tr(E' H E) with H = X'X / T, is split over channels as H_kk ||E_k||^2: exact but for what the errors
of two channels do together, which is nothing on average where rounding errors are independent. The scales are those
that `--method awq` ships, rounding is plain. H is of the calibration tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from awq_onnx import Machine, Recipe, codec, groups
from awq_onnx.calibrate import data
from awq_onnx.calibrate.data import Calibration
from awq_onnx.calibrate.feeds import signature
from awq_onnx.calibrate.segments import Data, Segments
from awq_onnx.calibrate.straight import straighten
from awq_onnx.codec import Float32
from awq_onnx.passes.sites import Site
from awq_onnx.pipeline import trace_channels
from awq_onnx.plan import make_plan
from awq_onnx.progress import Silent
from awq_onnx.search import Reader, plain_error
from awq_onnx.store import OpenedModel, open_model

BLOCK_SIZE = 128
SALIENT = 0.01  # of the channels
SHARES = tuple(np.geomspace(0.005, 1, 24).tolist())  # of the channels, where the cumulative share is read off
KINDS = {"q_proj": "q, k, v", "k_proj": "q, k, v", "v_proj": "q, k, v", "o_proj": "o", "down_proj": "down"}
OTHERS = "gate, up"
NONE, LOUDEST, LARGEST, ANY = "none", "mean|x|", "norm of the weights", "random"


@dataclass(frozen=True)
class Layer:
    """One weight. rounded: float32, as it lies in the file. act_mean, norms, plain, scaled: float32 (K,): mean|x| and
    ||W_k|| of each channel, its part of the squared error of the output without scales and with them.
    loss, scaled_loss: all of that error, tr(E' H E).
    """

    site: Site
    rounded: Float32
    act_mean: Float32
    norms: Float32
    plain: Float32
    scaled: Float32
    loss: float
    scaled_loss: float

    @property
    def K(self) -> int:
        return len(self.act_mean)

    @property
    def figures(self) -> dict[str, Any]:
        """For JSON. plain, scaled: the share of the error that the loudest channels carry, at each of `SHARES`."""
        order = np.argsort(-self.act_mean, kind="stable")
        return {
            "name": self.site.name,
            "kind": next((kind for part, kind in KINDS.items() if part in self.site.name), OTHERS),
            "plain": _cumulative(self.plain[order]),
            "scaled": _cumulative(self.scaled[order]),
            "plain_salient": _cumulative(self.plain[order], [SALIENT])[0],
            "scaled_salient": _cumulative(self.scaled[order], [SALIENT])[0],
            "loss_ratio": self.scaled_loss / self.loss,
        }

    def kept(self, by: str, rng: np.random.Generator) -> NDArray[np.int64]:
        """The channels that stay unrounded."""
        ranks = {LOUDEST: self.act_mean, LARGEST: self.norms}.get(by, rng.random(self.K))
        return np.argsort(-ranks, kind="stable")[: 0 if by == NONE else _count(SALIENT, self.K)]


def measured_channels(
    model: Path, calibration: Calibration, samples: int, compared: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Figures for JSON: of every layer, and of the model with some channels kept. compared: with the original."""
    with open_model(model) as opened:
        layers = list(_layers(opened, calibration, samples))
    return {
        "block_size": BLOCK_SIZE,
        "layers": [one.figures for one in layers],
        "kept": {by: _with_kept(model, layers, by, compared) for by in (NONE, LOUDEST, LARGEST, ANY)},
    }


def _layers(opened: OpenedModel, calibration: Calibration, samples: int) -> Iterator[Layer]:
    """The model is run over the calibration data once, and the scales are searched as the command does it."""
    recipe = Recipe(method="awq", block_size=BLOCK_SIZE, samples=samples)
    plan = make_plan(opened.model, recipe)
    loaded = data.load(opened, signature(opened.model.graph), recipe, calibration, None, Silent())
    straight = straighten(opened, plan.survey, loaded.feeds[0])
    maps = trace_channels(plan, straight, loaded)
    with tempfile.TemporaryDirectory() as folder:
        budget_bytes = Machine().budget_bytes
        run = Segments(straight.opened, plan.groups, Data(loaded.feeds), folder=Path(folder), budget_bytes=budget_bytes)
        for known in run.run():
            for group, statistics in known:
                found = groups.search_group(group, maps.get(group), statistics, plan.formats, recipe, opened)
                for site in group.sites:
                    weight = opened.read(site.tensor)
                    seen = statistics[site.input.name or ""]
                    reader = Reader(weight.T if site.transposed else weight, seen, fmt=plan.formats[site])
                    yield _layer(site, reader, found.scale)


def _layer(site: Site, reader: Reader, scale: Float32) -> Layer:
    weight, statistics = reader.columns(), reader.statistics
    plain, scaled = (_error(weight, one, reader) for one in (np.ones_like(scale), scale))
    rounded = weight + plain
    return Layer(
        site=site,
        rounded=np.ascontiguousarray(rounded.T) if site.transposed else rounded,
        act_mean=statistics.act_mean,
        norms=np.linalg.norm(weight, axis=1),
        plain=statistics.diagonal * np.square(plain).sum(axis=1),
        scaled=statistics.diagonal * np.square(scaled).sum(axis=1),
        loss=statistics.loss(plain),
        scaled_loss=statistics.loss(scaled),
    )


def _error(weight: Float32, scale: Float32, reader: Reader) -> Float32:
    """E = Q(s W) / s - W of plain rounding: (K, N)."""
    blocks = codec.to_blocks(weight * scale[:, None], reader.fmt.block_size)
    return codec.from_blocks(plain_error(blocks, reader.fmt, np.empty_like(blocks)), reader.K) / scale[:, None]


def _cumulative(parts: Float32, shares: Collection[float] = SHARES) -> list[float]:
    """The share of all that the first channels carry, for each share of them, to four digits."""
    sums = np.cumsum(parts, dtype=np.float64)
    return [round(float(sums[_count(share, len(parts)) - 1] / sums[-1]), 4) for share in shares]


def _count(share: float, channels: int) -> int:
    return math.ceil(share * channels - 1e-9)


def _with_kept(
    model: Path, layers: Collection[Layer], by: str, compared: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """The comparison of the model whose weights are rounded and kept in fp32, but for some channels."""
    rng = np.random.default_rng(0)
    chosen: Mapping[str, tuple[Layer, NDArray[np.int64]]] = {
        one.site.tensor.name or "": (one, one.kept(by, rng)) for one in layers
    }
    graph = onnx.load(model)
    for tensor in graph.graph.initializer:
        if tensor.name in chosen:
            layer, kept = chosen[tensor.name]
            weight, rounded = onnx.numpy_helper.to_array(tensor), layer.rounded.copy()
            where = (slice(None), kept) if layer.site.transposed else (kept,)
            rounded[where] = weight[where]
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.onnx"
        onnx.save(graph, path)
        del graph
        return compared(path)
