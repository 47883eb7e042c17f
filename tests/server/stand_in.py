"""A stand-in for an OpenAI-compatible server: answers what a test's function says, over real HTTP."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = tuple[int, bytes, dict[str, str]]


def as_json(document: Any, status: int = 200, **headers: str) -> Answer:
    """A JSON answer."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, json.dumps(document).encode(), {"content-type": "application/json"} | names


def as_stream(*deltas: dict[str, Any]) -> Answer:
    """A streamed chat answer."""
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    data = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
    return 200, data.encode(), {"content-type": "text/event-stream"}


class StandIn:
    """`answer(path, body)`; body is None for GET. `asked` holds what came."""

    def __init__(self, answer: Callable[[str, Any], Answer]) -> None:
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def reply(self, body: Any) -> None:
                outer.asked.append((self.path, body))
                status, data, headers = answer(self.path, body)
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
