"""Messages to prompt text, by the model's own Jinja template. Knows templates and messages, no ids, no HTTP.

The environment is that of transformers' `apply_chat_template` (sandbox, filters, globals, `{% generation %}`), made
here because importing it costs an API worker a second and the whole of transformers.
"""

import json
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic_core import from_json

from ropeway.server.errors import ApiError, invalid

TRUSTED_ROLES = ("system", "developer", "assistant")
"""Every other role's text may come from anybody: special tokens spelled out in it stay text."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


class ChatTemplate:
    """One model's template.

    Args:
        source: Jinja text.
        special_tokens: variables such as `bos_token`.
        special_texts: what special tokens look like, so that users cannot write them.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any], special_texts: Sequence[str] = ()) -> None:
        self._special_tokens = special_tokens
        spelled = sorted((re.escape(text) for text in special_texts if len(text) > 1), key=len, reverse=True)
        self._special = re.compile(f"(?=(?:{'|'.join(spelled)}))(.)", re.DOTALL) if spelled else None
        self._knows_developer = "developer" in source
        environment = _environment()
        self._template: Template | None = None
        self._broken = ""
        self.renders_tools = False
        """Whether tools in a request make any difference."""
        try:
            self._template = environment.from_string(source)
            self.renders_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            self._broken = f"line {error.lineno}: {error.message}"

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[str]:
        """The prompt, in pieces to be tokenized one by one: nearly always a single one.

        Where a user's or a tool's text spells a special token, the prompt is cut inside of that text, so that no
        piece holds the special token and it is tokenized as ordinary text.

        Raises: ApiError 400 with the template's own message.
        """
        if self._template is None:
            raise invalid(f"The model's chat template is broken ({self._broken}).", "messages")
        prepared = prepare_messages(messages, self._knows_developer)
        cut, end = secrets.token_hex(12), secrets.token_hex(12)
        guarded = self._guard(prepared, cut)
        if continue_final_message:
            final = prepared[-1] = dict(prepared[-1])
            final["content"] += end + " "
        try:
            text = self._template.render(
                messages=prepared,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:
            reason = " ".join(str(error.message).split()).rstrip(".")
            raise invalid(f"The chat template refused the messages: {reason}.", "messages") from None
        except Exception as error:  # a template is code: it may fail in any way on messages it does not expect
            raise invalid(f"The chat template failed on these messages ({error}).", "messages") from None
        if continue_final_message:
            text, found, rest = text.rpartition(end)
            if not found:
                raise invalid("The chat template leaves the final message out: it cannot be continued.", "messages")
            if not rest.startswith(" "):  # the template trims contents
                text = text.rstrip()
        return text.split(cut) if guarded else [text]

    def _guard(self, messages: list[dict[str, Any]], cut: str) -> bool:
        """Puts `cut` behind the first character of every special token that untrusted text spells."""
        if self._special is None:
            return False
        found = 0
        for message in messages:
            if message["role"] not in TRUSTED_ROLES:
                message["content"], count = self._special.subn(rf"\g<1>{cut}", message["content"])
                found += count
        return found > 0


def missing_template() -> ApiError:
    """The 400 for chat with a model that has no template."""
    return invalid(
        "This model has no chat template: use /v1/completions, or start the server with --chat-template.", "messages"
    )


def prepare_messages(messages: Sequence[Any], knows_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates expect them: new dicts, null fields left out, content one string, arguments objects.

    Raises: ApiError 400 naming the part that is wrong.
    """
    if not messages:
        raise invalid("messages must hold at least one message.", "messages")
    return [_prepare(message, f"messages[{place}]", knows_developer) for place, message in enumerate(messages)]


def _prepare(message: Any, where: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(f"{where} must be an object with role and content.", where)
    prepared = {key: value for key, value in message.items() if value is not None}
    role = prepared.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role must be a string such as user.", f"{where}.role")
    if role == "developer" and not knows_developer:
        prepared["role"] = "system"
    prepared["content"] = _flatten(prepared.get("content"), role, f"{where}.content")
    if "reasoning" in prepared:
        prepared.setdefault("reasoning_content", prepared["reasoning"])
    if "tool_calls" in prepared:
        prepared["tool_calls"] = _prepare_calls(prepared["tool_calls"], f"{where}.tool_calls")
    return prepared


def _flatten(content: Any, role: str, where: str) -> str:
    """One string of a string, of text parts, or of an assistant's null (a turn that only calls tools)."""
    if isinstance(content, str):
        return content
    if content is None:
        if role == "assistant":
            return ""
        raise invalid(f"{where} must be a string or a list of text parts.", where)
    if not isinstance(content, list):
        raise invalid(f"{where} must be a string or a list of text parts.", where)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise invalid(f"{where} may hold only parts of type text; this model takes no other.", f"{where}[{place}]")
        texts.append(text)
    return "".join(texts)


def _prepare_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments parsed; what is no JSON (a model wrote it) stays text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise invalid(f"{where} must be a list of tool calls.", where)
    prepared = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = call | {"function": function | {"arguments": _parsed(function["arguments"])}}
        prepared.append(call)
    return prepared


def _parsed(arguments: str) -> Any:
    try:
        return from_json(arguments, allow_inf_nan=False)
    except ValueError:
        return arguments
