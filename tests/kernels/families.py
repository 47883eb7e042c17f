"""Tiny random models of many families, small enough to build and run in fractions of a second.

Random weights prove little unless attention and positions matter: matrices are drawn so that every layer passes on
about what it gets (and the embedding does not drown the rest), norms and biases are moved off 1 and 0, windows are
shorter than the sequences. `test_parity.py` asserts that what a family emits is worth comparing.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
WINDOW = 8


@dataclass(slots=True, frozen=True)
class Family:
    """One model type with one configuration."""

    model_type: str
    config: dict[str, Any]
    packed: bool = True
    """The layout that the probe finds: packed, or padded."""
    position_ids: bool = True
    """It is told positions; False: it reads them off the columns of the mask (ALiBi)."""
    gain: float = 1.0
    """Scale of its matrices, relative to what keeps the variance of a layer's input."""
    seed: int = 0
    common: bool = True
    """In the quick tests; the others are in the slow ones, on the page of families and in the tests of a GPU."""


_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_WINDOW = {"sliding_window": WINDOW}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}


def _base(model_type: str, /, *, gain: float = 1.0, seed: int = 0, **config: Any) -> Family:
    return Family(model_type, _BASE | config, gain=gain, seed=seed)


def _more(model_type: str, /, *, seed: int = 0, **config: Any) -> Family:
    return Family(model_type, _BASE | config, seed=seed, common=False)


def _unpacked(model_type: str, config: dict[str, Any], gain: float = 2.0, position_ids: bool = True) -> Family:
    return Family(model_type, config, packed=False, position_ids=position_ids, gain=gain)


FAMILIES: dict[str, Family] = {
    "llama": _base("llama"),
    "mistral": _base("mistral", **_WINDOW),
    "qwen2": _base("qwen2"),
    "qwen2-window": _base("qwen2", use_sliding_window=True, max_window_layers=1, **_WINDOW),
    "qwen3": _base("qwen3", head_dim=16),
    "qwen3_moe": _base("qwen3_moe", head_dim=16, num_experts=4, **_EXPERTS),
    "mixtral": _base("mixtral", num_local_experts=4, **_WINDOW),
    "gemma": _base("gemma", gain=2.0, head_dim=16),
    "gemma2": _base("gemma2", gain=2.0, head_dim=16, query_pre_attn_scalar=16, **_MIXED),
    "gemma3_text": _base("gemma3_text", head_dim=16, query_pre_attn_scalar=16, **_MIXED),
    "phi": _base("phi"),
    "phi3": _base("phi3", original_max_position_embeddings=128, **_WINDOW),
    "olmo2": _base("olmo2"),
    "olmo3": _base("olmo3", **_MIXED),
    "granite": _base("granite"),
    "stablelm": _base("stablelm"),
    "cohere": _base("cohere", seed=2),
    "cohere2": _base("cohere2", **_MIXED),
    "starcoder2": _base("starcoder2", seed=3, **_WINDOW),
    "smollm3": _base("smollm3", no_rope_layers=[1, 0]),
    "gpt_neox": _base("gpt_neox", seed=2),
    "gpt_oss": _base("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_MIXED),
    "deepseek_v3": _base("deepseek_v3", **_LATENT, **_ROUTED),
    "gpt2": Family("gpt2", _GPT2),
    "gpt_bigcode": Family("gpt_bigcode", _GPT2, seed=3),
    "opt": Family(
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "biogpt": Family(
        "biogpt",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "olmo": _more("olmo"),
    "olmoe": _more("olmoe", seed=1, num_experts=4, num_experts_per_tok=2),
    "flex_olmo": _more("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _more("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "glm": _more("glm", head_dim=16),
    "glm4": _more("glm4", head_dim=16),
    "glm4_moe": _more("glm4_moe", head_dim=16, **_ROUTED),
    "nemotron": _more("nemotron", head_dim=16),
    "exaone4": _more("exaone4", **_MIXED),
    "ernie4_5": _more("ernie4_5", head_dim=16),
    "ernie4_5_moe": _more("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_layer_start_index=1, **_EXPERTS),
    "seed_oss": _more("seed_oss", head_dim=16),
    "hunyuan_v1_dense": _more("hunyuan_v1_dense", head_dim=16),
    "hunyuan_v1_moe": _more("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2),
    "arcee": _more("arcee"),
    "helium": _more("helium", head_dim=16),
    "persimmon": _more("persimmon", seed=1),
    "qwen2_moe": _more("qwen2_moe", num_experts=4, shared_expert_intermediate_size=32, **_EXPERTS),
    "deepseek_v2": _more("deepseek_v2", **_LATENT, **_ROUTED),
    "dots1": _more("dots1", head_dim=16, **_ROUTED),
    "apertus": _more("apertus"),
    "bitnet": _more("bitnet"),
    "vaultgemma": _more("vaultgemma", seed=2, head_dim=16, query_pre_attn_scalar=16, **_MIXED),
    "ministral": _more("ministral", head_dim=16, **_MIXED),
    "jetmoe": _more("jetmoe"),
    "phimoe": _more("phimoe", num_local_experts=4, num_experts_per_tok=2),
    "phimoe-window": Family(
        "phimoe", _BASE | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}, packed=False, common=False
    ),
    "llama4_text": Family(
        "llama4_text",
        _BASE
        | {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attn_temperature_tuning": False,
        },
        packed=False,
        common=False,
    ),
    "xglm": Family(
        "xglm",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
        packed=False,
        seed=1,
        common=False,
    ),
    "falcon": _unpacked("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon-alibi": _unpacked(
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        position_ids=False,
    ),
    "bloom": _unpacked("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, position_ids=False),
    "mpt": _unpacked(
        "mpt",
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
        gain=1.0,
        position_ids=False,
    ),
    "gptj": _unpacked("gptj", {**_GPT2, "rotary_dim": 8}),
    "codegen": _unpacked("codegen", {**_GPT2, "rotary_dim": 8}),
    "gpt_neo": _unpacked(
        "gpt_neo",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 128,
        },
        gain=1.0,
    ),
}

REFUSED: dict[str, Family] = {
    "bamba": _more("bamba", attn_layer_indices=[1]),
    "falcon_h1": _more("falcon_h1"),
    "granitemoehybrid": _more(
        "granitemoehybrid", layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2
    ),
    "jamba": _more("jamba"),
    "lfm2": _more("lfm2", layer_types=["conv", "full_attention"]),
    "mamba": Family("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": Family(
        "mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2},
    ),
    "qwen3_next": _more("qwen3_next", head_dim=16, num_experts=4, **_EXPERTS, num_hidden_layers=4),
    "recurrent_gemma": _more("recurrent_gemma", num_hidden_layers=3),
    "rwkv": Family("rwkv", {"hidden_size": 64, "num_hidden_layers": 2}),
}
"""Layers with a state of their own: not to be batched, and the probe says so."""


def build(family: Family) -> PreTrainedModel:
    """The family's model in fp32, always with the same weights; it never ends a text by itself."""
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shared = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": False, **tokens}
    config = AutoConfig.for_model(family.model_type, **shared | family.config)
    with torch.random.fork_rng(), warnings.catch_warnings():  # some of transformers' modules are imported here
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        torch.manual_seed(family.seed)  # what a family draws itself, attention sinks for example, stays in
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(family.seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter += 0.1 * noise
            elif id(parameter) in embeddings:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * family.gain / parameter.shape[-1] ** 0.5)
    return model
