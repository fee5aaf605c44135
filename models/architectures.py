"""The architectures of tiny.py as data: transformers configs, optimum tasks, inputs, and what cannot be exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, LAYERS, POSITIONS = 128, 4, 2, 256, 512, 2, 128
IMAGE, PATCH, MELS, FRAMES = 32, 8, 16, 64

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
ROTARY = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "falcon_grouped"}
ROTARY |= {"mixtral", "qwen3_moe"}

# What cannot be exported with torch 2.13, transformers 4.57 and optimum-onnx 0.1.0, and why: found by trying.
FAILS: dict[tuple[str, str], str] = {
    ("mixtral", "optimum"): "optimum-onnx has no configuration for mixtral",
    (
        "falcon_grouped",
        "optimum",
    ): "optimum expects a cache of the key/value heads, transformers keeps one of all heads",
    ("falcon", "dynamo23"): "torch's Attention of opset 23 takes no single key/value head for many query heads",
}
