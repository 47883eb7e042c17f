"""The sampling fields of a request body: their legal ranges, and those that are not built yet.

Knows fields and numbers; no HTTP, no text, no model, no defaults. Pydantic checks each field alone, strictly (no string
or boolean is a number). OpenAI's, vLLM's and transformers' names stand side by side: properties say what they mean
together. A field's description completes the sentence "FIELD must be ...": it is the error message and the
documentation.
"""

from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from ropeway.server.errors import ApiError, invalid

MAX_CHOICES = 128
MAX_BEAMS = 64
MAX_STOPS, MAX_STOP_CHARS = 64, 256
MAX_LISTED_IDS = 1024
MAX_SEQUENCES, MAX_SEQUENCE_IDS = 128, 64
MAX_NAMED = 16
NAMED = f"a list of at most {MAX_NAMED} objects with a name and, if it takes any, args"
MAX_CONFIG_CHARS = 2**16
MAX_MESSAGES, MAX_TOOLS = 10_000, 1024
LONGEST_NAME = 64
"""Characters of an unknown field's name that are repeated to the client."""
GREEDY_BELOW = 1e-5
"""Temperatures under this are 0: dividing logits by them would overflow."""
OFF: dict[str, tuple[float, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "top_h": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""Fields that shape sampling -> their values that do nothing."""

UNBUILT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (),  # harmless where it equals n, see `_check_unbuilt`
    "chat_template": (),
    "constraints": (),
    "continue_final_message": (False,),
    "custom_generate": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "echo": (False,),
    "force_words_ids": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "prompt_logprobs": (),
    "prompt_lookup_num_tokens": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "suffix": ("",),
    "token_healing": (False,),
}
"""Fields of the contract that are not built yet -> the values that ask for nothing (null and empties never do)."""

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
IdList = Annotated[list[int], Field(fail_fast=True)]
"""Fails at the first wrong element, as every list of a body must: an error each costs seconds on the event loop."""
StopTexts = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None
STOP = f"a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters"
IdLists = Annotated[list[Annotated[IdList, Field(min_length=1, max_length=MAX_SEQUENCE_IDS)]], Field(fail_fast=True)]
ObjectList = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

UNSEARCHABLE = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "regex",
    "ebnf", "grammar", "logprobs", "prompt_logprobs", "tools", "thinking_budget", "thinking_token_budget",
)  # fmt: skip


class StreamOptions(BaseModel):
    """What else a stream tells."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _bias_pair(pair: list[list[int] | float]) -> list[list[int] | float]:
    ids, bias = pair
    if not (isinstance(ids, list) and 0 < len(ids) <= MAX_SEQUENCE_IDS):
        raise ValueError
    if isinstance(bias, list) or not -1e6 <= bias <= 1e6:
        raise ValueError
    return pair


def _decay_pair(pair: list[int | float]) -> list[int | float]:
    start, factor = pair
    if not isinstance(start, int) or not (0 <= start < 2**31 and 0 < factor <= 100):
        raise ValueError
    return pair


_PAIR = Field(min_length=2, max_length=2, fail_fast=True)
BiasPair = Annotated[list[IdList | float], _PAIR, AfterValidator(_bias_pair)]
DecayPair = Annotated[list[int | float], _PAIR, AfterValidator(_decay_pair)]


class Named(BaseModel):
    """Something registered under a name, and its arguments."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    args: Annotated[dict[str, Any], Field(max_length=64)] = {}


class Watermarking(BaseModel):
    """transformers' WatermarkingConfig."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    greenlist_ratio: Annotated[float, Field(ge=0, le=1)] = 0.25
    bias: Annotated[float, Field(ge=-100, le=100)] = 2.0
    hashing_key: Annotated[int, Field(ge=0, lt=2**31)] = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: Annotated[int, Field(ge=1, le=16)] = 1


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
    typical_p: float | None = _number("a number above 0 and up to 1 (off)", gt=0, le=1)
    top_h: float | None = _number("a number above 0 and up to 1", gt=0, le=1)
    epsilon_cutoff: float | None = _number("a number from 0 (off) to 1, which is excluded", ge=0, lt=1)
    eta_cutoff: float | None = _number("a number from 0 (off) to 1, which is excluded", ge=0, lt=1)
    repetition_penalty: float | None = _number("a number from 0.01 to 100 (1 is off)", ge=0.01, le=100)
    frequency_penalty: float | None = _number("a number from -2 to 2", ge=-2, le=2)
    presence_penalty: float | None = _number("a number from -2 to 2", ge=-2, le=2)
    encoder_repetition_penalty: float | None = _number("a number from 0.01 to 100 (1 is off)", ge=0.01, le=100)
    no_repeat_ngram_size: int | None = _number("an integer of at least 1, or 0 (off)", ge=0, lt=2**31)
    encoder_no_repeat_ngram_size: int | None = _number("an integer of at least 1, or 0 (off)", ge=0, lt=2**31)
    bad_words: Annotated[list[StopText], Field(fail_fast=True)] | None = _number(
        f"a list of at most {MAX_SEQUENCES} strings, each of 1 to {MAX_STOP_CHARS} characters", max_length=MAX_SEQUENCES
    )
    bad_words_ids: IdLists | None = _number(
        f"a list of at most {MAX_SEQUENCES} lists, each of 1 to {MAX_SEQUENCE_IDS} token ids", max_length=MAX_SEQUENCES
    )
    sequence_bias: Annotated[list[BiasPair], Field(fail_fast=True)] | None = _number(
        f"a list of at most {MAX_SEQUENCES} pairs: a list of 1 to {MAX_SEQUENCE_IDS} token ids, a number from -1e6 to "
        "1e6",
        max_length=MAX_SEQUENCES,
    )
    exponential_decay_length_penalty: DecayPair | None = _number(
        "a pair: an integer of at least 0 (the output token after which EOS gets likelier), a number above 0 and up to "
        "100 (how much, to the power of the tokens since)"
    )
    begin_suppress_tokens: IdList | None = _number(
        f"a list of at most {MAX_LISTED_IDS} token ids", max_length=MAX_LISTED_IDS
    )
    forced_bos_token_id: int | None = _number("a token id")
    forced_eos_token_id: int | IdList | None = _number(f"a token id or a list of at most {MAX_LISTED_IDS} of them")
    watermarking_config: Watermarking | None = _number(
        "an object with greenlist_ratio (0 to 1), bias (-100 to 100), hashing_key (an integer from 0 to 2^31 - 1), "
        "seeding_scheme (lefthash or selfhash) and context_width (1 to 16)"
    )
    logits_processors: Annotated[list[Named], Field(fail_fast=True)] | None = _number(NAMED, max_length=MAX_NAMED)
    stopping_criteria: Annotated[list[Named], Field(fail_fast=True)] | None = _number(NAMED, max_length=MAX_NAMED)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_short)] = (
        _number(
            f"an object of at most {MAX_LISTED_IDS} token ids with numbers from -100 to 100", max_length=MAX_LISTED_IDS
        )
    )
    allowed_token_ids: IdList | None = _number(
        f"a list of 1 to {MAX_LISTED_IDS} token ids", min_length=1, max_length=MAX_LISTED_IDS
    )
    stop_token_ids: IdList | None = _number(f"a list of at most {MAX_LISTED_IDS} token ids", max_length=MAX_LISTED_IDS)
    eos_token_id: int | IdList | None = _number(f"a token id or a list of at most {MAX_LISTED_IDS} of them")
    suppress_tokens: IdList | None = _number(f"a list of at most {MAX_LISTED_IDS} token ids", max_length=MAX_LISTED_IDS)
    stop: StopTexts = _number(STOP)
    stop_strings: StopTexts = _number(STOP)
    max_tokens: int | None = _number("an integer of at least 1", ge=1)
    max_completion_tokens: int | None = _number("an integer of at least 1", ge=1)
    max_new_tokens: int | None = _number("an integer of at least 1", ge=1)
    max_length: int | None = _number("an integer of at least 1: tokens of prompt and output", ge=1)
    max_time: float | None = _number("a number of seconds above 0", gt=0, le=10**9)
    min_tokens: int | None = _number("an integer of at least 0", ge=0)
    min_new_tokens: int | None = _number("an integer of at least 0", ge=0)
    min_length: int | None = _number("an integer of at least 0: tokens of prompt and output", ge=0)
    n: int | None = _number(f"an integer from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)
    num_return_sequences: int | None = _number(f"an integer from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)
    num_beams: int | None = _number(f"an integer from 1 (off) to {MAX_BEAMS}", ge=1, le=MAX_BEAMS)
    length_penalty: float | None = _number("a number from -10 to 10 (1 by default)", ge=-10, le=10)
    early_stopping: bool | Literal["never"] | None = _number('true, false or "never"')
    renormalize_logits: bool | None = _number(
        "true or false: whether beams are compared by probabilities that add up to 1; without beams they always do"
    )
    guidance_scale: float | None = _number("a number from -100 to 100 (1 is off)", ge=-100, le=100)
    negative_prompt: str | None = _number(
        "a text, not empty: with guidance_scale, what to lead away from", min_length=1
    )
    negative_prompt_ids: IdList | None = _number("a list of token ids, in place of negative_prompt", min_length=1)
    do_sample: bool | None = _number("true (sampling) or false (greedy)")
    generation_config: Annotated[
        dict[str, Any] | Annotated[str, Field(max_length=MAX_CONFIG_CHARS)] | None, BeforeValidator(_short)
    ] = _number(
        "an object of transformers' GenerationConfig, its JSON, or the name of a generation-config file of the model"
    )
    truncate_prompt_tokens: int | None = _number(
        "an integer of at least 1 (the prompt's last tokens that are kept), or -1 (as many as fit)", ge=-1
    )
    seed: int | None = _number("an integer of 64 bits (-2^63 to 2^63 - 1)", ge=-(2**63), lt=2**63)
    ignore_eos: bool | None = _number("true or false")
    skip_special_tokens: bool | None = _number("true or false")
    include_stop_str_in_output: bool | None = _number("true or false")
    response_format: dict[str, Any] | None = _number("an object with type text, json_object or json_schema")
    structured_outputs: dict[str, Any] | None = _number("an object with one of json, regex, choice, grammar")
    guided_json: dict[str, Any] | str | None = _number("a JSON Schema")
    guided_regex: str | None = _number("a string: a regular expression")
    guided_choice: list[Any] | None = _number("a list of strings")
    guided_grammar: str | None = _number("a string: a grammar")
    guided_whitespace_pattern: str | None = _number("a string: a regular expression")
    regex: str | None = _number("a string: a regular expression")
    ebnf: str | None = _number("a string: a grammar")
    grammar: dict[str, Any] | str | None = _number("an object with type and value, or the text of a grammar")
    json_close_on_length: bool | None = _number("true or false")
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

    unused: ClassVar[tuple[str, ...]] = ("user", "metadata")
    """OpenAI's fields for which this server has no use."""
    unsearchable: ClassVar[tuple[str, ...]] = UNSEARCHABLE
    """Fields that ask for what a beam search cannot do, unless they are null, false, empty or "text"."""
    _idle: list[str] = PrivateAttr(default_factory=list)

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
        fields._check_pairs()
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

    def _check_pairs(self) -> None:
        """What one field says of another."""
        if self.do_sample and self.temperature is not None and self.temperature < GREEDY_BELOW:
            raise invalid("temperature must be above 0 with do_sample: true.", "temperature")
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens must be at least 1, or -1.", "truncate_prompt_tokens")
        for name in ("eos_token_id", "forced_eos_token_id"):
            ids = getattr(self, name)
            if isinstance(ids, list) and len(ids) > MAX_LISTED_IDS:
                raise invalid(f"{name} must hold at most {MAX_LISTED_IDS} token ids.", name)
        if self.n is not None and self.num_return_sequences not in (None, self.n):
            raise invalid("num_return_sequences must equal n where both are given.", "num_return_sequences")
        if self.negative_prompt and self.negative_prompt_ids:
            raise invalid("negative_prompt_ids cannot stand beside negative_prompt.", "negative_prompt_ids")
        if self.do_sample is False:
            self._idle += [name for name in ("temperature", *OFF) if self._shapes(name)]
        self._idle += [name for name in self.unused if getattr(self, name)]

    def _shapes(self, name: str) -> bool:
        value = getattr(self, name, None)
        return value is not None and value not in OFF.get(name, (0,))

    def _extras(self) -> dict[str, Any]:
        """Fields that are not declared and ask for something."""
        return {name: value for name, value in (self.model_extra or {}).items() if value not in (None, [], {})}

    def unknown(self) -> list[str]:
        """Names of fields that change nothing because nobody here knows them."""
        names = [name for name in self._extras() if name not in UNBUILT]
        if self.stream_options is not None:
            names += [f"stream_options.{name}" for name in self.stream_options.model_extra or {}]
        return names

    def ignored(self) -> list[str]:
        """Names of all fields that change nothing: unknown and unused ones, and those without effect beside another."""
        return self.unknown() + self._idle

    def ignore(self, names: list[str]) -> None:
        """Adds to `ignored`."""
        self._idle += names

    def idle_beside(self) -> list[str]:
        """Names of fields that ask for something which another field, with its default filled in, leaves without
        effect."""
        names: dict[str, bool] = {
            "length_penalty": not self.searches and self.length_penalty != 1,
            "early_stopping": not self.searches,
            "negative_prompt": not self.guided,
            "negative_prompt_ids": not self.guided and not self.negative_prompt,
        }
        return [name for name, idle in names.items() if idle and getattr(self, name)]

    @property
    def choices(self) -> int:
        """Answers per prompt, 1 by default."""
        return self.n or self.num_return_sequences or 1

    @property
    def searches(self) -> bool:
        """Whether answers are found by beam search."""
        return (self.num_beams or 1) > 1

    @property
    def guided(self) -> bool:
        """Whether each answer is led away from a negative prompt."""
        return self.guidance_scale not in (None, 1)

    @property
    def rows(self) -> int:
        """Rows of the batch that a prompt takes."""
        return self.num_beams or 1 if self.searches else self.choices * (1 + self.guided)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        given = (self.stop, self.stop_strings)
        return tuple(text for texts in given if texts for text in ([texts] if isinstance(texts, str) else texts))

    @property
    def eos_ids(self) -> list[int] | None:
        """What ends an answer instead of the model's own end tokens; None = those."""
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id

    def most_tokens(self, prompt_tokens: int) -> int | None:
        """Output tokens that were asked for: the smallest of all names; `max_length` counts only where no other does,
        as in transformers. May be less than 1."""
        asked = min(filter(None, (self.max_tokens, self.max_completion_tokens, self.max_new_tokens)), default=None)
        return self.max_length - prompt_tokens if asked is None and self.max_length else asked

    def least_tokens(self, prompt_tokens: int) -> int:
        """Output tokens before which nothing ends an answer."""
        return max(self.min_tokens or 0, self.min_new_tokens or 0, (self.min_length or 0) - prompt_tokens)


def names_header(names: list[str]) -> str:
    """Field names, which are any text at all, as a header's value."""
    shown = [quote(name[:LONGEST_NAME], safe="$.[]") for name in names[:20]]
    return ", ".join(shown + ["..."] * (len(names) > 20))
