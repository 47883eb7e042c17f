"""What OpenAI's two generating endpoints share: from fields to `GenerationRequest`, and the frame around every answer.

Knows OpenAI's names and the services; no engine, no sockets.
"""

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from fastapi import Request

from ropeway import __version__
from ropeway.scheduler.messages import ModelInfo
from ropeway.server.errors import invalid
from ropeway.server.generator import Usage
from ropeway.server.presets import AnyFields
from ropeway.server.request import ChoiceDelta, GenerationRequest
from ropeway.server.sampling import check_ids, context_error, output_limit, sampling_params
from ropeway.server.sampling_fields import SamplingFields, names_header
from ropeway.server.services import Services, key_id
from ropeway.server.stream import DONE, json_bytes

TIMEOUT_HEADER = "x-request-timeout-ms"
MAX_TIMEOUT_MS = 10**9


def context_length(info: ModelInfo) -> int:
    """Most tokens of prompt and output: the model's, or the whole KV cache if that is smaller (block 0 is reserved)."""
    return min(info.max_model_len, (info.num_blocks - 1) * info.block_size)


def read_fields(services: Services, kind: type[AnyFields], body: Any, *, samples: bool = True) -> AnyFields:
    """The fields of a parsed JSON body, with every default filled in.

    Args:
        samples: what the protocol means when nothing says whether to sample.

    Raises: ApiError 400 naming the field; 404 for a model that is not served; 503 unless the server is ready.
    """
    fields = kind.parse(body, services.settings.strict)
    services.check_model(fields.model)
    services.require_ready()
    return services.presets.fill(fields, samples=samples, strict=services.settings.strict)


def check_could_fit(services: Services, characters: int, param: str) -> None:
    """Refuses a prompt by its length alone: tokenizing megabytes only to refuse them would cost everybody.

    Raises: ApiError 400 `context_length_exceeded`.
    """
    least = characters // services.tokenizer.longest_token
    context = context_length(services.require_loaded())
    if least > context:
        raise context_error(least, 1, context, param, at_least=True)


def generation_request(
    services: Services,
    request: Request,
    fields: SamplingFields,
    prompt_ids: list[int],
    *,
    logprobs: int | None,
    default_tokens: Literal["rest", "short"],
    first_index: int = 0,
) -> GenerationRequest:
    """One prompt of a request, checked against the model.

    Args:
        logprobs: top logprobs per token, None for none.
        default_tokens: without max_tokens: the rest of the context, or generation_config's max_new_tokens, else 16.
        first_index: of the prompt's choices; choice i of the answer uses seed + i.

    Raises: ApiError 400.
    """
    info, tokenizer = services.require_loaded(), services.tokenizer
    field = "prompt" if default_tokens == "short" else "messages"
    if not prompt_ids:  # a model has nothing to continue
        raise invalid(f"{field} must not be empty: this prompt has no tokens.", field)
    check_ids(prompt_ids, info.vocab_size, field)
    context = context_length(info)
    prompt_ids = truncated(prompt_ids, fields, context)
    if logprobs is not None and logprobs > services.settings.max_logprobs:
        param = "top_logprobs" if default_tokens == "rest" else "logprobs"
        raise invalid(f"{param} must be an integer from 0 to {services.settings.max_logprobs}.", param)
    default = services.presets.completion_tokens(len(prompt_ids)) if default_tokens == "short" else None
    limit = output_limit(fields, len(prompt_ids), context, default, field)
    sampling = sampling_params(
        fields,
        vocab_size=info.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
        logprobs=logprobs,
        prompt_tokens=len(prompt_ids),
        seed=services.settings.seed,
        first_index=first_index,
    )
    return GenerationRequest(
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=limit,
        n=fields.choices,
        first_index=first_index,
        stop=fields.stops,
        include_stop_str_in_output=fields.include_stop_str_in_output or False,
        skip_special_tokens=fields.skip_special_tokens is not False,
        key_id=key_id(request.scope),
        cache_salt=fields.cache_salt or "",
        priority=fields.priority or 0,
        deadline=deadline(request, services.settings.request_timeout),
    )


def truncated(prompt_ids: list[int], fields: SamplingFields, context: int) -> list[int]:
    """The prompt's last tokens, as many as `truncate_prompt_tokens` keeps; -1 leaves room for the output asked for."""
    keep = fields.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep < 0:
        keep = max(context - (fields.most_tokens(0) or 1), 1)
    return prompt_ids[-keep:]


def deadline(request: Request, limit_s: float | None) -> float | None:
    """When the request must be done, monotonic seconds: the server's limit or the client's header, the sooner one.

    Raises: ApiError 400 for a header that is no number of milliseconds.
    """
    header = request.headers.get(TIMEOUT_HEADER)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) <= 10 and 0 < int(header) <= MAX_TIMEOUT_MS):
            message = f"{TIMEOUT_HEADER} must be an integer of milliseconds from 1 to {MAX_TIMEOUT_MS}."
            raise invalid(message, TIMEOUT_HEADER)
        limit_s = min(int(header) / 1000, limit_s or float("inf"))
    if limit_s is None:
        return None
    arrival: float = request.scope.get("state", {}).get("arrival", time.monotonic())
    return arrival + limit_s


def answer_headers(fields: SamplingFields, hints: list[str]) -> dict[str, str]:
    """What the client should know beside the answer: fields that changed nothing, and hints."""
    headers = {}
    if ignored := fields.ignored():
        headers["x-ignored-params"] = names_header(ignored)
    if hints:
        headers["x-ropeway-hint"] = " ".join(hints)
    return headers


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's CompletionUsage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def end_fields(delta: ChoiceDelta) -> dict[str, Any]:
    """How a choice ended: OpenAI's reason, and beside it what exactly ended it."""
    return {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}


@dataclass(slots=True, frozen=True)
class Head:
    """What every document of one answer begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def make(cls, prefix: str, services: Services) -> "Head":
        """A new answer: `prefix` is "chatcmpl" or "cmpl"."""
        info = services.require_loaded()
        built = (__version__, info.model, info.architecture, info.dtype, info.device, info.layout)
        fingerprint = hashlib.blake2b(repr(built).encode(), digest_size=6).hexdigest()
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), services.model_name, f"fp_{fingerprint}")

    def document(self, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The whole answer of a request that is not streamed."""
        return {"object": kind, **_fields(self), "choices": choices, "usage": usage_object(usage)}


class Chunks:
    """Writes a stream's events. What is the same in all of them is encoded once.

    Args:
        head: of the answer.
        kind: the `object` field.
        fields: say whether usage is wanted at the end, or with every chunk.
        usage: of the generation; read when a chunk is written.
    """

    def __init__(self, head: Head, kind: str, fields: SamplingFields, usage: Usage) -> None:
        options = fields.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._running_usage = bool(options and options.continuous_usage_stats)
        self._usage = usage
        self._prefix = b"data: " + json_bytes({"object": kind, **_fields(head)})[:-1] + b',"choices":['

    def choice(self, data: bytes) -> bytes:
        """An event with one choice, already JSON."""
        return self._event(data, last=False)

    def finish(self) -> bytes:
        """The usage chunk, if asked for, and the end."""
        return (self._event(b"", last=True) if self._include_usage else b"") + DONE

    def _event(self, choices: bytes, last: bool) -> bytes:
        if last or self._running_usage:
            usage = b'],"usage":' + msgspec.json.encode(usage_object(self._usage)) + b"}\n\n"
        else:
            usage = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"
        return self._prefix + choices + usage


def _fields(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }
