"""The official openai SDK against the running server, as its users would call it."""

import math

import openai
import pytest
from harness import RunningServer, start_server

QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return server.openai()


def test_models(client: openai.OpenAI) -> None:
    """Guards discovery: the listed id can be retrieved and used; an unknown one is a 404."""
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert client.completions.create(model=model.id, prompt="1, 2", max_tokens=2).model == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such-model")
    assert caught.value.code == "model_not_found"


def test_stream_equals_whole(client: openai.OpenAI) -> None:
    """Guards the stream: its pieces joined are the whole answer, with the same usage and finish reason."""
    options = {"model": "", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finish == [whole.choices[0].finish_reason]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_n_and_seed(client: openai.OpenAI) -> None:
    """Guards n: choices differ, share one prompt in usage, and choice i is what seed + i gives alone."""
    options = {"model": "", "prompt": "I am a cat.", "temperature": 1.0, "max_tokens": 12}
    many = client.completions.create(**options, n=3, seed=10)  # type: ignore[call-overload]
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    alone = [client.completions.create(**options, seed=10 + i) for i in range(3)]  # type: ignore[call-overload]
    assert [choice.text for choice in many.choices] == [answer.choices[0].text for answer in alone]
    assert len({choice.text for choice in many.choices}) > 1
    assert many.usage.prompt_tokens == alone[0].usage.prompt_tokens


def test_stop(client: openai.OpenAI) -> None:
    """Guards stop strings: the text ends before the string, also where it straddles tokens, streamed or not."""
    options = {"model": "", "prompt": "A sequence of numbers: 1, 2", "temperature": 0, "max_tokens": 40}
    for stop in (", 7", "8, 9", ["nothing", ", 1"]):
        whole = client.completions.create(**options, stop=stop)  # type: ignore[call-overload]
        stream = client.completions.create(**options, stop=stop, stream=True)  # type: ignore[call-overload]
        streamed = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert whole.choices[0].text == streamed
        assert whole.choices[0].finish_reason == "stop"
        assert not any(text in streamed for text in ([stop] if isinstance(stop, str) else stop))


def test_logprobs(client: openai.OpenAI) -> None:
    """Guards logprobs: greedy picks the top token, probabilities are probabilities, bytes spell the text."""
    chat = client.chat.completions.create(
        model="",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=4,
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content and chat.usage and len(content) == chat.usage.completion_tokens
    for position in content:
        assert len(position.top_logprobs) == 4
        assert position.logprob == position.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in position.top_logprobs) <= 1.0001
    spelled = b"".join(bytes(position.bytes or []) for position in content).decode()
    assert spelled.startswith(chat.choices[0].message.content or "?")

    text = client.completions.create(model="", prompt="1, 2", temperature=0, max_tokens=6, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert logprobs and "".join(logprobs.tokens or []) == text.choices[0].text
    assert (
        len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == len(logprobs.text_offset or []) == 6
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 10**9}, "n"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    """Guards errors: the SDK's class, code, param and request id are all there, and the server goes on."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="", prompt="1, 2", extra_body=fields)
    assert caught.value.param == param
    assert isinstance(caught.value.code, str)
    assert caught.value.request_id
    assert client.completions.create(model="", prompt="1, 2", max_tokens=1).choices


def test_context_length(client: openai.OpenAI) -> None:
    """Guards an over-long prompt: never cut silently, always the contract's sentence."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="", prompt="1, " * 5000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is" in caught.value.message


def test_api_key() -> None:
    """Guards the door: without the key nothing but health answers."""
    guarded = start_server("--api-key", "correct-horse")
    try:
        with pytest.raises(openai.AuthenticationError) as caught:
            guarded.openai(api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert guarded.openai(api_key="correct-horse").models.list().data
    finally:
        assert guarded.stop() == 0
