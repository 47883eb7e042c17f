"""What both layouts share: the shape of a forward, how a model is called, and which attention it uses by itself."""

import inspect
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ropeway.kernels.batch import LeftPaddedBatch


class UnsupportedAttention(Exception):
    """The model wants something of its attention that a layout does not do; the words follow "because"."""


class Forward(Protocol):
    """Runs one step of a model over the KV pool."""

    def __call__(self, batch: LeftPaddedBatch) -> torch.Tensor:
        """Logits [L,V] of `batch.logits_index`; writes the K and V of every token to the pool.

        fp32 on the CPU; on a GPU in the model's dtype, which the sampler there reads as it is: 256 rows of a large
        vocabulary would cost 0.1 ms to widen.
        """

    def computed_slots(self, batch: LeftPaddedBatch) -> int:
        """Token places that the forward of this batch computes, pads included."""


class ModelCall:
    """Calls a model with the inputs that its forward knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._known = set(parameters)

    def __call__(self, keep: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Logits [B,len(keep),V] of the columns `keep` [K] int64, as `Forward` says."""
        if not self._takes_any:
            inputs = {name: value for name, value in inputs.items() if name in self._known}
        if "logits_to_keep" in self._known:
            logits: torch.Tensor = self._model(**inputs, logits_to_keep=keep).logits
        else:
            logits = self._model(**inputs).logits[:, keep]
        return logits if logits.is_cuda else logits.float()


def uses_softcap(model: PreTrainedModel) -> bool:
    """Whether attention scores are capped; transformers' sdpa silently leaves that out, eager does it."""
    return getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def plain_attention(model: PreTrainedModel) -> str:
    """The attention implementation that defines what the model's right output is: sdpa where it computes the same."""
    return "sdpa" if model._supports_sdpa and not uses_softcap(model) else "eager"


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Make the model use this attention implementation; cheap if it does already.

    Raises:
        UnsupportedAttention: the model's code does not go through transformers' attention interface.
    """
    if model.config._attn_implementation == name:
        return
    if not model._can_set_attn_implementation():
        raise UnsupportedAttention("its code does not go through transformers' attention interface")
    model.set_attn_implementation(name)
