"""What the routes share: readiness, names, admission."""

from pathlib import Path
from typing import Any

import pytest
from fake_client import engine_status
from shell import make_services
from tiny_text import write_text_dir

from ropeway.server.errors import ApiError
from ropeway.server.services import Services, key_id


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return make_services(write_text_dir(tmp_path))


def refused(services: Services) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        services.begin({}, 1)
    assert 1 <= int(caught.value.headers["Retry-After"]) <= 120
    return caught.value.status, caught.value.code


def test_nothing_begins_before_or_after(services: Services) -> None:
    """Guards requests against an engine that is not there: each state has its own code, and takes no slot."""
    assert refused(make_services(reason="loading")) == (503, "loading")
    for reason, code in (
        ("engine_restarting", "engine_restarting"),
        ("engine_stalled", "engine_restarting"),
        ("draining", "draining"),
    ):
        services.client.status = engine_status(reason)  # type: ignore[misc]
        assert refused(services) == (503, code)
        sample = services.metrics.registry.get_sample_value
        assert sample("ropeway_admission_rejections_total", {"model_name": "tiny", "reason": code})
    assert services.admission.requests == 0


def test_a_restart_keeps_the_tokenizer(services: Services) -> None:
    """Guards /tokenize and /v1/models: they need the model's facts, not a living engine."""
    tokenizer = services.tokenizer
    services.client.status = engine_status("engine_restarting")  # type: ignore[misc]
    assert services.require_loaded().max_model_len == 128 and services.tokenizer is tokenizer


def test_begin(services: Services) -> None:
    """Guards the record: it holds the slots, knows the key, and gives everything back."""
    scope: dict[str, Any] = {"state": {"key_id": "abc", "arrival": 1.0}}
    record = services.begin(scope, 3, 50)
    assert (services.admission.requests, services.admission.tokens) == (3, 50)
    assert (record.key_id, record.arrival, key_id(scope), key_id({})) == ("abc", 1.0, "abc", "")
    record.finish("error")
    assert (services.admission.requests, services.admission.tokens) == (0, 0)


def test_names(services: Services) -> None:
    """Guards the model field: absent or empty is fine, another name is 404 with a short message."""
    for name in (None, "", "tiny", "org/tiny"):
        services.check_model(name)
    with pytest.raises(ApiError) as caught:
        services.check_model("x" * 10**6)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 300
    assert services.model_name == "tiny"
