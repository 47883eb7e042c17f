"""The sampling fields of a request body: their legal ranges, their defaults, and what they mean for the sampler.

Knows fields and numbers; no HTTP, no text, no engine. Pydantic checks each field alone, strictly (no string or boolean
is a number); this module checks what needs the model: token ids against the logits' width, lengths against the context.
A field's description completes the sentence "FIELD must be ...": it is the error message and the documentation.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ropeway.kernels.sampling_params import SamplingParams, wrap_seed
from ropeway.server.errors import ApiError, invalid

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_CHARS = 64, 256
MAX_LISTED_IDS = 1024
MAX_MESSAGES, MAX_TOOLS = 10_000, 1024
LONGEST_NAME = 64
"""Characters of an unknown field's name that are repeated to the client."""
GREEDY_BELOW = 1e-5
"""Temperatures under this are 0: dividing logits by them would overflow."""
BANNED = -100.0
"""A logit bias of this and less bans the token."""
COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion."""

UNBUILT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "bad_words": (),
    "best_of": (),  # harmless where it equals n, see `_check_unbuilt`
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "custom_generate": (),
    "do_sample": (True,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "eos_token_id": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "generation_config": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "max_new_tokens": (),
    "max_time": (),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "parallel_tool_calls": (True,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "stop_strings": (),
    "stopping_criteria": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
}
"""Fields of the contract that are not built yet -> the values that ask for nothing (null and empties never do)."""

Number = TypeVar("Number", int, float)
_ID = re.compile(r"0|[1-9][0-9]{0,18}")
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
IdList = Annotated[list[int], Field(fail_fast=True)]
"""Fails at the first wrong element, as every list of a body must: an error each costs seconds on the event loop."""
ObjectList = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    """What else a stream tells."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _short(value: Any) -> Any:
    """Before the values are looked at: an object has no fail_fast."""
    if isinstance(value, dict) and len(value) > MAX_LISTED_IDS:
        raise ValueError
    return value


def _number(text: str, **limits: Any) -> Any:
    return Field(default=None, description=text, **limits)


