"""Build tiny random-weight models of many architectures as ONNX, to try awq-onnx on every kind of graph.

    python models/tiny.py NAME [FOLDER] [--exporter optimum|torchscript|dynamo|dynamo23] [--print-path]
    python models/tiny.py --list

Needs `pip install awq-onnx[cpu,export]`, and onnxscript for the dynamo exporters; downloads nothing. The
models are made from transformers configs: two layers, hidden size 128, weights from a fixed seed. What they
compute means nothing, but every norm gain has a few outlier channels and every bias and norm offset is
nonzero, so that a scale folded into the wrong place shows in the numbers.

An export is a folder with one or more .onnx files and config.json; without FOLDER it goes into the cache, see
`cached_folder`, and one that is there already is kept. Each is loaded in onnxruntime before it is kept, and what
the torch exporters wrote is compared with torch, at other sizes than it was exported with.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import inspect
import logging
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent))  # not there where a script is loaded by its path
from architectures import (
    ARCHITECTURES,
    EXPORTERS,
    FAILS,
    FRAMES,
    HEADS,
    HIDDEN,
    IMAGE,
    MELS,
    ROTARY,
    VOCAB,
    Architecture,
)
from model_building import build_once, cached_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SEED = 20231
OUTLIERS = (5, 38, 101)  # the channels of the hidden axis whose gain is large in every norm
OUTLIER_GAIN = 20.0
TOLERANCE = 1e-3  # of the exported model against torch, relative to the largest output

# The axes of the inputs whose size is free, and the sizes that an example is made with.
_AXES: dict[str, tuple[str | int, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "token_type_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "input_features": ("batch", MELS, FRAMES),
    "pixel_values": ("batch", 3, IMAGE, IMAGE),
}
_EXAMPLE_SIZES = {"batch": 2, "sequence": 7, "decoder_sequence": 5}
_CHECKED_SIZES = (
    _EXAMPLE_SIZES,
    {"batch": 3, "sequence": 11, "decoder_sequence": 4},
    {"batch": 1, "sequence": 1, "decoder_sequence": 1},
)


def architectures() -> list[str]:
    """The names that `build` takes."""
    return list(ARCHITECTURES)


def build(name: str, exporter: str = "optimum", folder: Path | None = None) -> list[Path]:
    """Export the model `name` into `folder` unless it is there already; returns its .onnx files."""
    if (name, exporter) in FAILS:
        raise NotImplementedError(f"{name} cannot be exported with {exporter}: {FAILS[name, exporter]}")
    if EXPORTERS[exporter][1] and importlib.util.find_spec("onnxscript") is None:
        raise NotImplementedError(f"{exporter} needs onnxscript: pip install onnxscript")
    folder = folder or cached_folder(f"tiny/{name}-{exporter}")
    return sorted(build_once(folder, lambda work: _build_into(work, name, exporter)).glob("*.onnx"))


def _build_into(folder: Path, name: str, exporter: str) -> None:
    architecture = ARCHITECTURES[name]
    if exporter == "dynamo23" and name in ROTARY:
        architecture = replace(architecture, inputs=(*architecture.inputs, "position_ids"))
    with _quiet():
        if exporter == "optimum":
            _export_with_optimum(folder, architecture)
        else:
            _export_with_torch(folder, architecture, *EXPORTERS[exporter])
    for path in folder.glob("*.onnx"):
        _session(path)


def make_model(architecture: Architecture) -> Any:
    """The torch model, its weights random but always the same."""
    import transformers

    config = getattr(transformers, architecture.config)(**architecture.options)
    model = getattr(transformers, architecture.model)(config).eval()
    plant(model)
    return model


def plant(model: Any) -> None:
    """Fill in the weights: activations of about unit size, outlier channels in the norms, no bias zero."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                continue  # CLIP's temperature
            if "Norm" in kind and name == "weight":
                value = _gain(noise) - (1.0 if kind.startswith("Gemma") else 0.0)
            elif parameter.ndim == 1:
                value = 0.2 * noise
            else:
                fan_in = parameter.shape[0] if kind == "Conv1D" else math.prod(parameter.shape[1:])
                value = noise / math.sqrt(fan_in)
            if path.endswith(".q"):  # T5 does not divide by sqrt(head size) in the attention
                value = value / math.sqrt(HIDDEN // HEADS)
            parameter.data = value


def _gain(noise: torch.Tensor) -> torch.Tensor:
    """A norm's gain: about one, but for the outliers of the hidden axis (a head's norm has none)."""
    gain = 1 + 0.1 * noise
    if len(gain) == HIDDEN:
        gain[list(OUTLIERS)] *= OUTLIER_GAIN
    return gain


def example(architecture: Architecture, sizes: dict[str, int]) -> dict[str, Any]:
    """Random inputs of a plain export."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    inputs = {}
    for name in architecture.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in _AXES[name]]
        if name == "attention_mask":
            inputs[name] = torch.ones(shape, dtype=torch.int64)
            inputs[name][-1, -2:-1] = 0  # a masked token, where there are two or more
        elif name == "position_ids":
            inputs[name] = torch.arange(shape[1]).expand(shape).clone()
        elif name.endswith("_ids"):
            inputs[name] = torch.randint(2 if name == "token_type_ids" else VOCAB, shape, generator=generator)
        else:
            inputs[name] = torch.randn(shape, generator=generator)
    return inputs


def _export_with_optimum(folder: Path, architecture: Architecture) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    model = make_model(architecture)
    onnx_export_from_model(model, folder, task=architecture.task, do_validation=False, nb_max_frames=FRAMES)


def _export_with_torch(folder: Path, architecture: Architecture, opset: int | None, dynamo: bool) -> None:
    import torch

    model, reference = make_model(architecture), make_model(architecture)
    model.config.save_pretrained(folder)
    for one in (model, reference):
        limit_forward(one, architecture)
    run_all_experts(model)
    axes = {n: {i: a for i, a in enumerate(_AXES[n]) if isinstance(a, str)} for n in architecture.inputs}
    how = {"dynamic_shapes": axes, "external_data": True} if dynamo else {"dynamic_axes": axes}
    path = folder / "model.onnx"
    with contextlib.nullcontext() if dynamo else _masks_without_vmap():
        torch.onnx.export(
            model,
            tuple(example(architecture, _EXAMPLE_SIZES).values()),
            path,
            input_names=list(architecture.inputs),
            output_names=list(architecture.outputs),
            opset_version=opset,
            dynamo=dynamo,
            verbose=False,
            **how,
        )
    for sizes in _CHECKED_SIZES:
        _compare(path, reference, architecture, sizes)


def limit_forward(model: Any, architecture: Architecture) -> None:
    """Let the model take and return what the architecture names, by position, and keep no cache.

    A wrapping module would do the same, but put its own name before that of every node and weight.
    """
    whole = model.forward

    def forward(*values: Any) -> tuple[Any, ...]:
        returned = whole(**dict(zip(architecture.inputs, values, strict=True)))
        return tuple(returned[name] for name in architecture.outputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in architecture.inputs])  # type: ignore[attr-defined]
    model.config.use_cache = False
    model.forward = forward


def run_all_experts(model: Any) -> None:
    """Let mixtures of experts run every expert on every token, weighted with zero where it was not chosen.

    transformers loops over the experts that some token has chosen: a tracer would keep those of the example
    only, and torch.export refuses. The function stays the same.
    """
    for block in model.modules():
        if type(block).__name__.endswith("SparseMoeBlock"):
            block.forward = functools.partial(_all_experts, block)


def _all_experts(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    tokens = hidden.reshape(-1, hidden.shape[-1])
    logits = block.gate(tokens)
    weights, chosen = torch.topk(logits.softmax(-1), block.top_k)
    if getattr(block, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    shares: Any = torch.zeros_like(logits).scatter(1, chosen, weights)
    pairs = zip(shares.split(1, dim=1), block.experts, strict=True)
    mixed = torch.stack([share * expert(tokens) for share, expert in pairs]).sum(0)
    return mixed.reshape(hidden.shape), logits


@contextlib.contextmanager
def _masks_without_vmap() -> Iterator[None]:
    """Causal masks made without vmap, which torch.jit cannot trace."""
    from transformers.integrations.executorch import sdpa_mask_without_vmap
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionMaskInterface.register("sdpa", sdpa_mask_without_vmap)
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", sdpa_mask)


def _compare(path: Path, model: Any, architecture: Architecture, sizes: dict[str, int]) -> None:
    """Assert that onnxruntime gets from the file what torch gets from the model."""
    import torch

    inputs = example(architecture, sizes)
    with torch.no_grad():
        expected = [value.numpy() for value in model(*inputs.values())]
    got = _session(path).run(None, {name: value.numpy() for name, value in inputs.items()})
    for name, ours, theirs in zip(architecture.outputs, got, expected, strict=True):
        assert ours.shape == theirs.shape, f"{name} is {ours.shape} at {sizes}, torch has {theirs.shape}"
        difference = float(abs(ours - theirs).max() / abs(theirs).max())
        assert difference < TOLERANCE, f"{name} differs from torch by {difference:.1e} at {sizes}"


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One thread, and what exporters print and warn of kept from standard output."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)


def _table() -> Iterator[str]:
    yield f"{'':15}" + "".join(f"{exporter:13}" for exporter in EXPORTERS)
    for name, architecture in ARCHITECTURES.items():
        cells = ("-" if (name, exporter) in FAILS else "yes" for exporter in EXPORTERS)
        yield f"{name:15}" + "".join(f"{cell:13}" for cell in cells) + architecture.note
    for (name, exporter), reason in FAILS.items():
        yield f"{name}-{exporter}: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a tiny random-weight model as ONNX.")
    parser.add_argument("name", nargs="?", choices=architectures(), help="which model")
    parser.add_argument("folder", nargs="?", type=Path, help="where to (default: the cache)")
    parser.add_argument("--exporter", choices=list(EXPORTERS), default="optimum")
    parser.add_argument("--list", action="store_true", help="list the models and what exports them")
    parser.add_argument("--print-path", action="store_true", help="print the paths of the files and nothing else")
    arguments = parser.parse_args()
    if arguments.list or not arguments.name:
        print("\n".join(_table()))
        return
    try:
        paths = build(arguments.name, arguments.exporter, arguments.folder)
    except NotImplementedError as error:
        sys.exit(f"tiny.py: {error}")
    for path in paths:
        print(path if arguments.print_path else f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
