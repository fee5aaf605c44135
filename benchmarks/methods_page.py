"""docs/methods.md and its pictures, from the figures of benchmarks/methods.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import variants as runs
from numpy.typing import NDArray
from pictures import pyplot, save_picture
from quality import ratio_with_error
from salient import ANY, LARGEST, LOUDEST, NONE, SHARES
from variants import Found, Variant

from awq_onnx.targets import WHOLE_COLUMN

WINDOWS = 24  # of text to measure on
GREY = "0.55"
COLOURS = {"rtn": GREY, "gptq": "C1", "awq": "C0", "awq+gptq": "C2"}
NAMES = {"rtn": "rounding alone (`rtn`)", "gptq": "`gptq`", "awq": "`awq`", "awq+gptq": "`awq+gptq` (default)"}
FORMULAS = {"max": "SmoothQuant's", "weights": "AutoAWQ's", "all": "the best of all three, layer by layer"}
EVERY_KIND = ("q, k, v", "gate, up", "down", "o")

INTRODUCTION = """# The methods, side by side

Made by `python benchmarks/methods.py --output docs/methods.md`; the pictures too. Every figure was measured on one
model, SmolLM2-135M (trained weights, 210 linear layers), with onnxruntime on a CPU; another model gives other
figures.

Quantisation stores each weight of a model in 4 bits in the place of 32 or 16. A few neighbouring weights (a block, of
32 or 128 here) share a scale and a zero point, and each is rounded to one of the 16 numbers that these leave. All
models on this page with the same block size have the same size: what differs is how the numbers were chosen.

* **KL**: how far the 4-bit model's guess of the next token is from that of the original model, in nats, mean over
  {windows} windows of {length} tokens of CPython's documentation, which calibrated nothing. 0 is the same guess. The
  smaller the better.
* **perplexity**: how surprised the model is by that text. The original's is {perplexity:.2f}.
* **+-**: one standard error over the windows. All models read the same windows, so a ratio of two is known better
  than either.
* **/ rtn**: the KL over that of rounding alone with the same blocks: 0.25 is a quarter of it.
* **calibration**: running the original over some text to see which numbers flow through it. The model writes that
  text itself, unless the page says otherwise; where a text of its own ends early, the rest of that sequence does not
  count.
