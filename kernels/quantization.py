"""Weights in 8 or 4 bits, by transformers' own bitsandbytes integration: its names, its configuration, its bytes.
FP8 is `fp8.py`'s: such weights are read as they are stored, and rounded in memory.

Knows no file and no request. A batch must not change what a row says, so 8-bit runs without outlier columns: LLM.int8
(Dettmers et al. 2022, https://arxiv.org/abs/2208.07339) looks for them over all rows of a matmul.
"""

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ropeway.kernels.errors import UnsupportedSetting

KINDS = ("fp8", "bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes-int8")

BITS = {"bitsandbytes-nf4": 4.5, "bitsandbytes-fp4": 4.5, "bitsandbytes-int8": 8.0}
"""Per weight that is quantised while it is read; 4-bit ones have an fp32 scale for every 64."""


def stored_kind(config: PreTrainedConfig) -> str | None:
    """How the weights of a checkpoint are quantised already; None: they are not. Other methods go by their own name."""
    given = _stored(config)
    if not given:
        return None
    if given.get("load_in_8bit"):
        return "bitsandbytes-int8"
    if given.get("load_in_4bit"):
        return f"bitsandbytes-{given.get('bnb_4bit_quant_type', 'fp4')}"
    return str(given.get("quant_method", "unknown"))


def quantization_options(config: PreTrainedConfig, wanted: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for `from_pretrained`; a checkpoint that is quantised already runs as it is, but for outlier columns.

    Args:
        config: of the checkpoint; its threshold for outliers is set to 0.
        wanted: one of `KINDS`, or None.
        dtype: in which 4-bit weights are multiplied.

    Raises:
        UnsupportedSetting: no such kind, or the checkpoint is quantised in another way.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every single matmul
    stored = stored_kind(config)
    if wanted is not None and wanted not in KINDS:
        raise UnsupportedSetting(f"There is no quantization {wanted!r}: say {', '.join(KINDS)}.")
    if stored is not None:
        if wanted == "fp8" or wanted not in (None, stored):
            raise UnsupportedSetting(f"This model is quantised already ({stored}): leave --quantization {wanted} out.")
        if stored == "bitsandbytes-int8":
            config.quantization_config = _stored(config) | {"llm_int8_threshold": 0.0}
        return {}
    if wanted in (None, "fp8"):
        return {}
    if wanted == "bitsandbytes-int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=wanted.removeprefix("bitsandbytes-"), bnb_4bit_compute_dtype=dtype
        )
    }


def keep_compute_dtype(model: PreTrainedModel) -> None:
    """4-bit layers on a CPU multiply in the dtype they were told.

    On a CPU with AVX512-BF16 bitsandbytes repacks weights for a kernel that multiplies in bf16 whatever the dtype, and
    fails on shapes that are no multiples of its tiles (32 outputs) and blocks (64 inputs).
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = module.weight.quant_state
            outputs, inputs = state.shape
            fits = outputs % 32 == 0 and inputs % state.blocksize == 0
            module.support_avx512bf16_for_cpu = fits and module.compute_dtype == torch.bfloat16


def multiplies_in_int8(model: PreTrainedModel) -> bool:
    """Whether activations are rounded to 8 bits before they meet the weights."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


def count_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters, and the bytes that they take with the scales of quantised ones."""
    number = size = 0
    for parameter in model.parameters():
        size += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        number += parameter.numel() if state is None else state.shape.numel()
        size += sum(scales.nbytes for scales in _scales(parameter, state))
    return number, size


def _scales(parameter: torch.nn.Parameter, state: Any) -> list[torch.Tensor]:
    """8-bit: SCB. 4-bit: absmax, which double quantisation keeps in 8 bits with an absmax of its own."""
    nested = getattr(state, "state2", None)
    found = (getattr(parameter, "SCB", None), getattr(state, "absmax", None), getattr(nested, "absmax", None))
    return [scales for scales in found if scales is not None]


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    given = getattr(config, "quantization_config", None) or {}
    return dict(given) if isinstance(given, dict) else dict(given.to_dict())
