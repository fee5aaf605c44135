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
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SEED = 20231
HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, LAYERS, POSITIONS = 128, 4, 2, 256, 512, 2, 128
IMAGE, PATCH, MELS, FRAMES = 32, 8, 16, 64
OUTLIERS = (5, 38, 101)  # the channels of the hidden axis whose gain is large in every norm
OUTLIER_GAIN = 20.0
TOLERANCE = 1e-3  # of the exported model against torch, relative to the largest output

# What the exporters are called with: the opset, and whether through torch.export (None: optimum decides).
EXPORTERS: dict[str, tuple[int | None, bool]] = {
    "optimum": (None, False),
    "torchscript": (17, False),
    "dynamo": (18, True),
    "dynamo23": (23, True),
}

_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_TEXT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {**_SIZES, **_TEXT, "max_position_embeddings": POSITIONS, "intermediate_size": FFN}
_GROUPED = {**_DECODER, "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 64}
_SEQ2SEQ = {
    **_TEXT,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_VISION = {**_SIZES, "intermediate_size": FFN, "image_size": IMAGE, "patch_size": PATCH}

_GENERATION = "text-generation-with-past"
_TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, its tiny config, optimum's task, and the inputs and outputs of a plain export."""

    note: str
    model: str
    config: str
    options: dict[str, Any]
    task: str = _GENERATION
    inputs: tuple[str, ...] = _TOKENS
    outputs: tuple[str, ...] = ("logits",)


ARCHITECTURES = {
    "llama": Architecture("grouped-query attention", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": Architecture("as llama, another class", "MistralForCausalLM", "MistralConfig", _GROUPED),
    "qwen2": Architecture("biases on q, k and v", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": Architecture("norms on q and k", "Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma2": Architecture(
        "(1 + w) norms, before and after; capped logits", "Gemma2ForCausalLM", "Gemma2Config", _GEMMA
    ),
    "gemma3": Architecture(
        "as gemma2, norms on q and k, no caps",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "rope_local_base_freq": 1e4},
    ),
    "phi3": Architecture(
        "packed qkv and gate_up", "Phi3ForCausalLM", "Phi3Config", {**_DECODER, "num_key_value_heads": KV_HEADS}
    ),
    "gpt2": Architecture(
        "Conv1D, biases, packed qkv",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TEXT, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
    ),
    "gpt_neox": Architecture("parallel residual, two norms", "GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER),
    "falcon": Architecture(
        "parallel residual, one norm, multi-query packed qkv",
        "FalconForCausalLM",
        "FalconConfig",
        {**_DECODER, "multi_query": True, "bias": True},
    ),
    "falcon_grouped": Architecture(
        "parallel residual, two norms, grouped packed qkv",
        "FalconForCausalLM",
        "FalconConfig",
        {**_DECODER, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "ffn_hidden_size": FFN},
    ),
    "opt": Architecture(
        "ReLU, biases, learned positions",
        "OPTForCausalLM",
        "OPTConfig",
        {**_DECODER, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
    ),
    "bloom": Architecture(
        "ALiBi, packed qkv with heads outermost",
        "BloomForCausalLM",
        "BloomConfig",
        {**_TEXT, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "mixtral": Architecture(
        "4 experts, 2 a token",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "intermediate_size": HIDDEN, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Architecture(
        "4 experts, 2 a token, norms on q and k",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, "moe_intermediate_size": HIDDEN, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "t5": Architecture(
        "encoder-decoder, RMS norms, gated",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": FFN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        "text2text-generation-with-past",
        (*_TOKENS, "decoder_input_ids"),
    ),
    "bart": Architecture(
        "encoder-decoder, post-LN",
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SEQ2SEQ, "max_position_embeddings": POSITIONS},
        "text2text-generation-with-past",
        (*_TOKENS, "decoder_input_ids"),
    ),
    "whisper": Architecture(
        "speech to text",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": POSITIONS,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "automatic-speech-recognition-with-past",
        ("input_features", "decoder_input_ids"),
    ),
    "bert": Architecture(
        "post-LN encoder",
        "BertModel",
        "BertConfig",
        _DECODER,
        "feature-extraction",
        (*_TOKENS, "token_type_ids"),
        ("last_hidden_state",),
    ),
    "vit": Architecture(
        "images", "ViTForImageClassification", "ViTConfig", _VISION, "image-classification", ("pixel_values",)
    ),
    "clip": Architecture(
        "image and text",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_DECODER}, "vision_config": {**_VISION}, "projection_dim": HIDDEN},
        "zero-shot-image-classification",
        ("input_ids", "pixel_values", "attention_mask"),
        ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
    ),
}

# Given no position_ids, transformers makes one row of angles for the whole batch. From opset 23 on that row goes into
# RotaryEmbedding, for which onnxruntime wants a row for each: so these are exported with position_ids there.
_ROTARY = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "falcon_grouped"}
_ROTARY |= {"mixtral", "qwen3_moe"}

# What cannot be exported with torch 2.13, transformers 4.57 and optimum-onnx 0.1.0, and why: found by trying.
FAILS: dict[tuple[str, str], str] = {
    ("mixtral", "optimum"): "optimum-onnx has no configuration for mixtral",
    (
        "falcon_grouped",
        "optimum",
    ): "optimum expects a cache of the key/value heads, transformers keeps one of all heads",
    ("falcon", "dynamo23"): "torch's Attention of opset 23 takes no single key/value head for many query heads",
}

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


def cached_folder(name: str, exporter: str) -> Path:
    """Where an export is kept: in $AWQ_ONNX_CACHE, or else ~/.cache/awq-onnx, never in the checkout."""
    root = os.environ.get("AWQ_ONNX_CACHE")
    cache = Path(root) if root else Path.home() / ".cache" / "awq-onnx"
    return cache / "models" / "tiny" / f"{name}-{exporter}"


def build(name: str, exporter: str = "optimum", folder: Path | None = None) -> list[Path]:
    """Export the model `name` into `folder` unless it is there already; returns its .onnx files."""
    if (name, exporter) in FAILS:
        raise NotImplementedError(f"{name} cannot be exported with {exporter}: {FAILS[name, exporter]}")
    if EXPORTERS[exporter][1] and importlib.util.find_spec("onnxscript") is None:
        raise NotImplementedError(f"{exporter} needs onnxscript: pip install onnxscript")
    folder = folder or cached_folder(name, exporter)
    if not any(folder.glob("*.onnx")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            with _quiet():
                _build_into(work, name, exporter)
            work.chmod(0o755)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return sorted(folder.glob("*.onnx"))


def _build_into(folder: Path, name: str, exporter: str) -> None:
    architecture = ARCHITECTURES[name]
    if exporter == "optimum":
        _export_with_optimum(folder, architecture)
    else:
        if exporter == "dynamo23" and name in _ROTARY:
            architecture = replace(architecture, inputs=(*architecture.inputs, "position_ids"))
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
