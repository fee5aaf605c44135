"""What the command costs on larger and larger models: peak memory and time over size, and time over layers.

    python benchmarks/scale.py [--sizes 0.1 0.5 1.5 6] [--layers 2 4 8 16] [--json FILE] [--plot docs/scale.svg]
    python benchmarks/scale.py --from-json FILE [FILE ...] [--plot docs/scale.svg]
    python benchmarks/scale.py --sizes 0.5 --memory-budget 2GB -- --block-size 128

Builds llama-shaped models with random weights (see random_llama.py) in a temporary folder, runs awq-onnx on each with
random tokens for calibration, in a process of its own that is watched from outside, and removes what was made before
the next. What stands after `--` goes to awq-onnx as it is. The second form makes the tables and the picture again
from what --json kept, without running anything. Linux only: memory is read from /proc.

Private memory is what the process allocates, resident memory counts the mapped model files too, which the system
takes back when it needs the memory. The layers are all of one shape, so time over layers should be a straight line.

The largest size needs 16 GB of disk and about an hour of two idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from common import size_bytes
from pictures import pyplot, save_picture
from random_llama import DTYPES, POSITIONS, SHAPES, Shape, build
from watching import Cost, watched

LAYERS_SHAPE = "0.5"  # whose layers `--layers` counts
SEED = 20231
HELD_OUT_SHARE = 16  # awq-onnx keeps one sample in so many to measure with
MB, GB = 1e6, 1e9
GREY = "0.55"


@dataclass(frozen=True)
class Run:
    """One run of the command.

    shape: of the model, a key of SHAPES; layers: how many it had. of_layers: whether it belongs to `--layers`.
    weight_bytes, moment_bytes: of the largest weight, and of the largest second moment (K x K), in fp32.
    quantized, folded: layers, and those whose scale a node absorbed. cpu_seconds: of all cores, which other work on the
    machine changes less than the seconds. stages: seconds, as awq-onnx reports them.
    """

    shape: str
    layers: int
    of_layers: bool
    dtype: str
    samples: int
    length: int
    options: tuple[str, ...]
    cpus: int
    parameters: int
    model_bytes: int
    output_bytes: int
    weight_bytes: int
    moment_bytes: int
    quantized: int
    folded: int
    seconds: float
    cpu_seconds: float
    stages: Mapping[str, float]
    private_bytes: int
    resident_bytes: int

    @property
    def settings(self) -> tuple[str, ...]:
        """What has to agree for two runs to be comparable."""
        of_shape = (f"layers of {self.shape}",) if self.of_layers else ()
        options = (" ".join(self.options),) if self.options else ()
        return (*of_shape, self.dtype, f"{self.samples} x {self.length} tokens", f"{self.cpus} cores", *options)


@dataclass(frozen=True)
class Line:
    """seconds = fixed + each * layers, by least squares; off: the largest distance from it, relative to the line."""

    fixed: float
    each: float
    off: float

    @classmethod
    def through(cls, layers: Sequence[int], seconds: Sequence[float]) -> Line:
        each, fixed = np.polyfit(layers, seconds, 1)
        on_line = fixed + each * np.array(layers)
        return cls(float(fixed), float(each), float(np.max(np.abs(np.array(seconds) / on_line - 1))))

    def __str__(self) -> str:
        return f"{self.fixed:.1f} s + {self.each:.2f} s a layer; the farthest run is {self.off:.1%} off that line"


def measured(name: str, layers: int | None, arguments: argparse.Namespace) -> Run:
    """Build the model, quantise it, and remove both unless they are to be kept."""
    shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
    label = f"{name}b-{shape.layers}-layers-{arguments.dtype}"
    with _work_folder(arguments.folder, label, keep=arguments.keep) as folder:
        _say(f"{label}: building {shape.parameters / GB:.2f} billion parameters")
        model = build(folder, shape, arguments.dtype, SEED)
        ids = _calibration(folder, shape, arguments.samples, arguments.length)
        _say(f"{label}: quantising {size_bytes(model) / GB:.2f} GB")
        command = [sys.executable, "-m", "awq_onnx", str(model), "-o", str(folder / "int4.onnx")]
        command += ["--calibration", str(ids), "--samples", str(arguments.samples), "--quiet", "--json", "--force"]
        report, cost = report_of([*command, *_options(arguments)])
    return Run(
        shape=name,
        layers=shape.layers,
        of_layers=layers is not None,
        dtype=arguments.dtype,
        samples=arguments.samples,
        length=arguments.length,
        options=_options(arguments),
        cpus=os.cpu_count() or 1,
        parameters=shape.parameters,
        model_bytes=report["size_before_bytes"],
        output_bytes=report["size_after_bytes"],
        weight_bytes=max(4 * one["K"] * one["N"] for one in report["matmuls"]),
        moment_bytes=max(4 * one["K"] ** 2 for one in report["matmuls"]),
        quantized=len(report["matmuls"]),
        folded=sum(one["fold"] is not None for one in report["matmuls"]),
        stages=report["seconds"],
        **asdict(cost),
    )


def _options(arguments: argparse.Namespace) -> tuple[str, ...]:
    budget = ("--memory-budget", arguments.memory_budget) if arguments.memory_budget is not None else ()
    return (*budget, *arguments.options)


@contextmanager
def _work_folder(parent: Path | None, label: str, *, keep: bool) -> Iterator[Path]:
    """A new folder that is removed afterwards, or one that stays, by the model's name."""
    if keep and parent is not None:
        folder = parent / label
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="awq-onnx-scale-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _calibration(folder: Path, shape: Shape, samples: int, length: int) -> Path:
    """Random token ids: as many as the command calibrates with, and those that it holds out."""
    rows = samples + max(1, samples // HELD_OUT_SHARE)
    path = folder / "ids.npy"
    np.save(path, np.random.default_rng(SEED).integers(0, shape.vocabulary, (rows, length)))
    return path


def report_of(command: Sequence[str]) -> tuple[dict[str, Any], Cost]:
    """Run a command; what it prints, as JSON, and what it cost."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        cost, code = watched(command, output, errors)
        output.seek(0)
        errors.seek(0)
        if code:
            sys.exit(f"{' '.join(command)}\nended with {code}: {errors.read().decode().strip()}")
        return json.load(output), cost


def sizes_table(runs: Sequence[Run]) -> Iterator[str]:
    """Markdown, a line for each run over sizes."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    yield from _header(
        "parameters, 10^9", "layers", "folded", "model MB", "largest weight MB", "K x K MB", "s", "CPU s", *stages,
        "private MB", "resident MB", "private / model",
    )  # fmt: skip
    for run in runs:
        cells = [f"{run.parameters / GB:.2f}", f"{run.layers}", f"{run.folded} of {run.quantized}"]
        cells += [f"{size / MB:.0f}" for size in (run.model_bytes, run.weight_bytes, run.moment_bytes)]
        cells += [
            f"{run.seconds:.0f}",
            f"{run.cpu_seconds:.0f}",
            *(f"{run.stages.get(stage, 0):.1f}" for stage in stages),
        ]
        cells += [f"{run.private_bytes / MB:.0f}", f"{run.resident_bytes / MB:.0f}"]
        yield _row(*cells, f"{run.private_bytes / run.model_bytes:.2f}")


