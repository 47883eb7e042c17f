"""What `ropeway serve` and `ropeway check` say while a model loads and once it runs. Prints; decides nothing.

The supervisor shows it everything the engine reports. A terminal gets one moving line, anything else plain lines.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from ropeway import __version__
from ropeway.scheduler.messages import EngineReady, EngineReport, Heartbeat, LoadFailed, ModelInfo
from ropeway.server.chat_template import ChatTemplate
from ropeway.server.presets import DEFAULT_FILE, file_name, not_done
from ropeway.server.settings import Settings

SAMPLING_DEFAULTS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
DETERMINISTIC = "a request's logits have the same bits whatever shares its steps, is cached or was preempted"
PROGRESS_STEP = 0.25
"""Plain lines tell a stage's progress in such steps."""
STAGES_SHOWN = 4
"""Of the start: those that took longest."""


class StartScreen:
    """Follows the engine's reports.

    Args:
        settings: what the user chose.
        url: where the server listens; None for a check, which has no server.
        console: where to print.
    """

    def __init__(self, settings: Settings, url: str | None, console: Console | None = None) -> None:
        self._settings = settings
        self._url = url
        self._console = console or Console(highlight=False)
        self._status: Status | None = None
        self._told: tuple[str, int] | None = None
        self._ready_once = False

    def begin(self) -> None:
        """The first line, before anything loads."""
        model = self._settings.model or "the embedded demo model"
        where = f" on {self._url}" if self._url else ""
        self._console.print(f"[bold]Ropeway {__version__}[/bold]: {escape(model)}{where}", soft_wrap=True)
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()

    def end(self) -> None:
        """No more progress; also before an error is printed."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def on_report(self, report: EngineReport) -> None:
        """Progress while loading, the whole screen at the first ready, one line at each later one."""
        if isinstance(report, Heartbeat) and report.phase in ("loading", "compiling"):
            self._progress(report.stage or report.phase, report.progress)
        elif isinstance(report, LoadFailed):
            self.end()  # the supervisor prints why
        elif isinstance(report, EngineReady):
            self.end()
            if self._ready_once:
                self._console.print("The engine runs again.")
                return
            self._ready_once = True
            self._print_plan(plan_rows(report.info, self._settings))
            if self._url:
                self._console.print(self._invitation(self._url), soft_wrap=True)

    def _print_plan(self, rows: list[tuple[str, str]]) -> None:
        """Model, memory plan, limits and access: a table that fits the terminal, or a line each, however long."""
        if self._console.is_terminal:
            self._console.print(plan_table(rows))
            return
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            self._console.print(f"{name:<{width}}  {escape(text)}", soft_wrap=True)

    def _progress(self, stage: str, progress: float) -> None:
        if self._status is not None:
            self._status.update(f"{escape(stage)} [dim]{progress:.0%}[/dim]")
            return
        step = (stage, int(progress / PROGRESS_STEP))
        if step != self._told:
            self._told = step
            self._console.print(f"  {escape(stage)} ({progress:.0%})", soft_wrap=True)

    def _invitation(self, url: str) -> str:
        key = " -H 'Authorization: Bearer KEY'" if self._settings.has_keys else ""
        body = '{"messages": [{"role": "user", "content": "Who are you?"}], "stream": true}'
        route = f"{url}{self._settings.root_path}/v1/chat/completions"
        return (
            f"Ready. Try:\n\n  curl -N {route} \\\n    -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n"
        )


def plan_table(rows: list[tuple[str, str]]) -> Table:
    """The screen's lines in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def plan_rows(info: ModelInfo, settings: Settings) -> list[tuple[str, str]]:
    """The screen's lines as (name, text)."""
    tokens = info.num_blocks * info.block_size
    return [
        ("model", f"{', '.join(settings.served_names)} ({info.architecture}, {count(info.num_parameters)} parameters)"),
        ("runs as", f"{info.layout} batch in {info.dtype} on {info.device}"),
        ("probe", info.layout_reason),
        ("weights", size(info.weight_bytes)),
        *([("quantization", info.quantization)] if info.quantization else []),
        *([("fusion", info.fusion)] if info.fusion else []),
        *([("deterministic", DETERMINISTIC)] if settings.deterministic else []),
        *([("CUDA graphs", graphs_line(info))] if info.device.startswith("cuda") else []),
        (
            "KV cache",
            f"{size(info.kv_cache_bytes)} in {info.kv_cache_dtype}: {info.num_blocks} blocks x {info.block_size} "
            f"tokens = {tokens} tokens, prefix caching {'on' if settings.enable_prefix_caching else 'off'}",
        ),
        (
            "limits",
            f"{info.max_model_len} tokens per request, {info.max_num_seqs} rows and {info.max_num_batched_tokens} "
            f"tokens per step, {settings.max_queued_requests} choices in flight",
        ),
        ("API workers", str(settings.num_api_workers)),
        ("chat", chat_line(info, settings)),
        ("sampling", sampling_defaults(info, settings)),
        ("access", access_line(settings)),
        *([("started in", started_line(info.start_seconds))] if info.start_seconds else []),
    ]


def started_line(seconds: dict[str, float]) -> str:
    """How long the engine's start took, and what took most of it: slow disks and cold compilers show here."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:STAGES_SHOWN]
    return f"{sum(seconds.values()):.1f} s: " + ", ".join(f"{stage} {took:.1f}" for stage, took in longest)


def graphs_line(info: ModelInfo) -> str:
    """Whether steps are replayed; a GPU that waits for Python at every step is slow, and should say why."""
    return "one per size of a step" if info.no_graphs is None else f"none, because {info.no_graphs}"


def chat_line(info: ModelInfo, settings: Settings) -> str:
    """Which chat template there is, and whether it is one."""
    path = Path(info.text_dir) / "chat_template.jinja"
    if not path.exists():
        return "no chat template: /v1/chat/completions refuses messages; --chat-template gives one"
    broken = ChatTemplate(path.read_text(encoding="utf-8"), {}).broken
    if broken:
        return f"the model's chat template is broken ({broken}); --chat-template gives another"
    return "the template of --chat-template" if settings.chat_template else "the model's own template"


def sampling_defaults(info: ModelInfo, settings: Settings) -> str:
    """What a request gets that says nothing: the model's generation_config.json over the protocol's own."""
    chosen = {"auto": [], "none": []}.get(settings.generation_config, [file_name(settings.generation_config)])
    names = [*chosen, *([DEFAULT_FILE] if settings.generation_config != "none" else [])]
    paths = [path for name in names if (path := Path(info.text_dir) / name).exists()]
    files: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    config: dict[str, Any] = {}
    for values in reversed(files.values()):
        config |= values
    shown = [f"{name} {config[name]}" for name in SAMPLING_DEFAULTS if config.get(name) is not None]
    left = not_done(config)
    text = f"{', '.join(shown)} ({', '.join(files)})" if shown else "temperature 1, top_p 1 (OpenAI's)"
    return text + (f"; not done yet: {', '.join(left)}" if left else "")


def access_line(settings: Settings) -> str:
    """Who may call."""
    if settings.has_keys:
        return "only with an API key (all routes but /health/*)"
    if settings.no_auth:
        return f"open to everybody who reaches {settings.host} (--no-auth)"
    return f"open, without a key, to this machine alone ({settings.host})"


def count(number: int) -> str:
    """3600000 -> "3.6 M"."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes for people: 1073741824 -> "1.0 GiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"
