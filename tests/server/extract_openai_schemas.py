"""Writes openai_schemas.json: the few schemas of OpenAI's OpenAPI description that referee our answers.

    python tests/server/extract_openai_schemas.py openapi.yaml

The description is github.com/openai/openai-openapi, commit f85dbe2, MIT licence. OpenAPI 3.0's `nullable` becomes
JSON Schema's null; prose and examples are left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

WANTED = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "Response",
    "ResponseStreamEvent",
)
TARGET = Path(__file__).with_name("openai_schemas.json")
NOTE = (
    "Extracted by extract_openai_schemas.py from github.com/openai/openai-openapi, commit f85dbe2. "
    "MIT License, Copyright (c) OpenAI (https://openai.com)."
)
PROSE = {"description", "example", "examples", "x-oaiMeta", "discriminator", "nullable", "deprecated"}
REF = "#/components/schemas/"


def cleaned(node: Any, refs: set[str]) -> Any:
    """The node as plain JSON Schema; names of referenced schemas are added to `refs`."""
    if isinstance(node, list):
        return [cleaned(item, refs) for item in node]
    if not isinstance(node, dict):
        return node
    if str(node.get("$ref", "")).startswith(REF):
        name = node["$ref"].removeprefix(REF)
        refs.add(name)
        schema: dict[str, Any] = {"$ref": f"#/$defs/{name}"}
    else:
        schema = {key: cleaned(value, refs) for key, value in node.items() if key not in PROSE}
    return {"anyOf": [schema, {"type": "null"}]} if node.get("nullable") is True else schema


def extract(schemas: dict[str, Any]) -> dict[str, Any]:
    """The wanted schemas and all that they refer to, under `$defs`."""
    definitions: dict[str, Any] = {}
    todo = set(WANTED)
    while todo:
        name = min(todo)
        definitions[name] = cleaned(schemas[name], todo)
        todo -= definitions.keys()
    return {"$comment": NOTE, "$defs": definitions}


if __name__ == "__main__":
    description = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    TARGET.write_text(json.dumps(extract(description["components"]["schemas"]), indent=1) + "\n")
