"""What may change a row's scores before its token is chosen, and end the row after it: grammars, processors, criteria.

Knows nothing of how they work. Each choice of a request has edits of its own, built in the engine process when the row
is added and again after a crash of the engine. A preemption does not touch them. So that a row's tokens depend on
nothing but the row, an edit must be a function of the ids it is given: it may keep what it computed of earlier ids, but
its first call may come with a long output.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ropeway.kernels.errors import MAX_ERROR, EditError

if TYPE_CHECKING:
    import torch


class RowEdit(Protocol):
    """One of a row's edits. Everything is called in the engine's thread, with the prompt and every output token read
    so far, unpadded; the list is the row's own, it must not be changed or kept."""

    @property
    def ready(self) -> bool:
        """Whether the row may join the batch. Asked before every step while it waits; must not wait itself."""
        ...

    def edit(self, token_ids: Sequence[int], scores: "torch.Tensor") -> None:
        """Changes scores [V] fp32 in place, on their device; -inf bans a token.

        Raises EditError, whose sentence the client gets, or anything else: the row ends with it."""
        ...

    def stop_reason(self, token_ids: Sequence[int]) -> str | None:
        """After each token: why the row ends with it, None to go on. Raises whatever it likes: the row ends with it."""
        ...


def stop_reason(edits: Sequence[RowEdit], token_ids: Sequence[int]) -> str | None:
    """The first reason among a row's edits; all of them are asked, since they see every token.

    Raises EditError if one of them raises."""
    try:
        reasons = [one.stop_reason(token_ids) for one in edits]
    except EditError:
        raise
    except Exception as error:
        message = f"Asking whether this request ends failed: {type(error).__name__}: {error}"
        raise EditError(message[:MAX_ERROR]) from error
    return next((reason for reason in reasons if reason is not None), None)
