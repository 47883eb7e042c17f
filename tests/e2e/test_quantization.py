"""Quantised models over HTTP: what transformers says on the same quantised weights, alone and in a batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from harness import MODEL_DIR, Reference, RunningServer, start_server
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

KINDS: dict[str, dict[str, Any]] = {
    "bitsandbytes-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "bitsandbytes-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "bitsandbytes-int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
PROMPTS = ["Once upon a time", "The", "In the morning the sun", "She said that", "A cat", "He went to the market and"]
TOKENS = 24


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> Iterator[tuple[RunningServer, Reference]]:
    """A server of the demo model in one kind, and the reference."""
    with pytest.MonkeyPatch.context() as patch:  # or it multiplies in bf16 where the machine can
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        model = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR,
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**KINDS[request.param]),
        )
    server = start_server("--quantization", request.param)
    yield server, Reference(model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR))
    assert server.stop() == 0


def test_answers_are_those_of_generate(both: tuple[RunningServer, Reference]) -> None:
    """Guards the whole way of the flag, and requests against what their neighbours' activations are rounded to."""
    server, reference = both
    expected = [reference.text(prompt, TOKENS) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)

    def ask(prompt: str) -> str:
        answer = server.post("/v1/completions", model="", prompt=prompt, temperature=0, max_tokens=TOKENS).json()
        return str(answer["choices"][0]["text"])

    assert [ask(prompt) for prompt in PROMPTS[:2]] == expected[:2]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, PROMPTS)) == expected
