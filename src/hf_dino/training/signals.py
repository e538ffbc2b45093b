"""Stop a run on a signal, at the end of a step and with nothing lost."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import NoReturn

from accelerate import Accelerator

from ..data.loaders import STOP_SIGNALS
from ..utils.distributed import all_reduce_max


# One press of Ctrl-C arrives twice: from the terminal, and from the launcher, which forwards it.
_DUPLICATE_SECONDS = 1.0


class StopSignals:
    """Record signals to stop instead of being interrupted by them, while the context lasts.

    A second signal, more than a second later, ends the process at once.

    Args:
        accelerator (`Accelerator`): The accelerator, whose processes all stop after the same step.

    Attributes:
        received (`int`): Number of the signal that was received, 0 if there was none.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self._since = 0.0
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            if self.accelerator.is_main_process:  # os.write, since the signal may have interrupted a print
                os.write(2, b"stopping after this step or evaluation; a second signal stops at once\n")
        elif now - self._since > _DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def should_stop(self) -> bool:
        """Return whether any process received a signal; called by every process after the same step."""
        self.received = all_reduce_max(self.accelerator, self.received)
        return self.received != 0

    def exit(self, message: str) -> NoReturn:
        """End the process with 128 plus the number of the signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1.

        Args:
            message (`str`): Printed after the name of the signal.

        Raises:
            SystemExit: Always, so that contexts are left and trackers write what they have.
        """
        self.accelerator.print(f"{signal.Signals(self.received).name}: {message}", flush=True)
        self.accelerator.end_training()
        raise SystemExit(128 + self.received)
