"""One rope regime: a row's logits do not depend on how long its neighbours are."""

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, Family, build
from ragged_steps import BLOCK_SIZE, NUM_BLOCKS, batched_logits, largest_difference, plain_logits, token_rows
from transformers import PreTrainedModel

from ropeway.kernels.errors import UnsupportedModel
from ropeway.kernels.kv_pool import KVPool
from ropeway.kernels.packed import PackedForward
from ropeway.kernels.padded import PaddedForward
from ropeway.kernels.rope import FIXED, fix_rope, rope_types

ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "phi3-longrope": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": ORIGINAL,
        "max_position_embeddings": 64,
    },
    "llama-dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL},
    "gemma3_text-dynamic": {
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "max_position_embeddings": ORIGINAL,
    },
}
TOKENS = token_rows((9, 40, 5), VOCAB_SIZE)


def make(name: str) -> PreTrainedModel:
    family = FAMILIES[name.split("-")[0]]
    return build(Family(family.model_type, family.config | MODELS[name], gain=family.gain))


@pytest.mark.parametrize("layout", [PackedForward, PaddedForward])
@pytest.mark.parametrize("name", MODELS)
def test_a_long_neighbour_changes_nothing(name: str, layout: type[PackedForward] | type[PaddedForward]) -> None:
    """Guards short rows: transformers takes the regime of the longest row, which moved their logits by whole units."""
    model = make(name)
    fix_rope(model, max_model_len=64)
    together, alone = (
        batched_logits(layout(model, KVPool(NUM_BLOCKS, BLOCK_SIZE)), tokens, (1, 1, 4, 9))
        for tokens in (TOKENS, [TOKENS[0]])
    )
    assert largest_difference(together[:1], alone) < 1e-5
    assert largest_difference(together, plain_logits(model, TOKENS)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_regime_is_transformers_own(name: str) -> None:
    """Guards the formula: a sequence of exactly max_model_len tokens gets what transformers gives it."""
    tokens = token_rows((64,), VOCAB_SIZE)
    model = make(name)
    fix_rope(model, max_model_len=64)
    assert largest_difference(plain_logits(model, tokens), plain_logits(make(name), tokens)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_short_limits_stay_as_they_were(name: str) -> None:
    """Guards --max-model-len: within the original length nothing is stretched."""
    tokens = token_rows((ORIGINAL, 3), VOCAB_SIZE)
    model = make(name)
    fix_rope(model, max_model_len=ORIGINAL)
    assert largest_difference(plain_logits(model, tokens), plain_logits(make(name), tokens)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_regime_matters(name: str) -> None:
    """Guards the tests above: were the two regimes equal, they would prove nothing."""
    long, short = make(name), make(name)
    fix_rope(long, max_model_len=64)
    fix_rope(short, max_model_len=ORIGINAL)
    assert largest_difference(plain_logits(long, TOKENS[:1]), plain_logits(short, TOKENS[:1])) > 0.01


def test_other_types_are_left_alone() -> None:
    """Guards the many: default rope must not be touched."""
    model = build(FAMILIES["llama"])
    before = model.model.rotary_emb.inv_freq
    fix_rope(model, max_model_len=4096)
    assert model.model.rotary_emb.inv_freq is before
    assert model.model.rotary_emb.rope_type == "default"
    assert rope_types(model.config) == {"default"}
    fix_rope(build(FAMILIES["gpt2"]), max_model_len=64)


def test_layer_types_are_fixed_apart() -> None:
    """Guards gemma3: only the layers whose frequencies move are fixed."""
    model = make("gemma3_text-dynamic")
    fix_rope(model, 64)
    assert model.model.rotary_emb.rope_type == {"full_attention": FIXED, "sliding_attention": "default"}


def test_an_unknown_kind_is_refused() -> None:
    """Guards remote code with its own rotary module: it would go on following the longest row."""
    model = make("llama-dynamic")
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="dynamic rotary embeddings of its own kind"):
        fix_rope(model, 64)
