"""What the routes share, made once per API worker. Knows who answers what; answers nothing itself."""

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ropeway.scheduler.messages import ModelInfo
from ropeway.server.admission import Admission, RejectReason
from ropeway.server.errors import ApiError
from ropeway.server.metrics import RequestMetrics, RequestRecord
from ropeway.server.settings import Settings

if TYPE_CHECKING:
    from ropeway.scheduler.client import EngineClient
    from ropeway.server.generator import Generator
    from ropeway.server.tokenizer import Tokenizer

UNREADY_RETRY_S = 5


@dataclass(slots=True)
class Services:
    """Handed to every `create_router(services)`. `worker.py` makes it and calls `load` when the engine is ready.

    A protocol's way through it:

        record = services.begin(request.scope, n)     # 503 unless ready; 503 when the queue is full
        try:
            ids = ...                                 # tokenize, validate
            record.settle(len(ids))                   # the real number of prompt tokens
            for delta in ...: record.observe(delta)   # once per wake-up and choice
        except ...: record.finish("error")            # also "disconnected", "timeout"
        finally: record.finish()                      # idempotent: the first outcome stays
    """

    settings: Settings
    client: "EngineClient"
    admission: Admission
    metrics: RequestMetrics
    created: int = 0
    """Unix seconds when the model was loaded."""
    tokenizer: "Tokenizer" = field(init=False)
    """Filled by `load`, like `generator`: use both only after `require_ready()`."""
    generator: "Generator" = field(init=False)

    @property
    def model_name(self) -> str:
        """The name in answers; `settings.served_names` has the others it listens to."""
        return self.settings.served_names[0]

    def require_ready(self) -> ModelInfo:
        """The model's facts, once tokens can come out.

        Raises: ApiError 503 `draining`, `loading` or `engine_restarting`, with Retry-After.
        """
        status = self.client.status
        if status.draining:
            raise self._unready("draining", "The server is shutting down; try again in a moment.")
        info = self.client.info
        if info is None or not self.created:
            done = f"{status.progress:.0%}"
            raise self._unready("loading", f"The model is still loading ({status.stage or status.phase}, {done}).")
        if status.phase == "dead":
            raise self._unready("engine_restarting", "The engine is being restarted; try again in a moment.")
        return info

    def check_model(self, name: str | None) -> None:
        """Raises: ApiError 404 `model_not_found` if a request names a model that is not served here ("" names none)."""
        if name and name not in self.settings.served_names:
            shown = name if len(name) <= 100 else name[:100] + "..."
            message = f"The model {shown!r} does not exist; this server has {', '.join(self.settings.served_names)}."
            raise ApiError(404, message, code="model_not_found", param="model")

    def begin(self, scope: MutableMapping[str, Any], n: int, prompt_tokens: int = 0) -> RequestRecord:
        """Admits a request of n choices; `prompt_tokens` is an upper bound, if one is known before tokenizing.

        Raises: ApiError 503 unless the server is ready and its queue has room.
        """
        self.require_ready()
        ticket = self.admission.reserve(n, prompt_tokens)
        return self.metrics.begin(scope, n, ticket)

    def _unready(self, reason: RejectReason, message: str) -> ApiError:
        self.metrics.rejected(reason)
        return ApiError(503, message, code=reason, headers={"Retry-After": str(UNREADY_RETRY_S)})


def key_id(scope: MutableMapping[str, Any]) -> str:
    """The caller's key as a short hash, "" on an open server: for fair share and the prefix cache's salt."""
    value: str = scope.get("state", {}).get("key_id", "")
    return value


def now() -> int:
    """Unix seconds, for `created`."""
    return int(time.time())
