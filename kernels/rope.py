"""Rotary embeddings whose frequencies depend on the longest sequence of a forward: one regime, whatever the neighbours.

transformers' `dynamic` (NTK) and `longrope` choose their frequencies by the largest position in the forward. In a
batch a long row would then change every other row's logits, and keys already in the cache would stop fitting the
queries. So the regime is fixed once, at start, by max_model_len: all tokens of all rows get cos and sin from it.

    longrope   the long factors if max_model_len > original_max_position_embeddings, else the short ones
    dynamic    the base for a sequence of max_model_len tokens; the original one up to max_position_embeddings

What such a model "should" say is defined by the plain model, alone, in the same regime. `generate()` as it comes
differs from it where a sequence is shorter than the regime's.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropeway.kernels.errors import UnsupportedModel

FIXED = "fixed"
"""The rope type of a module whose frequencies are final; transformers updates it no more."""


def fix_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Give every rotary module of the model the regime for max_model_len (tokens). Changes nothing for other types.

    Raises:
        UnsupportedModel: the config asks for such a type, and no module is there that we know how to fix.
    """
    fixed = False
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        if isinstance(types, str) and moves(types):
            _fix(module, types, None, max_model_len)
            module.rope_type = FIXED
            fixed = True
        elif isinstance(types, dict):
            for layer_type, rope_type in types.items():
                if moves(rope_type):
                    _fix(module, rope_type, layer_type, max_model_len)
                    types[layer_type] = FIXED
                    fixed = True
    moving = [rope_type for rope_type in rope_types(model.config) if moves(rope_type)]
    if moving and not fixed:
        raise UnsupportedModel(
            f"{type(model).__name__} has {moving[0]} rotary embeddings of its own kind, which would let a long request "
            "change the text of its neighbours."
        )


def rope_types(config: PreTrainedConfig) -> set[str]:
    """The rope types that a model's config names, over all of its layer types."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


def moves(rope_type: str) -> bool:
    """Whether transformers changes this type's frequencies with the longest row."""
    return "dynamic" in rope_type or rope_type == "longrope"


def _fix(module: Any, rope_type: str, layer_type: str | None, max_model_len: int) -> None:
    prefix = f"{layer_type}_" if layer_type else ""
    old: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, old.device, seq_len=max_model_len, layer_type=layer_type
    )
    module.register_buffer(f"{prefix}inv_freq", inv_freq.to(old.dtype), persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)
