"""What every row of a benchmark says about where it comes from: hardware, versions, command. Loads no torch."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ropeway import __version__

PACKAGES = ("torch", "transformers", "triton", "uvicorn", "msgspec")


def about() -> dict[str, Any]:
    """For the end of a JSON line."""
    return {
        "hardware": hardware(),
        "versions": {"ropeway": __version__, "python": platform.python_version()} | installed(),
        "command": " ".join(["python", *sys.argv]),
    }


def installed() -> dict[str, str]:
    """Versions of the packages that speed depends on, of those that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The GPUs if there are any, then cores and processor."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([*gpus(), f"{cores} cores of {processor()}"])


def gpus() -> list[str]:
    """Names of the GPUs, from the driver's own tool."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def processor() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
