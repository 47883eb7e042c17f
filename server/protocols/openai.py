"""The frame that OpenAI's generating endpoints put around every answer. Knows OpenAI's names, no field's meaning."""

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from ropeway import __version__
from ropeway.server.generator import Usage
from ropeway.server.request import ChoiceDelta
from ropeway.server.sampling_fields import SamplingFields
from ropeway.server.services import Services
from ropeway.server.stream import DONE, json_bytes


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's CompletionUsage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def end_fields(delta: ChoiceDelta) -> dict[str, Any]:
    """How a choice ended: OpenAI's reason, and beside it what exactly ended it; of a beam search, its score."""
    score = {} if delta.score is None else {"sequence_score": delta.score}
    return {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason, **score}


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
