"""Writes the pages that follow from the code: `python docs/make_tables.py`. A test compares them with the code."""

import json
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from transformers import GenerationConfig

from ropeway.scheduler.engine_metrics import EngineMetrics, SupervisorMetrics
from ropeway.scheduler.process_metrics import ProcessMetrics
from ropeway.server.metrics import RequestMetrics
from ropeway.server.presets import DRAFTING, MEANINGLESS, SERVER_FLAGS
from ropeway.server.sampling_fields import UNBUILT, SamplingFields
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


def generation_rows() -> list[str]:
    """A row for each field of transformers' GenerationConfig."""
    rows = []
    for name in GenerationConfig().to_dict().keys() | {"_from_model_config"}:
        if name in SamplingFields.model_fields:
            place, text = "request field", SamplingFields.model_fields[name].description
        elif name in SERVER_FLAGS:
            place, text = "server flag", SERVER_FLAGS[name]
        elif name in MEANINGLESS:
            place, text = "changes nothing", MEANINGLESS[name]
        elif name in DRAFTING:
            place, text = "changes nothing", "makes `generate()` faster; the text is the same"
        else:
            values = ", ".join(f"`{json.dumps(value)}`" for value in UNBUILT[name])
            place, text = (
                "refused",
                "not supported yet" + (f"; {values} is accepted, which asks for nothing" * bool(values)),
            )
        rows.append(f"| `{name}` | {place} | {text} |")
    return sorted(rows)


def generation_page() -> str:
    """docs/generation.md: where each option of `generate()` is."""
    lines = [
        "# Options of `generate()`",
        "",
        "A request field goes into the body of `/v1/chat/completions` and `/v1/completions`, under this name, or into",
        "`generation_config`: an object, its JSON, or the name of a generation-config file in the model's folder",
        "(`translation_generation_config` for `translation_generation_config.json`).",
        "",
        "What a field means that is absent, highest first: the request's `generation_config`; the file named by",
        "`--generation-config NAME`; the model's `generation_config.json` (unless `--generation-config none`); the",
        "protocol: `/v1/*` samples at temperature 1, `/generate` is greedy. `temperature` above 0, `top_p`, `top_k`,",
        "`min_p`, `typical_p`, `top_h`, `epsilon_cutoff` or `eta_cutoff` mean sampling, unless `do_sample` says",
        "otherwise. A refused field is a 400 that names it.",
        "",
        "A file's `num_beams` yields to a request that asks for what no beam search can do (logprobs, a format, tools,",
        "a thinking budget, `guidance_scale`, penalties of frequency and presence, more answers than beams):",
        "`x-ignored-params` then says `generation_config.num_beams`.",
        "",
        "| field of `GenerationConfig` | here | |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *generation_rows()]) + "\n"


PAGES = {"flags.md": flags_page, "generation.md": generation_page, "metrics.md": metrics_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"docs/{name}")
