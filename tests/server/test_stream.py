"""The two answers on the wire: held headers, keep-alives, errors, clients that leave or do not read."""

import asyncio
import json
from typing import Any

import pytest
import text_samples
from scripted import Record, ScriptedClient, ScriptedRows, Wake, row
from wire import Wire, events

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.client import EngineFailed
from ropeway.server import stream
from ropeway.server.errors import ApiError
from ropeway.server.generator import Generator
from ropeway.server.http_protocol import BODY_WRITER
from ropeway.server.request import ChoiceDelta, GenerationRequest
from ropeway.server.stream import EventStream, JsonAnswer, json_bytes
from ropeway.server.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer(text_samples.byte_level())
IDS = TOKENIZER._encode(["Hello, world!"], False)
TICK = 0.02


class Frames:
    """A protocol in three lines."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def encode(self, deltas: list[ChoiceDelta]) -> bytes:
        if self.broken and deltas[0].finish_reason:
            raise RuntimeError("a bug")
        return b"".join(stream.event({"text": delta.text}) for delta in deltas if delta.text)

    def finish(self) -> bytes:
        return stream.DONE


class Writer:
    """Stands for `BodyWriter`; what it writes is a message of the wire like any other."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.writes = 0

    @property
    def ready(self) -> bool:
        return self._wire.reading.is_set()

    def write(self, data: bytes) -> None:
        assert data and self.ready
        self.writes += 1
        self._wire.messages.append({"type": "http.response.body", "body": data, "more_body": True})


class Case:
    """A response over a scripted engine, and the task that answers the client."""

    def __init__(self, *script: Wake, kind: str = "stream", broken: bool = False, direct: bool = False) -> None:
        client = ScriptedClient(None, script, open_end=True)
        self.record = Record()
        request = GenerationRequest([5], SamplingParams(), 100)
        generation = Generator(client, TOKENIZER).start([request], self.record)
        self.rows: ScriptedRows = client.submitted[0].rows
        self.wire = Wire()
        self.wire._incoming.clear()  # the endpoint has read the body
        self.writer = Writer(self.wire)
        if direct:
            self.wire.scope["extensions"] = {BODY_WRITER: self.writer}
        response = (
            EventStream(generation, Frames(broken), {"x-extra": "1"})
            if kind == "stream"
            else JsonAnswer(generation, lambda choices: {"text": choices[0].text}, {"x-extra": "1"})
        )
        self.task = asyncio.create_task(self.wire.call(response))

    async def ended(self, outcome: str | None) -> None:
        """The call returns soon, with this outcome told once."""
        await asyncio.wait_for(self.task, 1)
        assert self.record.outcomes == [outcome]


kinds = pytest.mark.parametrize("kind", ["stream", "json"])


async def test_bytes_of_a_stream() -> None:
    """Guards the framing: headers, one `data:` line per event, an empty line after each, [DONE] last, nothing else."""
    case = Case([row(0, IDS[:2])], [row(0, IDS[2:], "length")])
    await case.ended(None)
    start, *bodies = case.wire.messages
    assert start["status"] == 200
    assert case.wire.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "x-extra": "1",
    }
    first, rest = (json.dumps({"text": TOKENIZER.decode(ids)}, separators=(",", ":")) for ids in (IDS[:2], IDS[2:]))
    assert [body["body"].decode() for body in bodies] == [
        f"data: {first}\n\n",
        f"data: {rest}\n\n",
        "data: [DONE]\n\n",
    ]
    assert [body["more_body"] for body in bodies] == [True, True, False]


async def test_bytes_of_a_document() -> None:
    """Guards the plain answer: one document with its length."""
    case = Case([row(0, IDS[:2])], [row(0, IDS[2:], "length")], kind="json")
    await case.ended(None)
    assert case.wire.body == b'{"text":"Hello, world!"}'
    assert case.wire.headers == {"content-type": "application/json", "content-length": "24", "x-extra": "1"}


@kinds
async def test_early_errors_have_their_status(kind: str) -> None:
    """Guards headers held back: nothing is sent before the first token, so an early error is no 200."""
    case = Case(kind=kind)
    await asyncio.sleep(TICK)
    assert case.wire.messages == []
    case.rows.feed(EngineFailed("The engine died."))
    with pytest.raises(ApiError) as caught:
        await asyncio.wait_for(case.task, 1)
    assert caught.value.status == 503 and case.wire.messages == []
    assert case.record.outcomes == ["error"]


