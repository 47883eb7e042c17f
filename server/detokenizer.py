"""Token ids to text, one at a time: whole characters only, and the same text however the ids are cut into deltas.

Byte-level and byte-fallback vocabularies go through each token's real bytes and an incremental UTF-8 decoder, which is
exact for valid text and cannot fail on any sequence of ids. (`DecodeStream` raises on most random byte-fallback
sequences: a poison request.) Other decoders look at neighbouring tokens; those go through `DecodeStream`.
"""

import codecs
import re
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from ropeway.server.tokenizer import TextTokenizer

PROMPT_TAIL = 8
"""Ids of the prompt that decide how its continuation looks: an unfinished character, a first space."""

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


class Detokenizer:
    """One choice's text.

    Args:
        tokenizer: gives bytes per id.
        prompt_ids: the text continues them (a character begun in the prompt is completed in the output).
        skip_special_tokens: leave special tokens out.
        kept: special tokens that are not left out.
    """

    __slots__ = ("_kept", "_skip", "_source", "_tokenizer")

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._kept = kept
        tail = prompt_ids[-PROMPT_TAIL:]
        self._source: _ByteSource | _StreamSource
        if tokenizer.decoder_kind == "contextual":
            self._source = _StreamSource(tokenizer, tail, skip_special_tokens)
        else:
            self._source = _ByteSource(tokenizer, tail, skip_special_tokens)

    def step(self, token_id: int) -> str:
        """The characters that this token completes; "" while one is unfinished."""
        if self._skip and self._tokenizer.is_special(token_id):
            return self._tokenizer.token_text(token_id) if token_id in self._kept else ""
        return self._source.step(token_id)

    def finish(self) -> str:
        """What is left of an unfinished character, as `generate` and `decode` would show it: U+FFFD."""
        return self._source.finish()


class _ByteSource:
    """Bytes per token through UTF-8. Invalid bytes: byte-level decoders replace them as Unicode recommends (once per
    broken character), byte-fallback decoders one by one."""

    __slots__ = ("_decoder", "_one_by_one", "_token_bytes")

    def __init__(self, tokenizer: TextTokenizer, tail: Sequence[int], skip: bool) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._one_by_one = tokenizer.decoder_kind == "per_token"
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if self._one_by_one else "replace")
        for token_id in tail:
            if not (skip and tokenizer.is_special(token_id)):
                self._decoder.decode(self._token_bytes(token_id))

    def step(self, token_id: int) -> str:
        return self._replaced(self._decoder.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        return self._replaced(self._decoder.decode(b"", final=True))

    def _replaced(self, text: str) -> str:
        if self._one_by_one and not text.isascii():
            return _ESCAPED_BYTE.sub("\ufffd", text)
        return text


class _StreamSource:
    """tokenizers' own streaming decoder, started again where it gives up. Such vocabularies have no partial bytes."""

    __slots__ = ("_backend", "_skip", "_stream")

    def __init__(self, tokenizer: TextTokenizer, tail: Sequence[int], skip: bool) -> None:
        self._backend = tokenizer.backend
        self._skip = skip
        self._stream = DecodeStream(ids=list(tail), skip_special_tokens=skip)

    def step(self, token_id: int) -> str:
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # tokenizers raises a bare Exception when a prefix changes
            self._stream = DecodeStream(ids=[], skip_special_tokens=self._skip)
            piece = self._stream.step(self._backend, token_id)
        return piece or ""

    def finish(self) -> str:
        return ""
