"""Generation configs of a model's folder, at start and per request: the text-generation guide's part on saving them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MODEL_DIR, Reference, RunningServer, start_server
from openai_app import check
from transformers import GenerationConfig

PROMPT = "A sequence of numbers: 1, 2"
GUIDE = "translation_generation_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with the guide's file beside its own, written as the guide writes it, and one more."""
    folder = tmp_path_factory.mktemp("model") / "copy"
    shutil.copytree(MODEL_DIR, folder)
    GenerationConfig(num_beams=4, early_stopping=True, decoder_start_token_id=0, eos_token_id=2).save_pretrained(
        folder, config_file_name=GUIDE
    )
    config = GenerationConfig(max_new_tokens=7, do_sample=False, repetition_penalty=8.0)
    config.save_pretrained(folder, config_file_name="brief_generation_config.json")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    running = start_server(str(folder), "--generation-config", "brief_generation_config", "--served-model-name", "m")
    yield running
    assert running.stop() == 0


def complete(server: RunningServer, **fields: object) -> str:
    answer = server.post("/v1/completions", prompt=PROMPT, **fields)
    assert answer.status_code == 200, answer.text
    return str(check(answer.json(), "CreateCompletionResponse")["choices"][0]["text"])


def test_preset_of_the_server(server: RunningServer, reference: Reference) -> None:
    """Guards `--generation-config NAME`: requests that say nothing are as generate() with that file."""
    assert complete(server) == reference.text(PROMPT, 7, repetition_penalty=8.0)
    assert complete(server, repetition_penalty=1.0, max_new_tokens=20) == reference.text(PROMPT, 20)


def test_preset_of_a_request(server: RunningServer, reference: Reference) -> None:
    """Guards a preset by name, an object and its JSON: they go before the server's."""
    own = {"max_new_tokens": 12, "repetition_penalty": 1.0}
    expected = reference.text(PROMPT, 12)
    assert complete(server, generation_config=own) == complete(server, generation_config=json.dumps(own)) == expected
    assert complete(server, generation_config="brief_generation_config", repetition_penalty=1.0) == reference.text(
        PROMPT, 7
    )
    refused = server.post("/v1/completions", prompt=PROMPT, generation_config="unknown")
    assert refused.status_code == 400 and GUIDE in refused.json()["error"]["message"]


def test_the_guides_preset(server: RunningServer, reference: Reference) -> None:
    """Guards the guide's own file: it is done as generate() does it."""
    options = {"num_beams": 4, "early_stopping": True}
    assert complete(server, generation_config=GUIDE, repetition_penalty=1.0) == reference.text(PROMPT, 7, **options)


def test_unknown_preset_at_start(folder: Path) -> None:
    """Guards a typo in `--generation-config`: the start fails with the names that there are."""
    command = [sys.executable, "-m", "ropeway.server.cli", "serve", str(folder), "--port", "0"]
    failed = subprocess.run([*command, "--generation-config", "breif"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1 and "brief_generation_config.json" in failed.stderr


def test_batch_and_chat(server: RunningServer, reference: Reference, tmp_path: Path) -> None:
    """Guards `ropeway run-batch` and `ropeway chat` against the real server."""
    tool = [sys.executable, "-m", "ropeway.server.cli"]
    line = {"method": "POST", "url": "/v1/completions"}
    prompts = [PROMPT, "A, B, C, D, E"]
    jobs = [{**line, "custom_id": prompt, "body": {"prompt": prompt}} for prompt in prompts]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, jobs)))
    batch = [*tool, "run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--url", server.url]
    subprocess.run(batch, check=True, capture_output=True, timeout=120)
    entries: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert all(check(entry["response"]["body"], "CreateCompletionResponse") for entry in entries)
    texts = {entry["custom_id"]: entry["response"]["body"]["choices"][0]["text"] for entry in entries}
    assert texts == {prompt: reference.text(prompt, 7, repetition_penalty=8.0) for prompt in prompts}
    chat = [*tool, "chat", "--url", server.url, "--set", "repetition_penalty=1", "--set", "max_tokens=40"]
    said = subprocess.run(chat, input="Who are you?\n", capture_output=True, text=True, timeout=120, check=True)
    assert reference.chat([{"role": "user", "content": "Who are you?"}], 40) in said.stdout


def test_max_time(server: RunningServer) -> None:
    """Guards max_time: generation stops after it, with the text so far, as generate(max_time=...)."""
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=400, ignore_eos=True, max_time=0.1).json()
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "max_time")
    assert 0 < answer["usage"]["completion_tokens"] < 400
