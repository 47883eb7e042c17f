"""What end-to-end tests stand on: a real server process, and transformers on the same weights as the reference."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

MODEL_DIR = Path(__file__).resolve().parents[2] / "server" / "demo_model"
START_LIMIT_S = 120


@dataclass(slots=True, frozen=True)
class Metrics:
    """One answer of /metrics."""

    text: str

    def total(self, name: str, **labels: str) -> float:
        """Sum of the metric's samples with these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [line for line in self.text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples if all(label in line for label in wanted))


@dataclass(slots=True)
class RunningServer:
    """One `ropeway serve` process."""

    process: subprocess.Popen[str]
    port: int
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST of a JSON body; patient, since many tests share few cores."""
        return httpx.post(self.url + path, json=body, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official SDK pointed at this server, without retries; closed with the server."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))
        self.clients.append(client)
        return client

    def metrics(self) -> "Metrics":
        return Metrics(self.get("/metrics").text)

    def metric(self, name: str) -> float:
        """Sum of one metric's samples over labels and processes."""
        return self.metrics().total(name)

    def engine(self) -> psutil.Process:
        """The child that has torch loaded: the one with by far the most memory."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no token comes and no stream ends, on any device. Keep it short: silence looks like a hang."""
        engine = self.engine()
        engine.suspend()
        try:
            yield
        finally:
            engine.resume()

    def stop(self) -> int:
        """SIGTERM; returns the exit code. Clients are closed after it, so that streams still run while it drains."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        for client in self.clients:
            client.close()
        return code


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start_server(*flags: str, env: dict[str, str] | None = None) -> RunningServer:
    """Starts `ropeway serve` on a free port and waits until it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "ropeway.server.cli", "serve", "--port", str(port), "--api-workers", "1", *flags]
    process = subprocess.Popen(command, text=True, env=os.environ | (env or {}))
    server = RunningServer(process, port)
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            if server.get("/health/ready").status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    server.stop()
    raise AssertionError("the server did not become ready")


@dataclass(slots=True)
class Reference:
    """transformers on the same weights: what the server must say."""

    model: Any
    tokenizer: Any

    def text(self, prompt: str, max_new_tokens: int, **options: Any) -> str:
        """Greedy continuation of one prompt alone, special tokens left out; options as for `generate()`."""
        return self.continuations([prompt], max_new_tokens, **options)[0]

    def continuations(
        self, prompts: list[str], max_new_tokens: int, padding_side: str = "left", **options: Any
    ) -> list[str]:
        """Greedy continuations of prompts in one padded batch."""
        self.tokenizer.padding_side = padding_side
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **options)
        width = inputs["input_ids"].shape[1]
        return list(self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))

    def chat(self, messages: list[dict[str, str]], max_new_tokens: int) -> str:
        """Greedy answer to a conversation."""
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return str(self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