def layers_table(runs: Sequence[Run]) -> Iterator[str]:
    """Markdown, a line for each run over layers; and how straight a line they make."""
    yield from _header("layers", "s", "CPU s", "private MB", "resident MB")
    for run in runs:
        memory = (f"{size / MB:.0f}" for size in (run.private_bytes, run.resident_bytes))
        yield _row(f"{run.layers}", f"{run.seconds:.1f}", f"{run.cpu_seconds:.1f}", *memory)
    yield ""
    layers = [run.layers for run in runs]
    if len(set(layers)) < 3:
        yield "a line to compare with takes three numbers of layers or more"
        return
    yield f"time: {Line.through(layers, [run.seconds for run in runs])}"
    yield f"CPU time: {Line.through(layers, [run.cpu_seconds for run in runs])}"


def _header(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield "|" + "---|" * len(titles)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(runs: Sequence[Run]) -> Iterator[str]:
    """Every table there is something for: runs are compared only with others of the same settings."""
    for settings in dict.fromkeys(run.settings for run in runs):
        chosen = [run for run in runs if run.settings == settings]
        yield f"\n{', '.join(settings)}:\n"
        if chosen[0].of_layers:
            yield from layers_table(sorted(chosen, key=lambda run: run.layers))
        else:
            yield from sizes_table(sorted(chosen, key=lambda run: run.parameters))


def plot(runs: Sequence[Run], path: Path) -> None:
    """Memory and time over size, one line for each measure and settings."""
    over_sizes = sorted((run for run in runs if not run.of_layers), key=lambda run: run.parameters)
    if not over_sizes:
        sys.exit("scale.py: nothing to plot: there is no run over sizes")
    figure, (memory, minutes) = pyplot().subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    every = list(dict.fromkeys(run.settings for run in over_sizes))
    for settings, style in zip(every, cycle(["-", "--", ":", "-."])):
        chosen = [run for run in over_sizes if run.settings == settings]
        which = _apart(settings, every)
        _curve(memory, chosen, lambda run: run.resident_bytes / GB, f"peak resident{which}", f"C0{style}")
        _curve(memory, chosen, lambda run: run.private_bytes / GB, f"peak private{which}", f"C1{style}")
        _curve(minutes, chosen, lambda run: run.seconds / 60, f"whole command{which}", f"C2{style}")
        _curve(minutes, chosen, lambda run: run.cpu_seconds / 60, f"CPU time of all cores{which}", f"C3{style}")
    first = over_sizes[0]
    _guide(memory, over_sizes, lambda run: run.model_bytes / GB, "the model file")
    _guide(minutes, over_sizes, lambda run: first.seconds / 60 * run.parameters / first.parameters, "in proportion")
    _label(memory, over_sizes, "memory, GB")
    _label(minutes, over_sizes, "time, minutes")
    figure.suptitle(", ".join(one for one in every[0] if all(one in other for other in every)), fontsize="small")
    save_picture(figure, path)


def _apart(settings: Sequence[str], every: Sequence[Sequence[str]]) -> str:
    """What tells settings from the others, to write behind a name."""
    if len(every) < 2:
        return ""
    own = [one for one in settings if not all(one in other for other in every)]
    return f", {', '.join(own) or 'no option'}"


def _curve(axes: Any, runs: Sequence[Run], measure: Callable[[Run], float], label: str, style: str) -> None:
    parameters = [run.parameters / GB for run in runs]
    axes.plot(parameters, [measure(run) for run in runs], style, marker="o", markersize=4, label=label)


def _guide(axes: Any, runs: Sequence[Run], measure: Callable[[Run], float], label: str) -> None:
    """A line to compare with, which was not measured."""
    parameters = [run.parameters / GB for run in runs]
    axes.plot(parameters, [measure(run) for run in runs], color=GREY, linewidth=1, zorder=1, label=label)


def _label(axes: Any, runs: Sequence[Run], title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="parameters, billions", title=title)
    axes.minorticks_off()
    sizes = sorted({run.parameters / GB for run in runs})
    axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
    low, high = axes.get_ylim()
    ticks = _round_numbers(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.14))


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range; where that is hardly any, all multiples."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [(digit, digit * 10.0**power) for power in powers for digit in range(1, 10)]
    inside = [(digit, number) for digit, number in every if low <= number <= high]
    few = [number for digit, number in inside if digit in (1, 2, 5)]
    return few if len(few) > 3 else [number for _, number in inside]


