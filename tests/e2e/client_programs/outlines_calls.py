"""What a program that uses Outlines does, for test_clients.py: argv holds the URL and the greedy answer.

Outlines knows four servers whose shapes Ropeway has; each is asked for every kind of format that it can send.
"""

import re
import sys
import warnings
from typing import Any, Literal

import openai
import outlines
from huggingface_hub import InferenceClient
from outlines.types import CFG, Regex
from pydantic import BaseModel, ConfigDict

warnings.filterwarnings("ignore", message="SGLang grammar-based structured outputs")  # says that it wants EBNF
URL, EXPECTED = sys.argv[1:]
QUESTION = "Who are you?"
SDK = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")


class Place(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome"]
    big: bool


servers: dict[str, tuple[Any, dict[str, Any]]] = {
    "openai": (outlines.from_openai(SDK, "ropeway-demo"), {"max_tokens": 60, "temperature": 0}),
    "vllm": (outlines.from_vllm(SDK, "ropeway-demo"), {"max_tokens": 60, "temperature": 0}),
    "sglang": (outlines.from_sglang(SDK, "ropeway-demo"), {"max_tokens": 60, "temperature": 0}),
    "tgi": (outlines.from_tgi(InferenceClient(URL)), {"max_new_tokens": 60}),
}
for name, (model, options) in servers.items():
    if name != "tgi":  # it knows no template
        assert model(QUESTION, **options) == EXPECTED, name
        assert "".join(model.stream(QUESTION, **options)) == EXPECTED, name
    Place.model_validate_json(model(QUESTION, Place, **options))
    Place.model_validate_json("".join(model.stream(QUESTION, Place, **options)))
    if name == "openai":  # Outlines asks it for nothing but schemas
        continue
    assert model(QUESTION, Literal["red", "blue"], **options) in ("red", "blue"), name
    assert re.fullmatch("[a-c]{3}", model(QUESTION, Regex("[a-c]{3}"), **options)), name
    assert re.fullmatch("[a-c]{3}", "".join(model.stream(QUESTION, Regex("[a-c]{3}"), **options))), name
for name, grammar in (("vllm", 'start: "yes" | "no"'), ("sglang", 'root ::= "yes" | "no"')):
    model, options = servers[name]
    assert model(QUESTION, CFG(grammar), **options) in ("yes", "no"), name
