"""The demo model's shape, and its weights as files.

Weights are stored as float16 to halve the folder; `dtype` in the config says float32, so that
transformers widens them on loading and computes in single precision.
"""

import json
from pathlib import Path

import torch
from demo_model.tokenizer import CONTEXT
from demo_model.turns import END_TEXT, END_TURN, PAD
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

# What every config carries and a reader of this one does not need.
DEFAULTS = frozenset(
    {
        "_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id",
        "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type", "return_dict",
    }
)  # fmt: skip


def model_config(tokenizer_folder: Path) -> LlamaConfig:
    """Five layers of width 256 with grouped-query attention and tied embeddings: 3.6 M parameters."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end_turn, end_text, pad = tokenizer.convert_tokens_to_ids([END_TURN, END_TEXT, PAD])
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[end_turn, end_text],
        pad_token_id=pad,
        dtype="float32",
    )


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in model.config.to_dict().items() if name not in DEFAULTS}
    config.update(architectures=["LlamaForCausalLM"], dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    GenerationConfig(eos_token_id=eos, pad_token_id=pad).save_pretrained(folder)
    # The output head is the embedding, so it is stored once.
    weights = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
