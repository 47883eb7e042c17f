"""Defaults of a request: its `generation_config`, the one the server was started with, the model's own.

Knows transformers' GenerationConfig: which of its fields are fields of a request here, and which mean nothing to a
server. Highest first: field of the request > its generation_config > `--generation-config NAME` > the model's
generation_config.json > the protocol, which says whether absent fields mean sampling or greedy.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from ropeway.server.errors import ApiError, invalid
from ropeway.server.sampling_fields import GREEDY_BELOW, OFF, UNBUILT, SamplingFields

DEFAULT_FILE = "generation_config.json"
MAX_NAMES_SHOWN = 20

SERVER_FLAGS = {
    "cache_config": "`--kv-cache-memory-bytes` and `--block-size`: all requests share one KV cache",
    "cache_implementation": "`--batch-layout`: all requests share one KV cache",
    "compile_config": "`--device`: on a GPU the server captures its own CUDA graphs",
    "continuous_batching_config": "`--max-num-seqs` and `--max-num-batched-tokens`: every request is batched",
    "disable_compile": "`--device`: on a GPU the server captures its own CUDA graphs",
    "max_cache_len": "`--max-model-len`",
    "prefill_chunk_size": "`--max-num-batched-tokens`: long prompts are computed in chunks",
}
"""GenerationConfig's fields that are settings of the server, and which."""

MEANINGLESS = {
    "_from_model_config": "says where a file came from",
    "bos_token_id": "the prompt's tokens are as they are; tokenizer and chat template write BOS",
    "decoder_start_token_id": "only encoder-decoder models start from it",
    "is_assistant": "says that a model drafts for another",
    "low_memory": "memory is planned at start",
    "output_attentions": "answers hold text and logprobs",
    "output_hidden_states": "answers hold text and logprobs",
    "output_logits": "ask for `logprobs`",
    "output_scores": "ask for `logprobs`",
    "pad_token_id": "nothing is padded",
    "remove_invalid_values": "a row whose logits are not finite ends with an error of its own",
    "return_dict_in_generate": "answers are JSON",
    "transformers_version": "says who wrote a file",
    "use_cache": "the KV cache is always used",
}
"""GenerationConfig's fields that change no answer here, and why."""

DRAFTING = (
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type",
    "target_lookbehind", "use_mtp",
)  # fmt: skip
"""GenerationConfig's fields that make decoding faster and change no answer: tokens are decoded one by one here."""

