"""What people see while a model loads, and once it runs."""

import io
from pathlib import Path

import pytest
from fake_client import model_info
from rich.console import Console
from tiny_text import write_text_dir

from ropeway.scheduler.messages import EngineReady, Heartbeat, LoadFailed
from ropeway.server.sampling_fields import UNBUILT
from ropeway.server.settings import Settings
from ropeway.server.start_screen import StartScreen, access_line, chat_line, count, plan_rows, sampling_defaults, size


def shown(settings: Settings, *reports: Heartbeat | EngineReady | LoadFailed, url: str | None = "http://x:1") -> str:
    """Everything a screen that is no terminal prints."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    screen = StartScreen(settings, url, console)
    screen.begin()
    for report in reports:
        screen.on_report(report)
    screen.end()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_one_screen(tmp_path: Path) -> None:
    """Guards the promise of one readable screen: model, layout and why, memory plan, limits, defaults, access, URL."""
    info = model_info(write_text_dir(tmp_path))
    text = shown(Settings(served_model_name=("tiny",), api_workers="3"), EngineReady(1, info))
    for words in (
        "tiny (LlamaForCausalLM, 3.6 M parameters)",
        "packed batch in float32 on cpu",
        "the probe found it exact",
        "2.0 MiB",
        "1.0 MiB in float32: 100 blocks x 16 tokens = 1600 tokens",
        "128 tokens per request, 4 rows and 256 tokens per step, 256 choices in flight",
        "temperature 0.7, top_k 5",
        "API workers  3",
        "open, without a key, to this machine alone",
        "curl -N http://x:1/v1/chat/completions",
    ):
        assert words in text
    assert len(text.splitlines()) < 24 and max(map(len, text.splitlines())) < 120


def test_logs_have_whole_lines(tmp_path: Path) -> None:
    """Guards logs: what is no terminal has no width, so nothing is wrapped at 80 columns and nothing padded."""
    info = model_info(write_text_dir(tmp_path), layout_reason="packed: " + "word " * 40 + "end")
    console = Console(file=io.StringIO(), width=80, highlight=False)
    StartScreen(Settings(), None, console).on_report(EngineReady(1, info))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert any("packed: word" in line and line.endswith("end") for line in lines)
    assert all(line == line.rstrip() and not line.startswith(" ") for line in lines)


def test_chat_line(tmp_path: Path) -> None:
    """Guards `ropeway check`: a model without a chat template, or with a broken one, says so before it serves."""
    folder = write_text_dir(tmp_path)
    info = model_info(folder)
    assert chat_line(info, Settings()) == "the model's own template"
    assert chat_line(info, Settings(chat_template="{{ x }}")) == "the template of --chat-template"
    (folder / "chat_template.jinja").write_text("{% if x %}")
    assert "is broken (line 1: " in chat_line(info, Settings())
    (folder / "chat_template.jinja").unlink()
    assert chat_line(info, Settings()).startswith("no chat template")


def test_deterministic_is_said(tmp_path: Path) -> None:
    """Guards a promise that costs speed: who asked for it, and only who did, sees that it holds."""
    info = model_info(write_text_dir(tmp_path))
    assert "same bits" in dict(plan_rows(info, Settings(deterministic=True)))["deterministic"]
    assert "deterministic" not in dict(plan_rows(info, Settings()))


def test_progress_without_a_terminal() -> None:
    """Guards logs: a line per stage and quarter, not one per heartbeat."""
    beats = [Heartbeat(1, "loading", "reading weights", step / 100) for step in range(100)]
    lines = shown(Settings(), *beats).splitlines()
    assert lines[1:] == [f"  reading weights ({percent}%)" for percent in (0, 25, 50, 75)]


def test_heartbeats_of_a_running_engine_say_nothing(tmp_path: Path) -> None:
    """Guards the terminal of somebody who serves: nothing scrolls by while all is well; a restart is one line."""
    ready = EngineReady(1, model_info(tmp_path))
    once = shown(Settings(), ready, Heartbeat(1, "stepping"))
    assert once == shown(Settings(), ready)
    again = shown(Settings(), ready, Heartbeat(2, "loading", "reading weights", 0.5), EngineReady(2, ready.info))
    assert again.removeprefix(once) == "  reading weights (50%)\nThe engine runs again.\n"


def test_check_has_no_invitation(tmp_path: Path) -> None:
    """Guards `ropeway check`: there is no server to call."""
    text = shown(Settings(), EngineReady(1, model_info(tmp_path)), url=None)
    assert "curl" not in text and "blocks" in text


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    """Guards against names that rich would take for styles, or fail on."""
    info = model_info(tmp_path, layout_reason="because [/bold] of [red]")
    text = shown(Settings(model="[bold", served_model_name=("[/x]",)), EngineReady(1, info))
    assert "[bold" in text and "[/x]" in text and "because [/bold] of [red]" in text


def test_a_terminal_gets_one_moving_line(tmp_path: Path) -> None:
    """Guards the live line: it is gone before an error or the screen is printed."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    screen = StartScreen(Settings(), "http://x:1", console)
    screen.begin()
    screen.on_report(Heartbeat(1, "loading", "reading weights", 0.5))
    screen.on_report(LoadFailed(1, "no memory"))
    screen.on_report(EngineReady(1, model_info(tmp_path)))
    screen.end()
    assert isinstance(console.file, io.StringIO)
    _, moving, rest = console.file.getvalue().partition("\x1b[?25l")
    shown, _, rest = rest.partition("\x1b[?25h")
    assert moving and "reading weights" in shown and "curl" in rest and "reading weights" not in rest


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(api_key=("secret",)), "only with an API key"),
        (Settings(host="0.0.0.0", no_auth=True), "--no-auth"),
        (Settings(), "this machine alone"),
    ],
)
def test_access(settings: Settings, words: str) -> None:
    """Guards against surprises: who may call is said, the key is not."""
    assert words in access_line(settings) and "secret" not in access_line(settings)


