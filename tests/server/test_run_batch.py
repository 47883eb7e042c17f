"""`ropeway run-batch` against a stand-in: what it writes, how it goes on, when it asks again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stand_in import Answer, StandIn, as_json

from ropeway.server import run_batch
from ropeway.server.cli import main


def request(name: str, **changes: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": name}} | changes


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(request(str(i))) for i in range(20)) + "\n\n")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(files: tuple[Path, Path], url: str, *more: str) -> int:
    return main(["run-batch", "-i", str(files[0]), "-o", str(files[1]), "--url", url, *more])


def entries(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def echo(path: str, body: Any) -> Answer:
    return as_json({"path": path, "said": body["prompt"]}, x_request_id="r")


def test_every_request_has_its_answer(files: tuple[Path, Path]) -> None:
    """Guards OpenAI's format: a line per request, found by its custom_id, with status, body and request id."""
    with StandIn(echo) as server:
        assert run(files, f"{server.url}/v1", "--concurrency", "4") == 0
    found = {entry["custom_id"]: entry for entry in entries(files[1])}
    assert len(entries(files[1])) == 20 and found.keys() == {str(i) for i in range(20)}
    for name, entry in found.items():
        body = {"path": "/v1/completions", "said": name}
        assert entry["response"] == {"status_code": 200, "request_id": "r", "body": body} and entry["error"] is None


def test_it_goes_on(files: tuple[Path, Path]) -> None:
    """Guards hours of work: after a crash in the middle of a line nothing is asked twice and nothing is missing."""
    with StandIn(echo) as server:
        run(files, server.url)
        lines = files[1].read_text().splitlines(keepends=True)
        files[1].write_text("".join(lines[:7]) + lines[7][:30])
        server.asked.clear()
        assert run(files, server.url) == 0
        assert len(server.asked) == 13 and len(entries(files[1])) == 20
        server.asked.clear()
        assert run(files, server.url) == 0 and not server.asked


def test_failures_are_written_and_asked_again_next_time(files: tuple[Path, Path]) -> None:
    """Guards mistakes in the input: they are answers too, the exit code says so, and the next run tries them again."""
    bad = lambda path, body: as_json({"error": {"message": "no"}}, 400) if body["prompt"] == "3" else echo(path, body)  # noqa: E731
    with StandIn(bad) as server:
        assert run(files, server.url) == 1
    (failed,) = [entry for entry in entries(files[1]) if entry["response"]["status_code"] == 400]
    assert failed["custom_id"] == "3" and failed["response"]["body"]["error"]["message"] == "no"
    with StandIn(echo) as server:
        assert run(files, server.url) == 0 and len(server.asked) == 1


def test_a_full_server_is_asked_again(files: tuple[Path, Path]) -> None:
    """Guards batches larger than the queue: 503 with Retry-After is waited for; what cannot help is not tried."""
    seen: Counter[str] = Counter()

    def answer(path: str, body: Any) -> Answer:
        seen[body["prompt"]] += 1
        if body["prompt"] == "5":
            return as_json({"error": {}}, 500, x_should_retry="false")
        return as_json({}, 503, retry_after="0") if seen[body["prompt"]] < 3 else echo(path, body)

    with StandIn(answer) as server:
        assert run(files, server.url) == 1
    assert seen.pop("5") == 1 and set(seen.values()) == {3}


def test_nobody_answers(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a hang: without a server every line is an error that says so."""
    monkeypatch.setattr(run_batch, "MAX_TRIES", 1)
    with StandIn(echo) as server:
        gone = server.url
    assert run(files, gone) == 1
    assert {entry["error"]["code"] for entry in entries(files[1])} == {"connection_error"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: this is no JSON"),
        ("[]", "custom_id"),
        (json.dumps(request("a", custom_id=5)), "custom_id"),
        (json.dumps(request("a", url="/v1/embeddings")), "url"),
        (json.dumps(request("a", body={"stream": True})), "stream"),
        (json.dumps(request("a")) + "\n" + json.dumps(request("a")), "line 2: custom_id 'a' is there twice"),
    ],
)
def test_bad_input(line: str, said: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards users: the line at fault is named before anything is asked."""
    files[0].write_text(line)
    assert run(files, "http://127.0.0.1:1") == 2
    assert said in capsys.readouterr().err and not files[1].exists()


def test_foreign_output(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards somebody's file: what is no output of a batch is not touched."""
    files[1].write_text("my notes\n")
    assert run(files, "http://127.0.0.1:1") == 2
    assert files[1].read_text() == "my notes\n" and "no output of a batch" in capsys.readouterr().err
