"""Defaults in layers: the request, its generation_config, the server's preset, the model's file, the protocol."""

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from ropeway.server.errors import ApiError
from ropeway.server.presets import (
    DEFAULT_FILE,
    DRAFTING,
    MEANINGLESS,
    SERVER_FLAGS,
    Presets,
    known,
    legal,
    not_done,
)
from ropeway.server.protocols.completions import CompletionFields
from ropeway.server.protocols.tgi import GenerateFields
from ropeway.server.sampling_fields import UNBUILT, SamplingFields

GUIDE = {"num_beams": 4, "early_stopping": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token": 0}
"""The text-generation guide's translation_generation_config.json."""


def fill(body: dict[str, Any], model: dict[str, Any] | None = None, **options: Any) -> SamplingFields:
    files = {DEFAULT_FILE: model or {}} | options.pop("files", {})
    chosen, strict = options.pop("chosen", "auto"), options.get("strict", False)
    return Presets(files, chosen).fill(SamplingFields.parse(body, strict), **options)


def refusal(body: dict[str, Any], **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fill(body, **options)
    assert caught.value.status == 400 and caught.value.message.endswith(".")
    return caught.value


def test_layers() -> None:
    """Guards precedence, field by field; each layer says one thing more than the one above it."""
    files = {"warm.json": {"temperature": 0.9, "top_p": 0.8, "top_k": 7}}
    model = {"temperature": 0.1, "top_p": 0.1, "top_k": 1, "min_p": 0.2}
    body = {"temperature": 1.5, "generation_config": {"temperature": 1.4, "top_p": 0.7}}
    fields = fill(body, model, files=files, chosen="warm")
    assert (fields.temperature, fields.top_p, fields.top_k, fields.min_p) == (1.5, 0.7, 7, 0.2)
    assert fill({}, model, files=files, chosen="none").top_p is None
    assert Presets({DEFAULT_FILE: model} | files, "warm").defaults == model | files["warm.json"]


@pytest.mark.parametrize(
    ("body", "model", "samples", "sampled", "temperature"),
    [
        ({}, {}, True, True, None),
        ({}, {}, False, False, None),
        ({"temperature": 0.5}, {}, False, True, 0.5),
        ({"top_p": 0.5}, {}, False, True, None),
        ({"top_k": 5}, {"do_sample": False}, True, True, None),
        ({"top_p": 1, "top_k": -1, "min_p": 0}, {}, False, False, None),
        ({"temperature": 0, "top_p": 0.5}, {}, True, False, 0),
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.6}, True, False, 0.6),
        ({"do_sample": True}, {"temperature": 0}, False, True, 1),
        ({"do_sample": True}, {"do_sample": False, "temperature": 0.6}, False, True, 0.6),
        ({"top_p": 0.5}, {"temperature": 0}, False, True, 1),
        ({}, {"do_sample": False, "temperature": 0.6}, True, False, 0.6),
        ({"generation_config": {"do_sample": False}}, {"temperature": 0.6}, True, False, 0.6),
        ({"temperature": 0.7, "generation_config": {"do_sample": False}}, {}, True, True, 0.7),
    ],
    ids=str,
)
def test_sampling_or_greedy(
    body: dict[str, Any], model: dict[str, Any], samples: bool, sampled: bool, temperature: float | None
) -> None:
    """Guards "do_sample": the highest layer that says anything about sampling decides."""
    fields = fill(body, model, samples=samples)
    assert fields.do_sample is sampled and fields.temperature == temperature


def test_greedy_names_what_it_leaves_out() -> None:
    """Guards against silence: a temperature beside do_sample: false does nothing, and the answer says so."""
    body = {"do_sample": False, "temperature": 0.7, "top_p": 1, "top_k": 5}
    assert fill(body).ignored() == ["temperature", "top_k"]
    assert refusal({"do_sample": True, "temperature": 0}).param == "temperature"


@pytest.mark.parametrize("shape", [lambda config: config, json.dumps], ids=["object", "JSON"])
def test_generation_config_of_a_request(shape: Any) -> None:
    """Guards `transformers chat`, which sends a GenerationConfig as JSON inside of the body."""
    config = {"max_new_tokens": 256, "do_sample": True, "stop_strings": ["x"], "num_return_sequences": 2,
              "eos_token_id": [5, 6], "transformers_version": "5.17.0", "use_cache": True}  # fmt: skip
    fields = fill({"generation_config": shape(config)})
    assert (fields.most_tokens(3), fields.stops, fields.choices, fields.eos_ids) == (256, ("x",), 2, [5, 6])
    assert fields.ignored() == []
    assert fill({"max_tokens": 9, "stop": "y", "n": 1, "generation_config": shape(config)}).most_tokens(3) == 9
    assert fill({"stop": "y", "generation_config": shape(config)}).stops == ("y",)
    everything = GenerationConfig(do_sample=True, max_new_tokens=7).to_dict()
    assert fill({"generation_config": shape(everything)}, strict=True).most_tokens(3) == 7


