"""Takes connections from a listening socket that several processes share. Knows no HTTP.

Event loops accept until nothing is left, so of a burst the first process to wake up gets nearly all (59 of 64 with
four processes). This takes one per round of the loop: whoever is busy comes back later, and the others take the rest.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE_S = 0.5
"""Without accepting, when the process or the machine has no descriptor or buffer left."""
_log = logging.getLogger("ropeway.server")


class Acceptor:
    """Accepts until it is closed. Made and used in the running loop.

    Args:
        listener: bound and listening; not closed here.
        make_protocol: called once per connection.
    """

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make_protocol = make_protocol
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Takes no more. Idempotent."""
        self._loop.remove_reader(self._listener.fileno())
        if self._pause:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Every connection that was taken is in the hands of its protocol."""
        await asyncio.gather(*self._tasks)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was faster, or the client has left
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                raise
            _log.error("no connection can be taken: %s", error.strerror)
            self._loop.remove_reader(self._listener.fileno())
            self._pause = self._loop.call_later(PAUSE_S, self._listen)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._hand_over(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()  # it broke before it began
