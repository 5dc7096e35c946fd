"""GGUF files of a tiny Llama, written as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dspa.testing import make_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
KINDS = gguf.GGMLQuantizationType
BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_llama(width: int = 64, **config: Any) -> PreTrainedModel:
    """A Llama of rows that the blocks of quantised weights divide."""
    sizes = {"hidden_size": width, "intermediate_size": 64, "head_dim": width // 4, "vocab_size": len(TOKENS)}
    return make_model("llama", tie_word_embeddings=True, **sizes, **config)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F16",
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    without: str = "no tensor",
) -> None:
    """Write `model`, its matrices in blocks of `kind`; the model has the values of those blocks afterwards."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.named_parameters():
        if without in _gguf_name(name):
            continue
        packed = _packed(weight, kind)
        n_heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name[-len("q_proj.weight")])
        if "self_attn" in name and n_heads:
            packed = _rotary_order(packed, n_heads)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=KINDS[kind] if weight.dim() > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _packed(weight: Tensor, kind: str) -> np.ndarray:
    """Quantise a matrix; `weight` gets the values that are left of it."""
    values = weight.detach().float().numpy()
    if weight.dim() == 1:
        return values
    packed = gguf.quantize(values, KINDS[kind])
    weight.data.copy_(weight.new_tensor(gguf.dequantize(packed, KINDS[kind])))
    return packed


def _rotary_order(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Interleave the two halves of each head, as llama.cpp rotates pairs of neighbours."""
    return rows.reshape(n_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{BLOCKS[part]}.weight"
