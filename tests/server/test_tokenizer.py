"""Text to ids and back, and what a single token means."""

import json
import threading
from pathlib import Path

import pytest
import text_samples
from tokenizers import Tokenizer

from ropeway.server.tokenizer import INLINE_CHARS, TextTokenizer, byte_level_alphabet

DEMO = Path(__file__).parents[2] / "server" / "demo_model"


def test_load_reads_what_the_engine_wrote(tmp_path: Path) -> None:
    """Guards the way from the engine's files to the API worker: ids, template, EOS and defaults, with nothing added."""
    backend = text_samples.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=12)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}日")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3], "top_k": 7}')
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.eos_token_ids == {1, 3}
    assert tokenizer.generation_config["top_k"] == 7
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == ["x日"]
    assert len(tokenizer._encode([text_samples.TEXTS[0]], True)) > 12, "truncation or padding survived"


def test_eos_falls_back_to_the_token(tmp_path: Path) -> None:
    """Guards models whose generation_config names no EOS: their answers would never end."""
    backend = text_samples.byte_level()
    assert TextTokenizer(backend, {"eos_token": "</s>"}).eos_token_ids == {1}
    assert TextTokenizer(backend, {"eos_token": "</s>"}, None, {"eos_token_id": 3}).eos_token_ids == {3}
    assert TextTokenizer(backend).eos_token_ids == frozenset()
    for wrong in ("</s>", 3.0, True, [None, "3"], {"id": 3}, []):  # a file is anything at all
        assert TextTokenizer(backend, {"eos_token": "</s>"}, None, {"eos_token_id": wrong}).eos_token_ids == {1}
    assert TextTokenizer(backend, {"eos_token": 7}, None, {"eos_token_id": [3, "x"]}).eos_token_ids == {3}


async def test_long_texts_leave_the_loop() -> None:
    """Guards the event loop: a long prompt must be encoded in a thread, with the same ids as inline."""
    tokenizer = TextTokenizer(text_samples.byte_level())
    threads: list[str] = []
    encode = tokenizer._encode

    def spy(*arguments: object) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(*arguments)  # type: ignore[arg-type]

    tokenizer._encode = spy  # type: ignore[method-assign, assignment]
    text = "Hello, world! " * INLINE_CHARS
    long = await tokenizer.encode([text], add_special_tokens=False)
    short = await tokenizer.encode(["Hello, world! "], add_special_tokens=False)
    assert long == encode([text], False) and len(long) == INLINE_CHARS * len(short)
    assert threads[0].startswith("tokenize") and threads[1] == threading.current_thread().name


@pytest.mark.parametrize("make", [text_samples.byte_level, text_samples.byte_fallback])
def test_bytes_of_tokens_spell_the_text(make: type[Tokenizer]) -> None:
    """Guards logprobs' bytes: joined they are the text, also where one character is several tokens."""
    tokenizer = TextTokenizer(make())
    for text in text_samples.TEXTS:
        ids = tokenizer._encode([text], False)
        spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert spelled in (text, " " + text)  # sentencepiece writes a first space
    assert any(len(tokenizer.token_bytes(id)) == 1 and tokenizer.token_bytes(id)[0] > 127 for id in ids)


def test_text_of_partial_characters() -> None:
    """Guards people who read logprobs: a broken character shows its bytes, never U+FFFD, and stays unique."""
    tokenizer = TextTokenizer(text_samples.byte_fallback())
    id_of = tokenizer.backend.token_to_id
    assert tokenizer.token_text(id_of("<0xE6>")) == "bytes:\\xe6"
    assert tokenizer.token_bytes(id_of("<0xE6>")) == b"\xe6"
    assert tokenizer.token_text(id_of("▁the")) == " the"
    assert tokenizer.token_text(id_of("</s>")) == "</s>"
    assert tokenizer.token_bytes(10**6) == b""


def test_alphabet_is_gpt2s() -> None:
    """Guards the byte table against the one that tokenizers uses."""
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10
    pre = text_samples.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in text_samples.TEXTS:
        shown = "".join(piece for piece, _ in pre.pre_tokenize_str(text))
        assert bytes(alphabet[char] for char in shown).decode() == text


def test_every_demo_token_has_bytes() -> None:
    """Guards the embedded model's vocabulary: bytes per token agree with decoding it."""
    tokenizer = TextTokenizer(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    names = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    for id in names.values():
        data = tokenizer.token_bytes(id)
        assert data.decode(errors="replace") == tokenizer.decode([id], skip_special_tokens=False)
