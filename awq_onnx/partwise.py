"""Run the model part by part over the data, and quantise each group of layers once its inputs are known.

The search of one part's groups runs beside the next part. What is finished is in the journal: an interrupted run skips
it, and starts where the values between two parts were saved last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from awq_onnx import groups, methods, stand_ins
from awq_onnx.calibrate.data import CalibrationData
from awq_onnx.calibrate.segments import Data, Saved, Segments, Statistics
from awq_onnx.codec import Format
from awq_onnx.groups import Found, GroupResult
from awq_onnx.job import Job, Traced, submit
from awq_onnx.passes import rewrite
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.sites import Site
from awq_onnx.passes.switch import StandIn
from awq_onnx.threads import Spread, Workers, usable_cores

Outputs = list[NDArray[np.generic]]

GROUP, VALUES = "group", "values"  # what entries of the journal are called
SAVE_EVERY_SECONDS = 60.0
FORWARD = 0.5  # of the work, about; the rest is the search


@dataclass(frozen=True)
class Partwise:
    """plan: the groups, in the order of the results. formats: of every site."""

    job: Job
    traced: Traced
    plan: Sequence[Group]
    formats: Mapping[Site, Format]
    _searched: deque[tuple[Group, Future[Found]]] = field(default_factory=deque)

    def run(
        self, data: CalibrationData, outputs: Sequence[str], advance: Callable[[float], None]
    ) -> tuple[list[GroupResult], list[Outputs]]:
        """The results of all groups, and what the model makes of the held-out data."""
        job, files = self.job, self.job.files
        entries = {group: f"{GROUP} {number}" for number, group in enumerate(self.plan)}
        finished = {group for group, entry in entries.items() if entry in files.done}
        names = rewrite.weight_names([site for group in self.plan for site in group.sites])
        drifts = methods.makes_up_for_drift(job.recipe) and not data.random
        share = (1 - FORWARD) / max(len(entries) - len(finished), 1)

        def write(*, wait: bool) -> None:
            while self._searched and (wait or self._searched[0][1].done()):
                group, found = self._searched.popleft()
                files.record(entries[group], groups.write_group(found.result(), files, names, job.recipe))
                advance(share)

        def finished_layers(made: Collection[str]) -> dict[str, StandIn]:
            write(wait=True)
            layers = {}
            for group, entry in entries.items():
                if entry in files.done and any(site.output.name in made for site in group.sites):
                    result = self._result(group, entry, names)
                    layers.update({one.site.output.name or "": (one, result.scale) for one in result.sites})
            paths = {name: files.work / f"stand-in-{at}.npz" for at, name in enumerate(sorted(made))}
            return {name: stand_ins.of_result(*layers[name], path) for name, path in paths.items() if name in layers}

        with Workers(usable_cores(), job.budget_bytes) as workers, files.failures():
            run = Segments(
                self.traced.straight,
                self.plan,
                Data(data.feeds, data.held_out, outputs),
                folder=files.work,
                budget_bytes=job.budget_bytes,
                finished=finished,
                saved=self._saved(len(data.feeds) + len(data.held_out)),
                spread=workers.spread,
                device=job.device,
                stand_ins=finished_layers if drifts else None,
            )
            last_saved = time.monotonic()
            for known in run.run(make_room=workers.make_room, advance=lambda part: advance(FORWARD * part)):
                while known:
                    self._search(*known.pop(0), workers, data.random, drifts=drifts)
                    write(wait=False)
                job.opened.let_go()
                if time.monotonic() - last_saved > SAVE_EVERY_SECONDS and run.can_be_saved:
                    write(wait=True)
                    self._save(run)
                    last_saved = time.monotonic()
            write(wait=True)
        return [self._result(group, entry, names) for group, entry in entries.items()], run.measured

    def _search(self, group: Group, statistics: Statistics, workers: Workers, random: bool, *, drifts: bool) -> None:
        channels, job = self.traced.maps.get(group), self.job
        formats = {site: self.formats[site] for site in group.sites}

        def work(spread: Spread) -> Found:
            with job.device.turn:
                return groups.search_group(
                    group,
                    channels,
                    statistics,
                    formats,
                    job.recipe,
                    job.opened,
                    random=random,
                    spread=spread,
                    device=job.device,
                )

        self._searched.append((group, submit(workers, group, work, drifts=drifts)))

    def _result(self, group: Group, entry: str, names: Mapping[Site, str]) -> GroupResult:
        files = self.job.files
        return groups.result_of(files.done[entry], group, self.traced.maps.get(group), files.work, names)

    def _save(self, run: Segments) -> None:
        """Let an interrupted run go on from here, in the place of the values saved before."""
        before = self.job.files.done.get(VALUES)
        number = 1 + before["number"] if before else 0
        end = run.save(self.job.files.work / f"{VALUES}-{number}.npz")
        self.job.files.record(VALUES, {"number": number, "end": end})
        for other in self.job.files.work.glob(f"{VALUES}-*.npz"):
            if other.name != f"{VALUES}-{number}.npz":
                other.unlink()

    def _saved(self, feeds: int) -> Saved | None:
        entry = self.job.files.done.get(VALUES)
        if entry is None:
            return None
        return Saved.read(self.job.files.work / f"{VALUES}-{entry['number']}.npz", entry["end"], feeds)