class SamplingFields(BaseModel):
    """What every generating endpoint takes. None = absent, which null in JSON means too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = _number("a string: the name of the model")
    temperature: float | None = _number("a number from 0 (greedy) to 2", ge=0, le=2)
    top_p: float | None = _number("a number above 0 and up to 1 (off)", gt=0, le=1)
    top_k: int | None = _number("an integer of at least 1, or 0 or -1 (off)", ge=-1, lt=2**31)
    min_p: float | None = _number("a number from 0 (off) to 1", ge=0, le=1)
    repetition_penalty: float | None = _number("a number from 0.01 to 100 (1 is off)", ge=0.01, le=100)
    frequency_penalty: float | None = _number("a number from -2 to 2", ge=-2, le=2)
    presence_penalty: float | None = _number("a number from -2 to 2", ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_short)] = (
        _number(
            f"an object of at most {MAX_LISTED_IDS} token ids with numbers from -100 to 100", max_length=MAX_LISTED_IDS
        )
    )
    allowed_token_ids: IdList | None = _number(
        f"a list of 1 to {MAX_LISTED_IDS} token ids", min_length=1, max_length=MAX_LISTED_IDS
    )
    stop_token_ids: IdList | None = _number(f"a list of at most {MAX_LISTED_IDS} token ids", max_length=MAX_LISTED_IDS)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = _number(
        f"a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters"
    )
    max_tokens: int | None = _number("an integer of at least 1", ge=1)
    max_completion_tokens: int | None = _number("an integer of at least 1", ge=1)
    min_tokens: int | None = _number("an integer of at least 0", ge=0)
    n: int | None = _number(f"an integer from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)
    seed: int | None = _number("an integer of 64 bits (-2^63 to 2^63 - 1)", ge=-(2**63), lt=2**63)
    ignore_eos: bool | None = _number("true or false")
    skip_special_tokens: bool | None = _number("true or false")
    include_stop_str_in_output: bool | None = _number("true or false")
    stream: bool | None = _number("true or false")
    stream_options: StreamOptions | None = _number(
        "an object with include_usage and continuous_usage_stats, each true or false"
    )
    user: str | None = _number("a string")
    metadata: dict[str, Any] | None = _number("an object")
    cache_salt: str | None = _number("a string of 1 to 256 characters", min_length=1, max_length=256)
    priority: int | None = _number(
        "an integer from 0 (default, soonest) to 2^31 - 1: a request may step back, never ahead", ge=0, lt=2**31
    )

    @classmethod
    def parse(cls, body: Any, strict: bool = False) -> Self:
        """The fields of a parsed JSON body.

        Args:
            strict: unknown fields are errors.

        Raises: ApiError 400 naming the field and its legal values.
        """
        try:
            fields = cls.model_validate(body)
        except ValidationError as error:
            raise cls._refusal(error) from None
        fields._check_unbuilt()
        if strict and (unknown := fields.unknown()):
            name = unknown[0][:LONGEST_NAME]
            raise invalid(f"{name!r} is not a field of this endpoint.", name, "unknown_parameter")
        if fields.stream_options is not None and not fields.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        return fields

    @classmethod
    def _refusal(cls, error: ValidationError) -> ApiError:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if name is None:
            return invalid("The body must be a JSON object.", None)
        if first["type"] == "missing":
            return invalid(f"{name} is required.", name, "missing_required_parameter")
        return invalid(f"{name} must be {cls.model_fields[name].description}.", name)

    def _check_unbuilt(self) -> None:
        for name, value in self._extras().items():
            if name == "best_of" and value == self.choices:
                continue
            if name in UNBUILT and value not in UNBUILT[name]:
                raise invalid(f"{name} is not supported by this server yet.", name, "unsupported_parameter")

    def _extras(self) -> dict[str, Any]:
        """Fields that are not declared and ask for something."""
        return {name: value for name, value in (self.model_extra or {}).items() if value not in (None, [], {})}

    def unknown(self) -> list[str]:
        """Names of fields that change nothing because nobody here knows them."""
        names = [name for name in self._extras() if name not in UNBUILT]
        if self.stream_options is not None:
            names += [f"stream_options.{name}" for name in self.stream_options.model_extra or {}]
        return names

    @property
    def choices(self) -> int:
        """n, 1 by default."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def names_header(names: list[str]) -> str:
    """Field names, which are any text at all, as a header's value."""
    shown = [quote(name[:LONGEST_NAME], safe="$.[]") for name in names[:20]]
    return ", ".join(shown + ["..."] * (len(names) > 20))