"""

METHODS_TEXT = """
* `rtn`, round to nearest: every weight to the nearest number of its block's range. It reads no text.
* `gptq` ([Frantar et al. 2022](https://arxiv.org/abs/2210.17323)): input channel after input channel; what rounding
  one got wrong is made up for in the channels that are not rounded yet.
* `awq` ([Lin et al. 2023](https://arxiv.org/abs/2306.00978)): before rounding, weights that meet large activations
  are multiplied by a scale, which makes their errors smaller, and the activations are divided by it, which changes
  nothing else. Then the ranges of blocks are clipped where that helps.
* `awq+gptq`: AWQ's scales, then ranges that are fitted by least squares, then errors made up for.

Seconds per layer are those of calibrating, searching and rounding, over the number of layers: the forward passes are
in them, the writing of the text is not. For `rtn`, which needs neither, they are of the one sequence that the command
runs anyway. They are of one run on two cores, which other work shared: take them as an order of magnitude.
"""

FORMULAS_TEXT = """### Formulas of the scale

AWQ's scale of an input channel is mean|x|^alpha, alpha searched for each layer. Others have other formulas
(`--scale-from`), or one alpha for all layers (`--alpha`); each of them with `--method awq`, all else equal:
"""

SALIENT_TEXT = """
AWQ rests on an observation: a few input channels carry much larger numbers than the others, and rounding errors of
the weights that meet them hurt most. Below, the channels of each layer are sorted by mean|x|, the loudest first; the
curve tells which share of the squared error of the layer's output the first so many percent carry (blocks of 128,
plain rounding; the line is the mean over the layers of a kind, the shade holds eight of ten of them). If all channels
mattered alike, it would be the dotted line.

![Share of the error that the loudest channels carry]({picture})
"""

TOKENS_TEXT = """
Scales take one mean for each channel. To make up for errors takes the correlation of every two channels of a layer,
of which many are chance where the tokens are few. awq-onnx therefore tries what it learned on sequences that it kept
apart, and where that does not help, or there is nothing to keep apart, the layer is rounded without. Blocks of 32:

![KL over the number of calibration tokens]({picture})
"""

TEXT_TEXT = """
The default calibrates on text that the model wrote itself. Here it is given that, or as many sequences of something
else. numpy's documentation is akin to what is measured on, CPython's; the licences of the packages in onnxruntime are
not, nor is the prose that comes with awq-onnx, which is of many kinds (news, letters, recipes, a little code).
{random}The difference from self-written text is taken window by window:
"""

RANDOM_TEXT = "Random token ids are given as data: the command does not know that they are noise. "

FP16_TEXT = """
The same weights exported in fp16: each 4-bit model against its own original, on the same windows, calibrated on the
same tokens. Its scales are fp16 too, so the file is smaller.
"""


def write_page(found: Found, path: Path) -> None:
    """The page, and its pictures beside it; of sections that were measured."""
    sections = [(title, "\n".join(body(found, path))) for title, body in SECTIONS]
    sections = [(title, text) for title, text in sections if text]
    contents = [f"{number}. [{title}](#{_anchor(number, title)})" for number, (title, _) in enumerate(sections, 1)]
    parts = [f"## {number}. {title}\n{text}" for number, (title, text) in enumerate(sections, 1)]
    first = next(one for one in found.values() if "perplexity_original" in one)
    introduction = INTRODUCTION.format(windows=WINDOWS, length=runs.LENGTH, perplexity=first["perplexity_original"])
    path.write_text("\n".join([introduction, *contents, "", *parts]).rstrip() + "\n")


def _anchor(number: int, title: str) -> str:
    """As GitHub makes it of a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return f"{number}-{kept.replace(' ', '-')}"


def methods_section(found: Found, _: Path) -> Iterator[str]:
    if not _some(found, [one.with_block(32) for one in runs.FOUR_METHODS]):
        return
    yield METHODS_TEXT
    for block_size in (*runs.BLOCK_SIZES, WHOLE_COLUMN):
        yield from _methods_table(found, block_size)
    if _some(found, [one.with_block(32) for one in runs.FORMULAS]):
        yield FORMULAS_TEXT
        yield from _formulas_table(found)
    yield from _presets_table(found)


def _methods_table(found: Found, block_size: int) -> Iterator[str]:
    chosen = _some(found, [one.with_block(block_size) for one in runs.FOUR_METHODS])
    if not chosen:
        return
    size = found[chosen[-1].key]["size"] / 1e6
    name = "A scale for each column" if block_size == WHOLE_COLUMN else f"Blocks of {block_size}"
    yield f"### {name}, {size:.0f} MB\n"
    yield from _header("method", "calibration sequences", "seconds per layer", "perplexity", "KL", "/ rtn")
    for one in chosen:
        samples = "-" if one.settings["method"] == "rtn" else f"{one.samples} x {runs.LENGTH}"
        yield _row(NAMES[one.settings["method"]], samples, *_figures(found, one, block_size))
    yield ""


def _formulas_table(found: Found) -> Iterator[str]:
    yield from _header("scale", "block", "seconds per layer", "perplexity", "KL", "/ rtn")
    for block_size in runs.BLOCK_SIZES:
        for one in _some(found, [variant.with_block(block_size) for variant in (runs.AWQ, *runs.FORMULAS)]):
            yield _row(_formula_name(one), f"{block_size}", *_figures(found, one, block_size))
    yield ""


def _formula_name(one: Variant) -> str:
    if "alpha" in one.settings:
        return f"AWQ's, alpha {one.settings['alpha']} for all (`--alpha {one.settings['alpha']}`)"
    formula = one.settings.get("scale_from")
    return f"{FORMULAS[formula]} (`--scale-from {formula}`)" if formula else "AWQ's (`--method awq`)"


def _figures(found: Found, one: Variant, block_size: int) -> list[str]:
    """Seconds per layer, perplexity, KL, ratio to rtn."""
    figures = found[one.key]
    seconds = figures["seconds"]["calibrate and search"] / figures["layers"]
    return [f"{seconds:.2f}", f"{figures['perplexity_quantized']:.2f}", _kl(figures), _ratio(found, one, block_size)]


def _presets_table(found: Found) -> Iterator[str]:
    chosen = _some(found, [*runs.PRESETS, runs.PRESET_BEST])
    if not chosen:
        return
    yield "### Presets\n\nThe whole command with nothing given, blocks of 32, the writing of the text included:\n"
    yield from _header("preset", "sequences written", "seconds", "perplexity", "KL", "/ rtn", "size")
    for one in chosen:
        figures = found[one.key]
        yield _row(
            f"`--quality {one.settings['quality']}`",
            f"{one.samples} x {runs.LENGTH}",
            f"{figures['total_seconds']:.0f}",
            f"{figures['perplexity_quantized']:.2f}",
            _kl(figures),
            _ratio(found, one, 32),
            f"{figures['size'] / 1e6:.1f} MB",
        )
    yield ""


def salient_section(found: Found, path: Path) -> Iterator[str]:
    if runs.SALIENT not in found:
        return
    figures = found[runs.SALIENT]
    picture = path.with_name("methods-salient.svg")
    draw_salient(figures["layers"], picture)
    yield SALIENT_TEXT.format(picture=picture.name)
    layers = figures["layers"]
    before, after = (np.mean([one[f"{which}_salient"] for one in layers]) for which in ("plain", "scaled"))
    most = max(layers, key=lambda one: float(one["plain_salient"]))
    loss = float(np.exp(np.mean(np.log([one["loss_ratio"] for one in layers]))))
    yield (
        f"In the mean over all {len(layers)} layers the loudest 1% of the channels carry {before:.1%} of the error "
        f"before scaling and {after:.1%} after it. The layer where it is most: `{most['name']}`, "
        f"{most['plain_salient']:.1%} before, {most['scaled_salient']:.1%} after. The scales bring the squared error "
        f"of a layer's output to {loss:.2f} of what it was (geometric mean)."
    )
    yield ""
    yield from _kinds_table(layers)
    yield from _kept_table(figures)


def _kinds_table(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from _header("layers", "the loudest 1% before", "after", "squared error after / before")
    for kind in EVERY_KIND:
        chosen = [one for one in layers if one["kind"] == kind]
        before, after = (np.mean([one[f"{which}_salient"] for one in chosen]) for which in ("plain", "scaled"))
        loss = np.exp(np.mean(np.log([one["loss_ratio"] for one in chosen])))
        yield _row(f"{kind} ({len(chosen)})", f"{before:.1%}", f"{after:.1%}", f"{loss:.2f}")
    yield ""


def _kept_table(figures: dict[str, Any]) -> Iterator[str]:
    kept = figures["kept"]
    names = {
        NONE: "none",
        ANY: "1% of each layer's channels, at random",
        LARGEST: "the 1% with the largest weights, by norm",
        LOUDEST: "the 1% that are loudest, by mean\\|x\\|",
    }
    yield "The experiment that AWQ began with: plain rounding, blocks of 128, but some channels keep their weights:\n"
    yield from _header("kept unrounded", "perplexity", "KL", "/ none")
    for by, name in names.items():
        ratio, error = ratio_with_error(_windows(kept[by]), _windows(kept[NONE]))
        told = "-" if by == NONE else f"{ratio:.3f} +-{error:.3f}"
        yield _row(name, f"{kept[by]['perplexity_quantized']:.2f}", _kl(kept[by]), told)
    yield ""


def draw_salient(layers: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each kind of layer: cumulative share of the error over the share of the channels."""
    figure, panels = pyplot().subplots(1, len(EVERY_KIND), figsize=(9, 3), sharey=True, layout="constrained")
    percent = 100 * np.array(SHARES)
    for axes, kind in zip(panels, EVERY_KIND, strict=True):
        chosen = [one for one in layers if one["kind"] == kind]
        for which, label, colour in (("plain", "before", "C3"), ("scaled", "after scaling", "C0")):
            curves = 100 * np.array([one[which] for one in chosen])
            axes.fill_between(percent, *np.quantile(curves, [0.1, 0.9], axis=0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(percent, curves.mean(axis=0), color=colour, label=label)
        axes.plot(percent, percent, ":", color=GREY, label="all alike")
        axes.axvline(1, color="0.85", linewidth=1, zorder=0)
        axes.set(xscale="log", title=kind, xlim=(percent[0], 100), ylim=(0, 100))
        axes.set_xticks([1, 10, 100], ["1%", "10%", "100%"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    panels[0].set_ylabel("share of the squared error")
    panels[-1].legend(frameon=False, fontsize="small", loc="upper left")  # the panel with the lowest curves
    figure.supxlabel("share of the input channels, the loudest first", fontsize="medium")
    save_picture(figure, path)


def tokens_section(found: Found, path: Path) -> Iterator[str]:
    chosen = _some(found, runs.OVER_TOKENS)
    if len({one.samples for one in chosen}) < 2:
        return
    picture = path.with_name("methods-tokens.svg")
    draw_tokens(found, chosen, picture)
    yield TOKENS_TEXT.format(picture=picture.name)
    methods = list(dict.fromkeys(one.settings["method"] for one in chosen))
    yield from _header("tokens", *(f"`{method}`" for method in methods), "layers where `gptq` beats plain rounding")
    for samples in dict.fromkeys(sorted(one.samples for one in chosen)):
        here = {one.settings["method"]: found[one.key] for one in chosen if one.samples == samples}
        cells = [_kl(here[method]) if method in here else "" for method in methods]
        helped = f"{here['gptq']['better_than_plain']} of {here['gptq']['layers']}" if "gptq" in here else ""
        yield _row(f"{samples * runs.LENGTH:,}", *cells, helped)
    yield ""


def draw_tokens(found: Found, chosen: Iterable[Variant], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    chosen = list(chosen)
    for method in dict.fromkeys(one.settings["method"] for one in chosen):
        mine = sorted((one for one in chosen if one.settings["method"] == method), key=lambda one: one.samples)
        figures = [found[one.key] for one in mine]
        tokens, means, errors = (
            [one.samples * runs.LENGTH for one in mine],
            *([one[name] for one in figures] for name in ("kl_mean", "kl_se")),
        )
        axes.errorbar(tokens, means, errors, marker="o", markersize=4, capsize=2, color=COLOURS[method], label=method)
    plain = found.get(runs.ROUND_TO_NEAREST.with_block(32).key)
    if plain:
        axes.axhline(plain["kl_mean"], color=GREY, linewidth=1, label="rounding alone (rtn)")
    ticks = sorted({one.samples * runs.LENGTH for one in chosen})
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="KL, nats per token", ylim=(0, None))
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_picture(figure, path)


def text_section(found: Found, _: Path) -> Iterator[str]:
    chosen = _some(found, runs.wanted_variants(runs.TEXT, best=False))
    own = {(one.settings["block_size"], one.samples): found[one.key] for one in chosen if one.text == runs.OWN}
    others = [one for one in chosen if one.text != runs.OWN and (one.settings["block_size"], one.samples) in own]
    if not others:
        return
    yield TEXT_TEXT.format(random=RANDOM_TEXT if any(one.text == runs.RANDOM for one in others) else "")
    yield from _header("calibrated on", "block", "perplexity", "KL", "KL less that of own text", "in standard errors")
    for (block_size, samples), figures in own.items():
        here = [one for one in others if (one.settings["block_size"], one.samples) == (block_size, samples)]
        if here:
            yield _text_row(runs.OWN, samples, block_size, figures, "-", "-")
        for one in here:
            difference, error = _difference(found[one.key], figures)
            told = f"{difference:+.4f} +-{error:.4f}"
            yield _text_row(one.text, samples, block_size, found[one.key], told, f"{difference / error:+.1f}")
    yield ""


def _text_row(text: str, samples: int, block_size: int, figures: dict[str, Any], *difference: str) -> str:
    perplexity = f"{figures['perplexity_quantized']:.2f}"
    return _row(f"{text}, {samples} x {runs.LENGTH}", f"{block_size}", perplexity, _kl(figures), *difference)


def fp16_section(found: Found, _: Path) -> Iterator[str]:
    halves = _some(found, [one.with_block(size) for size in runs.BLOCK_SIZES for one in runs.HALVES])
    if not halves:
        return
    yield FP16_TEXT
    yield from _header("original", "method", "block", "perplexity of the original", "perplexity", "KL", "/ rtn", "size")
    for half in halves:
        block_size = half.settings["block_size"]
        whole = replace(half, model=runs.FP32_MODEL)
        for one, original in ((whole, "fp32"), (half, "fp16")):
            if one.key not in found:
                continue
            figures = found[one.key]
            perplexities = (f"{figures[f'perplexity_{which}']:.2f}" for which in ("original", "quantized"))
            ratio = _ratio(found, one, block_size)
            size = f"{figures['size'] / 1e6:.1f} MB"
            yield _row(
                original, f"`{one.settings['method']}`", f"{block_size}", *perplexities, _kl(figures), ratio, size
            )
    yield ""


def _difference(figures: dict[str, Any], others: dict[str, Any]) -> tuple[float, float]:
    """Mean of the differences of windows, and its standard error."""
    paired = _windows(figures) - _windows(others)
    return float(paired.mean()), float(paired.std(ddof=1) / len(paired) ** 0.5)


def _ratio(found: Found, one: Variant, block_size: int) -> str:
    plain = replace(runs.ROUND_TO_NEAREST, model=one.model).with_block(block_size).key
    if plain not in found or one.key == plain:
        return "-"
    ratio, error = ratio_with_error(_windows(found[one.key]), _windows(found[plain]))
    return f"{ratio:.3f} +-{error:.3f}"


def _windows(figures: dict[str, Any]) -> NDArray[np.float64]:
    return np.array(figures["kl_windows"], np.float64)


def _kl(figures: dict[str, Any]) -> str:
    return f"{figures['kl_mean']:.4f} +-{figures['kl_se']:.4f}"


def _some(found: Found, variants: Iterable[Variant]) -> list[Variant]:
    """Those that were measured."""
    return [one for one in variants if one.key in found]


def _header(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield "|" + "---|" * len(titles)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


SECTIONS: Sequence[tuple[str, Callable[[Found, Path], Iterator[str]]]] = (
    ("What each method brings", methods_section),
    ("The salient channels", salient_section),
    ("How many tokens", tokens_section),
    ("What to calibrate on", text_section),
    ("fp16", fp16_section),
)
