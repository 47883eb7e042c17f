"""Names in the environment: mistakes are told, what Kubernetes adds is kept away."""

import pytest

from ropeway.server.environment import read_environment

KNOWN = ["ROPEWAY_PORT", "ROPEWAY_MAX_NUM_SEQS", "ROPEWAY_API_KEY", "ROPEWAY_CONFIG"]


def test_what_is_known_passes() -> None:
    """Guards everybody else: no warning without a reason, and other programs' variables are none of our business."""
    environ = {"PATH": "/bin", "ROPEWAY_PORT": "9000", "ROPEWAY_MAX_NUM_SEQS": "4", "MY_PORT": "tcp://x"}
    assert read_environment(environ, KNOWN) == (environ, [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ROPEWAY_MAX_NUM_SEQ", "did you mean ROPEWAY_MAX_NUM_SEQS?"),
        ("ROPEWAY_APIKEY", "did you mean ROPEWAY_API_KEY?"),
        ("ROPEWAY_X", "`ropeway serve --help` lists all"),
    ],
)
def test_typing_errors_are_told(name: str, words: str) -> None:
    """Guards secrets and limits: a misspelt ROPEWAY_API_KEY left a server open without a word, and is never shown."""
    ours, (warning,) = read_environment({name: "secret"}, KNOWN)
    assert not ours and name in warning and words in warning and "secret" not in warning


def test_service_links_are_not_settings() -> None:
    """Guards a Kubernetes Service called ropeway: its ROPEWAY_PORT=tcp://... kept every server from starting."""
    links = {
        "ROPEWAY_SERVICE_HOST": "10.0.0.7",
        "ROPEWAY_SERVICE_PORT": "8000",
        "ROPEWAY_SERVICE_PORT_HTTP": "8000",
        "ROPEWAY_PORT": "tcp://10.0.0.7:8000",
        "ROPEWAY_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "ROPEWAY_PORT_8000_TCP_PROTO": "tcp",
        "ROPEWAY_PORT_8000_TCP_PORT": "8000",
        "ROPEWAY_PORT_8000_TCP_ADDR": "10.0.0.7",
        "ROPEWAY_CANARY_SERVICE_HOST": "10.0.0.8",
        "ROPEWAY_CANARY_PORT": "tcp://10.0.0.8:8000",
    }
    ours, (warning,) = read_environment(links, KNOWN)
    assert not ours
    assert "ROPEWAY_PORT=tcp://10.0.0.7:8000" in warning and "enableServiceLinks: false" in warning
