"""Grammars that a request can ask for by name: Lark files beside this one. Knows files; compiles nothing.

They are our own, written from the languages' specifications and smaller than the languages, so that a text that follows
one is a text of the language, as far as a grammar can say: names that nobody declared are not its business.
"""

import re
from functools import cache
from pathlib import Path

NAMED_GRAMMARS = ("json", "sql", "python", "c", "java", "go")
"""`json` is no file: it is a schema that allows everything."""
LEVELS = 8
"""Levels of indentation of a language that has them."""
_EACH_LEVEL = "// each level\n"


@cache
def named_grammar(name: str) -> str:
    """The Lark text of a name other than `json`."""
    text = (Path(__file__).parent / "grammars" / f"{name}.lark").read_text("utf-8")
    rules, _, repeated = text.partition(_EACH_LEVEL)
    return rules + "".join(_level(repeated, level) for level in range(LEVELS)) if repeated else text


def _level(rules: str, level: int) -> str:
    """A level's rules. N stands for it, N+ for the next one; behind the last level there are no blocks."""
    if level == LEVELS - 1:
        rules = "stmt_N: INDENT_N simple END\n" + "".join(
            line for line in rules.splitlines(keepends=True) if line.startswith(("comment_N:", "block_N:"))
        )
    rules = rules.replace("_N+", f"_{level + 1}")
    rules = re.sub(r"INDENT_N ?", f'"{" " * 4 * level}" ' if level else "", rules)
    return rules.replace("_N", f"_{level}")
