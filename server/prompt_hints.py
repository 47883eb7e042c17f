"""What probably went wrong with a legal prompt: sentences for the header `x-ropeway-hint`, and once for the log.

Knows token ids and the tokenizer's special tokens; changes nothing.
"""

import functools
import logging

from ropeway.server.tokenizer import TextTokenizer

_log = logging.getLogger("ropeway.hints")

DOUBLE_BOS = "The prompt begins with the BOS token twice: the tokenizer writes one itself."
SPECIAL = "The prompt spells special tokens ({}), which were read as such."
NO_TEMPLATE = "The prompt was not put into this model's chat template; /v1/chat/completions does that."
MAX_SHOWN = 3


def prompt_hints(tokenizer: TextTokenizer, prompt: str | list[int], ids: list[int]) -> list[str]:
    """Sentences about one prompt.

    Args:
        prompt: as the client sent it.
        ids: what the model will see.
    """
    hints = []
    bos = tokenizer.backend.token_to_id(tokenizer.special_tokens.get("bos_token") or "")
    if bos is not None and ids[:2] == [bos, bos]:
        hints.append(DOUBLE_BOS)
    if isinstance(prompt, str):
        texts = {tokenizer.backend.id_to_token(id) for id in set(ids) if tokenizer.is_special(id)}
        spelled = sorted(text for text in texts if text and text in prompt)
        if spelled:
            hints.append(SPECIAL.format(", ".join(map(ascii, spelled[:MAX_SHOWN]))))  # headers and logs hold no more
        elif tokenizer.chat_template is not None:
            hints.append(NO_TEMPLATE)
    for hint in hints:
        _log_once(hint)
    return hints


@functools.lru_cache(maxsize=64)
def _log_once(hint: str) -> None:
    _log.warning(hint)
