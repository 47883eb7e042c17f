"""Runs the scripts of bench/ as people do, and imports them as modules."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def rows(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for row in found:
        assert {"hardware", "versions", "command"} <= row.keys(), "a figure without its origin"
    return found


def module(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; its siblings can be found while it is imported."""
    patch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)
