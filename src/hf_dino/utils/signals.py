"""Signals that ask a run to stop, and DataLoader workers that outlive them."""

import os
import signal
import threading


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Sent by Ctrl-C, by job schedulers and preempted machines, and by Slurm's `--signal`."""


def ignore_stop_signals(worker_id: int) -> None:
    """Let a DataLoader worker outlive stop signals, which often go to all processes of a job: `worker_init_fn`.

    The parent process still needs batches to finish its step. Only a SIGTERM from the parent ends the worker: torch
    and `multiprocessing` would wait forever for one that ignores it. Where the sender cannot be determined (macOS,
    Windows), and in workers that are spawned rather than forked, SIGTERM may keep its effect.

    Args:
        worker_id (`int`): Not used.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)  # as torch's own handler: any other status would be reported as a crash