def test_key_in_the_curl_line(tmp_path: Path) -> None:
    """Guards the invitation: it works as it stands but for the key, under the proxy's prefix too."""
    text = shown(Settings(api_key=("secret",), root_path="/llm"), EngineReady(1, model_info(tmp_path)))
    assert "Authorization: Bearer KEY" in text and "http://x:1/llm/v1/" in text and "secret" not in text


def test_sampling_defaults(tmp_path: Path) -> None:
    """Guards what is promised against what is done: --generation-config none means OpenAI's defaults."""
    info = model_info(write_text_dir(tmp_path))
    assert sampling_defaults(info, Settings()) == "temperature 0.7, top_k 5 (generation_config.json)"
    assert "OpenAI" in sampling_defaults(info, Settings(generation_config="none"))
    (tmp_path / "p.json").write_text('{"top_k": 9, "num_beams": 4, "pad_token_id": 0}')
    shown = sampling_defaults(info, Settings(generation_config="p"))
    assert shown.startswith("temperature 0.7, top_k 9 (p.json, generation_config.json)")
    assert "num_beams" not in UNBUILT or shown.endswith("; not done yet: num_beams")
    assert dict(plan_rows(info, Settings()))["sampling"]


def test_quantised_weights_are_named(tmp_path: Path) -> None:
    """Guards the screen: small weights must be told apart from a small model."""
    rows = dict(plan_rows(model_info(tmp_path, quantization="bitsandbytes-nf4"), Settings()))
    assert rows["quantization"] == "bitsandbytes-nf4" and rows["weights"]
    assert "quantization" not in dict(plan_rows(model_info(tmp_path), Settings()))


def test_what_makes_a_gpu_fast_is_told(tmp_path: Path) -> None:
    """Guards the screen: a server without fused kernels or graphs must not look like one that has them."""
    fast = model_info(tmp_path, device="cuda:0", fusion="fused: 2 norms", no_graphs=None)
    rows = dict(plan_rows(fast, Settings()))
    assert (rows["fusion"], rows["CUDA graphs"]) == ("fused: 2 norms", "one per size of a step")
    rows = dict(plan_rows(model_info(tmp_path, device="cuda:0", no_graphs="it waits"), Settings()))
    assert rows["CUDA graphs"] == "none, because it waits" and "fusion" not in rows
    on_cpu = dict(plan_rows(model_info(tmp_path, device="cpu", no_graphs="they need a GPU"), Settings()))
    assert not {"fusion", "CUDA graphs"} & set(on_cpu)


def test_what_made_the_start_slow_is_told(tmp_path: Path) -> None:
    """Guards the screen: who waits for a start should see for what, the longest first."""
    stages = {"reading weights": 8.04, "a": 0.1, "b": 0.2, "c": 0.3, "trying the layouts": 1.26}
    rows = dict(plan_rows(model_info(tmp_path, start_seconds=stages), Settings()))
    assert rows["started in"] == "9.9 s: reading weights 8.0, trying the layouts 1.3, c 0.3, b 0.2"


def test_numbers_for_people() -> None:
    """Guards units: powers of 1000 for counts, of 1024 for bytes."""
    assert [count(number) for number in (999, 1000, 3_600_000, 7 * 10**9)] == ["999", "1.0 k", "3.6 M", "7.0 B"]
    assert [size(number) for number in (0, 2**10, 3 * 2**19, 2**30)] == ["0 B", "1.0 KiB", "1.5 MiB", "1.0 GiB"]
