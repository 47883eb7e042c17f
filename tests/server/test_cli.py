"""The command line: help, version, and what it says when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from ropeway import __version__
from ropeway.server.cli import main, parse
from ropeway.server.errors import UsageError
from ropeway.server.settings import flag_fields, flag_name


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for item, _ in flag_fields():
        monkeypatch.delenv(f"ROPEWAY_{item.name.upper()}", raising=False)


def said(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the help: every flag, in groups, for both commands; nothing that is not built."""
    for command in ("serve", "check"):
        with pytest.raises(SystemExit) as caught:
            parse([command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(flag_name(item.name) in text for item, _ in flag_fields() if item.name != "model")
        assert "--no-enable-prefix-caching" in text and "Batch and memory:" in text and "ROPEWAY_<FLAG>" in text
        assert "--tensor-parallel-size" not in text
    with pytest.raises(SystemExit):
        parse(["--version"])
    assert capsys.readouterr().out == f"ropeway {__version__}\n"


def test_as_a_module() -> None:
    """Guards `python -m ropeway`, for a Python whose scripts are not on the path."""
    done = subprocess.run([sys.executable, "-m", "ropeway", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ropeway {__version__}\n"


def test_values_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards the way from words to settings, booleans and repeated flags included."""
    (tmp_path / "config.json").write_text("{}")
    command, settings = parse(
        f"serve {tmp_path} --port=1 --strict --no-enable-prefix-caching --api-key a --api-key b,c --seed -5".split()
    )
    assert command == "serve" and settings.model == str(tmp_path) and settings.port == 1
    assert settings.strict and not settings.enable_prefix_caching and not settings.trust_remote_code
    assert settings.api_key == ("a", "b", "c") and settings.seed == -5
    monkeypatch.setenv("ROPEWAY_STRICT", "1")
    assert parse(["check"])[1].strict


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "ropeway serve"),
        (("serv",), "serve"),
        (("serve", "--max-num-sequences", "3"), "did you mean --max-num-seqs"),
        (("serve", "--max-num"), "no flag --max-num"),
        (("serve", "--tensor-parallel-size", "2"), "--tensor-parallel-size is not built yet"),
        (("serve", "--quantization=awq"), "is one of fp8, bitsandbytes-nf4, bitsandbytes-fp4, bitsandbytes-int8"),
        (("serve", "--api-workers=0"), "--api-workers is auto or a whole number from 1 to 64"),
        (("serve", "--port"), "--port"),
        (("serve", "--port", "x"), "--port wants a whole number"),
        (("serve", "a", "b"), "one MODEL"),
        (("serve", "/no/such/folder"), "no folder /no/such/folder"),
        (("serve", "./nowhere"), "no folder ./nowhere"),
        (("serve", __file__), "is a file"),
        (("serve", str(Path(__file__).parent)), "config.json"),
        (("serve", "--api-key-file", "/no/such/file"), "--api-key-file"),
        (("serve", "--host", "0.0.0.0"), "--api-key"),
    ],
)
def test_wrong_words(arguments: tuple[str, ...], words: str) -> None:
    """Guards newcomers: one sentence that says what is wrong and what to do."""
    assert words in said(*arguments)


def test_a_hub_id_is_no_folder() -> None:
    """Guards hub ids: whether they exist is the engine's to find out."""
    assert parse(["serve", "org/model"])[1].model == "org/model"
    assert parse(["serve", "gpt2"])[1].model == "gpt2"


def test_exit_code_and_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards scripts: non-zero, stderr, no usage dump, no traceback."""
    assert main(["serve", "--port", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "ropeway: --port wants a whole number, not 'x'.\n"


def test_the_supervisors_process_stays_light() -> None:
    """Guards the supervisor: no torch, and no prometheus_client before its directory is made."""
    code = (
        "import ropeway.server.cli, sys; sys.exit(bool({'torch', 'prometheus_client', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_misspelt_variables_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the way from the environment to the screen: a warning, and the server starts all the same."""
    monkeypatch.setenv("ROPEWAY_PORTS", "9000")
    monkeypatch.setenv("ROPEWAY_PORT", "tcp://10.0.0.7:8000")
    _, settings = parse(["serve"])
    assert settings.port == 8000
    error = capsys.readouterr().err
    assert "ropeway: There is no variable ROPEWAY_PORTS" in error and "enableServiceLinks" in error
