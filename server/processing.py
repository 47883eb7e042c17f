"""Options of a request that edit its scores between forward and sampler: what the engine process builds them from.

Knows which options do not commute with what the sampler does itself, and lets those bring it along, so that a row's
processors act in transformers' order (`GenerationMixin._get_logits_processor`). No HTTP, no model but its width.
"""

from dataclasses import replace
from typing import Any

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.messages import EditSpec, ModelInfo
from ropeway.server.errors import invalid
from ropeway.server.sampling_fields import Named, SamplingFields

KIND = "processors"
"""Of the `EditSpec`: see `scheduler/processors.py`, which this process cannot import."""
MAX_NAMES_SHOWN = 50
_OFF: dict[str, tuple[Any, ...]] = {
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words": (),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": (),
    "watermarking_config": (),
}
"""Options of any row -> values that do nothing (null and empties never do)."""
_WARPERS: dict[str, tuple[Any, ...]] = {"typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
"""Options of rows that sample."""
_BEFORE_REPETITION = {"sequence_bias", "encoder_repetition_penalty"}
"""What transformers applies before the repetition penalty."""
_AFTER_TEMPERATURE = {*_WARPERS, "watermarking_config"}


def processing(
    fields: SamplingFields, params: SamplingParams, info: ModelInfo
) -> tuple[SamplingParams, list[EditSpec]]:
    """The sampler's parameters, without what moves into the row's edits; and those edits.

    Raises: ApiError 400 for names that the engine does not have.
    """
    options = _asked(fields, _OFF)
    changes: dict[str, Any] = {}
    if params.temperature > 0:
        options |= _asked(fields, _WARPERS)
        if options.keys() & _AFTER_TEMPERATURE:
            native = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
            changes |= native
            options |= {name: value for name in native if (value := getattr(params, name)) != native[name]}
    if options.keys() & _BEFORE_REPETITION and params.repetition_penalty != 1:
        options["repetition_penalty"] = params.repetition_penalty
        changes["repetition_penalty"] = 1.0
    processors = _named(fields.logits_processors, info.logits_processors, "logits_processors")
    criteria = _named(fields.stopping_criteria, info.stopping_criteria, "stopping_criteria")
    if not (options or processors or criteria):
        return params, []
    args = {"options": options, "logits_processors": processors, "stopping_criteria": criteria}
    return replace(params, **changes), [EditSpec(KIND, args)]


def _asked(fields: SamplingFields, off: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    given = fields.model_dump(include=set(off), exclude_none=True)
    return {name: value for name, value in given.items() if value not in (*off[name], [])}


def _named(given: list[Named] | None, there: list[str], param: str) -> list[dict[str, Any]]:
    for one in given or []:
        if one.name not in there:
            names = ", ".join(there[:MAX_NAMES_SHOWN]) or "none"
            raise invalid(f"{param} has no {one.name[:64]!r}; there is {names}.", param)
    return [one.model_dump() for one in given or []]
