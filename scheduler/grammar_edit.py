"""A row whose tokens follow a grammar: masks of its scores, and its end. Knows ids and masks; compiles nothing itself.

    a token is read -> stop_reason: the matcher takes it, a thread begins the next mask -> plan, launch, forward
                    -> edit: the mask is there, or nearly -> sampler

So the masks of all rows are computed in parallel, beside whatever the engine and the device do. The state is a function
of the output ids: a preempted row goes on with its matcher, and a row that is added again after a crash feeds its
output to a new one.
"""

import math
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
from ropeway.scheduler.closing import LIKELIEST, Closing, NoEnd
from ropeway.scheduler.grammar import COMPILE_SECONDS, Grammars, InvalidGrammar, sentence
from ropeway.scheduler.row import Row

Bits = np.ndarray[Any, np.dtype[np.uint8]]


class GrammarBuilder:
    """build(args, row) -> the row's edit; one for all rows of an engine."""

    def __init__(self, grammars: Grammars, clock: Callable[[], float] = time.monotonic) -> None:
        self._grammars = grammars
        self._clock = clock
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mask")

    def __call__(self, args: dict[str, Any], row: Row) -> "GrammarEdit":
        compiled = self._grammars.compile(args["grammar"])
        letters = None if args.get("endings") is None else self._grammars.compile(args["grammar"], letters=True)
        edit = GrammarEdit(compiled, row, self._grammars, self._threads, self._clock)
        if letters is not None:
            edit.close_with(letters, args["endings"], args.get("end"))
        return edit


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
        self._max_length = row.max_length
        self._letters: Future[LLMatcher] | None = None
        self._endings: list[str] = []
        self._end: list[int] | None = None
        self._closing: Closing | None = None

    def close_with(self, letters: "Future[LLMatcher]", endings: list[str], end: list[int] | None) -> None:
        """The text is to be complete within the row's length; see `closing.py`. `end`: of the empty text, if known."""
        self._letters, self._endings, self._end = letters, endings, end

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled, or never will be."""
        done = self._compiled.done() and (self._letters is None or self._letters.done())
        return done or self._clock() > self._deadline

    def edit(self, token_ids: Sequence[int], scores: torch.Tensor) -> None:
        """Bans what the grammar does not allow next. Raises: EditError."""
        matcher = self._follow(token_ids)
        assert self._mask is not None
        try:
            packed = np.frombuffer(self._mask.result(), dtype=np.uint8).copy()
        except NoEnd as error:
            raise EditError(f"The answer cannot be completed: {error}.") from error
        if matcher.is_error():
            raise EditError(f"The grammar is too complex to go on: {sentence(matcher.get_error())}")
        if self._closing is not None:
            packed = self._fitting(self._closing, packed, scores, self._max_length - len(token_ids) - 1)
        self._allow_end(packed, matcher.is_accepting())
        if not packed.any():
            raise EditError("The grammar allows no further token, and nothing ends the answer.")
        scores.masked_fill_(banned(packed, len(scores), scores.device), -torch.inf)

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        """ "" once nothing may follow the last token. Raises: EditError."""
        if not self.ready or token_ids[-1] in self._stop_ids:
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
            last = self._closing is not None and len(token_ids) >= self._max_length
            self._complete = self._matcher.is_stopped() or (last and self._matcher.is_accepting())
            self._mask = self._threads.submit(self._prepare, self._matcher, new, self._max_length - self._taken)
        return self._matcher

    def _prepare(self, matcher: LLMatcher, new: list[int], left: int) -> bytes:
        """The mask behind the new tokens, behind which `left` more may come. In a thread."""
        if self._closing is not None:
            for place, token_id in enumerate(new, start=1):
                self._closing.take(token_id, left + len(new) - place)
        return matcher.compute_bitmask()

    def _begin(self) -> LLMatcher:
        if not (self._compiled.done() and (self._letters is None or self._letters.done())):
            raise EditError(f"Compiling the grammar took longer than {COMPILE_SECONDS:.0f} seconds.")
        try:
            matcher = self._compiled.result().deep_copy()
            if self._letters is not None:
                self._closing = Closing(self._grammars.alphabet, self._letters.result(), self._endings, self._end)
        except (InvalidGrammar, NoEnd) as error:
            raise EditError(f"The grammar cannot be honoured: {error}") from error
        special = self._grammars.tokenizer.is_special_token
        self._end_ids = [id for id in self._stop_ids if id < self._grammars.tokenizer.vocab_size and special(id)]
        return matcher

    def _fitting(self, closing: Closing, packed: Bits, scores: torch.Tensor, left: int) -> Bits:
        """Of the tokens allowed: those behind which an end is known within `left` tokens, among the likeliest."""
        allowed = scores.masked_fill(banned(packed, len(scores), scores.device), -torch.inf)
        best = allowed.topk(min(LIKELIEST, len(allowed)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        likeliest = [id for id, score in pairs if score > -math.inf]
        narrowed = np.zeros_like(packed)
        for id in closing.fitting(likeliest, left) + closing.end[:1]:
            narrowed[id // 8] |= 1 << id % 8
        return narrowed

    def _allow_end(self, packed: Bits, accepting: bool) -> None:
        """Sets the bits of the tokens that end the row. llguidance has set its own, which may be any special token."""
        own = self._grammars.tokenizer.eos_token
        if accepting:
            packed[own // 8] &= ~np.uint8(1 << own % 8)
            for id in self._end_ids:
                packed[id // 8] |= 1 << id % 8


def banned(packed: Bits, width: int, device: torch.device) -> torch.Tensor:
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
