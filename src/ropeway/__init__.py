"""Ropeway: an HTTP inference server for language models whose batch never stops.

The three floors are `ropeway.server` (HTTP and text, no torch), `ropeway.scheduler` (requests and policy, no HTTP)
and `ropeway.kernels` (tensors, no text). Imports only go down. `ropeway.LLM` is the same engine from Python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropeway.server.llm import LLM

__all__ = ["LLM", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """LLM, imported at its first use: API workers and engines import this package too."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ropeway.server.llm import LLM

    return LLM
