"""The commands that README.md and docs/ show are run as they stand."""

import re
import subprocess
from pathlib import Path

import pytest
from harness import RunningServer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/guide.md", "docs/tools.md"]


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block for block in blocks if block.startswith("curl")]


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_commands_work(server: RunningServer, page: str, command: str) -> None:
    """Guards the reader: a command in the documentation that does not work is worse than none."""
    assert ":8000/" in command
    line = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(
        "localhost:8000", f"localhost:{server.port}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"choices"' in done.stdout and '"error"' not in done.stdout, done.stdout
    assert ("data: [DONE]" in done.stdout) == ('"stream": true' in command)


def test_every_page_shows_a_command() -> None:
    """Guards this test: a changed code fence must not empty it."""
    assert all(commands(page) for page in PAGES)