async def test_error_in_mid_stream() -> None:
    """Guards clients in mid-stream: an error event with the same code, then [DONE], and the answer is complete."""
    case = Case([row(0, IDS[:2])], [row(0, [], "timeout", error="Too late.")])
    await case.ended("timeout")
    error = events(case.wire.body)[-1]["error"]
    assert error == {"message": "Too late.", "type": "timeout_error", "param": None, "code": "deadline_exceeded"}
    assert case.wire.complete


async def test_our_own_bug_in_mid_stream() -> None:
    """Guards against clients that hang for a bug of ours: the stream ends in words, the bug still reaches the log."""
    case = Case([row(0, IDS[:2])], [row(0, IDS[2:], "length")], broken=True)
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(case.task, 1)
    error = events(case.wire.body)[-1]["error"]
    assert error["code"] == "engine_error" and "a bug" not in error["message"]
    assert case.wire.complete and case.record.outcomes == ["error"]


async def test_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards proxies that close silent connections: a comment after silence, also before the first token, none while
    tokens come; an error after it is an event."""
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", TICK)
    case = Case()
    await asyncio.wait_for(case.wire.until(3), 5)
    assert case.wire.status == 200
    assert [message["body"] for message in case.wire.messages[1:3]] == [b": keep-alive\n\n"] * 2
    case.rows.feed(EngineFailed("The engine died."))
    await case.ended("error")
    assert events(case.wire.body)[-1]["error"]["code"] == "draining"


async def test_no_keep_alive_while_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards bandwidth: silence is measured from the last bytes, not from the start."""
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.5)
    case = Case()
    for token in IDS[:6]:
        case.rows.feed([row(0, [token])])
        await asyncio.sleep(0.1)
    case.rows.feed([row(0, [IDS[6]], "length")])
    await case.ended(None)
    assert b"keep-alive" not in case.wire.body


@kinds
async def test_client_leaves_while_waiting(kind: str) -> None:
    """Guards the GPU: a client that leaves before the first token is noticed, its row aborted, nothing is sent."""
    case = Case(kind=kind)
    await asyncio.sleep(TICK)
    case.wire.leave()
    await case.ended("disconnected")
    assert case.rows.aborted == [None] and case.wire.messages == []


@kinds
async def test_client_leaves_in_the_middle(kind: str) -> None:
    """Guards the GPU: leaving after some tokens aborts at once, and tokens that still come go nowhere."""
    case = Case([row(0, IDS[:2])], kind=kind)
    await asyncio.sleep(TICK)
    case.wire.leave()
    await case.ended("disconnected")
    sent = len(case.wire.messages)
    assert sent == (2 if kind == "stream" else 0)
    case.rows.feed([row(0, IDS[2:], "length")])
    await asyncio.sleep(TICK)
    assert len(case.wire.messages) == sent and case.rows.aborted == [None]


@kinds
async def test_cancelled_from_outside(kind: str) -> None:
    """Guards shutdown: a cancelled answer closes its generation and leaves no task behind."""
    before = asyncio.all_tasks()
    case = Case([row(0, IDS[:2])], kind=kind)
    await asyncio.sleep(TICK)
    case.task.cancel()
    await asyncio.wait([case.task])
    assert case.record.outcomes == ["error"] and case.rows.aborted == [None]
    assert asyncio.all_tasks() == before


async def test_client_that_never_reads_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards its place in the queue: an error event to a full socket held it for as long again."""
    monkeypatch.setattr(stream, "SLOW_READER_S", 0.2)
    case = Case([row(0, IDS[:2])])
    case.wire.reading.clear()
    begun = asyncio.get_running_loop().time()
    await case.ended("disconnected")
    assert asyncio.get_running_loop().time() - begun < 0.35
    assert case.wire.messages == []


async def test_slow_reader() -> None:
    """Guards memory and neighbours: while the socket is full nothing is taken from the engine; then all comes."""
    case = Case()
    await asyncio.sleep(0)
    case.wire.reading.clear()
    case.rows.feed([row(0, IDS[:1])])
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[1:4]), row(0, IDS[4:])], [row(0, [], "length")])
    await asyncio.sleep(TICK)
    assert case.rows.taken == 1
    case.wire.reading.set()
    await case.ended(None)
    assert "".join(event["text"] for event in events(case.wire.body)) == "Hello, world!"


async def test_reader_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the queue: a client that holds its socket open and reads nothing loses its row after a while."""
    monkeypatch.setattr(stream, "SLOW_READER_S", TICK)
    case = Case([row(0, IDS[:2])])
    case.wire.reading.clear()
    await case.ended("disconnected")
    assert case.rows.aborted == [None]


