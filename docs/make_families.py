"""Writes docs/families.md: `python docs/make_families.py`. A test runs the same and compares.

Every family of `tests/kernels/families.py` goes through the probe, and in the layout it gets through ragged steps that
are compared with the plain model. A page has bounds, not digits: a bound that the page states stays while it holds, so
that another machine's rounding changes nothing.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "families.md"
sys.path.append(str(DOCS.parent / "tests" / "kernels"))

from families import FAMILIES, REFUSED, VOCAB_SIZE, Family, build  # noqa: E402
from ragged_steps import (  # noqa: E402
    BLOCK_SIZE,
    LENGTHS,
    NUM_BLOCKS,
    batched_logits,
    largest_difference,
    plain_logits,
    token_rows,
)

from ropeway.kernels.errors import UnsupportedModel  # noqa: E402
from ropeway.kernels.kv_pool import KVPool  # noqa: E402
from ropeway.kernels.packed import PackedForward  # noqa: E402
from ropeway.kernels.padded import PaddedForward  # noqa: E402
from ropeway.kernels.probe import choose_layout  # noqa: E402

MAX_MODEL_LEN = 128
CHUNKS = (1, 1, 1, 2, 5, 9)

HEAD = """# Families

Ropeway runs the models of transformers as they are. Which layout of the batch serves a model is found out at every
start by running it (`kernels/probe.py`): packed where its attention goes through transformers' attention interface,
padded where it does not; what neither layout computes rightly is refused in one sentence. `ropeway check MODEL` says it
of any model. The families below are those that the tests hold to it, with tiny random models; one that is missing here
is tried like any other.

**Largest difference**: of any logit, in fp32 on a CPU, between rows that share a batch (they join at different steps,
in chunks of different sizes) and the same row alone in the plain model. With broken attention, positions or block
tables it is more than 0.01, which `tests/kernels/test_parity.py` shows of every packed and padded family.

| rotary embeddings | |
|---|---|
| default, linear, yarn, llama3 | as transformers computes them |
| dynamic, longrope | fixed at start by `--max-model-len`: a long request would else change its neighbours' text |

Encoder-decoder models are not served yet.
"""


@dataclass(slots=True, frozen=True)
class Verdict:
    """What one family came to."""

    name: str
    model_class: str
    layout: str
    """packed, padded or refused."""
    reason: str = ""
    """Why not packed, or why not at all."""
    difference: float = math.nan


def judge(name: str, family: Family) -> Verdict:
    """The probe's layout, and how far it is from the plain model."""
    model = build(family)
    kind = type(model).__name__
    try:
        choice = choose_layout(model, MAX_MODEL_LEN)
    except UnsupportedModel as error:
        reason = str(error).rstrip(".").partition(" cannot be batched")[2].lstrip(":, ")
        return Verdict(name, kind, "refused", reason)
    pool = KVPool(NUM_BLOCKS, BLOCK_SIZE, fill=math.nan)
    forward = (PackedForward if choice.layout == "packed" else PaddedForward)(model, pool)
    tokens = token_rows(LENGTHS, VOCAB_SIZE)
    difference = largest_difference(batched_logits(forward, tokens, CHUNKS), plain_logits(model, tokens))
    return Verdict(name, kind, choice.layout, choice.reason.partition("not packed, ")[2], difference)


def stated_bounds(page: str) -> dict[str, str]:
    """Family -> bound, as a page says it."""
    return dict(re.findall(r"^\| (\S+) \| `\w+` \| < (\S+) \|", page, re.MULTILINE))


def bound(verdict: Verdict, stated: dict[str, str]) -> str:
    """ "< 1e-5": the stated bound if it holds, else the power of ten beyond twice the difference."""
    known = stated.get(verdict.name, "0")
    if verdict.difference < float(known):
        return f"< {known}"
    power = max(math.ceil(math.log10(2 * verdict.difference)), -5)
    return f"< 1e{power}"


def families_page(stated: str) -> str:
    """docs/families.md.

    Args:
        stated: the page as it is ("" = there is none); a bound of its is kept if it holds.
    """
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = [judge(name, family) for name, family in sorted((FAMILIES | REFUSED).items())]
    old = stated_bounds(stated)
    lines = [HEAD]
    packed = [verdict for verdict in verdicts if verdict.layout == "packed"]
    lines += [f"## Packed ({len(packed)})", "", "| family | class | largest difference |", "|---|---|---|"]
    lines += [f"| {v.name} | `{v.model_class}` | {bound(v, old)} |" for v in packed]
    padded = [verdict for verdict in verdicts if verdict.layout == "padded"]
    lines += ["", f"## Padded ({len(padded)})", "", "| family | class | largest difference | not packed, |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {v.name} | `{v.model_class}` | {bound(v, old)} | {v.reason} |" for v in padded]
    refused = [verdict for verdict in verdicts if verdict.layout == "refused"]
    lines += ["", f"## Refused ({len(refused)})", "", "| family | class | cannot be batched |", "|---|---|---|"]
    lines += [f"| {v.name} | `{v.model_class}` | {v.reason} |" for v in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(families_page(PAGE.read_text() if PAGE.exists() else ""))
    print("docs/families.md")
