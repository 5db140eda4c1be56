"""How a run ends early: by Ctrl-C or SIGTERM, a loss that is no number, a full disk. Nothing is lost.

pytest tests/train -k "signal or nan or disk"
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class TrainingStopped(Exception):  # noqa: N818 (a run that was asked to stop is no error)
    """A run ended early. The message is one sentence for the user: what happened, what is saved, what to do.

    ``exit_code`` is for the process: 1.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """While this context lasts, the first Ctrl-C or SIGTERM only sets ``name``; a second Ctrl-C interrupts at once.

    Signals can be caught in a process's main thread alone; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.name is not None

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
