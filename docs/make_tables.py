"""Writes the pages that follow from the code: `python docs/make_tables.py`. A test compares them with the code."""

from pathlib import Path

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


PAGES = {"flags.md": flags_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"docs/{name}")
