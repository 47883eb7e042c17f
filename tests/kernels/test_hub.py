"""Hub ids that cannot be had: one question, one sentence."""

from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ropeway.kernels import hub
from ropeway.kernels.errors import NotAModel
from ropeway.kernels.hub import check_hub

RESPONSE = httpx.Response(404, request=httpx.Request("HEAD", "http://hub"))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the hub got; it has everything."""
    asked: list[str] = []
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("long", response=RESPONSE), "the hub has no such model; if it is private"),
        (RevisionNotFoundError("long", response=RESPONSE), "no revision v2 of some/model"),
        (EntryNotFoundError("long"), "it has no config.json"),
        (httpx.ConnectError("no route"), r"the hub cannot be asked \(ConnectError: no route\)"),
        (OSError("no network"), r"the hub cannot be asked \(OSError: no network\)"),
    ],
)
def test_what_the_hub_lacks(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    """Guards mistyped ids and machines without a network: they waited for a minute of retries to be told less."""
    tries = []

    def fail(url: str, timeout: float) -> NoReturn:
        tries.append(timeout)
        raise error

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    with pytest.raises(NotAModel, match=message):
        check_hub("some/model", "v2")
    assert tries == [hub.ANSWER_SECONDS]


def test_what_is_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards names that the hub's own rules refuse, before anything is asked."""
    monkeypatch.undo()
    with pytest.raises(NotAModel, match="neither a folder here nor a hub id"):
        check_hub("a model of mine", None)


def test_no_question_without_need(monkeypatch: pytest.MonkeyPatch, asked: list[str], tmp_path: Path) -> None:
    """Guards starts from the cache, and HF_HUB_OFFLINE: the hub is asked only for what is not here."""
    check_hub("some/model", None)
    assert len(asked) == 1 and "some/model" in asked[0]

    def cached(*args: Any, **kwargs: Any) -> str:
        return str(tmp_path / "config.json")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "try_to_load_from_cache", cached)
        check_hub("some/model", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub("some/model", None)
    assert len(asked) == 1
