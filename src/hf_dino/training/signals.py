"""Stop when asked to, at the end of a step and with nothing lost."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import NoReturn

from accelerate import Accelerator

from ..utils.distributed import all_reduce_max
from ..utils.signals import STOP_SIGNALS


# One press of Ctrl-C comes twice: from the terminal, and from the launcher, which passes it on.
_SECONDS_TO_THE_SECOND = 1.0


class StopSignals:
    """While its context lasts, a signal to stop does not interrupt but is kept, to be asked for between steps.

    A second signal, more than a second later, ends the process at once, as any signal does without this class.

    Args:
        accelerator (`Accelerator`): Knows the processes, which all stop after the same step.

    Attributes:
        received (`int`): Number of the signal that this process got, 0 as long as there was none.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        self._since = 0.0
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
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
            if self.accelerator.is_main_process:  # written by the system: a print may be what was interrupted
                os.write(2, b"stopping after this step or evaluation; a second signal stops at once\n")
        elif now - self._since > _SECONDS_TO_THE_SECOND:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def should_stop(self) -> bool:
        """Say whether any process was asked to stop; all processes have to ask, after the same step."""
        self.received = all_reduce_max(self.accelerator, self.received)
        return self.received != 0

    def leave(self, text: str) -> NoReturn:
        """End the process with the status that shells give to one that the signal ended: 130, 143, 138.

        Args:
            text (`str`): What to tell people, after the signal's name.

        Raises:
            SystemExit: Always, so that contexts are left and trackers write what they have.
        """
        self.accelerator.print(f"{signal.Signals(self.received).name}: {text}", flush=True)
        self.accelerator.end_training()
        raise SystemExit(128 + self.received)
