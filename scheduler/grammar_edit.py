"""A row whose tokens follow a grammar: masks of its scores, and its end. Knows ids and masks; compiles nothing itself.

    a token is read -> stop_reason: the matcher takes it, a thread begins the next mask -> plan, launch, forward
                    -> edit: the mask is there, or nearly -> sampler

So the masks of all rows are computed in parallel, beside whatever the engine and the device do. The state is a function
of the output ids: a preempted row goes on with its matcher, and a row that is added again after a crash feeds its
output to a new one.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher

from ropeway.kernels.errors import EditError
from ropeway.kernels.triton_jit import upload
from ropeway.scheduler.grammar import COMPILE_SECONDS, Grammars, InvalidGrammar, sentence
from ropeway.scheduler.row import Row


class GrammarBuilder:
    """build(args, row) -> the row's edit; one for all rows of an engine."""

    def __init__(self, grammars: Grammars, clock: Callable[[], float] = time.monotonic) -> None:
        self._grammars = grammars
        self._clock = clock
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mask")

    def __call__(self, args: dict[str, Any], row: Row) -> "GrammarEdit":
        compiled = self._grammars.compile(args["grammar"])
        return GrammarEdit(compiled, row, self._grammars, self._threads, self._clock)


class GrammarEdit:
    """One row's matcher; see `row_edits.RowEdit`."""

    def __init__(
        self,
        compiled: "Future[LLMatcher]",
        row: Row,
        grammars: Grammars,
        threads: ThreadPoolExecutor,
        clock: Callable[[], float],
    ) -> None:
        self._compiled = compiled
        self._grammars = grammars
        self._threads = threads
        self._clock = clock
        self._deadline = clock() + COMPILE_SECONDS
        self._stop_ids = row.stop_ids
        self._end_ids: list[int] = []
        """Those of the stop tokens that are no text: allowed where the grammar lets the answer end."""
        self._taken = row.num_prompt
        """Tokens of the row that the matcher has seen; the prompt is not for it."""
        self._matcher: LLMatcher | None = None
        self._complete = False
        """Nothing may follow the tokens taken."""
        self._mask: Future[bytes] | None = None
        """Of the token after the last one taken."""

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled, or never will be."""
        return self._compiled.done() or self._clock() > self._deadline

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        """Bans what the grammar does not allow next. Raises: EditError."""
        matcher = self._follow(token_ids)
        assert self._mask is not None
        packed = np.frombuffer(self._mask.result(), dtype=np.uint8).copy()
        if matcher.is_error():
            raise EditError(f"The grammar is too complex to go on: {sentence(matcher.get_error())}")
        self._allow_end(packed, matcher.is_accepting())
        if not packed.any():
            raise EditError("The grammar allows no further token, and nothing ends the answer.")
        scores.masked_fill_(banned(packed, len(scores), scores.device), -torch.inf)

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        """ "" once nothing may follow the last token. Raises: EditError."""
        if not self._compiled.done() or token_ids[-1] in self._stop_ids:
            return None  # it has output of another engine, or it ends anyway
        self._follow(token_ids)
        return "" if self._complete else None

    def _follow(self, token_ids: Sequence[int]) -> LLMatcher:
        """The matcher after all of the row's output. A thread computes its mask: the matcher is that thread's until
        the mask is there."""
        if self._matcher is None:
            self._matcher = self._begin()
        new = list(token_ids[self._taken :])
        if new or self._mask is None:
            self._taken = len(token_ids)
            if new and not self._matcher.consume_tokens(new):
                raise EditError(f"The answer left its grammar: {sentence(self._matcher.get_error())}")
            self._complete = self._matcher.is_stopped()
            self._mask = self._threads.submit(self._matcher.compute_bitmask)
        return self._matcher

    def _begin(self) -> LLMatcher:
        if not self._compiled.done():
            raise EditError(f"Compiling the grammar took longer than {COMPILE_SECONDS:.0f} seconds.")
        try:
            matcher = self._compiled.result().deep_copy()
        except InvalidGrammar as error:
            raise EditError(f"The grammar cannot be honoured: {error}") from error
        special = self._grammars.tokenizer.is_special_token
        self._end_ids = [id for id in self._stop_ids if id < self._grammars.tokenizer.vocab_size and special(id)]
        return matcher

    def _allow_end(self, packed: np.ndarray[Any, np.dtype[np.uint8]], accepting: bool) -> None:
        """Sets the bits of the tokens that end the row. llguidance has set its own, which may be any special token."""
        own = self._grammars.tokenizer.eos_token
        if accepting:
            packed[own // 8] &= ~np.uint8(1 << own % 8)
            for id in self._end_ids:
                packed[id // 8] |= 1 << id % 8


def banned(packed: np.ndarray[Any, np.dtype[np.uint8]], width: int, device: torch.device) -> torch.Tensor:
    """Bits of what is allowed [ceil(width / 8) or more], lowest first -> [width] bool on the device, which is not
    waited for: only the bits travel."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, count=width, bitorder="little") == 0)
    return ~unpack(upload(torch.from_numpy(packed), device), width)


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Bits [ceil(width / 8) or more] uint8, lowest first -> [width] bool, on the same device."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    allowed: torch.Tensor = (packed.unsqueeze(1) >> bits & 1).view(-1)[:width].bool()
    return allowed
