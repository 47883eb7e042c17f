"""A closed loop of streams over HTTP: throughput, time to first token, gaps between tokens. One JSON line per row.

    python bench/http_load.py                                             # starts the demo model itself
    python bench/http_load.py --url http://127.0.0.1:8000 --row c256 --row c32-2048 --shape llama-8b --processes 4
    python bench/http_load.py --url http://127.0.0.1:8000 -c 64 --requests 256 --prompt-tokens 64:448
    python bench/http_load.py --url http://127.0.0.1:8000 --sweep 1,2,4,8,16,32,64,128,256,512 --plot sweep.png

Each of `-c` streams sends its next request when the last has ended. Figures are of requests after the first of each
stream; that start-up wave is told apart. Throughput is over everything, `steady` between the end of the wave and the
first stream that finds no more to do. Tokens are counted by the server's own running usage; an event with k tokens is
one gap and k - 1 zeros, and the largest k is told. Client processes report their CPU use: where one takes more than 80%
of a core, the row measures the client. (Not called `http.py`: beside a script that name would hide Python's.)
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from about import about
from rich.console import Console

from ropeway.server.demo import start_server, stop_server

FIRST_ID, LAST_ID = 10, 2000
"""Prompts are random ids between these: in every vocabulary that is served, and no special tokens."""
ROUNDS = 4
"""Requests per stream, unless said otherwise."""
BUSY = 0.8
"""Share of a core above which a client process measures itself."""
COUNT = b'"completion_tokens":'


@dataclass(slots=True, frozen=True)
class Load:
    """What the clients do. Lengths in tokens, both ends included."""

    streams: int
    prompt: tuple[int, int] = (128, 128)
    output: tuple[int, int] = (128, 128)
    requests: int = 0
    """All streams together; 0 = `ROUNDS` per stream."""
    shared: int = 0
    """First tokens of every prompt that are the same."""
    long_streams: int = 0
    """Further streams, whose figures do not count, with prompts of `long_prompt` as long as the others run."""
    long_prompt: int = 12_000


ROWS = {
    "c1": Load(1, requests=8),
    "c32": Load(32),
    "c64": Load(64, (64, 448)),
    "c256": Load(256),
    "c256-512": Load(256, output=(512, 512)),
    "c32-2048": Load(32, (2048, 2048)),
    "c64-shared": Load(64, (2048, 2048), shared=1536),
    "cold-8192": Load(1, (8192, 8192), (8, 8), requests=6),
    "c48-long": Load(48, long_streams=2),
}
"""The rows of the speed tables by name. c64-shared wants a prefix cache, the others none."""
VLLM: dict[str, dict[str, dict[str, Any]]] = {
    "llama-8b": {
        "c1": {"tok_s": 202, "ttft_ms": 19.1, "itl_ms": 4.83},
        "c32": {"tok_s": 4866, "ttft_ms": 143, "itl_ms": 5.40},
        "c64": {"tok_s": 6890, "ttft_ms": 246, "itl_ms": 6.13, "itl_p99_ms": 12.5},
        "c256": {"tok_s": 12273, "ttft_ms": 601, "itl_ms": 13.4, "itl_p99_ms": 98.5},
        "c256-512": {"tok_s": 13429, "ttft_ms": 496, "itl_ms": 16.9, "itl_p99_ms": 34},
        "c32-2048": {"tok_s": 1667, "ttft_ms": 592, "itl_p99_ms": 197},
        "c64-shared": {"tok_s": 4367},
        "cold-8192": {"ttft_ms": 230},
        "c48-long": {"tok_s": 4059, "itl_ms": 5.8, "itl_p99_ms": 227},
    },
    "qwen3-0.6b": {"c1": {"tok_s": 530, "ttft_ms": 12.9}, "c256": {"tok_s": 15620}},
}
"""vLLM 0.26.0, torch 2.11.0+cu130, on one NVIDIA H200 (November 2026), same shapes, random weights, bf16, defaults."""


@dataclass(slots=True)
class Stream:
    """One finished request; `time.perf_counter()` seconds, which all processes of a machine share."""

    sent: float
    first: bool = False
    """Whether it was its stream's first request."""
    times: list[float] = field(default_factory=list)
    """One per token."""
    most: int = 0
    """Tokens of the largest event."""

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(slots=True)
class Share:
    """What one client process saw."""

    streams: list[Stream]
    idle_since: float
    """When one of its streams first found nothing more to do."""
    cpu_share: float


