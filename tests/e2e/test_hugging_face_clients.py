"""Hugging Face's own clients against the running server, as their users call them."""

import os
import subprocess
import sys

import pytest
from harness import Reference, RunningServer
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError
from openai_app import check

PROMPT = "A sequence of numbers: 1, 2"


def test_text_generation(server: RunningServer, reference: Reference) -> None:
    """Guards InferenceClient.text_generation: greedy like generate(), streamed, with details."""
    client = InferenceClient(server.url)
    expected = reference.text(PROMPT, 30)
    assert client.text_generation(PROMPT, max_new_tokens=30) == expected
    assert "".join(client.text_generation(PROMPT, max_new_tokens=30, stream=True)) == expected
    assert client.text_generation(PROMPT, max_new_tokens=30, return_full_text=True) == PROMPT + expected
    detailed = client.text_generation(PROMPT, max_new_tokens=30, details=True)
    assert detailed.generated_text == expected and detailed.details
    assert detailed.details.generated_tokens == len(detailed.details.tokens) == 30
    *_, last = client.text_generation(PROMPT, max_new_tokens=30, details=True, stream=True)
    assert last.generated_text == expected and last.details and last.details.finish_reason == "length"
    sampled = {client.text_generation("I am a cat.", max_new_tokens=8, do_sample=True, seed=seed) for seed in range(5)}
    assert len(sampled) > 1
    stopped = client.text_generation(PROMPT, max_new_tokens=30, stop=[", 7"])
    assert stopped.endswith(", 7")
    with pytest.raises(ValidationError, match="top_k must be"):
        client.text_generation(PROMPT, top_k=-1)


def test_chat_completion(server: RunningServer, reference: Reference) -> None:
    """Guards InferenceClient.chat_completion, whole and streamed."""
    client = InferenceClient(base_url=server.url)
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = reference.chat(messages, 30)
    answer = client.chat_completion(messages, max_tokens=30, temperature=0)
    assert answer.choices[0].message.content == expected
    body = {"messages": messages, "max_tokens": 30, "temperature": 0}
    check(server.post("/v1/chat/completions", **body).json(), "CreateChatCompletionResponse")
    stream = client.chat_completion(messages, max_tokens=30, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected


def test_endpoint_info(server: RunningServer) -> None:
    """Guards InferenceClient.get_endpoint_info."""
    assert InferenceClient(server.url, provider="hf-inference").get_endpoint_info()["model_id"] == "ropeway-demo"


def test_transformers_chat(server: RunningServer, reference: Reference) -> None:
    """Guards `transformers chat`: it asks /load_model, and its generation_config decides, here greedy and short."""
    expected = reference.chat([{"role": "user", "content": "Who are you?"}], 20)
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "chat", "ropeway-demo", server.url]
    shown = subprocess.run(
        [*command, "max_new_tokens=20", "do_sample=False"],
        input="Who are you?\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert shown.returncode == 0, shown.stderr
    assert "was already loaded" in shown.stdout
    assert expected.strip() in shown.stdout
