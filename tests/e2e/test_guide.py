"""Hugging Face's text-generation guide, over HTTP: what its snippets on decoder models do, this server does.

The reference is `generate()` on the same weights; texts are compared exactly.
"""

import openai
import pytest
from harness import Reference, RunningServer

PIRATE = [
    {"role": "system", "content": "You are a friendly chatbot who always responds in the style of a pirate"},
    {"role": "user", "content": "How many cats does it take to change a light bulb?"},
]


def complete(server: RunningServer, prompt: str, **options: object) -> str:
    answer = server.post("/v1/completions", **{"prompt": prompt, "temperature": 0} | options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_default_generate(server: RunningServer, reference: Reference) -> None:
    """Guards the first snippet a newcomer runs: a list of colors goes on with colors."""
    text = complete(server, "A list of colors: red, blue", max_tokens=20)
    assert text == reference.text("A list of colors: red, blue", 20)
    colors = {"green", "yellow", "orange", "purple", "pink", "black", "white", "brown", "gray"}
    assert len(colors & set(text.replace(".", "").replace(",", "").split())) >= 3


def test_default_length(server: RunningServer, reference: Reference) -> None:
    """Guards the pitfall "output length": without max_tokens the answer is short, and the server says so."""
    answer = server.post("/v1/completions", prompt="A sequence of numbers: 1, 2", temperature=0)
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    assert choice["text"] == reference.text("A sequence of numbers: 1, 2", usage["completion_tokens"])
    assert choice["text"].startswith(", 3, 4, 5")
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] <= 20
    assert "max_tokens" in answer.headers["x-ropeway-hint"]


def test_max_new_tokens(server: RunningServer, reference: Reference) -> None:
    """Guards long outputs: 50 tokens of counting, the same as generate(max_new_tokens=50)."""
    text = complete(server, "A sequence of numbers: 1, 2", max_new_tokens=50)
    assert text == reference.text("A sequence of numbers: 1, 2", 50)
    assert text.startswith(", 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")


def test_greedy_repeats_itself_sampling_does_not(server: RunningServer, reference: Reference) -> None:
    """Guards the decoding strategy: greedy is one text, sampling many, and a seed makes sampling repeatable."""
    greedy = {complete(server, "I am a cat.", max_tokens=20) for _ in range(3)}
    assert greedy == {reference.text("I am a cat.", 20)}
    sampled = [complete(server, "I am a cat.", max_tokens=20, temperature=1, seed=seed) for seed in range(8)]
    assert len(set(sampled)) >= 4
    assert sampled[3] == complete(server, "I am a cat.", max_tokens=20, temperature=1, seed=3)


def test_left_padding_equals_alone(server: RunningServer, reference: Reference) -> None:
    """Guards the pitfall "padding side": in one batch each prompt gets what it gets alone; right padding does not."""
    prompts = ["1, 2, 3", "A, B, C, D, E"]
    answer = server.openai().completions.create(model="", prompt=prompts, max_tokens=20, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert texts == [reference.text(prompt, 20) for prompt in prompts]
    assert texts == reference.continuations(prompts, 20)
    assert texts[0].startswith(", 4, 5, 6") and texts[1].startswith(", F, G, H")
    assert texts[0] != reference.continuations(prompts, 20, padding_side="right")[0]


def test_chat_template(server: RunningServer, reference: Reference) -> None:
    """Guards the pitfall "prompt format": messages go through the chat template, and the system turn is obeyed."""
    answer = server.openai().chat.completions.create(model="", messages=PIRATE, temperature=0, max_tokens=50)  # type: ignore[arg-type]
    text = answer.choices[0].message.content
    assert text == reference.chat(PIRATE, 50)
    plain = server.openai().chat.completions.create(model="", messages=PIRATE[1:], temperature=0, max_tokens=50)  # type: ignore[arg-type]
    assert plain.choices[0].message.content != text


def test_sampled_chat(server: RunningServer) -> None:
    """Guards the guide's last snippet: do_sample with a chat template, streamed."""
    stream = server.openai().chat.completions.create(
        model="",
        messages=PIRATE,  # type: ignore[arg-type]
        temperature=0.9,
        seed=1,
        max_tokens=50,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert len(text) > 20


def test_common_options(server: RunningServer, reference: Reference) -> None:
    """Guards the table of common options, under the guide's own names."""
    text = complete(server, "A sequence of numbers: 1, 2", max_new_tokens=30, temperature=None, do_sample=False)
    assert text == reference.text("A sequence of numbers: 1, 2", 30)
    ids = server.post("/tokenize", prompt=",", add_special_tokens=False).json()["tokens"]
    assert complete(server, "A sequence of numbers: 1", max_tokens=30, eos_token_id=ids) == ""
    penalised = complete(server, "A sequence of numbers: 1, 2", max_tokens=30, repetition_penalty=8.0)
    assert penalised == reference.text("A sequence of numbers: 1, 2", 30, repetition_penalty=8.0) != text
    assert complete(server, "A sequence of numbers: 1, 2", max_tokens=30, temperature=0.01, seed=5) == text


def test_beam_groups_are_refused_in_words(server: RunningServer) -> None:
    """Guards against silence: what is not there yet says so and names the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().completions.create(model="", prompt="1, 2", extra_body={"num_beam_groups": 4})
    assert caught.value.param == "num_beam_groups"