@dataclass(slots=True, frozen=True)
class SamplingDefaults:
    """What a field means when it is absent: the model's generation_config.json, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    completion_tokens: int = COMPLETION_TOKENS
    """Length of a completion, `max_new_tokens` of the file."""
    seed: int | None = None
    """None = a random one for every request."""

    @classmethod
    def from_generation_config(cls, config: dict[str, Any]) -> "SamplingDefaults":
        """Takes what is there and legal. An explicit `do_sample: false` means greedy."""
        legal = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            try:
                SamplingFields.model_validate({name: config.get(name)})
            except ValidationError:
                continue
            if config.get(name) is not None:
                legal[name] = config[name]
        if config.get("do_sample") is False:
            legal["temperature"] = 0.0
        length = config.get("max_new_tokens")
        return cls(**legal, completion_tokens=length if isinstance(length, int) and length > 0 else COMPLETION_TOKENS)


def sampling_params(
    fields: SamplingFields,
    defaults: SamplingDefaults,
    *,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    logprobs: int | None,
    first_index: int = 0,
) -> SamplingParams:
    """One request's parameters for the sampler.

    Args:
        vocab_size: width of the logits; every token id must be smaller.
        eos_token_ids: end the text unless the client ignores them.
        logprobs: top logprobs per token, None for none at all.
        first_index: of the prompt's choices; choice i of the answer samples with seed + i.

    Raises: ApiError 400 for token ids outside of the vocabulary, and where every token is banned.
    """
    temperature = _given(fields.temperature, defaults.temperature)
    ends = set(fields.stop_token_ids or ())
    if not fields.ignore_eos:  # a model's files may name an EOS that its logits do not have
        ends |= {id for id in eos_token_ids if 0 <= id < vocab_size}
    check_ids(fields.stop_token_ids or [], vocab_size, "stop_token_ids")
    check_ids(fields.allowed_token_ids or [], vocab_size, "allowed_token_ids")
    params = SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(_given(fields.top_k, defaults.top_k), 0),
        top_p=_given(fields.top_p, defaults.top_p),
        min_p=_given(fields.min_p, defaults.min_p),
        repetition_penalty=_given(fields.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=fields.frequency_penalty or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        logit_bias=_logit_bias(fields.logit_bias or {}, vocab_size),
        allowed_token_ids=tuple(dict.fromkeys(fields.allowed_token_ids or ())),
        stop_token_ids=tuple(sorted(ends)),
        min_tokens=fields.min_tokens or 0,
        seed=wrap_seed(_given(fields.seed, defaults.seed, secrets.randbits(63)) + first_index),
        logprobs=logprobs,
    )
    _check_a_token_is_left(params, vocab_size)
    return params


def _given(*values: Number | None) -> Number:
    """The first that is there; the last always is."""
    return next(value for value in values if value is not None)


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 unless every id is in [0, vocab_size); `vocab_size` is the width of the logits."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise invalid(f"{param} must hold token ids from 0 to {vocab_size - 1}.", param)


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    if not all(_ID.fullmatch(key) for key in given):
        raise invalid(f"logit_bias must have token ids from 0 to {vocab_size - 1} as keys.", "logit_bias")
    bias = {int(key): value for key, value in given.items()}
    check_ids(list(bias), vocab_size, "logit_bias")
    return bias


def _check_a_token_is_left(params: SamplingParams, vocab_size: int) -> None:
    """The sampler cannot choose from nothing: refuse what bans every token, if only for the first `min_tokens`."""
    banned = {token for token, value in params.logit_bias.items() if value <= BANNED}
    if params.min_tokens:
        banned |= set(params.stop_token_ids)
    if params.allowed_token_ids and banned.issuperset(params.allowed_token_ids):
        raise invalid("allowed_token_ids has no token that is not banned by another field.", "allowed_token_ids")
    if len(banned) >= vocab_size:
        raise invalid("logit_bias and stop_token_ids ban every token.", "logit_bias")


def output_limit(
    fields: SamplingFields, prompt_tokens: int, context: int, default: int | None, param: str = "messages"
) -> int:
    """Output tokens a choice may have.

    Args:
        prompt_tokens: length of the prompt.
        context: most tokens of prompt and output together.
        default: if the request does not say; None = whatever the context leaves.
        param: the field that holds the prompt.

    Raises: ApiError 400 `context_length_exceeded`.
    """
    asked = min(filter(None, (fields.max_tokens, fields.max_completion_tokens)), default=None)
    left = context - prompt_tokens
    if left < (asked or 1):
        raise context_error(prompt_tokens, asked or 1, context, param)
    limit = asked or min(default or left, left)
    if (fields.min_tokens or 0) > limit:
        raise invalid(f"min_tokens must be at most max_tokens, which is {limit} here.", "min_tokens")
    return limit


def context_error(prompt_tokens: int, output_tokens: int, context: int, param: str, at_least: bool = False) -> ApiError:
    """The contract's sentence for a request that does not fit. `at_least`: the prompt has so many tokens or more."""
    return invalid(
        f"This model's maximum context length is {context} tokens. However, you requested {'at least ' * at_least}"
        f"{prompt_tokens + output_tokens} tokens ({prompt_tokens} in the messages, {output_tokens} in the completion). "
        "Please reduce the length of the messages or completion.",
        param,
        "context_length_exceeded",
    )