async def test_a_full_socket_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the limit: a token that came while a keep-alive waited for the socket had all of it once more."""
    monkeypatch.setattr(stream, "SLOW_READER_S", 5 * TICK)
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", TICK)
    case = Case([row(0, IDS[:2])])
    waits = 0

    async def send(message: Any) -> None:
        nonlocal waits
        waits += not case.wire.reading.is_set()
        await Wire.send(case.wire, message)

    case.wire.send = send  # type: ignore[method-assign]
    await case.wire.until(2)
    case.wire.reading.clear()
    await asyncio.sleep(3 * TICK)  # a keep-alive waits by now
    case.rows.feed([row(0, IDS[2:3])])
    await case.ended("disconnected")
    assert waits == 1


# ---- written by the callback that hears the engine ----


async def test_tokens_after_the_first_need_no_task() -> None:
    """Guards the price of an event: it is on the wire when the engine's callback returns, the loop has not turned."""
    case = Case([row(0, IDS[:1])], direct=True)
    await asyncio.sleep(TICK)
    for place in range(1, len(IDS)):
        case.rows.feed([row(0, [IDS[place]])])
        assert case.writer.writes == place
    case.rows.feed([row(0, [], "length")])
    await case.ended(None)
    assert "".join(event["text"] for event in events(case.wire.body)) == "Hello, world!"
    assert case.wire.complete


async def test_a_full_socket_is_waited_for_by_nobody_else() -> None:
    """Guards memory and order: nothing is taken from the engine while the socket is full, then all comes, once."""
    case = Case([row(0, IDS[:1])], direct=True)
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[1:2])])
    case.wire.reading.clear()
    taken = case.rows.taken
    case.rows.feed([row(0, IDS[2:4])])
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[4:5])])
    assert case.rows.taken == taken + 1, "what waits in send, no more"
    case.wire.reading.set()
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[5:])])
    assert case.writer.writes >= 2, "it goes on without a task"
    case.rows.feed([row(0, [], "length")])
    await case.ended(None)
    assert "".join(event["text"] for event in events(case.wire.body)) == "Hello, world!"


@pytest.mark.parametrize(
    ("end", "outcome", "code"),
    [
        (EngineFailed("The engine died."), "error", "draining"),
        ([row(0, [], "timeout", error="Too late.")], "timeout", "deadline_exceeded"),
    ],
)
async def test_failures_without_a_task(end: Wake, outcome: str, code: str) -> None:
    """Guards the end of such a stream: errors are events there too."""
    case = Case([row(0, IDS[:2])], direct=True)
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[2:4])], end)
    await case.ended(outcome)
    assert events(case.wire.body)[-1]["error"]["code"] == code


async def test_our_own_bug_without_a_task() -> None:
    """Guards the neighbours: the callback that wakes all streams must not fail for one of them."""
    case = Case([row(0, IDS[:2])], broken=True, direct=True)
    await asyncio.sleep(TICK)
    case.rows.feed([row(0, IDS[2:], "length")])
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(case.task, 1)
    assert events(case.wire.body)[-1]["error"]["code"] == "engine_error"


async def test_leaving_without_a_task() -> None:
    """Guards the GPU: who leaves a stream that no task waits for is noticed, and nothing is written afterwards."""
    case = Case([row(0, IDS[:2])], direct=True)
    await asyncio.sleep(TICK)
    case.wire.leave()
    await case.ended("disconnected")
    case.rows.feed([row(0, IDS[2:])])
    assert case.writer.writes == 0 and case.rows.aborted == [None]


@pytest.mark.parametrize("text", text_samples.TEXTS)
def test_json_bytes(text: str) -> None:
    """Guards clients that split lines at U+2028, U+2029 or U+0085 as Python's str.splitlines does."""
    value: dict[str, Any] = {"text": text, "n": [1, 2.5, None]}
    data = json_bytes(value)
    assert json.loads(data) == value
    assert len(data.decode().splitlines()) == 1
