"""The load generator: its arithmetic on streams that the test makes up, and a short load on a scripted server."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import module


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("http_load", monkeypatch)


def stream(load: ModuleType, sent: float, times: list[float], first: bool = False, most: int = 1) -> Any:
    return load.Stream(sent, first, times, most)


def test_figures_of_two_clients(load: ModuleType) -> None:
    """Guards the definitions: the wave apart, gaps per token, the steady time between wave and first idle stream."""
    one = load.Share([stream(load, 0.0, [1.0, 2.0], True), stream(load, 2.0, [2.5, 2.75, 3.0])], 3.0, 0.5)
    two = load.Share([stream(load, 0.0, [1.5, 1.5], True, 2), stream(load, 1.5, [3.5, 4.0])], 4.0, 0.9)
    row = load.figures([one, two])
    assert row["requests"] == 4 and row["output_tokens_per_s"] == round(9 / 4.0, 1)
    assert row["steady_tokens_per_s"] == 3.0  # three tokens in (2, 3]
    assert row["ttft_ms"]["50"] == 2000.0 and row["wave_ttft_ms"]["50"] == 1500.0
    assert row["itl_ms"]["99"] == 500.0 and row["itl_ms"]["mean"] == pytest.approx(333.333)
    assert row["largest_event_tokens"] == 2
    assert row["valid"] is False, "a client above 80% of a core measures itself"


def test_processes_share_all_of_a_load(load: ModuleType) -> None:
    """Guards against requests that nobody sends."""
    parts = [load.part(load.Load(10, long_streams=2), rank, 4) for rank in range(4)]
    assert [part.streams for part in parts] == [3, 3, 2, 2]
    assert (sum(part.requests for part in parts), sum(part.long_streams for part in parts)) == (40, 2)


def sse(tokens: int) -> bytes:
    document = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "more": {}}}
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


class Scripted:
    """A server that says the same to everybody; a write per chunk."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.bodies: list[dict[str, Any]] = []
        self.over = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        try:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for chunk in self.chunks:
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.write(b"0\r\n\r\n")
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self.over.set()

    async def one(self, load: ModuleType) -> Any:
        async with await asyncio.start_server(self.answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            try:
                return await load.one_stream("127.0.0.1", port, [1, 2, 3], 4, True)
            finally:
                await self.over.wait()  # a connection that outlives its loop is a warning in somebody else's test


async def test_tokens_are_counted_by_the_servers_usage(load: ModuleType) -> None:
    """Guards ITL per token: several events in one write, several tokens in one event, an end without new tokens."""
    server = Scripted(sse(1) + sse(2), sse(5)[:20], sse(5)[20:], sse(5) + b"data: [DONE]\n\n")
    done = await server.one(load)
    assert len(done.times) == 5 and done.most == 3
    assert [gap > 0.005 for gap in done.gaps] == [False, True, False, False]
    assert (server.bodies[0]["prompt"], server.bodies[0]["max_tokens"]) == ([1, 2, 3], 4)


async def test_an_error_is_no_measurement(load: ModuleType) -> None:
    """Guards figures of a server that fails half-way."""
    with pytest.raises(RuntimeError, match="engine_error"):
        await Scripted(sse(1), b'data: {"error":{"code":"engine_error"}}\n\n').one(load)


async def test_shared_tokens_are_shared(load: ModuleType) -> None:
    """Guards the prefix cache's row, and the others against finding anything in it."""
    one, two = (load.Client("h", 1, load.Load(1, shared=5), rank) for rank in range(2))
    assert one._prompt(8)[:5] == two._prompt(8)[:5] and len(one._prompt(8)) == 8
    assert one._prompt(8)[5:] != two._prompt(8)[5:]


def test_the_plot_is_a_picture(load: ModuleType, tmp_path: Path) -> None:
    """Guards the PNG of the notes."""
    pytest.importorskip("matplotlib", reason="pip install 'ropeway[bench]'")
    rows = [
        {"itl_ms": {"50": 4.0 + c}, "output_tokens_per_s": 200.0 * c, "load": {"streams": c}, "hardware": "a machine"}
        for c in (1, 2, 4)
    ]
    load.plot(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
