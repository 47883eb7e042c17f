"""What `make demo` shows: eight staggered requests, streamed over HTTP, share one running batch.

Starts `ropeway serve` on the embedded model in a process of its own and talks to it as any client would. The picture
is drawn from the streams alone: with `continuous_usage_stats` every chunk says how many tokens its row has by now.
"""

import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

COLUMNS = 40
"""Most characters a row of the grid takes."""
TOKENS_BETWEEN_JOINS = 14
START_LIMIT_S = 120.0

REQUESTS: list[tuple[str, dict[str, object]]] = [
    ("numbers", {"prompt": "A sequence of numbers: 1, 2", "max_tokens": 90}),
    ("colors", {"prompt": "A list of colors: red, blue", "max_tokens": 16}),
    ("letters", {"prompt": "A, B, C, D, E", "max_tokens": 40}),
    ("cats", {"messages": [("user", "How many cats does it take to change a light bulb?")], "max_tokens": 60}),
    ("pirate", {"messages": [("system", "You always respond like a pirate."), ("user", "Who are you?")]}),
    ("sum", {"messages": [("user", "What is 23 + 45?")]}),
    ("ropeway", {"messages": [("user", "What is continuous batching?")]}),
    ("days", {"prompt": "Monday, Tuesday", "max_tokens": 24}),
]


@dataclass(slots=True)
class DemoRow:
    """One request as its client sees it. Filled by its reader thread, drawn by whoever holds the lock."""

    name: str
    body: dict[str, object]
    started: float = 0.0
    first_token: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    state: str = "waiting"
    error: str | None = None

    @property
    def length(self) -> int:
        """Tokens the row holds: its real columns of the left-padded grid."""
        return self.prompt_tokens + self.output_tokens


@dataclass(slots=True)
class Picture:
    """Draws the batch whenever a row steps in or out."""

    rows: list[DemoRow]
    console: Console
    lock: threading.Lock = field(default_factory=threading.Lock)
    advanced: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        self.advanced = threading.Condition(self.lock)

    def draw(self, event: str) -> None:
        """Prints one frame; the caller holds the lock."""
        riding = [row for row in self.rows if row.state == "riding"]
        width = max((row.length for row in riding), default=0)
        pads = sum(width - row.length for row in riding)
        share = f", {100 * pads / (width * len(riding)):.0f}% pads" if riding else ""
        self.console.print(f"\n[bold]{event}[/bold]   batch {len(riding)} x {width}{share}")
        for row in riding:
            room = self.console.width - min(width, COLUMNS) - 18
            self.console.print(f"  {row.name:<8} {self.cells(row, width)}  [dim]{escape(repr(row.text[-room:]))}[/dim]")

    def cells(self, row: DemoRow, width: int) -> str:
        """The row of the grid, right-aligned: pads shaded, prompt light, output solid; at most COLUMNS wide."""
        columns = min(width, COLUMNS)
        output = round(row.output_tokens * columns / width)
        prompt = max(1, round(row.prompt_tokens * columns / width))
        pads = max(0, columns - prompt - output)
        return f"[dim]{'░' * pads}[/dim]{'▒' * prompt}[bold]{'█' * output}[/bold]"


def request_body(body: dict[str, object]) -> tuple[str, bytes]:
    """Path and JSON body of one demo request, streamed with running usage, greedy."""
    document = dict(body)
    path = "/v1/completions"
    if isinstance(turns := document.get("messages"), list):
        path = "/v1/chat/completions"
        document["messages"] = [{"role": role, "content": content} for role, content in turns]
    usage = {"include_usage": True, "continuous_usage_stats": True}
    document |= {"stream": True, "temperature": 0, "stream_options": usage}
    return path, json.dumps(document).encode()


def chunks(port: int, body: dict[str, object]) -> Iterator[dict[str, object]]:
    """The JSON documents of one SSE stream. Raises RuntimeError if the server answers with an error."""
    path, payload = request_body(body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[len(b"data: ") :])
    finally:
        connection.close()


def ride(port: int, row: DemoRow, picture: Picture) -> None:
    """Streams one request into its row; the body of a reader thread."""
    row.started = time.perf_counter()
    try:
        for chunk in chunks(port, row.body):
            with picture.lock:
                take(chunk, row, picture)
    except (RuntimeError, OSError) as error:
        row.error = str(error)
    with picture.lock:
        row.state = "done"
        picture.draw(f"<- {row.name} steps out after {row.output_tokens} tokens")
        picture.advanced.notify_all()


def take(chunk: dict[str, object], row: DemoRow, picture: Picture) -> None:
    """Enters one chunk into the row; the caller holds the lock."""
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"]))
    usage, choices = chunk.get("usage"), chunk.get("choices")
    if isinstance(usage, dict):
        row.prompt_tokens, row.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if isinstance(choices, list) and choices:
        row.text += choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""
    if row.output_tokens and row.first_token is None:
        row.first_token, row.state = time.perf_counter(), "riding"
        picture.draw(f"-> {row.name} steps in")
    picture.advanced.notify_all()


def run_requests(port: int, console: Console) -> list[DemoRow]:
    """Sends the eight requests, each a few tokens after the one before, and waits for all."""
    rows = [DemoRow(name, body) for name, body in REQUESTS]
    picture = Picture(rows, console)
    threads = []
    for index, row in enumerate(rows):
        threads.append(threading.Thread(target=ride, args=(port, row, picture), daemon=True))
        threads[-1].start()
        wanted = TOKENS_BETWEEN_JOINS * (index + 1)

        def far_enough(wanted: int = wanted) -> bool:
            started = [row for row in rows if row.started]
            return sum(row.output_tokens for row in rows) >= wanted or all(row.state == "done" for row in started)

        with picture.advanced:
            picture.advanced.wait_for(far_enough, timeout=30)
    for thread in threads:
        thread.join(timeout=60)
    return rows


def start_server(console: Console) -> tuple[subprocess.Popen[bytes], int]:
    """Starts `ropeway serve` on a free loopback port and waits until it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ropeway.server.cli", "serve", "--port", str(port), "--log-level", "warning"]
    console.print(f"[dim]$ ropeway serve --port {port} --log-level warning[/dim]")
    process = subprocess.Popen(command)
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            pass
        time.sleep(0.1)
    stop_server(process)
    raise RuntimeError("the server did not become ready; its own message stands above")


def stop_server(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, then the exit code; a server that does not stop is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def report(rows: list[DemoRow], seconds: float, console: Console) -> int:
    """Prints the figures; returns the number of rows that failed."""
    for row in rows:
        console.print(f"  [bold]{row.name:<8}[/bold] {escape(row.error or row.text.strip())}")
    tokens = sum(row.output_tokens for row in rows)
    waits = [1000 * (row.first_token - row.started) for row in rows if row.first_token is not None]
    if waits:
        line = f"{tokens} tokens in {seconds:.2f} s = {tokens / seconds:.0f} tok/s; "
        console.print(f"\n{line}TTFT median {statistics.median(waits):.0f} ms, longest {max(waits):.0f} ms")
    return sum(row.error is not None or row.output_tokens == 0 for row in rows)


def main() -> int:
    """Runs the demo; returns the exit code."""
    console = Console(highlight=False)
    try:
        process, port = start_server(console)
    except RuntimeError as error:
        console.print(f"make demo failed: {error}")
        return 1
    try:
        begin = time.perf_counter()
        rows = run_requests(port, console)
        seconds = time.perf_counter() - begin
    finally:
        code = stop_server(process)
    console.print("\nWhat they said:")
    failed = report(rows, seconds, console)
    return 1 if failed or code != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
