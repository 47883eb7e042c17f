"""A server and a reference that all end-to-end tests share."""

from collections.abc import Iterator

import pytest
from harness import MODEL_DIR, Reference, RunningServer, start_server


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The server most tests share; whatever a test does to it, the next one finds it working."""
    running = start_server()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def reference() -> Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return Reference(model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR))
