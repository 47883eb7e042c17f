"""The application over an engine that writes given texts, behind a template that knows tools and thoughts."""

from typing import Any

import text_samples
from openai_app import EOS, Server
from scripted import in_steps

from ropeway.server.generator import Generator
from ropeway.server.tokenizer import TextTokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.items() | list }}"
    "</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
BACKEND = text_samples.byte_level()


class TalkServer(Server):
    """Writes `text` in wake-ups of the given sizes, then ends with EOS or at the limit."""

    def __init__(self, text: str, sizes: tuple[int, ...] = (1,), finish: str = "stop", **options: Any) -> None:
        ids = BACKEND.encode(text, add_special_tokens=False).ids + [EOS] * (finish == "stop")
        script = in_steps([ids], sizes, finish, stop_id=EOS if finish == "stop" else None, cached=2)  # type: ignore[arg-type]
        super().__init__(script, template=TEMPLATE, info={"vocab_size": BACKEND.get_vocab_size()}, **options)
        self.tokenizer = TextTokenizer(BACKEND, {"eos_token": "<|im_end|>"}, TEMPLATE)
        self.services.tokenizer = self.tokenizer
        self.services.generator = Generator(self.engine, self.tokenizer)

    @property
    def prompt(self) -> str:
        """What the engine was asked last."""
        return self.tokenizer.decode(self.engine.submitted[-1].prompt_ids, skip_special_tokens=False)
