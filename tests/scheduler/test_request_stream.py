"""The stream alone: what a consumer sees, what another engine is asked for."""

import asyncio

import pytest

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.kernels.step import TokenLogprobs
from ropeway.scheduler.messages import AddRequest, ChoiceStart, RowOutput
from ropeway.scheduler.request_stream import FORGIVEN_TOKENS, EngineFailed, RequestStream, merge


def make(n: int = 1) -> tuple[RequestStream, list[int | None]]:
    """A stream and the list of what it wanted forgotten."""
    forgotten: list[int | None] = []
    request = AddRequest(1, 3, [1, 2], SamplingParams(), 9, [ChoiceStart(index) for index in range(n)])
    return RequestStream(request, lambda _, choice: forgotten.append(choice)), forgotten


def test_merging_keeps_everything() -> None:
    """Guards coalesced outputs: tokens and logprobs in order, the first one's cache hit, the last one's end."""
    logprobs = [TokenLogprobs(-0.5, []), TokenLogprobs(-1.5, [(4, -1.5)])]
    first = RowOutput(3, 1, [7], logprobs=logprobs[:1], cached_tokens=32)
    second = RowOutput(3, 1, [8], logprobs=logprobs[1:], finish_reason="stop", stop_token_id=8)
    assert merge(first, second) == RowOutput(
        3, 1, [7, 8], logprobs=logprobs, finish_reason="stop", stop_token_id=8, cached_tokens=32
    )
    failed = RowOutput(3, 1, finish_reason="error", error="No.")
    assert merge(RowOutput(3, 1, [7]), failed) == RowOutput(3, 1, [7], finish_reason="error", error="No.")


async def test_tokens_come_before_the_error() -> None:
    """Guards the last tokens before a failure: they were generated, so the consumer gets them."""
    stream, _ = make()
    stream.take(RowOutput(3, 0, [5]))
    stream.fail(EngineFailed("over"))
    assert (await anext(stream))[0].token_ids == [5]
    with pytest.raises(EngineFailed):
        await anext(stream)


async def test_a_waiting_consumer_wakes_up() -> None:
    """Guards against a consumer that waits for ever after an abort by somebody else."""
    stream, forgotten = make(2)
    waiting = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    stream.abort()
    assert await waiting is None
    assert forgotten == [None]


def test_deaths_far_apart_are_forgotten() -> None:
    """Guards long streams: two engines that died of others must not end them; a poison's few tokens clear nothing."""
    stream, _ = make(2)
    stream.lose_engine()
    for _ in range(FORGIVEN_TOKENS - 1):
        stream.take(RowOutput(3, 0, [5]))
        stream.take(RowOutput(3, 1, [5]))
    assert stream.deaths == 1
    stream.lose_engine()
    stream.take(RowOutput(3, 0, [5]))
    assert stream.deaths == 2  # those before the death do not count
    for _ in range(FORGIVEN_TOKENS - 1):
        stream.take(RowOutput(3, 0, [5]))
    assert stream.deaths == 0


def test_resuming_asks_for_what_is_open() -> None:
    """Guards resumed requests: emitted tokens go along, also those nobody read yet; what ended is not asked for."""
    stream, forgotten = make(3)
    stream.take(RowOutput(3, 0, [5, 6]))
    stream.take(RowOutput(3, 0, [7]))
    stream.take(RowOutput(3, 1, [9], finish_reason="stop"))
    stream.abort(2)
    assert forgotten == [2]
    request = stream.resume_request(4)
    assert (request.generation, request.request_id, request.max_tokens) == (4, 3, 9)
    assert request.choices == [ChoiceStart(0, [5, 6, 7])]
    assert not stream.finished
