"""SIGTERM, by which schedulers of clusters announce that they take the machine back."""

import signal
import threading
from types import TracebackType


class Interrupted(SystemExit):
    """The run was asked to stop, and has saved what it had; ends the process like the signal would, by code 143."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """Remembers a SIGTERM that comes while it is entered, instead of dying of it."""

    def __init__(self):
        self.received = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere, as in a notebook's, the signal does what it always did.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, signum, frame):
        self.received = True


def ignore_in_worker(worker: int) -> None:
    """Leaves SIGTERM to the main process: clusters send it to a loader's workers too, which must serve on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
