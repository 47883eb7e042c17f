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
BEAMS, GUIDANCE = "beams", "guidance"
"""Likewise: see `scheduler/beam.py` and `scheduler/guidance.py`."""
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
_NATIVE: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""What the sampler does with rows that sample -> where it is off."""
_BEFORE_REPETITION = {"sequence_bias", "encoder_repetition_penalty"}
"""What transformers applies before the repetition penalty."""
_AFTER_TEMPERATURE = {*_WARPERS, "watermarking_config"}


def processing(
    fields: SamplingFields, params: SamplingParams, info: ModelInfo
) -> tuple[SamplingParams, list[EditSpec]]:
    """The sampler's parameters, without what moves into the row's edits; and those edits.

    Raises: ApiError 400 for names that the engine does not have, and for what does not go together.
    """
    if fields.searches or fields.guided:
        return _search(fields, params, info)
    options = _asked(fields, _OFF)
    changes: dict[str, Any] = {}
    if params.temperature > 0:
        options |= _asked(fields, _WARPERS)
        if options.keys() & _AFTER_TEMPERATURE:
            changes |= _NATIVE
            options |= {name: value for name, off in _NATIVE.items() if (value := getattr(params, name)) != off}
    if options.keys() & _BEFORE_REPETITION and params.repetition_penalty != 1:
        options["repetition_penalty"] = params.repetition_penalty
        changes["repetition_penalty"] = 1.0
    processors = _named(fields.logits_processors, info.logits_processors, "logits_processors")
    criteria = _named(fields.stopping_criteria, info.stopping_criteria, "stopping_criteria")
    if not (options or processors or criteria):
        return params, []
    args = {"options": options, "logits_processors": processors, "stopping_criteria": criteria}
    return replace(params, **changes), [EditSpec(KIND, args)]


def _search(fields: SamplingFields, params: SamplingParams, info: ModelInfo) -> tuple[SamplingParams, list[EditSpec]]:
    """As `processing`, for rows whose processors act on log-probabilities: nothing of transformers' stays with the
    sampler but what comes after guidance."""
    _check_search(fields, params, info)
    suppressed = set(fields.suppress_tokens or ())
    bias = {id: value for id, value in params.logit_bias.items() if id not in suppressed}
    options = _asked(fields, _OFF | {"suppress_tokens": ()})
    options |= {"repetition_penalty": params.repetition_penalty} if params.repetition_penalty != 1 else {}
    options |= {"min_new_tokens": params.min_tokens} if params.min_tokens else {}
    # Stop strings wait for min_tokens; where beams end, the engine says.
    least = 0 if fields.searches else params.min_tokens
    params = replace(params, logit_bias=bias, repetition_penalty=1.0, min_tokens=least)
    criteria = _named(fields.stopping_criteria, info.stopping_criteria, "stopping_criteria")
    args: dict[str, Any] = {
        "options": options,
        "logits_processors": _named(fields.logits_processors, info.logits_processors, "logits_processors"),
        "stopping_criteria": criteria,
    }
    if params.temperature > 0:
        options |= _asked(fields, _WARPERS)
        if fields.searches or options.keys() & _AFTER_TEMPERATURE:
            options |= {name: value for name, off in _NATIVE.items() if (value := getattr(params, name)) != off}
            params = replace(params, **_NATIVE)
    if not fields.searches:
        guidance = {"scale": fields.guidance_scale, "negative_prompt_ids": fields.negative_prompt_ids or []}
        return params, [EditSpec(GUIDANCE, guidance), EditSpec(KIND, args)]
    options |= {"beams": True} | _asked(fields, {"renormalize_logits": (False,)})
    args["stop_strings"] = list(fields.stops)
    if fields.max_time is not None:
        criteria.append({"name": "MaxTimeCriteria", "args": {"max_time": fields.max_time}})
    beams = {
        "num_beams": fields.num_beams,
        "length_penalty": 1.0 if fields.length_penalty is None else fields.length_penalty,
        "early_stopping": fields.early_stopping or False,
        "do_sample": params.temperature > 0,
    }
    return replace(params, temperature=0.0), [EditSpec(KIND, args), EditSpec(BEAMS, beams)]


def _check_search(fields: SamplingFields, params: SamplingParams, info: ModelInfo) -> None:
    """Raises: ApiError 400 for what a beam search, or guidance, cannot do."""
    name = "num_beams" if fields.searches else "guidance_scale"
    if fields.searches and fields.guided:
        raise invalid("guidance_scale must be 1 with num_beams above 1.", "guidance_scale")
    if fields.searches and fields.choices > (fields.num_beams or 1):
        raise invalid(f"n must be at most num_beams, which is {fields.num_beams}.", "n")
    if fields.rows // fields.choices > info.max_num_seqs:
        rows = fields.rows // fields.choices
        raise invalid(f"{name} takes {rows} rows of the batch at a time, which has {info.max_num_seqs}.", name)
    for penalty in ("frequency_penalty", "presence_penalty"):
        if getattr(params, penalty):
            raise invalid(f"{penalty} must be 0 with {name}; repetition_penalty works.", penalty)
    if fields.searches and params.logprobs is not None:
        raise invalid("logprobs must be absent with num_beams above 1: answers have a sequence_score.", "logprobs")


def _asked(fields: SamplingFields, off: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    given = fields.model_dump(include=set(off), exclude_none=True)
    return {name: value for name, value in given.items() if value not in (*off[name], [])}


def _named(given: list[Named] | None, there: list[str], param: str) -> list[dict[str, Any]]:
    for one in given or []:
        if one.name not in there:
            names = ", ".join(there[:MAX_NAMES_SHOWN]) or "none"
            raise invalid(f"{param} has no {one.name[:64]!r}; there is {names}.", param)
    return [one.model_dump() for one in given or []]