_SYNONYMS = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
_NOT_SAMPLING = frozenset(
    ("model", "stream", "stream_options", "user", "metadata", "cache_salt", "priority", "generation_config")
)
COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion."""

AnyFields = TypeVar("AnyFields", bound=SamplingFields)


class Presets:
    """The generation-config files of one model.

    Args:
        files: name -> content; `generation_config.json` is the model's own.
        chosen: `--generation-config`: auto (the model's own), none, or a file that goes before it.
    """

    def __init__(self, files: Mapping[str, dict[str, Any]], chosen: str = "auto") -> None:
        self._files = files
        names = [] if chosen == "none" else [DEFAULT_FILE] if chosen == "auto" else [file_name(chosen), DEFAULT_FILE]
        self._layers = [legal(files[name]) for name in names if name in files]
        if DEFAULT_FILE in names and self._layers:
            self._layers[-1].pop("eos_token_id", None)  # the tokenizer has it
        lengths = [_pop_lengths(layer) for layer in self._layers]
        self._lengths = next(filter(None, lengths), {})

    @property
    def defaults(self) -> dict[str, Any]:
        """What the files say together."""
        return {name: value for layer in reversed(self._layers) for name, value in layer.items()}

    def completion_tokens(self, prompt_tokens: int, default: int = COMPLETION_TOKENS) -> int:
        """Output tokens of a completion that does not say how many it wants; `default` if no file does either."""
        asked = SamplingFields(**self._lengths).most_tokens(prompt_tokens)
        return default if asked is None else max(asked, 1)

    def fill(self, fields: AnyFields, *, samples: bool = True, strict: bool = False) -> AnyFields:
        """The fields with everything that they left open, as far as some layer says it.

        Args:
            samples: what the protocol means when no layer says whether to sample.
            strict: unknown entries of the request's generation_config are errors.

        Raises: ApiError 400 for a preset that is not there, and for illegal entries.
        """
        layers = [_given(fields), self._own(fields, strict), *self._layers]
        values: dict[str, Any] = {}
        taken: set[str] = set()
        for layer in layers:
            values |= {name: value for name, value in layer.items() if _group(name) not in taken}
            taken |= {_group(name) for name in layer}
        modes = (means_sampling(layer) for layer in layers)
        values["do_sample"] = next((mode for mode in modes if mode is not None), samples)
        if values["do_sample"] and values.get("temperature", 1.0) < GREEDY_BELOW:  # of a layer that was overruled
            values["temperature"] = 1.0
        filled = fields.model_copy(update=values)
        return filled if any("num_beams" in layer for layer in layers[:2]) else _without_beams(filled)

    def _own(self, fields: SamplingFields, strict: bool) -> dict[str, Any]:
        """The request's generation_config, checked; what means nothing is noted in the fields."""
        given = fields.generation_config
        if given is None:
            return {}
        entries = given if isinstance(given, dict) else self._named(given)
        entries = {name: value for name, value in entries.items() if value not in (None, [], {})}
        unknown = [name for name in entries if not known(name)]
        if unknown and strict:
            name = f"generation_config.{unknown[0][:64]}"
            raise invalid(f"{name!r} is not a field of GenerationConfig.", name, "unknown_parameter")
        fields.ignore([f"generation_config.{name}" for name in entries if name in unknown or name in SERVER_FLAGS])
        asked = {name: value for name, value in entries.items() if name not in unknown and not _idle(name)}
        try:
            checked = SamplingFields.parse(asked)
        except ApiError as error:
            message, param = f"generation_config.{error.message}", f"generation_config.{error.param}"
            raise invalid(message, param, error.code or "invalid_value") from None
        fields.ignore([f"generation_config.{name}" for name in checked.ignored()])
        return _given(checked)

    def _named(self, text: str) -> dict[str, Any]:
        """A GenerationConfig as JSON, as `transformers chat` sends it, or the name of one of the model's files."""
        if text.lstrip().startswith("{"):
            try:
                return dict(from_json(text, allow_inf_nan=False))
            except ValueError:
                raise invalid(
                    "generation_config must be JSON if it begins with a brace.", "generation_config"
                ) from None
        name = file_name(text)
        if name not in self._files:
            there = ", ".join(sorted(self._files)[:MAX_NAMES_SHOWN]) or "none"
            message = f"generation_config must name one of the model's presets, which are: {there}."
            raise invalid(message, "generation_config")
        return self._files[name]


def _without_beams(fields: AnyFields) -> AnyFields:
    """The fields, without the beam search of a file if they ask for what none can do: a model must not fail for a
    default that nobody asked for."""
    asked = [getattr(fields, name, None) for name in fields.unsearchable]
    asks = any(value is not False and value not in (None, [], {}, {"type": "text"}) for value in asked)
    beside = fields.guided or fields.frequency_penalty or fields.presence_penalty
    if not fields.searches or not (asks or beside or fields.choices > (fields.num_beams or 1)):
        return fields
    fields.ignore(["generation_config.num_beams"])
    return fields.model_copy(update={"num_beams": None, "length_penalty": None, "early_stopping": None})


def file_name(preset: str) -> str:
    """A preset's file: its name may leave `.json` out."""
    return preset if preset.endswith(".json") else f"{preset}.json"


def known(name: str) -> bool:
    """Whether a generation_config may hold it: GenerationConfig's fields, and this server's own about sampling."""
    fields = SamplingFields.model_fields.keys() - _NOT_SAMPLING
    return name in fields or name in UNBUILT or _idle(name)


def _idle(name: str) -> bool:
    return name in SERVER_FLAGS or name in MEANINGLESS or name in DRAFTING


def means_sampling(layer: Mapping[str, Any]) -> bool | None:
    """Whether a layer asks for sampling or for greedy; None if it says nothing about it."""
    if layer.get("do_sample") is not None:
        return bool(layer["do_sample"])
    if layer.get("temperature") is not None:
        return bool(layer["temperature"] >= GREEDY_BELOW)
    if any(layer.get(name, off[0]) not in off for name, off in OFF.items()):
        return True
    return False if (layer.get("num_beams") or 1) > 1 else None  # beams are drawn only where that is said


def legal(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file can be done: a model must not fail for a default that nobody asked for."""
    kept: dict[str, Any] = {}
    for name in config.keys() & (SamplingFields.model_fields.keys() - _NOT_SAMPLING):
        with contextlib.suppress(ValidationError):
            kept |= _given(SamplingFields.model_validate({name: config[name]}))
    return kept


def not_done(config: Mapping[str, Any]) -> list[str]:
    """Names of a file's entries that ask for something and are not done."""
    asked = {name for name, value in config.items() if value not in (None, [], {}, *UNBUILT.get(name, ()))}
    return sorted(name for name in asked - legal(config).keys() if not _idle(name))


def _pop_lengths(layer: dict[str, Any]) -> dict[str, Any]:
    """A file's lengths are for completions alone: a chat answer may fill the context."""
    return {name: layer.pop(name) for name in ("max_new_tokens", "max_length") if name in layer}


def _given(fields: SamplingFields) -> dict[str, Any]:
    return {name: value for name in type(fields).model_fields if (value := getattr(fields, name)) is not None}


def _group(name: str) -> str:
    return _SYNONYMS.get(name, name)
