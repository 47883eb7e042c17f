"""How models write tool calls and thoughts, as data; which of the ways a chat template has. Reads no output.

Calls are JSON or tags behind a marker: what differs is said by the fields of `ToolFormat`, and one parser
(`output_parser.py`) reads them all.
"""

import secrets
import string
from dataclasses import dataclass

ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(slots=True, frozen=True)
class Tags:
    """What stands around the parts of a call that is no JSON; "" where there is nothing. See `tagged_arguments.py`."""

    key_open: str
    key_close: str
    value_close: str
    value_open: str = ""
    name_open: str = ""
    name_close: str = ""
    end: str = ""
    """Behind the last value."""
    lines: bool = False
    """Values stand on lines of their own."""


@dataclass(slots=True, frozen=True)
class ToolFormat:
    """One way to write calls: a marker, then `{"name": ..., "arguments": {...}}`, a list of such objects, or tags."""

    name: str
    open: str
    """Marker before one call or several."""
    close: str = ""
    """Marker behind them, "" if there is none."""
    bare: bool = False
    """An answer may be a call without any marker: one that begins with `{` and names a tool of the request."""
    named: bool = False
    """Also `open name{arguments}`, with `separators` between."""
    separators: tuple[str, ...] = ()
    """What a named call has between name and arguments, in this order, each optional; text may follow the first."""
    tags: Tags | None = None
    """Instead of JSON."""
    short_ids: bool = False
    """Ids are nine letters and digits: the template refuses others when they come back."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and must reach the parser."""
        return tuple(filter(None, (self.open, self.close, *self.separators)))

    def new_id(self) -> str:
        """The id of a new call."""
        if self.short_ids:
            return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


@dataclass(slots=True, frozen=True)
class ReasoningFormat:
    """Thoughts stand at the beginning of an answer, between two markers; the prompt may hold the first one."""

    name: str
    open: str
    close: str

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and must reach the parser."""
        return (self.open, self.close)

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends with the opening marker, so that the output begins with thoughts."""
        return prompt.rstrip().endswith(self.open)

    def left_open(self, text: str) -> bool:
        """Whether an answer that is to be continued breaks off within its thoughts."""
        return text.lstrip().startswith(self.open) and self.close not in text


_QWEN_CODER = Tags(
    name_open="<function=", name_close=">", key_open="<parameter=", key_close=">", value_close="</parameter>",
    end="</function>", lines=True,
)  # fmt: skip
_GLM = Tags(
    key_open="<arg_key>",
    key_close="</arg_key>",
    value_open="<arg_value>",
    value_close="</arg_value>",
    end="</tool_call>",
)

TOOL_FORMATS = {
    shape.name: shape
    for shape in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>"),
        ToolFormat(
            "mistral", "[TOOL_CALLS]", named=True, separators=("[CALL_ID]", "[ARGS]"), short_ids=True
        ),
        ToolFormat("llama", "<|python_tag|>", bare=True),
        ToolFormat("granite", "<|tool_call|>"),
        ToolFormat("phi", "<|tool_call|>", "<|/tool_call|>"),
        ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>"),
        ToolFormat("qwen-coder", "<tool_call>", "</tool_call>", tags=_QWEN_CODER),
        ToolFormat("glm", "<tool_call>", "</tool_call>", tags=_GLM),
    )
}  # fmt: skip

REASONING_FORMATS = {
    shape.name: shape
    for shape in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    )
}


def recognise_tools(template: str) -> ToolFormat | None:
    """The format a template's own calls have, None if it is none of ours."""
    for name in ("mistral", "qwen-coder", "glm", "hermes", "nemotron", "phi", "granite", "llama"):
        shape = TOOL_FORMATS[name]
        signs = (shape.open, shape.close, shape.tags.key_open if shape.tags else "")
        if all(sign in template for sign in signs):
            return shape
    if "ipython" in template and '"parameters": ' in template:  # Llama 3.2: no marker at all
        return TOOL_FORMATS["llama"]
    return None


def recognise_reasoning(template: str) -> ReasoningFormat | None:
    """The format a template's own thoughts have; the closing marker is in all templates that know them."""
    return next((shape for shape in REASONING_FORMATS.values() if shape.close in template), None)
