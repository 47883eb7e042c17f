"""Clients that other people use, each in a process of its own; and the snippets of docs/clients.md as they stand.

`make test-tools` installs what they need. Clients that the tests need anyway have files of their own.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import Reference, RunningServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("client_programs")
NODE_MODULES = Path(sys.prefix) / "node_modules"
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.DOTALL)
NEEDS = {"litellm": "litellm", "langchain": "langchain_openai", "outlines": "outlines"}


def require(*modules: str) -> None:
    """Skips where one of the modules is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed: see make test-tools")


def node() -> str:
    """The program, with npm's openai at hand; skips where one of them is missing."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")
    if not (NODE_MODULES / "openai").exists():
        pytest.skip("npm's openai is not installed: see make test-tools")
    return program


def run(command: list[str], text: str = "") -> str:
    """What the program prints; it must end well."""
    environ = os.environ | {"NODE_PATH": str(NODE_MODULES), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "COLUMNS": "200"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, env=environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def expected(reference: Reference) -> str:
    return reference.chat([{"role": "user", "content": "Who are you?"}], 30)


@pytest.mark.parametrize("client", NEEDS)
def test_python_clients(server: RunningServer, expected: str, client: str) -> None:
    """Guards litellm, langchain-openai and Outlines: whole, streamed, tools, formats, as far as the client has them."""
    require(NEEDS[client])
    run([sys.executable, str(PROGRAMS / f"{client}_calls.py"), server.url, expected])


def test_npm_openai(server: RunningServer, expected: str) -> None:
    """Guards the official SDK of JavaScript."""
    run([node(), str(PROGRAMS / "openai_calls.cjs"), server.url, expected])


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"{language}-{i}" for i, (language, _) in enumerate(SNIPPETS)])
def test_snippets(server: RunningServer, snippet: tuple[str, str]) -> None:
    """Guards the reader: a snippet that does not work is worse than none."""
    language, text = snippet
    assert "127.0.0.1:8000" in text
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    if language == "js":
        printed = run([node(), "-"], text)
    elif language == "bash":
        printed = run(["bash", "-c", text], "Who are you?\n!exit\n")
    else:
        require(*re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
        printed = run([sys.executable, "-"], text)
    assert printed.strip()
