"""Writes the pages that follow from the code: `python docs/make_tables.py`. A test compares them with the code."""

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from ropeway.scheduler.engine_metrics import EngineMetrics, SupervisorMetrics
from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.server.metrics import RequestMetrics
from ropeway.server.settings import NOT_BUILT, Settings, env_name, flag_fields, flag_name

DOCS = Path(__file__).resolve().parent


def flags_page() -> str:
    """docs/flags.md: every flag of `ropeway serve`, by group."""
    lines = [
        "# Flags of `ropeway serve`",
        "",
        "A flag wins over its environment variable, that over the `--config FILE` (YAML, the same names), that",
        "over the default.",
    ]
    defaults = Settings()
    for group in dict.fromkeys(shown.group for _, shown in flag_fields()):
        lines += ["", f"## {group}", "", "| flag | default | variable | meaning |", "|---|---|---|---|"]
        for item, shown in flag_fields():
            if shown.group == group:
                name = "MODEL" if item.name == "model" else flag_name(item.name)
                default = getattr(defaults, item.name)
                text = (
                    ""
                    if default in (None, (), "")
                    else f"`{str(default).lower() if default in (True, False) else default}`"
                )
                lines.append(f"| `{name}` | {text} | `{env_name(item.name)}` | {shown.help} |")
    lines += ["", "## Refused", "", "Flags of other servers that are not built yet:", "", "| flag | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(NOT_BUILT.items())]
    return "\n".join(lines) + "\n"


def metric_rows() -> dict[str, str]:
    """Row of the table by name, as scraped, of every metric that a server exposes."""
    rows = {}
    makers = (RequestMetrics, EngineMetrics, SupervisorMetrics, ProcessMetrics)
    for make in makers:
        registry = CollectorRegistry()
        made = make("name", registry)
        assert made  # it holds the metrics
        for metric in list(registry._collector_to_names):
            assert isinstance(metric, MetricWrapperBase)
            name = metric._name + ("_total" if metric._type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            rows[name] = f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |"
    return rows


def metrics_page() -> str:
    """docs/metrics.md: every metric of `GET /metrics`."""
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` merges all processes of a server; it wants a key if the server has keys. A histogram `NAME` is",
        "scraped as `NAME_bucket`, `NAME_sum` and `NAME_count`. Alerts on these: `deploy/alerts.yml`.",
        "",
        "| name | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row for _, row in sorted(metric_rows().items()))]) + "\n"


PAGES = {"flags.md": flags_page, "metrics.md": metrics_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"docs/{name}")
