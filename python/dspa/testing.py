"""Small models, tokenizers, SAEs and maps with random weights, for tests, benchmarks and trials."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Model, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dspa.data.tokens import BOUNDARY
from dspa.maps.cdmap import TENSORS, ConditionalDifferenceMap, MapMeta
from dspa.models.attention import use_same_function
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer

D_IN, D_SAE_IN, D_SAE_OUT, VOCAB = 48, 96, 128, 61
L_IN, L_OUT = 1, 2
# Sizes by their names in each family's configuration.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_IN,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": D_IN, "n_layer": 4, "n_head": 4, "n_positions": 128} | {
    name: COMMON[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "qwen3": COMMON,
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": None},
    "gemma": COMMON,
    "gemma3_text": COMMON | {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "qwen2": {name: value for name, value in COMMON.items() if name != "head_dim"},
    # Its `base_model` is the whole model.
    "llama4_text": COMMON | {"intermediate_size_mlp": 64, "moe_layers": [], "attention_chunk_size": 16},
    "gpt2": GPT2,
    "gpt_neox": {n: v for n, v in COMMON.items() if n not in ("num_key_value_heads", "head_dim")},
}
_HYBRID: dict[str, Any] = {name: value for name, value in COMMON.items() if name != "head_dim"}
# Families with recurrent layers or convolutions, alone or beside attention.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": COMMON
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 12}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": _HYBRID | {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": _HYBRID | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "falcon_h1": COMMON | {"mamba_d_ssm": 96, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8},
    "recurrent_gemma": COMMON | {"lru_width": D_IN, "attention_window_size": 16},
    "mamba": {name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")},
}
BOS, EOS = 1, 2
_WORDS = (
    "the cat is a dog of my own and we see it run to home by an old red tree near his big house with some more good "
    "food on top for all you who like warm sun day night rain snow wind sea sky fish bird"
)
ENGLISH = _WORDS.split()


def cache_names() -> list[str]:
    """Return the keywords by which models of the installed transformers take a key/value cache."""
    takes = inspect.signature(Gemma2Model.forward).parameters
    return ["past_key_values", *(["cache"] if "cache" in takes else [])]


def make_model(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Return a model with random weights, by default so large that logits differ by a wide margin.

    Args:
        family: a name in `FAMILIES` or `RECURRENT`.
        seed: seed of the weights.
        dtype: dtype of the weights.
        config: settings of the family's configuration that differ from those there.
    """
    torch.manual_seed(seed)
    kind: Any = CONFIG_MAPPING[family]
    settings = (FAMILIES | RECURRENT)[family] | {"initializer_range": 0.2} | config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**settings), dtype=dtype)
    use_same_function(model)
    model.eval()
    return model


def make_sae(layer: int, d_sae: int, *, d_in: int = D_IN, seed: int = 0, **kwargs: Any) -> FrozenSAE:
    """Return a JumpReLU SAE with random weights, of whose latents about a tenth is active on a normalised residual."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    return FrozenSAE(
        "jumprelu",
        W_enc=W_dec.T.clone(),
        b_enc=0.05 * torch.randn(d_sae, generator=g),
        W_dec=W_dec,
        threshold=0.2 + torch.rand(d_sae, generator=g),
        layer=layer,
        **kwargs,
    )


def make_sae_for(h: Tensor, layer: int, d_sae: int, active: float, *, seed: int = 0) -> FrozenSAE:
    """Return a JumpReLU SAE with random unit rows, of which a share is active on given residuals.

    Its latents share one threshold, a quantile of the pre-activations of a sample of them.

    Args:
        h: Residuals [N, d_in], which give the SAE its dtype and device.
        layer: The SAE's layer.
        d_sae: Number of latents.
        active: Share of latents that are active per residual.
        seed: Seed of the weights.
    """
    g = torch.Generator(h.device).manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, h.shape[1], generator=g, device=h.device), dim=1)
    # torch.quantile takes at most 2^24 numbers.
    sample = (h.float() @ W_dec[:1024].T).flatten()[: 1 << 24]
    return FrozenSAE(
        "jumprelu",
        W_enc=W_dec.T.to(h.dtype),
        b_enc=torch.zeros(d_sae, device=h.device),
        W_dec=W_dec.to(h.dtype),
        threshold=sample.quantile(1 - active).expand(d_sae).clone(),
        layer=layer,
    )


def make_map(
    sae_in: FrozenSAE, sae_out: FrozenSAE, *, n_columns: int = 40, seed: int = 0, n_triples: int = 50
) -> ConditionalDifferenceMap:
    """Return a map with random entries in some of its columns."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.randperm(sae_out.d_sae, generator=g)[:n_columns].sort().values.to(torch.int32)
    gates = torch.randint(0, 256, (sae_in.d_sae, -(-n_triples // 8), 1), generator=g, dtype=torch.uint8)
    gates = ((gates >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, :n_triples].bool()
    meta = MapMeta(
        sae_in=sae_in.fingerprint,
        sae_out=sae_out.fingerprint,
        model_name="",
        layer_in=required_layer(sae_in),
        layer_out=required_layer(sae_out),
        d_sae_in=sae_in.d_sae,
        d_sae_out=sae_out.d_sae,
        n_triples=n_triples,
        n_cut=0,
        count_tokens="all",
        max_length=128,
        percentile=90.0,
        gate_rule="published",
        k_diff=16,
        sparsify=True,
        package="0",
        boundary=BOUNDARY,
        attention="eager",
    )
    tensors = gate_tensors(gates)
    return ConditionalDifferenceMap(
        columns,
        torch.randn(sae_in.d_sae, n_columns, generator=g),
        n_open=tensors["n_open"],
        gate_latents=tensors["gate_latents"],
        gates=tensors["gates"],
        variance=0.1 + torch.rand(n_columns, generator=g),
        meta=meta,
    )


def gate_tensors(gates: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a map that hold its gates, of all gates [d_sae_in, N] bool."""
    n_open = gates.sum(dim=1).to(torch.int32)
    partly = ((n_open > 0) & (n_open < gates.shape[1])).nonzero().flatten()
    bits = nn.functional.pad(gates[partly].to(torch.uint8), (0, -gates.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=2).to(torch.uint8)
    return {"n_open": n_open, "gate_latents": partly.to(torch.int32), "gates": packed}


def first_prompts(n_open: Tensor, n_triples: int) -> Tensor:
    """Return gates [d_sae_in, N] bool that are open on the first `n_open` [d_sae_in] of N prompts."""
    return torch.arange(n_triples) < n_open[:, None]


def with_tensors(cdmap: ConditionalDifferenceMap, **tensors: Tensor) -> ConditionalDifferenceMap:
    """Return the map with some of its tensors replaced."""
    return ConditionalDifferenceMap(**{name: getattr(cdmap, name) for name in TENSORS} | tensors, meta=cdmap.meta)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of English words that puts `<bos>` in front and pads on the left."""
    words = ["<pad>", "<bos>", "<unk>", *ENGLISH]
    vocabulary = {word: n for n, word in enumerate(words)}
    assert len(vocabulary) == len(words) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def make_tokenizer(padding_side: str = "right", vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w3, w4, ... with the ids 3, 4, ..., which puts `<s>` before a text."""
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side=padding_side
    )
