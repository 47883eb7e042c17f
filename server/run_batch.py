"""`ropeway run-batch`: a file of requests in OpenAI's batch format -> a file of answers. Knows HTTP, no model.

Resumable: what the output file already answers is not asked again, a last line that was cut is taken off, so after
Ctrl-C or a crash the same command goes on. Answers are in the order in which they came.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ropeway.server.command_line import Parser, add_server_flags, root_url
from ropeway.server.errors import UsageError
from ropeway.server.openai_client import TIMEOUT, headers

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
RETRIED = frozenset((408, 429, 500, 502, 503, 504))
MAX_TRIES = 8
LONGEST_WAIT_S = 60.0
CONCURRENCY = 64


@dataclass(slots=True, frozen=True)
class Job:
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Answers what is unanswered; 0 if all of it succeeded, else 1. Raises: UsageError."""
    options = build_parser().parse_args(arguments)
    if options.concurrency < 1:
        raise UsageError("--concurrency must be at least 1.")
    root, console = root_url(options.url), Console(stderr=True, highlight=False)
    jobs = read_jobs(options.input)
    done = answered(options.output)
    left = [job for job in jobs if job.custom_id not in done]
    if len(left) < len(jobs):
        console.print(f"{len(jobs) - len(left)} of {len(jobs)} are answered already.")
    try:
        with options.output.open("a", encoding="utf-8") as file:
            batch = Batch(root, options.api_key, file, console)
            asyncio.run(batch.run(left, options.concurrency))
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on.")
        return 130
    console.print(f"{len(left) - batch.failed} answers, {batch.failed} failed: {options.output}", soft_wrap=True)
    return 1 if batch.failed else 0


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("ropeway run-batch", description="Answer a file of requests in OpenAI's batch format.")
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="JSONL with a request a line")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="JSONL; is continued if there")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="requests in flight")
    add_server_flags(parser)
    return parser


def read_jobs(path: Path) -> list[Job]:
    """The whole input, checked before anything is asked. Raises: UsageError that names the line."""
    jobs: dict[str, Job] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} cannot be read.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            job = read_job(line, f"{path}, line {number}")
            if job.custom_id in jobs:
                raise UsageError(f"{path}, line {number}: custom_id {job.custom_id!r} is there twice.")
            jobs[job.custom_id] = job
    return list(jobs.values())


def read_job(line: str, where: str) -> Job:
    """One request. Raises: UsageError."""
    try:
        entry = json.loads(line)
    except ValueError:
        raise UsageError(f"{where}: this is no JSON.") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("custom_id"), str):
        raise UsageError(f"{where}: it must be an object with a custom_id, a string.")
    if entry.get("method") != "POST" or entry.get("url") not in URLS:
        raise UsageError(f"{where}: method must be POST and url one of {', '.join(URLS)}.")
    if not isinstance(entry.get("body"), dict) or entry["body"].get("stream"):
        raise UsageError(f"{where}: body must be an object, without stream.")
    return Job(entry["custom_id"], entry["url"], entry["body"])


def answered(path: Path) -> set[str]:
    """custom_ids that the output has an answer for; a last line that was cut is taken off. Raises: UsageError."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    try:
        for line in whole.splitlines():
            entry = json.loads(line)
            if entry["error"] is None and entry["response"]["status_code"] == 200:
                done.add(entry["custom_id"])
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{path} is there and is no output of a batch.") from None
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done


class Batch:
    """One run.

    Args:
        root, api_key: the server.
        file: gets a line per answer, at once.
        console: shows the progress.
    """

    def __init__(self, root: str, api_key: str, file: IO[str], console: Console) -> None:
        self._root = root
        self._api_key = api_key
        self._file = file
        self._console = console
        self.failed = 0

    async def run(self, jobs: list[Job], concurrency: int) -> None:
        """Asks everything, so many at a time."""
        columns = (
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        limits = httpx.Limits(max_connections=concurrency)
        queue = iter(jobs)
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task("", total=len(jobs))
            async with httpx.AsyncClient(
                base_url=self._root, headers=headers(self._api_key), timeout=TIMEOUT, limits=limits
            ) as http:
                workers = (self._work(http, queue, lambda: progress.advance(task)) for _ in range(concurrency))
                await asyncio.gather(*workers)

    async def _work(self, http: httpx.AsyncClient, queue: Iterator[Job], on_done: Any) -> None:
        for job in queue:
            entry = await ask(http, job)
            if entry["error"] is not None or entry["response"]["status_code"] != 200:
                self.failed += 1
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
            on_done()


async def ask(http: httpx.AsyncClient, job: Job) -> dict[str, Any]:
    """The output line of one request; a server that is full, or away for a while, is asked again."""
    head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": job.custom_id}
    for attempt in range(MAX_TRIES):
        last = attempt + 1 == MAX_TRIES
        try:
            answer = await http.post(job.url, json=job.body)
        except httpx.HTTPError as error:
            if last:
                message = f"The server does not answer: {error or type(error).__name__}."
                return {**head, "response": None, "error": {"code": "connection_error", "message": message}}
            await asyncio.sleep(wait_s(attempt, None))
            continue
        retry = answer.status_code in RETRIED and answer.headers.get("x-should-retry") != "false"
        if not retry or last:
            break
        await asyncio.sleep(wait_s(attempt, answer.headers.get("retry-after")))
    response = {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id", "")}
    return {**head, "response": {**response, "body": document(answer)}, "error": None}


def wait_s(attempt: int, retry_after: str | None) -> float:
    """Seconds until the next try: what the server says, else twice as long each time."""
    with contextlib.suppress(ValueError):
        if retry_after is not None:
            return min(max(float(retry_after), 0.0), LONGEST_WAIT_S)
    return min(0.5 * 2.0**attempt, LONGEST_WAIT_S)


def document(answer: httpx.Response) -> Any:
    """The body as JSON, or its text."""
    try:
        return answer.json()
    except ValueError:
        return answer.text
