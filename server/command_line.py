"""What the commands of `ropeway` share: a parser that raises, and the flags that say which server to talk to."""

import argparse
from typing import Any

from ropeway.server.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage."""

    def error(self, message: str) -> Any:
        """Raises: UsageError."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """--url and --api-key."""
    parser.add_argument("--url", help=f"an OpenAI-compatible server (default: {DEFAULT_URL})")
    parser.add_argument("--api-key", default="none", metavar="KEY", help="its key, if it wants one")


def root_url(url: str | None) -> str:
    """The server's address without `/v1`, which users of SDKs add. Raises: UsageError."""
    root = (url or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise UsageError(f"--url must begin with http:// or https://, not {url!r}.")
    return root
