"""A closed loop of streams over HTTP: throughput, time to first token, gaps between tokens. One JSON line.

    python bench/http_load.py                                     # starts the demo model itself
    python bench/http_load.py --url http://127.0.0.1:8000 -c 64 --requests 256 --prompt-tokens 64:448 --processes 4

Each of `-c` streams sends its next request when the last has ended. Tokens are counted by the server's own running
usage; a chunk with k tokens is one gap and k - 1 zeros. Client processes report their CPU use: where one takes more
than 80% of a core, the row measures the client. (Not called `http.py`: beside a script that name would hide Python's.)
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from ropeway import __version__
from ropeway.server.demo import start_server, stop_server

FIRST_ID, LAST_ID = 10, 2000
"""Prompts are random ids between these: in every vocabulary that is served, and no special tokens."""


@dataclass(slots=True)
class Stream:
    """One finished request; seconds."""

    first_token: float
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(slots=True)
class Share:
    """What one client process saw."""

    streams: list[Stream]
    seconds: float
    cpu_share: float


def span(text: str) -> tuple[int, int]:
    """ "128" -> (128, 128); "64:448" -> (64, 448)."""
    low, _, high = text.partition(":")
    return int(low), int(high or low)


async def documents(host: str, port: int, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON documents of one SSE answer. Raises RuntimeError for any answer but 200."""
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.splitlines()[0]:
            raise RuntimeError(f"{answer.decode()}{(await reader.read()).decode()}")
        while size := int(await reader.readline(), 16):
            events = (await reader.readexactly(size + 2))[:-2]
            for event in events.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    yield json.loads(event[len(b"data: ") :])
    finally:
        writer.close()


async def one_stream(host: str, port: int, prompt_tokens: int, output_tokens: int, rng: random.Random) -> Stream:
    """Sends a request and times its tokens."""
    body = {
        "prompt": [rng.randrange(FIRST_ID, LAST_ID) for _ in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    sent = last = time.perf_counter()
    stream = Stream(0.0)
    async for document in documents(host, port, body):
        if "error" in document:
            raise RuntimeError(document["error"])
        new = document["usage"]["completion_tokens"] - stream.tokens
        now = time.perf_counter()
        if stream.tokens:
            stream.gaps += [now - last] * bool(new) + [0.0] * (new - 1)
        elif new:
            stream.first_token = now - sent
        if new:
            stream.tokens, last = stream.tokens + new, now
    return stream


def client(host: str, port: int, streams: int, requests: int, options: argparse.Namespace, seed: int) -> Share:
    """One client process: `streams` loops that share `requests`."""
    rng = random.Random(seed)
    sizes = iter([(rng.randint(*options.prompt_tokens), rng.randint(*options.output_tokens)) for _ in range(requests)])
    done: list[Stream] = []

    async def loop() -> None:
        for prompt, output in sizes:
            done.append(await one_stream(host, port, prompt, output, rng))

    async def run() -> None:
        await asyncio.gather(*(loop() for _ in range(streams)))

    begin, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run())
    seconds = time.perf_counter() - begin
    return Share(done, seconds, (time.process_time() - cpu) / seconds)


def percentile(values: list[float], percent: int) -> float:
    """In milliseconds, nearest rank."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2) if ordered else 0.0


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the load; the row of figures."""
    address = urlsplit(url)
    processes = min(options.processes, options.c)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(
                client,
                address.hostname,
                address.port,
                options.c // processes + (rank < options.c % processes),
                options.requests // processes + (rank < options.requests % processes),
                options,
                rank,
            )
            for rank in range(processes)
        ]
        shares = [job.result() for job in jobs]
    streams = [stream for share in shares for stream in share.streams]
    gaps = [gap for stream in streams for gap in stream.gaps]
    tokens, seconds = sum(stream.tokens for stream in streams), max(share.seconds for share in shares)
    return {
        "streams": options.c,
        "requests": len(streams),
        "output_tokens_per_s": round(tokens / seconds, 1),
        "ttft_ms": {str(p): percentile([stream.first_token for stream in streams], p) for p in (50, 99)},
        "itl_ms": {"mean": round(1000 * statistics.fmean(gaps), 3), **{str(p): percentile(gaps, p) for p in (50, 99)}},
        "client_cpu": [round(share.cpu_share, 2) for share in shares],
    }


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the demo model is started")
    parser.add_argument("-c", type=int, default=8, help="streams at a time")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=span, default=(128, 128), help="N or LOW:HIGH")
    parser.add_argument("--output-tokens", type=span, default=(128, 128), help="N or LOW:HIGH")
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    options = parser.parse_args()
    server: subprocess.Popen[bytes] | None = None
    if not options.url:
        server, port = start_server(Console(quiet=True))
        options.url = f"http://127.0.0.1:{port}"
    try:
        row = measure(options.url, options)
    finally:
        if server:
            stop_server(server)
    about = {
        "command": " ".join(sys.argv),
        "ropeway": __version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(row | about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
