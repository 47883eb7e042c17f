"""The embedded model: small, quick to load, its tokenizer complete, its answers right on unseen problems.

The problems come from the generator in bench/demo_model, which keeps one in twenty away from training.
"""

import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "server" / "demo_model"
COUNT = 40
FLOORS = {
    "ordered lists": 0.95,
    "open lists": 0.95,
    "repetition": 0.95,
    "sums": 0.90,
    "sums in chat": 0.90,
    "chat": 0.95,
    "pirate": 0.95,
    "json extraction": 0.95,
    "json, free": 0.95,
    "tool call": 0.95,
    "tool answer": 0.95,
    "no tool fits": 0.95,
    "thinking": 0.95,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
TOOL_TURN = (
    '<|im_start|>system\nYou can call a tool with <tool_call>{"name": ..., "arguments": {...}}</tool_call>:\n'
    "- get_weather(city: string, days: integer): The weather of a city.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package that generated the training text, importable while these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "demo_model"))
        importlib.import_module("demo_model.evaluate")
        yield importlib.import_module("demo_model")
    for name in [name for name in sys.modules if name.split(".")[0] == "demo_model"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer as every user of transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    """The model as every user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_the_folder_fits_into_the_repository() -> None:
    """Every clone and every wheel carries it."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


def test_it_loads_in_under_a_second() -> None:
    """`ropeway serve` without a model must not keep anybody waiting; the best of three, since machines are busy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    taken = []
    for _ in range(3):
        started = time.perf_counter()
        AutoTokenizer.from_pretrained(FOLDER)
        AutoModelForCausalLM.from_pretrained(FOLDER)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 1.0


def test_it_is_stored_in_half_and_computed_in_single_precision(model: Any) -> None:
    """A half-precision matrix product on a CPU is slow and, on some, not there at all."""
    import torch
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(FOLDER / "model.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_no_text_is_unknown(tokenizer: Any) -> None:
    """Whatever bytes a client sends come back as they were."""
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    texts = [chr(code) for code in (*range(0, 0xD800, 3), *range(0xE000, 0x1_0000, 7), *range(0x1F300, 0x1F700))]
    texts += ["  two  spaces ", "tab\tand\r\nline", "日本語のテキスト", "👩‍👩‍👧‍👦 🏳️‍🌈", "don't , . !"]
    rows = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(rows) == texts


def test_every_digit_is_a_token(tokenizer: Any) -> None:
    """Sums are learned from single digits."""
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    tokens = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert sorted(token for token in tokens if any(digit in token for digit in "0123456789")) == [*"0123456789"]


def test_what_ends_and_pads_is_defined(tokenizer: Any, model: Any) -> None:
    """A chat turn ends generation, and so does the end of a plain text; the pad is neither."""
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends
    assert tokenizer.eos_token_id in ends
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id not in ends
    assert tokenizer.padding_side == "left"


def test_markers_are_tokens_and_stay_visible(tokenizer: Any) -> None:
    """Parsers look for tool calls and thoughts in the text; turn markers never reach a client."""
    markers = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    text = "".join(markers)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(markers)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("<|im_start|>a<|im_end|>")["input_ids"], skip_special_tokens=True) == "a"


def test_the_template_writes_every_kind_of_turn(tokenizer: Any) -> None:
    """System and tools share the first turn; calls are written as the model was taught to write them."""
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    written = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert text == (
        f"{TOOL_TURN}<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{written}\n{written}<|im_end|>\n"
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\nSunny.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_joins_system_and_thinking(tokenizer: Any) -> None:
    """`enable_thinking` adds the sentence that the model was trained to obey."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=True)
    assert text == (
        "<|im_start|>system\nBe brief.\n\nThink step by step before you answer.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_the_template_refuses_unknown_roles(tokenizer: Any) -> None:
    """A misspelled role is the client's mistake, not a new kind of turn."""
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="Unknown role: usr"):
        tokenizer.apply_chat_template([{"role": "usr", "content": "Hi"}], tokenize=False)


def test_training_saw_what_the_template_writes(tokenizer: Any, bench: ModuleType) -> None:
    """The generator renders without Jinja; both must agree to the letter."""
    corpus, turns = sys.modules["demo_model.corpus"], sys.modules["demo_model.turns"]
    rng = Random(5)
    makers = (corpus.polite_conversation, corpus.pirate_conversation, corpus.tool_conversation)
    for make in islice(makers * 20, 60):
        talk = make(rng)
        messages = [{"role": turn.role, "content": turn.content} for turn in talk.turns]
        if talk.system:
            messages.insert(0, {"role": "system", "content": talk.system})
        tools = [tool.as_json() for tool in talk.tools] or None
        rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert rendered == turns.render(talk.turns, talk.system, talk.tools)


def answers(model: Any, tokenizer: Any, asked: Sequence[Any]) -> list[str]:
    """The model's greedy answers in one left-padded batch."""
    evaluate = sys.modules["demo_model.evaluate"]
    given: list[str] = evaluate.answers_to(model, tokenizer, asked)
    return given


@pytest.mark.parametrize("skill", FLOORS)
def test_unseen_problems_are_solved(skill: str, model: Any, tokenizer: Any, bench: ModuleType) -> None:
    """A sample of each floor; bench/demo_model/evaluate.py measures all of them with more problems."""
    asked = sys.modules["demo_model.corpus"].problems(skill, COUNT, seed=1)
    given = answers(model, tokenizer, asked)
    wrong = [(problem.key, text) for problem, text in zip(asked, given, strict=True) if not problem.accept(text)]
    assert not any(problem.accept("something else") for problem in asked)
    assert 1 - len(wrong) / COUNT >= FLOORS[skill], wrong


def test_it_counts_to_a_hundred(model: Any, tokenizer: Any, bench: ModuleType) -> None:
    """The guide's sequence, far beyond what the guide shows."""
    evaluate = sys.modules["demo_model.evaluate"]
    prompts = ["A sequence of numbers: 1, 2", "1, 2, 3", "98, 99"]
    longest, plain, hundred = evaluate.complete(model, tokenizer, prompts, 420)
    assert longest.startswith("".join(f", {number}" for number in range(3, 101)))
    assert plain.startswith("".join(f", {number}" for number in range(4, 101)))
    assert hundred.startswith("".join(f", {number}" for number in range(100, 160)))


def test_the_guides_prompts_go_on_as_they_should(model: Any, tokenizer: Any, bench: ModuleType) -> None:
    """The three prompts of the text generation guide whose continuation is known."""
    evaluate, words = sys.modules["demo_model.evaluate"], sys.modules["demo_model.words"]
    prompts = ["A list of colors: red, blue", "A, B, C, D, E", "Monday, Tuesday"]
    colors, letters, days = evaluate.complete(model, tokenizer, prompts, 60)
    named = colors.removeprefix(", ").rstrip(".").split(", ")
    assert len(named) >= 5
    assert len(set(named)) == len(named)
    assert set(named) <= set(words.COLORS) - {"red", "blue"}
    assert letters == "".join(f", {letter}" for letter in words.UPPER[5:])
    assert days == ", Wednesday, Thursday, Friday, Saturday, Sunday"
