"""Hints about prompts."""

import text_samples

from ropeway.server.prompt_hints import prompt_hints
from ropeway.server.tokenizer import TextTokenizer


def test_special_tokens_beyond_ascii() -> None:
    """Guards DeepSeek's users: a header holds Latin-1 only, and the answer failed after its rows were submitted."""
    backend = text_samples.byte_level()
    backend.add_special_tokens(["<\uff5cUser\uff5c>"])
    prompt = "<\uff5cUser\uff5c>Hi"
    hints = prompt_hints(TextTokenizer(backend, {}, None), prompt, backend.encode(prompt).ids)
    assert hints == ["The prompt spells special tokens ('<\\uff5cUser\\uff5c>'), which were read as such."]