def save(runs: Sequence[Run], path: Path) -> None:
    path.write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n")


def load(path: Path) -> list[Run]:
    return [Run(**{**values, "options": tuple(values["options"])}) for values in json.loads(path.read_text())]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory and time of the command over the size of the model.")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), help="default: all, without --layers")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help=f"numbers of layers, of {LAYERS_SHAPE}")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="sequences to calibrate with (%(default)s)"
    )
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens in each (%(default)s)")
    parser.add_argument("--memory-budget", metavar="VALUE", help="passed on to awq-onnx")
    parser.add_argument("--folder", type=Path, help="where models are built (default: the system's temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave models and outputs in --folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, after every run")
    parser.add_argument("--from-json", type=Path, nargs="+", metavar="FILE", help="run nothing, take these figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time over size, .svg or .png")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options of awq-onnx")
    return parser


def _run_all(arguments: argparse.Namespace) -> list[Run]:
    names = arguments.sizes or ([] if arguments.layers else list(SHAPES))
    wanted: list[tuple[str, int | None]] = [(name, None) for name in names]
    wanted += [(LAYERS_SHAPE, layers) for layers in arguments.layers or ()]
    runs: list[Run] = []
    for name, layers in wanted:
        runs.append(measured(name, layers, arguments))
        if arguments.json is not None:
            save(runs, arguments.json)
    return runs


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.keep and arguments.folder is None:
        parser.error("--keep needs --folder")
    if arguments.length > POSITIONS:
        parser.error(f"--length is more than the models' {POSITIONS} positions")
    signal.signal(signal.SIGTERM, _interrupt)  # what was built is removed then too
    if arguments.plot is not None:
        pyplot()  # before hours are spent
    if arguments.from_json is not None:
        runs = [run for path in arguments.from_json for run in load(path)]
    else:
        runs = _run_all(arguments)
    print("\n".join(tables(runs)))
    if arguments.plot is not None:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