def test_generation_config_is_checked() -> None:
    """Guards its entries like fields: the error names the entry; unknown ones are named, or refused with --strict."""
    assert refusal({"generation_config": {"temperature": -1}}).param == "generation_config.temperature"
    error = refusal({"generation_config": {"num_beam_groups": 4}})
    assert error.code == "unsupported_parameter" and error.message.startswith("generation_config.num_beam_groups")
    assert fill({"generation_config": {"temprature": 1, "stream": True}}).ignored() == [
        "generation_config.temprature",
        "generation_config.stream",
    ]
    assert refusal({"generation_config": {"x": 1}}, strict=True).code == "unknown_parameter"
    assert refusal({"generation_config": "[1]"}).param == "generation_config"


def test_presets_by_name() -> None:
    """Guards the guide's second file in a model's folder: chosen by name, with or without .json; others are listed."""
    files = {"translation_generation_config.json": {"max_new_tokens": 77, "do_sample": False}}
    for name in ("translation_generation_config", "translation_generation_config.json"):
        fields = fill({"generation_config": name}, files=files)
        assert fields.most_tokens(1) == 77 and fields.do_sample is False
    error = refusal({"generation_config": "../secrets"}, files=files)
    assert "generation_config.json, translation_generation_config.json" in error.message


def test_the_guides_preset() -> None:
    """Guards the guide's own file: beams that are not drawn, and what cannot be done is said at start."""
    name = "translation_generation_config"
    fields = fill({"generation_config": name}, files={f"{name}.json": GUIDE})
    assert (fields.num_beams, fields.early_stopping, fields.do_sample) == (4, True, False)
    assert fill({"generation_config": name, "temperature": 0.5}, files={f"{name}.json": GUIDE}).do_sample is True
    assert not_done(GUIDE) == ["pad_token"]
    assert not_done({"temperature": 0.5, "num_beams": 1, "top_k": None, "top_p": 7}) == ["top_p"]
    assert legal({"temperature": "warm", "top_k": -7, "top_p": 0.5}) == {"top_p": 0.5}


def test_lengths_of_files() -> None:
    """Guards chat against a file's short default: only completions that do not say their length take it."""
    presets = Presets({DEFAULT_FILE: {"max_new_tokens": 30}})
    assert presets.completion_tokens(5) == 30
    assert presets.fill(SamplingFields()).most_tokens(5) is None
    assert Presets({DEFAULT_FILE: {"max_length": 30}}).completion_tokens(5) == 25
    assert Presets({DEFAULT_FILE: {"max_length": 3}}).completion_tokens(5) == 1
    assert Presets({}).completion_tokens(5) == 16


def test_end_tokens_of_files() -> None:
    """Guards the end: the tokenizer knows the model's own end tokens, a preset of the command line replaces them."""
    assert fill({}, {"eos_token_id": 4}).eos_ids is None
    assert fill({}, {"eos_token_id": 4}, files={"p.json": {"eos_token_id": 9}}, chosen="p").eos_ids == [9]


def test_every_field_of_transformers_is_placed() -> None:
    """Guards against a new transformers: each field of its GenerationConfig has exactly one place here."""
    fields = GenerationConfig().to_dict().keys() | {"_from_model_config"}
    assert [name for name in fields if not known(name)] == []
    places = [set(SamplingFields.model_fields), set(UNBUILT), set(SERVER_FLAGS), set(MEANINGLESS), set(DRAFTING)]
    assert [name for name in fields if sum(name in place for place in places) != 1] == []


BEAMS = {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}


@pytest.mark.parametrize(
    "body",
    [
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "a+"},
        {"presence_penalty": 0.5},
        {"guidance_scale": 2},
        {"n": 5},
    ],
    ids=str,
)
def test_beams_of_the_model_yield(body: dict[str, Any]) -> None:
    """Guards models whose own file searches, as those of translation do: every request with logprobs or a format was a
    400 for a default that nobody asked for. Who asks for beams gets them, or is told why not."""
    files = {DEFAULT_FILE: BEAMS}
    fields = Presets(files).fill(CompletionFields.parse({"prompt": "x"} | body))
    assert (fields.num_beams, fields.length_penalty, fields.early_stopping, fields.do_sample) == (
        None,
        None,
        None,
        False,
    )
    assert "generation_config.num_beams" in fields.ignored()
    for asked in ({"num_beams": 4}, {"generation_config": BEAMS}):
        assert Presets(files).fill(CompletionFields.parse({"prompt": "x"} | body | asked)).searches


def test_beams_of_the_model_stay() -> None:
    """Guards the search itself, which is what such a model's users expect, from requests that could do with it."""
    for body in ({}, {"logprobs": None, "n": 4, "stop": ["."], "response_format": {"type": "text"}, "stream": True}):
        fields = Presets({DEFAULT_FILE: BEAMS}).fill(CompletionFields.parse({"prompt": "x"} | body))
        assert fields.num_beams == 4 and not fields.ignored()
    for body, beams in (({}, 4), ({"stream": True}, None), ({"details": True}, None)):
        assert Presets({DEFAULT_FILE: BEAMS}).fill(GenerateFields.parse({"inputs": "x"} | body)).num_beams == beams
