"""What several test files of the processes start."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from supervised import LIMIT_S, SCRIPT, Server


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts fake servers; afterwards no child of theirs may live."""
    servers: list[Server] = []

    def run(**options: Any) -> Server:
        command = [sys.executable, str(SCRIPT), json.dumps(options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout
        servers.append(Server(process, int(process.stdout.readline() or 0)))
        return servers[-1]

    yield run
    for server in servers:
        server.end(signal.SIGTERM, signal.SIGINT)  # at once, and the private folder goes too
        server.process.communicate(timeout=LIMIT_S)
