"""Text to token ids and back, from the files the engine process wrote. Knows the vocabulary; no torch, no HTTP.

`tokenizers` alone reads `tokenizer.json`: the ids equal those of `AutoTokenizer` because the engine wrote its backend.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ropeway.server.chat_template import ChatTemplate

INLINE_CHARS = 256
"""Shorter texts are encoded on the event loop: that takes less time than the way to a thread and back."""

DecoderKind = Literal["byte_level", "per_token", "contextual"]
"""How tokens become text: through bytes, each for itself (byte fallback included), or depending on neighbours."""

_PER_TOKEN = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_NOT_PRESETS = ("tokenizer.json", "special_tokens.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(rest)}


class TextTokenizer:
    """The model's tokenizer, chat template and presets.

    Args:
        backend: the tokenizer itself.
        special_tokens: role -> text ("bos_token", "eos_token", ...), as templates see them.
        chat_template: None if the model has none.
        generation_config: the model's own defaults, as in its JSON file.
        presets: all generation-config files of the model, name -> content.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: dict[str, Any] | None = None,
        chat_template: str | None = None,
        generation_config: dict[str, Any] | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = special_tokens or {}
        self.generation_config = generation_config or {}
        self.presets = {"generation_config.json": self.generation_config} | (presets or {})
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        special_texts = [added[id].content for id in self._special_ids]
        self.chat_template = ChatTemplate(chat_template, self.special_tokens, special_texts) if chat_template else None
        self.eos_token_ids = self._eos_token_ids()
        self.decoder_kind = _decoder_kind(backend)
        self._alphabet = byte_level_alphabet()
        self._anchor = _anchor(backend)
        self._bytes: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters; no token stands for more of a text."""

    @classmethod
    def load(cls, text_dir: str | Path) -> "TextTokenizer":
        """Reads what the engine wrote: tokenizer.json, and if present special_tokens.json, chat_template.jinja,
        *generation_config*.json."""
        folder = Path(text_dir)
        template = folder / "chat_template.jinja"
        return cls(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            _read_json(folder / "special_tokens.json"),
            template.read_text(encoding="utf-8") if template.exists() else None,
            _read_json(folder / "generation_config.json"),
            {path.name: _read_json(path) for path in folder.glob("*.json") if path.name not in _NOT_PRESETS},
        )

    async def encode(self, pieces: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """Token ids of texts that are tokenized one by one and joined; a plain prompt is one piece.

        Long ones go to a thread, where `encode_batch` releases the GIL (`encode` does not).
        """
        if sum(map(len, pieces)) <= INLINE_CHARS:
            return self._encode(pieces, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._encode, pieces, add_special_tokens)

    def _encode(self, pieces: Sequence[str], add_special_tokens: bool) -> list[int]:
        encodings = self.backend.encode_batch(list(pieces), add_special_tokens=add_special_tokens)
        return [id for encoding in encodings for id in encoding.ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of whole ids; unknown ids are left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    async def decode_long(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The same for any number of ids: many go to a thread, where `decode_batch` releases the GIL."""
        if len(ids) <= INLINE_CHARS:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)
        loop = asyncio.get_running_loop()
        (text,) = await loop.run_in_executor(self._pool, self.backend.decode_batch, [list(ids)], skip_special_tokens)
        return str(text)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token_id in self._special_ids

    def special_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Text -> id, for those of the texts that are special tokens."""
        ids = {text: self.backend.token_to_id(text) for text in texts}
        return {text: id for text, id in ids.items() if id in self._special_ids}

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that it continues; b"" for an unknown id.

        A byte-level or byte-fallback token gives its real bytes, which need not be whole characters.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token for people: its text, or `bytes:\\xe6\\x97` where it is no whole text (as OpenAI writes it)."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoder_kind == "byte_level":
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return token.encode()
        if self.decoder_kind == "per_token" and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        before, both = _decode_tokens(self.backend, [self._anchor]), _decode_tokens(self.backend, [self._anchor, token])
        return both.removeprefix(before).encode()

    def _eos_token_ids(self) -> frozenset[int]:
        """The ids that end an answer: generation_config's, else the eos token's."""
        given = self.generation_config.get("eos_token_id")
        ids = [id for id in (given if isinstance(given, list) else [given]) if type(id) is int]  # true is none
        eos = self.special_tokens.get("eos_token")
        if not ids and isinstance(eos, str) and (id := self.backend.token_to_id(eos)) is not None:
            return frozenset([id])
        return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _decoder_kind(backend: Tokenizer) -> DecoderKind:
    """Reads it off the decoder's parts; none means that tokens are joined by spaces."""
    if backend.decoder is None:
        return "per_token"
    types = set(re.findall(r'"type":"(\w+)"', backend.decoder.__getstate__().decode()))
    if "ByteLevel" in types:
        return "byte_level"
    return "per_token" if types <= _PER_TOKEN else "contextual"


def _anchor(backend: Tokenizer) -> str:
    """A plain token to put before others, so that what decoders do at the start of a text does not happen to them."""
    candidates = (backend.id_to_token(id) for id in range(min(backend.get_vocab_size(), 10_000)))
    return next((token for token in candidates if token and token.isalnum()), "a")


def _decode_tokens(backend: Tokenizer, tokens: list[str]) -> str:
    return backend.decoder.decode(tokens) if backend.decoder is not None else " ".join(tokens)
