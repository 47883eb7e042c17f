"""The whole application over a scripted engine, and the referee of its answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import text_samples
from fake_client import model_info
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry
from scripted import ScriptedClient, Wake
from tokenizers.processors import TemplateProcessing
from wire import Wire, events

from ropeway.scheduler.client import EngineClient
from ropeway.server.admission import Admission
from ropeway.server.app import create_app
from ropeway.server.generator import Generator
from ropeway.server.keys import KeyRing
from ropeway.server.metrics import RequestMetrics
from ropeway.server.presets import Presets
from ropeway.server.services import Services
from ropeway.server.settings import Settings
from ropeway.server.tokenizer import TextTokenizer

EOS = 3
"""The template's end of a turn."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS = 0
BACKEND = text_samples.byte_level()
BACKEND.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
VOCAB = BACKEND.get_vocab_size() + 5
SCHEMAS = json.loads(Path(__file__).with_name("openai_schemas.json").read_text())
VALIDATORS = {name: Draft202012Validator({"$ref": f"#/$defs/{name}", **SCHEMAS}) for name in SCHEMAS["$defs"]}


class Server:
    """An app whose engine plays scripts.

    Args:
        scripts: one per prompt of a request.
        settings: flags.
    """

    def __init__(
        self,
        *scripts: Sequence[Wake],
        template: str | None = TEMPLATE,
        config: dict[str, Any] | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
        info: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        facts = {"vocab_size": VOCAB, "max_model_len": 500, "num_blocks": 1000} | (info or {})
        self.engine = ScriptedClient(model_info(**facts), *scripts)
        self.metrics = RequestMetrics("tiny", CollectorRegistry())
        self.admission = Admission(300, 10_000, self.metrics.rejected)
        self.services = Services(
            settings=Settings(**({"served_model_name": ("tiny",)} | settings)),
            client=cast(EngineClient, self.engine),
            admission=self.admission,
            metrics=self.metrics,
            created=1,
        )
        self.tokenizer = TextTokenizer(BACKEND, {"eos_token": "<|im_end|>"}, template, config, presets)
        self.services.tokenizer = self.tokenizer
        self.services.presets = Presets(self.tokenizer.presets, self.services.settings.generation_config)
        self.services.generator = Generator(self.engine, self.tokenizer)
        self.app: FastAPI = create_app(self.services, KeyRing([]))

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Wire:
        """One whole exchange; afterwards nothing may be left in the queue."""
        wire = Wire(path, body, headers)
        await wire.call(self.app)
        assert wire.complete
        assert (self.admission.requests, self.admission.tokens) == (0, 0)
        return wire

    async def refused(self, path: str, body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The error object of a request that gets a 4xx; the engine must not have seen it."""
        before = len(self.engine.submitted)
        wire = await self.post(path, body, headers)
        assert 400 <= wire.status < 500, wire.body
        assert len(self.engine.submitted) == before
        error: dict[str, Any] = json.loads(wire.body)["error"]
        assert error["message"].endswith(".") and "\n" not in error["message"]
        return error


def ids(text: str) -> list[int]:
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


def check(document: Any, schema: str) -> Any:
    """The document, which the referee accepts."""
    VALIDATORS[schema].validate(document)
    return document


def check_stream(wire: Wire, schema: str) -> list[Any]:
    """The documents of a stream, each of which the referee accepts; same id, created and model in all of them."""
    return check_documents(events(wire.body), schema)


def check_documents(documents: list[Any], schema: str) -> list[Any]:
    """The same of documents that were read already."""
    for document in documents:
        shown = document
        if schema == "CreateCompletionResponse":  # it describes whole answers: a piece has no reason and no usage yet
            kept = [{k: v for k, v in c.items() if (k, v) != ("finish_reason", None)} for c in document["choices"]]
            shown = {k: v for k, v in document.items() if (k, v) != ("usage", None)}
            shown["choices"] = [{"finish_reason": "stop"} | choice for choice in kept]
        check(shown, schema)
    assert len({(d["id"], d["created"], d["model"], d["object"], d["system_fingerprint"]) for d in documents}) == 1
    return documents
