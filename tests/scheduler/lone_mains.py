"""Main function of a spawned test engine: it must live in a module that a child can import by name."""

import fake_server

from ropeway.scheduler import lone_engine
from ropeway.scheduler.processes import EngineContext


def fake_engine(context: EngineContext) -> None:
    """The engine with the fake model."""
    lone_engine.engine_main(context, fake_server.engine_main)