def span(text: str) -> tuple[int, int]:
    """ "128" -> (128, 128); "64:448" -> (64, 448)."""
    low, _, high = text.partition(":")
    return int(low), int(high or low)


async def events(host: str, port: int, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The JSON documents of one SSE answer, not parsed. Raises RuntimeError for any answer but 200 and for errors."""
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.splitlines()[0]:
            raise RuntimeError(f"{answer.decode()}{(await reader.read()).decode()}")
        rest = b""
        while data := await reader.read(2**16):
            *whole, rest = (rest + data).split(b"\n\n")  # between events stand the marks of HTTP's chunks
            for event in whole:
                document = event[event.find(b"data: ") + len(b"data: ") :]
                if document.startswith(b'{"error"'):
                    raise RuntimeError(document.decode())
                if document.startswith(b"{"):
                    yield document
    finally:
        writer.close()


async def documents(host: str, port: int, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The same, parsed."""
    async for event in events(host, port, body):
        yield json.loads(event)


async def one_stream(host: str, port: int, prompt: list[int], output_tokens: int, first: bool) -> Stream:
    """Sends a request and times its tokens."""
    body = {
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    stream = Stream(time.perf_counter(), first)
    async for document in events(host, port, body):
        place = document.rfind(COUNT) + len(COUNT)
        tokens = int(document[place : document.index(b",", place)])
        if new := tokens - len(stream.times):
            stream.times += [time.perf_counter()] * new
            stream.most = max(stream.most, new)
    return stream


class Client:
    """One client process: some streams that share some requests."""

    def __init__(self, host: str, port: int, load: Load, seed: int) -> None:
        self._host, self._port, self._load = host, port, load
        self._rng = random.Random(f"{seed} {time.time_ns()}")  # what an earlier run sent is in no cache
        self._shared = [random.Random(0).randrange(FIRST_ID, LAST_ID) for _ in range(load.shared)]
        self._left = load.requests
        self._idle_since = float("inf")
        self.done: list[Stream] = []

    def _prompt(self, length: int) -> list[int]:
        return self._shared + [self._rng.randrange(FIRST_ID, LAST_ID) for _ in range(length - len(self._shared))]

    async def _loop(self) -> None:
        first = True
        while self._left > 0:
            self._left -= 1
            prompt = self._prompt(self._rng.randint(*self._load.prompt))
            output = self._rng.randint(*self._load.output)
            self.done.append(await one_stream(self._host, self._port, prompt, output, first))
            first = False
        self._idle_since = min(self._idle_since, time.perf_counter())

    async def _long_loop(self) -> None:
        while True:
            prompt = self._prompt(self._load.long_prompt)
            await one_stream(self._host, self._port, prompt, self._load.output[1], False)

    async def _run(self) -> None:
        beside = [asyncio.create_task(self._long_loop()) for _ in range(self._load.long_streams)]
        await asyncio.gather(*(self._loop() for _ in range(self._load.streams)))
        for task in beside:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)

    def run(self) -> Share:
        """To the end."""
        begin, cpu = time.perf_counter(), time.process_time()
        asyncio.run(self._run())
        return Share(self.done, self._idle_since, (time.process_time() - cpu) / (time.perf_counter() - begin))


def run_client(host: str, port: int, load: Load, seed: int) -> Share:
    """Main of a client process."""
    return Client(host, port, load, seed).run()


def part(load: Load, rank: int, processes: int) -> Load:
    """What one of several processes does of a load."""

    def divided(count: int) -> int:
        return count // processes + (rank < count % processes)

    requests = load.requests or ROUNDS * load.streams
    streams = divided(load.streams)
    return replace(load, streams=streams, requests=divided(requests), long_streams=divided(load.long_streams))


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds, nearest rank."""
    ordered = sorted(values) or [0.0]
    return {str(p): round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 90, 99)}


def measure(url: str, load: Load, processes: int) -> dict[str, Any]:
    """Runs the load; the row of figures."""
    address = urlsplit(url)
    processes = min(processes, load.streams)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(run_client, address.hostname, address.port, part(load, rank, processes), rank)
            for rank in range(processes)
        ]
        return figures([job.result() for job in jobs]) | {"load": asdict(load)}


def figures(shares: list[Share]) -> dict[str, Any]:
    """What the client processes saw, together."""
    streams = [stream for share in shares for stream in share.streams]
    wave = [stream for stream in streams if stream.first]
    later = [stream for stream in streams if not stream.first] or wave
    gaps = [gap for stream in later for gap in stream.gaps]
    times = [moment for stream in streams for moment in stream.times]
    seconds = max(times) - min(stream.sent for stream in streams)
    begin, end = max(stream.times[-1] for stream in wave), min(share.idle_since for share in shares)
    steady = sum(begin < moment <= end for moment in times)
    cpu = [round(share.cpu_share, 2) for share in shares]
    return {
        "requests": len(streams),
        "output_tokens_per_s": round(len(times) / seconds, 1),
        "steady_tokens_per_s": round(steady / (end - begin), 1) if end > begin else None,
        "ttft_ms": percentiles([stream.times[0] - stream.sent for stream in later]),
        "itl_ms": {"mean": round(1000 * statistics.fmean(gaps or [0.0]), 3)} | percentiles(gaps),
        "wave_ttft_ms": percentiles([stream.times[0] - stream.sent for stream in wave]),
        "largest_event_tokens": max(stream.most for stream in streams),
        "client_cpu": cpu,
        "valid": max(cpu) <= BUSY,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput over latency, a point per number of streams. Needs matplotlib: pip install 'ropeway[bench]'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    latency, rate = [row["itl_ms"]["50"] for row in rows], [row["output_tokens_per_s"] for row in rows]
    axes.plot(latency, rate, marker="o")
    for row, x, y in zip(rows, latency, rate, strict=True):
        axes.annotate(str(row["load"]["streams"]), (x, y), textcoords="offset points", xytext=(5, -10))
    axes.set(xlabel="median gap between tokens, ms", ylabel="output tokens per second", ylim=(0, None))
    axes.set_title(f"Streams at a time, {rows[0]['hardware']}", fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def loads_of(options: argparse.Namespace) -> list[tuple[str, Load]]:
    """Names and loads that the command line asks for."""
    if options.row:
        return [(name, ROWS[name]) for name in options.row]
    load = Load(options.c, options.prompt_tokens, options.output_tokens, options.requests, options.shared_tokens)
    if options.sweep:
        return [(f"sweep-{c}", replace(load, streams=int(c), requests=0)) for c in options.sweep.split(",")]
    return [("", load)]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the demo model is started")
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="repeatable: a row of the speed tables")
    parser.add_argument("--shape", choices=sorted(VLLM), help="of the model that is served, for vLLM's figures")
    parser.add_argument("-c", type=int, default=8, help="streams at a time")
    parser.add_argument("--sweep", help="streams at a time, one row each: 1,2,4")
    parser.add_argument("--plot", type=Path, help="PNG of throughput over latency")
    parser.add_argument("--requests", type=int, default=0, help=f"all streams together; default {ROUNDS} per stream")
    parser.add_argument("--prompt-tokens", type=span, default=(128, 128), help="N or LOW:HIGH")
    parser.add_argument("--output-tokens", type=span, default=(128, 128), help="N or LOW:HIGH")
    parser.add_argument("--shared-tokens", type=int, default=0, help="first tokens that all prompts share")
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    return parser


def main() -> int:
    """The command; returns the exit code."""
    options = build_parser().parse_args()
    server: subprocess.Popen[bytes] | None = None
    if not options.url:
        server, port = start_server(Console(quiet=True))
        options.url = f"http://127.0.0.1:{port}"
    rows = []
    try:
        for name, load in loads_of(options):
            theirs = VLLM.get(options.shape, {}).get(name, {})
            row = {"row": name} | measure(options.url, load, options.processes) | {"vllm": theirs or None}
            if "tok_s" in theirs:
                row["ratio"] = round(row["output_tokens_per_s"] / theirs["tok_s"], 3)
            rows.append(row | about())
            print(json.dumps(rows[-1]), flush=True)
    finally:
        if server:
            stop_server(server)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
